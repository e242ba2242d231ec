"""`InFloat64`: run any model in float64 without converting it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


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
        if getattr(func, "__name__", "") == "__get__":  # x.shape, x.dtype, x.data
            return _exact(func(*args, **(kwargs or {})))
        args, kwargs = tree_map(_exact, (args, kwargs or {}))
        return tree_map(_exact, func(*args, **kwargs))


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64)
    return value
