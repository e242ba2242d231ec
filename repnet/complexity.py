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
    shapes = deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    with counter, torch.no_grad():
        shapes(torch.empty(1, *input_shape, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2
