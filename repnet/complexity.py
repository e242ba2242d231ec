"""How large a model is, and how many multiplications it takes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values; running statistics do not count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-adds of convolution and linear layers for one image.

    Counted on the meta device: nothing is computed, and the model is not changed.

    Args:
        model: in any mode; its evaluation is counted.
        input_shape: `(channels, height, width)` of the image.
    """
    return sum(count_macs_by_part(model, input_shape, ()).values())


def count_macs_by_part(
    model: nn.Module, input_shape: Sequence[int], names: Sequence[str]
) -> dict[str, int]:
    """Return what `count_macs` counts, by part; the empty name is for what runs outside of them.

    What a part runs of another one counts for the first, so that the sum is that of the model.

    Args:
        model: in any mode; its evaluation is counted.
        input_shape: `(channels, height, width)` of the image.
        names: of modules.
    """
    shapes = deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    flops = dict.fromkeys(names, 0)
    running: list[str] = []

    def enter(name: str) -> None:
        running.append(name)
        if len(running) == 1:
            flops[name] -= counter.get_total_flops()

    def leave(name: str) -> None:
        running.pop()
        if not running:
            flops[name] += counter.get_total_flops()

    for name in names:
        module = shapes.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: enter(name))
        module.register_forward_hook(lambda *_, name=name: leave(name))
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    with counter, torch.no_grad():
        shapes(torch.empty(1, *input_shape, device="meta", dtype=dtype))
    flops[""] = counter.get_total_flops() - sum(flops.values())
    return {name: count // 2 for name, count in flops.items()}
