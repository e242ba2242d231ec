"""`SlicedPointwise`: strided 1x1 convolutions in a form whose backward pass is safe on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class SlicedPointwise(TorchFunctionMode):
    """Inside, a strided 1x1 convolution is an unstrided one of every n-th pixel: the same sums.

    torch 2.13 and 2.14 write beyond the memory of the backward pass of such a convolution of 3
    channels in channels_last on a CPU (oneDNN). Of 24 processes in float32 (16 to 224 pixels, 1 to
    16 images, 1 and 2 threads) 12 crashed; of 72 that ran it sliced (float32, bfloat16 and its
    autocast, torch 2.14.1) none did.
    A mode reaches every network, and leaves its modules, keys and fold as they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (_conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    rows, columns = _pair(stride)
    if tuple(weight.shape[2:]) == (1, 1) and (rows, columns) != (1, 1):
        if not isinstance(padding, str):  # which means none to a 1x1
            height, width = _pair(padding)
            input = functional.pad(input, (width, width, height, height))
        return torch.conv2d(input[..., ::rows, ::columns], weight, bias, groups=groups)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: Any) -> tuple[int, int]:
    first, *others = (value,) if isinstance(value, int) else value
    return first, others[0] if others else first
