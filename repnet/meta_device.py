"""Pointwise functions of tensors without values, which cost torch a millisecond each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POINTWISE = {
    "__add__", "__mul__", "__sub__", "add", "div", "elu", "gelu", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "mish", "mul", "relu", "relu6", "rsqrt", "sigmoid", "silu", "sqrt",
    "sub", "tanh", "true_divide",
}  # fmt: skip


def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return `func(*args, **kwargs)`, without calling it where only a shape is to be found."""
    if args and isinstance(args[0], Tensor) and args[0].is_meta and not kwargs.get("inplace"):
        if func is torch.nn.functional.batch_norm:
            return args[0].clone()
        if func.__name__ in POINTWISE and kwargs.keys() <= {"inplace"} and _can_broadcast(args):
            shapes = {arg.shape for arg in args if isinstance(arg, Tensor)}
            return args[0].expand(torch.broadcast_shapes(*shapes)).clone()
    return func(*args, **kwargs)


def _can_broadcast(args: tuple[Any, ...]) -> bool:
    """Return whether these are numbers and floating-point tensors of one dtype, without values."""
    dtype = args[0].dtype
    return dtype.is_floating_point and all(
        arg.is_meta and arg.dtype == dtype if isinstance(arg, Tensor) else type(arg) in (int, float)
        for arg in args
    )
