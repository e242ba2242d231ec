"""Rounding to int8 and back, in float, with the gradient of no rounding."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny  # in place of a scale of 0


def quantized_weight(weight: Tensor) -> Tensor:
    """Return `weight` rounded to int8, symmetric with a scale per output channel, its first axis.

    Gradients pass as if nothing was rounded. A batch norm that is folded into it later changes
    nothing: to scale a channel scales its steps.
    """
    scale = (weight.detach().abs().flatten(1).amax(1).float() / 127).clamp_min(_TINY)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def quantized_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `x` rounded to 256 steps from `low` to `high`, of which one is 0.

    Gradients pass inside the range, and are zero outside.
    """
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(_TINY)
    zero = (-low / scale).round().clamp(0, 255).int()
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
