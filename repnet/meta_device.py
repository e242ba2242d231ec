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
    """Return `func(*args, **kwargs)`, quickly where that says nothing but a shape."""
    if args and isinstance(args[0], Tensor) and args[0].is_meta and not kwargs.get("inplace"):
        if func is torch.nn.functional.batch_norm:
            return args[0].clone()
        if func.__name__ in POINTWISE and kwargs.keys() <= {"inplace"}:
            shape = _common_shape(args)
            if shape is not None:
                return args[0].expand(shape).clone()
    return func(*args, **kwargs)


def _common_shape(args: tuple[Any, ...]) -> torch.Size | None:
    """Return the shape that floating-point tensors of one dtype are broadcast to."""
    shape, dtype = args[0].shape, args[0].dtype
    for other in args[1:]:
        if isinstance(other, Tensor):
            if other.dtype != dtype or not other.is_meta:
                return None
            if other.shape != shape:
                shape = torch.broadcast_shapes(shape, other.shape)
        elif type(other) not in (int, float):
            return None
    return shape if dtype.is_floating_point else None
