"""`InFloat64`: run any model in float64 without converting it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

ROUNDING = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InFloat64(TorchFunctionMode):
    """While active, every floating-point tensor that enters or leaves a torch function is float64.

    Weights are converted where they are used, one layer at a time, so that a model takes no more
    memory than it has; a forward that converts to a fixed precision does not leave float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # x.shape, x.data; x.dtype stays true
            found = func(*args, **(kwargs or {}))
            return found if isinstance(found, torch.dtype) else _exact(found)
        func = Tensor.double if func in ROUNDING else func
        return _exact(func(*_exact(args), **_exact(kwargs or {})))


def _exact(value: Any) -> Any:
    """Return `value` with its floating-point tensors in float64; quicker than a pytree."""
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.is_floating_point() else value
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if type(value) in (tuple, list):
        return type(value)([_exact(v) for v in value])
    if type(value) is dict:
        return {key: _exact(v) for key, v in value.items()}
    if isinstance(value, tuple | list | dict):  # a named tuple, or a container of someone's own
        return tree_map(_exact, value)
    return value
