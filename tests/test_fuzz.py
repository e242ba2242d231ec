from __future__ import annotations

import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from repnet import symbolic
from repnet.kernel import ConvKernel, NotFoldableError
from repnet.layers import Sum

path = Path(__file__).parents[1] / "benchmarks" / "fuzz_fold.py"
spec = spec_from_file_location("fuzz_fold", path)
assert spec is not None
assert spec.loader is not None
fuzz: Any = module_from_spec(spec)
# Dataclasses look their module up by name.
sys.modules["fuzz_fold"] = fuzz
spec.loader.exec_module(fuzz)


def kinds(blocks: int) -> Counter[str]:
    return Counter(fuzz.check(seed=0, index=index).kind for index in range(blocks))


def test_random_blocks_fold_exactly_or_are_refused() -> None:
    outcomes = [fuzz.check(seed=0, index=index) for index in range(200)]
    assert [o for o in outcomes if o.kind == "failure"] == []
    counts = Counter(o.kind for o in outcomes)
    assert counts["folded"] > 100
    assert counts["refused"] > 20
    assert counts["not run"] + counts["undecided"] < 20
    assert 0 < max(o.error for o in outcomes) < fuzz.FOLD_TOLERANCE


def test_the_same_seed_draws_the_same_block() -> None:
    (first, _), (again, _), (other, _) = (fuzz.draw(0, 5), fuzz.draw(0, 5), fuzz.draw(1, 5))
    assert str(first) == str(again) != str(other)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_a_wrong_sign_in_the_batch_norm_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = symbolic.RULES[functional.batch_norm]

    def wrong(x: Any, mean: Any, *args: Any, **kwargs: Any) -> Any:
        return rule(x, None if mean is None else -mean, *args, **kwargs)

    monkeypatch.setitem(symbolic.RULES, functional.batch_norm, wrong)
    assert kinds(30)["failure"] > 5


def test_an_ignored_border_law_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConvKernel, "_check_border", lambda self, other: None)
    assert kinds(60)["failure"] > 5


def test_a_crash_of_the_fold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> Any:
        raise IndexError("of the fold itself")

    monkeypatch.setattr(fuzz, "kernel_of", crash)
    outcome = fuzz.check(seed=0, index=0)
    assert (outcome.kind, outcome.reason) == ("failure", "IndexError: of the fold itself")


def test_a_needless_refusal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise NotFoldableError("for no reason")

    monkeypatch.setattr(fuzz, "kernel_of", refuse)
    assert kinds(30)["over-refused"] > 15


class Slope(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[3])


class Even(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, : x.shape[2] // 2 * 2]


# What the oracle must tell apart without any rule.
ONE_CONVOLUTION = [
    nn.Conv2d(3, 4, (2, 3), stride=(2, 3), padding=(0, 2), dilation=2),
    nn.ConvTranspose2d(3, 2, 3, stride=(2, 1), padding=1, output_padding=(1, 0)),
    nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AvgPool2d(3, 2, 1)),
    nn.Sequential(nn.ConvTranspose2d(3, 3, 2, stride=4), nn.AvgPool2d(2, stride=2)),
    nn.Upsample(scale_factor=3),
    nn.Sequential(nn.ZeroPad2d((-2, 1, 3, 0)), nn.BatchNorm2d(3, affine=False)),
    Sum(nn.Identity(), nn.Conv2d(3, 3, 3, padding="same")),
]
NOT_ONE_CONVOLUTION = [
    nn.ReLU(),
    nn.GroupNorm(1, 3),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d(5),
    Slope(),
    Even(),
    nn.ReplicationPad2d(1),
    nn.ConstantPad2d(1, 0.5),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)),
    nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, padding=1, bias=False)),
    nn.Upsample(scale_factor=2, mode="bilinear"),
]


@pytest.mark.parametrize(
    ("module", "expected"),
    [*((m, True) for m in ONE_CONVOLUTION), *((m, False) for m in NOT_ONE_CONVOLUTION)],
    ids=str,
)
def test_the_oracle_needs_no_rule(module: nn.Module, expected: bool) -> None:
    block = fuzz.randomize(module).double()
    with fuzz.in_float64():
        images = [torch.randn(2, 3, *size) for size in fuzz.SIZES]
        assert fuzz.Oracle(block, 3).finds(images) is expected
