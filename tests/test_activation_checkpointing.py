"""Activation checkpointing: the same gradients and buffers, fewer saved tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrizations import spectral_norm

from repnet.blocks import Block
from repnet.errors import InputError
from repnet.fold import reparameterize
from repnet.models import create_model
from repnet.training import checkpoint_activations
from tests.models import randomize_batch_norm, relative_error

IMAGES = (4, 3, 16, 16)


def step(model: nn.Module, images: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(images)
    output.square().sum().backward()
    return output


def assert_same(plain: nn.Module, checkpointed: nn.Module) -> None:
    other = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, other[name].grad), name
    state = checkpointed.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name]), name


def pair(where: Any = "stages.*", name: str = "resnet20", **options: Any) -> tuple[Any, Any]:
    sizes = {"depths": [1, 2], "strides": [1, 1, 1, 2], "width": 4} if name == "resnet20" else {}
    options = {"num_classes": 3, **sizes, **options}
    plain = randomize_batch_norm(create_model(name, **options)).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed, where)
    return plain, checkpointed


@pytest.mark.parametrize("where", ["stages.*", "stem", Block, ["stages.0", "stages.1.?"]])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet20", {"drop_path": 0.5, "dropout": 0.5, "block": "dbb"}),
        ("repvgg_tiny", {"widths": [0.1] * 4, "dropout": 0.5}),
    ],
)
def test_gradients_and_buffers_are_those_of_the_plain_model(
    name: str, options: dict[str, Any], where: Any
) -> None:
    if name == "repvgg_tiny" and where == "stem":
        where = ["s*"]  # a stage's `Sequential`, and the stem
    plain, checkpointed = pair(where, name, **options)
    images = torch.randn(IMAGES, dtype=torch.float64)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    for seed in range(2):
        outputs = [step(model, images, seed) for model in (plain, checkpointed)]
        assert torch.equal(*outputs)
        assert_same(plain, checkpointed)
    moved = [key for key in before if not torch.equal(before[key], plain.state_dict()[key])]
    assert any(key.endswith("running_mean") for key in moved)
    counters = [v for k, v in checkpointed.state_dict().items() if k.endswith("tracked")]
    assert {int(counter) for counter in counters} == {2}


@pytest.mark.parametrize("momentum", [0.1, None], ids=["average", "cumulative"])
def test_buffers_that_the_output_depends_on_are_those_of_the_first_pass(
    momentum: float | None,
) -> None:
    part = nn.Sequential(
        spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4, momentum=momentum), nn.Dropout(0.3)
    )
    plain = nn.Sequential(part, nn.Flatten(), nn.LazyLinear(2)).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    plain(images)
    checkpointed = copy.deepcopy(plain)
    assert checkpoint_activations(checkpointed, "0") == ["0"]
    for seed in range(3):
        for model in (plain, checkpointed):
            torch.manual_seed(seed)
            loss = model(images).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        assert_same(plain, checkpointed)


def test_frozen_norms_stay_as_they_are() -> None:
    plain, checkpointed = pair()
    for model in (plain, checkpointed):
        for module in model.stages[1].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    frozen = {k: v.clone() for k, v in plain.stages[1].state_dict().items() if "running" in k}
    images = torch.randn(IMAGES, dtype=torch.float64)
    for model in (plain, checkpointed):
        step(model, images)
    assert_same(plain, checkpointed)
    assert all(torch.equal(checkpointed.stages[1].state_dict()[k], v) for k, v in frozen.items())


def test_two_backward_passes_and_two_forward_passes_agree() -> None:
    plain, checkpointed = pair(drop_path=0.3)
    images = torch.randn(IMAGES, dtype=torch.float64)
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        losses = [model(images[:2]).square().sum(), model(images[2:]).square().sum()]
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
    assert_same(plain, checkpointed)


def test_mixed_precision_is_that_of_the_first_pass() -> None:
    plain, checkpointed = (model.float() for model in pair())
    images = torch.randn(IMAGES)
    for model in (plain, checkpointed):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().square().sum()
        loss.backward()  # outside of autocast
    assert_same(plain, checkpointed)


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes of activations that a forward keeps for the backward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(images)
    assert kept.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(("where", "share"), [("stages.*", 0.25), ("stages.*.*", 0.5)])
def test_fewer_tensors_are_saved(where: str, share: float) -> None:
    plain, checkpointed = pair(where, depths=[3, 3, 3], strides=[1, 1, 1, 2, 2])
    images = torch.randn(IMAGES, dtype=torch.float64)
    few, all_of_them = saved_bytes(checkpointed, images), saved_bytes(plain, images)
    assert 0 < few < share * all_of_them


def calls_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    calls: list[str] = []
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: calls.append(n))
    return calls


def test_the_inside_is_computed_twice_in_training_and_once_in_evaluation() -> None:
    _, model = pair()
    inside, outside = "stages.1.0.first", "stages.1"
    calls = calls_of(model, [inside, outside])
    images = torch.randn(IMAGES, dtype=torch.float64)
    step(model, images)
    assert sorted(calls) == [outside, inside, inside]
    calls.clear()
    with torch.no_grad():
        model(images)
    step(model.eval(), images)
    assert sorted(calls) == [outside] * 2 + [inside] * 2


def test_only_the_outermost_part_is_checkpointed() -> None:
    model = create_model("repvgg_tiny")
    assert checkpoint_activations(model, "stages.*") == [f"stages.{i}" for i in range(4)]
    assert len(checkpoint_activations(create_model("repvgg_tiny"), Block)) == 8
    assert checkpoint_activations(create_model("repvgg_tiny"), [Block, "stages"]) == [
        "stem",
        "stages",
    ]
    assert len(checkpoint_activations(model, "stages.*")) == 4  # again, which changes nothing


def test_names_types_and_keys_stay_and_copies_are_their_own() -> None:
    plain, checkpointed = pair()
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in checkpointed.named_modules()
    ]
    images = torch.randn(IMAGES, dtype=torch.float64)
    for other in (copy.deepcopy(checkpointed), pickle.loads(pickle.dumps(checkpointed))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        assert relative_error(plain(images), other(images)) > 0.1
        step(other, images)
    assert all(p.grad is None for p in checkpointed.parameters())
    checkpointed.load_state_dict(plain.state_dict(), strict=True)


def test_a_checkpointed_model_folds() -> None:
    plain, checkpointed = pair(block="dbb")
    images = torch.randn(IMAGES, dtype=torch.float64)
    folded = [reparameterize(model.eval(), images) for model in (plain, checkpointed)]
    assert torch.equal(*(model(images) for model in folded))
    assert list(folded[0].state_dict()) == list(folded[1].state_dict())


def test_what_is_not_there_is_refused() -> None:
    model = create_model("repvgg_tiny")
    for where, name in (("stage.*", r"stage\.\*"), (nn.Conv3d, "Conv3d"), (["stem", "x"], "x")):
        with pytest.raises(InputError, match=rf"'{name}': RepVGG has no such part; it has stem"):
            checkpoint_activations(model, where)
    assert not any("forward" in vars(module) for module in model.modules())
    model.stem.forward = lambda x: x
    with pytest.raises(InputError, match="'stem': something has replaced its forward"):
        checkpoint_activations(model, "stem")
