"""Warnings before norms are frozen and weights rounded; proofs where outputs jump."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor, nn

from repnet.equivalence import FoldMismatchError, compare
from repnet.fold import reparameterize
from repnet.health import norm_health, weight_health
from repnet.layers import conv, conv_bn
from tests.models import randomize_batch_norm, relative_error


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8)


@pytest.fixture
def model() -> nn.Sequential:
    layers = (conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4))
    return randomize_batch_norm(nn.Sequential(*layers))


def test_healthy_norms_have_no_warning(model: nn.Module) -> None:
    assert norm_health(model) == []


def test_a_norm_that_never_saw_a_batch_is_named(model: nn.Sequential) -> None:
    model[2].bn.reset_running_stats()
    (warning,) = norm_health(model)
    assert warning.startswith("1 have the statistics of a norm that never saw a batch")
    assert warning.endswith(": 2.bn")


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite_are_named(
    value: float, statistic: str, model: nn.Sequential
) -> None:
    getattr(model[4].bn, statistic)[1] = value
    (warning,) = norm_health(model)
    assert "not finite: 4.bn" in warning


def test_a_channel_without_variance_is_named(model: nn.Sequential) -> None:
    model[0].bn.running_var[3] = 1e-7
    (warning,) = norm_health(model)
    assert "variance below eps" in warning
    assert warning.endswith(": 0.bn")


def test_one_sentence_for_each_kind_of_trouble(model: nn.Sequential) -> None:
    model[0].bn.running_mean[0] = nan
    model[2].bn.reset_running_stats()
    model[4].bn.running_var[0] = 0
    assert [w.partition(": ")[2] for w in norm_health(model)] == ["0.bn", "2.bn", "4.bn"]


def test_long_lists_are_cut() -> None:
    norms = nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(8)))
    (warning,) = norm_health(norms)
    assert warning.endswith(": 0, 1, 2, 3, 4 and 3 more")
    assert warning.startswith("8 have")


def test_the_model_itself_may_be_the_norm() -> None:
    (warning,) = norm_health(nn.BatchNorm2d(4))
    assert warning.endswith(": the model itself")


def test_norms_without_statistics_have_none_to_warn_of() -> None:
    layers = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4))
    assert norm_health(layers) == []


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        (1.0, 1.0, []),
        (5000.0, 1.0, ["large"]),
        (-70000.0, 1.0, ["large"]),
        (1.0, -9000.0, ["large"]),
        (1e-6, 1.0, ["small"]),
        (0.0, 0.0, []),
        (1.0, 1e-7, []),
        (1e-6, 1e6, ["large", "small"]),
    ],
)
def test_weights_at_the_limits_of_float16(weight: float, bias: float, expected: list[str]) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
    nn.init.constant_(model[1].weight, weight)
    nn.init.constant_(model[1].bias, bias)
    warnings = weight_health(model, [model[1]])
    assert ["large" if "large" in w else "small" for w in warnings] == expected
    assert all(": 1." in w for w in warnings)


def test_layers_that_were_not_folded_are_not_weighed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    nn.init.constant_(model[0].weight, 1e6)
    assert weight_health(model, []) == []


@pytest.mark.parametrize("method", ["modules", "graph"])
def test_warnings_are_in_the_report(method: str, model: nn.Sequential, x: Tensor) -> None:
    model[0].bn.reset_running_stats()
    nn.init.constant_(model[2].bn.weight, 1e6)
    report = reparameterize(model, x, method=method, return_report=True)[1]
    assert len(report.health) == 2
    assert "0.bn" in report.health[0]
    assert "2" in report.health[1].partition(": ")[2]
    assert "float16" in report.health[1]
    for warning in report.health:
        assert f"warning: {warning}" in str(report)


def test_no_report_without_trouble_has_warnings(model: nn.Sequential, x: Tensor) -> None:
    report = reparameterize(model, x, return_report=True)[1]
    assert report.health == []
    assert "warning" not in str(report)


# Outputs that jump


class Ranking(nn.Module):
    """Returns positions in the order of scores that are equal but for rounding, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        # In exact arithmetic every score is zero.
        scores = features.flatten(2).sum(1) - features.flatten(2).flip(1).sum(1)
        order = scores.argsort(dim=1)
        boxes = torch.arange(order.shape[1], dtype=x.dtype).expand_as(scores)
        return {"boxes": boxes.gather(1, order), "features": features}


def test_scores_that_tie_do_not_look_like_a_wrong_fold() -> None:
    model = randomize_batch_norm(Ranking()).double()
    x = torch.randn(2, 4, 30, 30, dtype=torch.float64)
    report = reparameterize(model, x, return_report=True)[1]
    assert report.left == []
    assert report.proof is not None
    assert report.proof.max_relative_error > 1e-3  # the order differs
    assert report.proof.rest_error == 0  # but not if the blocks return the same
    assert all(block.relative_error < 1e-12 for block in report.proof.blocks)


def test_what_the_rest_adds_is_still_an_error(model: nn.Sequential, x: Tensor) -> None:
    model, x = model.append(nn.Hardtanh(-1, 1)).double(), x.double()
    folded = reparameterize(model, x)
    assert compare(model, folded, x).rest_error == 0
    folded[5].max_val = 0.5
    result = compare(model, folded, x)
    assert all(block.relative_error < 1e-12 for block in result.blocks)
    assert result.rest_error == pytest.approx(relative_error(model(x), model(x).clamp(max=0.5)))
    with pytest.raises(FoldMismatchError, match="something outside them changed"):
        result.check(1e-9, 1e-6)


def test_without_blocks_the_whole_difference_counts() -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    result = compare(first, second, torch.randn(2, 4, 3, 3))
    assert result.blocks == ()
    assert result.max_relative_error > 0.1
    with pytest.raises(FoldMismatchError, match="the outputs differ"):
        result.check(1e-9, 1e-6)
