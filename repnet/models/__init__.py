"""Models: one file each; every named size is a file in `configs/model/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from repnet.models.mobileone import MobileOne
from repnet.models.repvgg import RepVGG
from repnet.models.resnet import ResNet
from repnet.spec import build, choices, load_choice

__all__ = ["MobileOne", "RepVGG", "ResNet", "create_model", "list_models"]


def list_models() -> list[str]:
    """Return the names that `create_model` knows."""
    return choices("model")


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    block: str | Callable[..., nn.Module] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Return an untrained model by name.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head.
        in_channels: of the image.
        block: a name in `configs/block/`, or a callable; None for the model's own.
        **overrides: other arguments of the model, in place of those of its config.

    Raises:
        InputError: unknown name or argument.

    Example:
        >>> create_model("repvgg_a0", num_classes=10, block="residual")
    """
    spec = load_choice("model", name)
    spec |= {"num_classes": num_classes, "in_channels": in_channels, **overrides}
    if isinstance(block, str):
        spec["block"] = load_choice("block", block)
    elif block is not None:
        spec["block"] = block
    return build(spec)
