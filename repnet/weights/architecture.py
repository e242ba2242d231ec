"""The shapes of a network, read from its weights, and its name if it is one of repnet's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from repnet.models import create_model, list_models
from repnet.spec import load_choice
from repnet.weights.identify import MAIN
from repnet.weights.own import neutral_keys

WIDE_STEM = (
    "The RepVGG of super-gradients has a stem as wide as its first stage, the paper's has at most "
    "64 channels: they are the same network only up to that width"
)


@dataclass(frozen=True)
class BlockShape:
    """The convolution that a block is when folded."""

    place: str
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: int
    attention: bool


def block_shapes(tensors: Mapping[str, Tensor]) -> list[BlockShape]:
    """Return the blocks of a chain of blocks, in order.

    Args:
        tensors: by neutral name.
    """
    main = {}
    for key, value in tensors.items():
        if key.endswith(MAIN) and key.startswith(("stem/", "stages.")):
            main[key.partition("/")[0]] = value
    places = sorted(main, key=lambda place: [int(n) for n in place.split(".")[1:]])
    shapes = []
    channels = main["stem"].shape[1] if "stem" in main else None
    for place in places:
        out_channels, inside, kernel_size, _ = main[place].shape
        channels = channels or inside
        attention = f"{place}/attention.fc1.weight" in tensors
        shape = BlockShape(
            place, channels, out_channels, channels // inside, kernel_size, attention
        )
        shapes.append(shape)
        channels = out_channels
    return shapes


def guess_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the model in `repnet.list_models()` that has these shapes.

    Args:
        tensors: by neutral name.
    """
    shapes = block_shapes(tensors)
    if not shapes:
        return _guess_plain(tensors)
    branches = {key for key in tensors if "/kxk." in key}
    for name in list_models():
        depth = sum(load_choice("model", name).get("depths", []))
        if len(shapes) - 1 not in (depth, 2 * depth):  # a unit of MobileOne is two blocks
            continue
        with torch.device("meta"):
            state = create_model(name, in_channels=shapes[0].in_channels).state_dict()
        twin = {new: state[key] for key, new in neutral_keys(state).items()}
        same_branches = not branches or branches == {key for key in twin if "/kxk." in key}
        if same_branches and block_shapes(twin) == shapes:
            return name
    return None


def _guess_plain(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the network of plain blocks that has these tensors, its head aside."""
    stem = tensors.get("stem.0.conv.weight")
    if stem is None:
        return None
    for name in list_models():
        if load_choice("model", name)["_target_"] != "repnet.models.ResNet":
            continue
        with torch.device("meta"):
            state = create_model(name, in_channels=stem.shape[1]).state_dict()
        if _body(state) == _body(tensors):
            return name
    return None


def _body(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if not key.startswith("head.")}
