"""`CpuConvolutions`: convolutions in a form whose backward pass torch computes right on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class CpuConvolutions(TorchFunctionMode):
    """Rewrites the 2d convolutions whose backward pass is wrong on a CPU; their results stay.

    Both faults are those of oneDNN in torch 2.13 and 2.14, and both end in NaN or a crash:

    - The weight gradient of a strided 1x1 convolution of up to 8 channels in channels_last writes
      beyond its memory, in float32 and bfloat16: about a third of 192 processes with 1, 3, 4 and 8
      channels crashed, and none that ran the form written here, an unstrided convolution of every
      n-th pixel. With 16 and 32 channels none crashed.
    - The weight gradient of a padded convolution in bfloat16 reads memory that nobody wrote where
      its stride is larger than the width of its input, as in the last stage of a network for small
      images: it was wrong in more than half of 108 such settings, in none with the padding written.

    `benchmarks/cpu_convolutions.py` counts both.

    A mode reaches every network, and leaves its modules, keys and fold as they are.

    Args:
        channels_last: whether the network runs in that layout, and so needs the first rule.
    """

    def __init__(self, *, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.conv2d:
            return self._conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        rows, columns = _pair(stride)
        pointwise = self.channels_last and tuple(weight.shape[2:]) == (1, 1)
        sliced = pointwise and (rows, columns) != (1, 1)
        # A padding in words means none to a strided convolution.
        if (sliced or columns > input.shape[-1]) and not isinstance(padding, str):
            height, width = _pair(padding)
            input, padding = functional.pad(input, (width, width, height, height)), 0
        if sliced:
            return torch.conv2d(input[..., ::rows, ::columns], weight, bias, groups=groups)
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: Any) -> tuple[int, int]:
    first, *others = (value,) if isinstance(value, int) else value
    return first, others[0] if others else first
