"""`norms="keep"`: the plain architecture, with the norms that follow its convolutions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.block_insertion import overparameterize
from repnet.fold import reparameterize
from repnet.kernel import NotFoldableError
from repnet.layers import Sum, conv, conv_bn
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-12


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model).double()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def branches(channels: int = 4) -> Sum:
    """Return a block of branches with norms, so that its convolution has a bias."""
    return Sum(conv_bn(channels, channels), conv_bn(channels, channels, 1))


class Plain(nn.Module):
    """A network of convolutions and norms, whose first convolution may be a block."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = first, nn.BatchNorm2d(4)
        self.shortcut = conv_bn(4, 6, 1)
        self.conv2, self.bn2 = conv(4, 6, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return self.head((self.bn2(self.conv2(y)) + self.shortcut(x)).relu().mean((2, 3)))


def test_blocks_become_convolutions_and_siblings_stay(x: Tensor) -> None:
    model = ready(Plain(branches()))
    folded, report = reparameterize(model, x, norms="keep", return_report=True)
    assert type(folded) is Plain
    assert type(folded.conv1) is nn.Conv2d
    assert norms(folded) == report.left == ["bn1", "shortcut.bn", "bn2"]
    assert [fold.name for fold in report.folded] == ["conv1"]
    assert {report.skipped[name] for name in report.left} == {"norms='keep'"}
    assert report.proof is not None
    assert report.proof.max_relative_error < TOLERANCE
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_the_keys_are_those_of_the_plain_network(x: Tensor) -> None:
    folded = reparameterize(ready(Plain(branches())), x, norms="keep")
    plain = Plain(conv(4, 4, bias=False)).double()
    assert list(folded.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(folded.state_dict())
    assert relative_error(folded(x), plain.eval()(x)) < TOLERANCE


def test_a_plain_network_stays_as_it_is(x: Tensor) -> None:
    model = ready(Plain(conv(4, 4)))
    folded, report = reparameterize(model, x, norms="keep", return_report=True)
    assert report.folded == []
    torch.testing.assert_close(folded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("block", [branches, lambda: Sum(conv(4, 4), conv(4, 4, 1))])
def test_the_bias_moves_into_the_running_mean(block: Callable[[], nn.Module], x: Tensor) -> None:
    model = ready(Plain(block()))
    exact = reparameterize(model.conv1, x)
    folded = reparameterize(model, x, norms="keep")
    assert exact.bias.abs().max() > 0.1
    assert folded.conv1.bias is None
    torch.testing.assert_close(folded.bn1.running_mean, model.bn1.running_mean - exact.bias)
    for name in ("running_var", "weight", "bias"):
        expected = getattr(model.bn1, name)
        torch.testing.assert_close(getattr(folded.bn1, name), expected, rtol=0, atol=0)
    untouched = folded.bn1(exact(x))  # the bias counted twice
    assert relative_error(model.bn1(model.conv1(x)), untouched) > 1e-3


def test_a_convolution_that_had_a_bias_keeps_it(x: Tensor) -> None:
    model = ready(Plain(branches()))
    model.conv1.original_bias = True
    folded = reparameterize(model, x, norms="keep")
    assert folded.conv1.bias is not None
    torch.testing.assert_close(folded.bn1.running_mean, model.bn1.running_mean, rtol=0, atol=0)
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_without_a_norm_the_bias_stays(x: Tensor) -> None:
    model = ready(nn.Sequential(branches(), nn.ReLU()))
    folded = reparameterize(model, x, norms="keep")
    assert folded[0].bias is not None
    assert relative_error(model(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)])
def test_a_norm_without_a_running_mean_takes_no_bias(norm: nn.Module, x: Tensor) -> None:
    model = ready(nn.Sequential(branches(), norm, nn.ReLU()))
    folded = reparameterize(model, x, norms="keep")
    assert folded[0].bias is not None
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_a_block_with_two_users_keeps_its_bias(x: Tensor) -> None:
    class TwoUsers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.bn = branches(), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return self.bn(x).relu() + x

    model = ready(TwoUsers())
    folded = reparameterize(model, x, norms="keep")
    assert folded.block.bias is not None
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_a_second_time_changes_nothing(x: Tensor) -> None:
    once = reparameterize(ready(Plain(branches())), x, norms="keep")
    twice, report = reparameterize(once, x, norms="keep", return_report=True)
    assert report.folded == []
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)


def test_the_argument_is_not_changed(x: Tensor) -> None:
    model = ready(Plain(branches())).train()
    state = deepcopy(model.state_dict())
    reparameterize(model, x, norms="keep")
    assert model.training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_stays(dtype: torch.dtype, x: Tensor) -> None:
    folded = reparameterize(ready(Plain(branches())).to(dtype), x.to(dtype), norms="keep")
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} == {dtype}


def test_the_result_trains_and_its_norms_follow(x: Tensor) -> None:
    folded = reparameterize(ready(Plain(branches())), x, norms="keep").train()
    before = deepcopy(folded.state_dict())
    optimizer = torch.optim.SGD(folded.parameters(), lr=0.1)
    folded(x).square().sum().backward()
    optimizer.step()
    after = folded.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {"conv1.weight", "bn1.weight", "bn1.running_mean", "bn1.num_batches_tracked"} <= moved


def test_what_was_kept_is_absorbed_later(x: Tensor) -> None:
    model = ready(Plain(branches()))
    kept = reparameterize(model, x, norms="keep")
    absorbed, report = reparameterize(kept, x, return_report=True)
    assert norms(absorbed) == report.left == []
    assert relative_error(model(x), absorbed(x)) < TOLERANCE
    directly = reparameterize(model, x).state_dict()
    torch.testing.assert_close(absorbed.state_dict(), directly)


def test_what_was_overparameterized_has_its_old_keys(x: Tensor) -> None:
    plain = ready(Plain(conv(4, 4, bias=False)))
    wide = overparameterize(plain, block="dbb", where=lambda name, m: name == "conv1")
    folded = reparameterize(randomize_batch_norm(wide), x, norms="keep")
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert relative_error(wide(x), folded(x)) < TOLERANCE


def test_absorbed_norms_cannot_be_kept(x: Tensor) -> None:
    absorbed = reparameterize(ready(Plain(branches())), x)
    with pytest.raises(NotFoldableError, match="of this Plain were absorbed already"):
        reparameterize(absorbed, x, norms="keep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": "kept"}, "no norms='kept'"),
        ({"norms": None}, "no norms=None"),
        ({"method": "fx"}, "method='fx'"),
        ({"norms": "keep", "method": "graph"}, "norms='keep' needs modules"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str, x: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        reparameterize(ready(Plain(branches())), x, **options)
