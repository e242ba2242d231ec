"""`compare`: agreement is measured, and a difference is attributed to the block that makes it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import inf, isnan, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repnet.blocks import RepVGGBlock
from repnet.equivalence import BlockError, Equivalence, FoldMismatchError, Inputs, compare
from repnet.fold import reparameterize
from tests.models import randomize_batch_norm

NAMES = ["0.conv", "1.conv", "2.conv"]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4, 6, 6, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    blocks = (RepVGGBlock(4, 4) for _ in NAMES)
    return randomize_batch_norm(nn.Sequential(*blocks, nn.Conv2d(4, 3, 6), nn.Flatten())).double()


@pytest.fixture
def folded(model: nn.Module, x: Tensor) -> nn.Module:
    return reparameterize(model, x)


class Constant(nn.Module):
    """Returns what it was given, whatever the input is."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def test_a_model_agrees_with_itself(model: nn.Module, x: Tensor) -> None:
    assert compare(model, deepcopy(model), x) == Equivalence(4, 0.0, 0.0, 1.0, ())


def test_blocks_are_listed_in_the_order_of_execution(
    model: nn.Module, folded: nn.Module, x: Tensor
) -> None:
    result = compare(model, folded, x)
    assert [block.name for block in result.blocks] == NAMES
    assert result.max_relative_error < 1e-12
    assert result.first_difference(1e-12) is None
    result.check(1e-12, 1e-12)


