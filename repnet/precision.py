"""`InFloat64`: run any model in float64 without converting it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from repnet import meta_device

CHUNK = 2**20  # values of a weight that are converted at a time
ROUNDING = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InFloat64(TorchFunctionMode):
    """While active, every floating-point tensor that enters or leaves a torch function is float64.

    Weights are converted where they are used, one layer at a time, so that a model takes no more
    memory than it has. A forward that converts to a fixed precision stays in float64, and one that
    compares dtypes, like that of `nn.LSTM`, reads float64 everywhere.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # x.shape, x.data, x.dtype
            return _exact(func(*args, **kwargs))
        if any(not issubclass(kind, Tensor) for kind in types):  # controls its own precision
            return func(*args, **kwargs)
        if func is torch.conv2d and not types:
            return _conv2d(*args, **kwargs)
        func = Tensor.double if func in ROUNDING else func
        return _exact(meta_device.run(func, _exact(args), _exact(kwargs)))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Return `torch.conv2d` in float64.

    A weight that is larger than everything it reads is converted and multiplied some rows at a
    time: moving the weight takes most of the time of such a layer, and a float64 copy of it, in
    fresh memory, would take several times as long.
    """
    x, bias = _exact((input, bias))
    size = weight[0].numel()
    reads = x.numel() // x.shape[-3] * size
    if not x.is_cpu or groups > 1 or not reads < weight.numel() > CHUNK:
        return torch.conv2d(x, _exact(weight), bias, stride, padding, dilation, groups)
    parts = weight.split(max(1, CHUNK // size))
    maps = [torch.conv2d(x, _exact(rows), None, stride, padding, dilation) for rows in parts]
    output = torch.cat(maps, -3)
    return output if bias is None else output + bias[:, None, None]


def _exact(value: Any) -> Any:
    """Return `value` with its floating-point tensors in float64; faster than `tree_map`."""
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, list):
        return [_exact(v) for v in value]
    if isinstance(value, dict):
        return {key: _exact(v) for key, v in value.items()}
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [_exact(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
