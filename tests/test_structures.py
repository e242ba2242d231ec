"""The default call of `reparameterize` on networks in the idioms of public ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import repnet
from tests.models import randomize_batch_norm, relative_error
from tests.runs import assert_outputs_agree, count_calls
from tests.structures import STRUCTURES, Structure

TOLERANCE = 1e-9

# What no convolution takes in, so that it is found where it was.
KEPT = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.MaxPool2d,
        nn.LayerNorm, nn.MultiheadAttention)  # fmt: skip


class Folding(NamedTuple):
    structure: Structure
    model: nn.Module
    folded: nn.Module
    report: repnet.FoldReport
    example: Tensor
    other: Tensor  # of another batch and size
    changes: list[str]  # of the argument


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by all of their names."""
    return dict(model.named_modules(remove_duplicate=False))


def norms(model: nn.Module) -> set[str]:
    return {name for name, module in modules(model).items() if isinstance(module, _BatchNorm)}


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Return everything that a fold might change: tensors, classes, flags, plain attributes."""
    state: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    for name, module in modules(model).items():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        state[f"{name}:"] = (id(module), type(module), repr(attributes))
    return state


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


@pytest.fixture(scope="module", params=STRUCTURES)
def folding(request: pytest.FixtureRequest) -> Folding:
    torch.manual_seed(0)
    structure = STRUCTURES[request.param]
    model: Any = randomize_batch_norm(structure.build()).double()
    for name, module in modules(model).items():
        module.tag = f"tag of '{name}'"  # type: ignore[assignment]
    example, other = (torch.randn(size, dtype=torch.float64) for size in structure.sizes)
    before = plain_state(model)
    folded, report = repnet.reparameterize(model, example, return_report=True)
    after = plain_state(model)
    changes = [key for key in before | after if not same(before.get(key), after.get(key))]
    return Folding(structure, model, folded, report, example, other, changes)


@torch.no_grad()
def test_the_network_looks_at_its_input(folding: Folding) -> None:
    first, second = (
        [t for t in tree_leaves(folding.model(x)) if isinstance(t, Tensor)]
        for x in (folding.example, folding.example + 1)
    )
    assert all(relative_error(a, b) > 1e4 * TOLERANCE for a, b in zip(first, second, strict=True))


def test_no_norm_is_left(folding: Folding) -> None:
    assert count_calls(folding.model, folding.example)["norms"] >= 10
    left = norms(folding.folded)
    assert left <= set(folding.structure.left)
    assert set(folding.report.left) == left
    assert left <= set(folding.report.skipped)
    for x in (folding.example, folding.other):
        assert count_calls(folding.folded, x)["norms"] <= len(left)


def test_a_pass_calls_no_more_layers_than_after_the_converter_of_the_authors(
    folding: Folding,
) -> None:
    for x in (folding.example, folding.other):
        assert count_calls(folding.folded, x)["layers"] <= folding.structure.layers


def test_there_are_no_more_parameters(folding: Folding) -> None:
    before, after = (
        sum(p.numel() for p in model.parameters()) for model in (folding.model, folding.folded)
    )
    assert after <= before


@torch.no_grad()
def test_the_outputs_agree(folding: Folding) -> None:
    # The example once more: what a forward keeps of one size must not stay for another.
    for x in (folding.example, folding.other, folding.example):
        assert_outputs_agree(folding.model(x), folding.folded(x), TOLERANCE)


def test_what_is_not_replaced_keeps_its_class_and_name(folding: Folding) -> None:
    before, after = modules(folding.model), modules(folding.folded)
    assert type(folding.folded) is type(folding.model)
    for name, module in before.items():
        if isinstance(module, KEPT):
            assert type(after.get(name)) is type(module), name
            replaced = False
            for i in range(name.count(".") + 1):
                outer = ".".join(name.split(".")[:i])
                replaced = replaced or isinstance(before[outer], folding.structure.blocks)
                assert replaced or type(after.get(outer)) is type(before[outer]), outer
    owners = {key.rpartition(".")[0] for key in folding.folded.state_dict()}
    assert owners <= set(before)


def test_attributes_of_others_remain(folding: Folding) -> None:
    before = modules(folding.model)
    for name, module in modules(folding.folded).items():
        known = before.get(name)
        if known is not None and (
            not list(module.children()) or isinstance(known, folding.structure.blocks)
        ):
            assert getattr(module, "tag", None) == known.tag, name


def test_a_second_time_changes_nothing(folding: Folding) -> None:
    twice, report = repnet.reparameterize(folding.folded, folding.example, return_report=True)
    assert report.folded == []
    before, after = modules(folding.folded), modules(twice)
    assert {n: type(m).__name__ for n, m in after.items()} == {
        n: type(m).__name__ for n, m in before.items()
    }
    torch.testing.assert_close(twice.state_dict(), folding.folded.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_the_result_can_be_copied_and_loaded(folding: Folding) -> None:
    copy = deepcopy(folding.folded)
    for tensor in copy.state_dict().values():
        tensor.zero_()
    copy.load_state_dict(folding.folded.state_dict())
    assert_outputs_agree(folding.model(folding.other), copy(folding.other), TOLERANCE)
    assert list(copy.state_dict()) == list(folding.folded.state_dict())


def test_the_argument_is_not_changed(folding: Folding) -> None:
    assert folding.changes == []