class OwnConv2d(nn.Conv2d):
    """As many libraries have it: a subclass that computes the same."""


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)],
        lambda: [OwnConv2d(4, 4, 3), nn.BatchNorm2d(4)],
        lambda: [nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4))],
        lambda: [nn.Sequential(nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4))],
    ],
    ids=["siblings", "siblings of another class", "padding in front", "padding of a block"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_no_block_of_a_right_fold_is_blamed(
    layers: Callable[[], list[nn.Module]], x: Tensor
) -> None:
    model = randomize_batch_norm(nn.Sequential(*layers(), nn.ReLU())).double()
    result = compare(model, reparameterize(model, x), x)
    assert len(result.blocks) == 1
    assert result.first_difference(1e-12) is None


@torch.no_grad()
@pytest.mark.parametrize("wrong", range(3))
def test_only_the_wrong_block_has_an_error(
    wrong: int, model: nn.Module, folded: nn.Module, x: Tensor
) -> None:
    folded[wrong].conv.weight[:, :, 1, 1] += 1e-3
    result = compare(model, folded, x)
    assert [b.name for b in result.blocks if b.relative_error > 1e-12] == [NAMES[wrong]]
    assert result.first_difference(1e-9) == result.blocks[wrong]
    with pytest.raises(FoldMismatchError, match=f"block '{NAMES[wrong]}' differs") as caught:
        result.check(1e-9, inf)
    assert caught.value.block == NAMES[wrong]


@torch.no_grad()
def test_a_difference_outside_the_blocks_is_not_blamed_on_one(
    model: nn.Module, folded: nn.Module, x: Tensor
) -> None:
    folded[3].weight.mul_(2)
    result = compare(model, folded, x)
    assert result.first_difference(1e-12) is None
    with pytest.raises(FoldMismatchError, match="something outside them changed") as caught:
        result.check(1e-9, 1e-6)
    assert caught.value.block is None


@torch.no_grad()
def test_nan_never_passes(model: nn.Module, folded: nn.Module, x: Tensor) -> None:
    folded[1].conv.bias[2] = nan
    result = compare(model, folded, [x, x])
    assert isnan(result.max_relative_error)
    assert result.first_difference(inf) == result.blocks[1]
    with pytest.raises(FoldMismatchError, match="1.conv"):
        result.check(inf, inf)


@pytest.mark.parametrize("values", [(nan, nan), (nan, 1.0), (1.0, nan), (inf, inf), (0.0, 1e-9)])
def test_what_cannot_be_measured_does_not_pass(values: tuple[float, float], x: Tensor) -> None:
    expected, actual = (Constant(torch.full((4, 2), value)) for value in values)
    result = compare(expected, actual, [x])
    with pytest.raises(FoldMismatchError):
        result.check(1.0, 1.0)


def test_a_nan_in_one_batch_is_not_forgotten_in_the_next(x: Tensor) -> None:
    outputs = [torch.ones(4, 2), torch.full((4, 2), nan), torch.ones(4, 2)]
    result = compare(nn.Identity(), nn.Identity(), outputs)
    assert isnan(result.max_error)
    assert isnan(result.max_relative_error)


def test_agreement_counts_samples_with_the_same_argmax(x: Tensor) -> None:
    expected, actual = torch.eye(4), torch.eye(4)
    actual[1] = actual[1].roll(1)
    assert compare(Constant(expected), Constant(actual), [x]).agreement == 3 / 4
    assert compare(Constant(expected), Constant(actual), [x, x]).samples == 8


def test_every_position_of_a_map_must_agree(x: Tensor) -> None:
    expected = torch.randn(4, 3, 5, 5)
    actual = expected.clone()
    actual[2, :, 4, 4] = actual[2, :, 4, 4].roll(1)
    assert compare(Constant(expected), Constant(actual), [x]).agreement == 3 / 4


def test_the_error_is_relative_to_the_largest_value(x: Tensor) -> None:
    expected = torch.tensor([[1.0, -8.0]])
    result = compare(Constant(expected), Constant(expected + torch.tensor([2.0, 0.0])), [x])
    assert result.max_error == 2
    assert result.max_relative_error == 0.25


def test_a_tensor_that_is_zero_but_for_rounding_has_no_scale_of_its_own(x: Tensor) -> None:
    outputs = ([torch.ones(4, 2), torch.full((4, 2), value)] for value in (1e-17, 2e-17))
    expected, actual = map(Constant, outputs)
    assert compare(expected, actual, x).max_relative_error < 1e-9


@pytest.mark.parametrize(
    "actual",
    [torch.ones(4, 3), torch.ones(4), [torch.ones(4, 2)] * 2, [], torch.ones(4, 2, 1)],
    ids=["channels", "dimensions", "number", "none", "trailing dimension"],
)
def test_another_shape_is_an_infinite_error(actual: Any, x: Tensor) -> None:
    result = compare(Constant(torch.ones(4, 2)), Constant(actual), [x])
    assert result.max_error == result.max_relative_error == inf
    assert result.samples == 4


def test_samples_of_another_shape_do_not_agree(x: Tensor) -> None:
    result = compare(Constant(torch.ones(4, 2)), Constant(torch.ones(4, 3)), [x])
    assert result.agreement == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: [(x, torch.zeros(4))],
        lambda x: [[x, torch.zeros(4)]],
        lambda x: (x for _ in range(1)),
        lambda x: [Inputs((x,))],
        lambda x: [Inputs(kwargs={"input": x})],
        lambda x: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, torch.zeros(4)), batch_size=3
        ),
    ],
    ids=["tensor", "list", "pairs", "lists", "generator", "arguments", "keywords", "loader"],
)
def test_batches_of_any_form(
    wrap: Callable[[Tensor], Any], model: nn.Module, folded: nn.Module, x: Tensor
) -> None:
    result = compare(model, folded, wrap(x))
    assert result.samples == 4
    assert result.agreement == 1
    assert [block.name for block in result.blocks] == NAMES


@pytest.mark.parametrize("batches", [[], [("no tensor", None)]])
def test_nothing_to_compare_is_an_error(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(nn.Identity(), nn.Identity(), batches)


def test_the_evaluation_is_compared_and_training_flags_come_back(
    model: nn.Module, folded: nn.Module, x: Tensor
) -> None:
    model.train()
    model[0].conv[0].bn.eval()
    folded.train()
    flags = [module.training for module in model.modules()]
    state = deepcopy(model.state_dict())
    assert compare(model, folded, x).max_relative_error < 1e-12
    assert [module.training for module in model.modules()] == flags
    assert all(module.training for module in folded.modules())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        compare(model, folded, torch.randn(4, 9, 6, 6, dtype=torch.float64))
    assert [module.training for module in model.modules()] == flags


def test_no_hook_is_left_behind(model: nn.Module, folded: nn.Module, x: Tensor) -> None:
    compare(model, folded, x)
    with pytest.raises(RuntimeError):
        compare(model, folded, torch.randn(4, 9, 6, 6, dtype=torch.float64))
    for module in (*model.modules(), *folded.modules()):
        assert not module._forward_hooks


class Repeated(nn.Module):
    """Runs its block `times` times."""

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.block, self.times = block, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.block(x)
        return x


def test_a_block_that_runs_several_times_is_compared_each_time(x: Tensor) -> None:
    model = Repeated(randomize_batch_norm(RepVGGBlock(4, 4)).double(), 3)
    folded = reparameterize(model, x)
    assert [block.name for block in compare(model, folded, x).blocks] == ["block.conv"]
    folded.times = 4
    (block,) = compare(model, folded, x).blocks
    assert block.relative_error == inf


def test_a_block_that_runs_less_often_is_an_infinite_error(x: Tensor) -> None:
    model = Repeated(randomize_batch_norm(RepVGGBlock(4, 4)).double(), 3)
    folded = reparameterize(model, x)
    folded.times = 2
    (block,) = compare(model, folded, x).blocks
    assert block.relative_error == inf


class OnePathPerSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = RepVGGBlock(4, 4), RepVGGBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x) if x.shape[2] < 5 else self.large(x)


@torch.no_grad()
def test_a_block_that_runs_in_a_later_batch_only_is_compared(x: Tensor) -> None:
    model = randomize_batch_norm(OnePathPerSize()).double()
    folded = deepcopy(model)
    for block in (folded.small, folded.large):
        block.conv = reparameterize(block.conv, x)
    folded.large.conv.weight.mul_(1.5)
    result = compare(model, folded, [x[:, :, :4], x])
    assert [block.name for block in result.blocks] == ["small.conv", "large.conv"]
    assert result.first_difference(1e-9) == result.blocks[1]


def test_the_whole_model_can_be_the_block(x: Tensor) -> None:
    model = randomize_batch_norm(RepVGGBlock(4, 4)).double().conv
    result = compare(model, reparameterize(model, x), x)
    assert result.blocks == (BlockError("Sum", result.blocks[0].relative_error),)
    assert result.blocks[0].relative_error < 1e-12


class Normalizing(nn.Module):
    """Changes its input in place, as some models' preprocessing does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(1)


def test_each_model_gets_the_batch_as_it_was(x: Tensor) -> None:
    before = x.clone()
    assert compare(Normalizing(), Normalizing(), x).max_error == 0
    torch.testing.assert_close(x, before, rtol=0, atol=0)


class Detector(nn.Module):
    """Returns boxes of one image, here none, as detectors do where they find nothing."""

    def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"boxes": x.new_zeros(0, 4), "scores": x.new_zeros(0)}]


def test_outputs_may_be_empty():
    result = compare(Detector(), Detector(), torch.zeros(1, 3, 8, 8))
    assert (result.samples, result.agreement, result.max_relative_error) == (1, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_limits_follow_the_dtype(dtype: torch.dtype, model: nn.Module, x: Tensor) -> None:
    model, x = model.to(dtype), x.to(dtype)
    folded = reparameterize(model, x)
    result = compare(model, folded, x)
    assert result.dtype == dtype
    result.check()
    folded[1].conv.weight.data[0, 0, 1, 1] += 1
    with pytest.raises(FoldMismatchError, match=r"1\.conv"):
        compare(model, folded, x).check()


def test_a_tensor_in_the_place_of_a_tuple_differs() -> None:
    class InTuple(nn.Identity):
        def forward(self, x: Tensor) -> Any:
            return (x,)

    assert compare(InTuple(), nn.Identity(), torch.ones(2, 3), names=[]).max_error == float("inf")
