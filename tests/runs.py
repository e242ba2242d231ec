"""What tests observe of a run: the layers that it calls, and outputs of any form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import relative_error

# The operators that torch dispatches convolutions and linear layers to.
LAYERS = ("convolution", "addmm", "mm")


class CallCounter(TorchDispatchMode):
    """Counts calls of convolutions and linear layers as "layers", and of batch norms as "norms".

    What is counted are operators, so that a norm written as a function is found as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls["layers"] += name in LAYERS
        self.calls["norms"] += "batch_norm" in name
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_calls(model: nn.Module, *inputs: Any) -> Counter[str]:
    """Return how many layers and norms one pass of `model` calls."""
    with CallCounter() as counter:
        model(*inputs)
    return counter.calls


def assert_outputs_agree(
    expected: Any, actual: Any, tolerance: float, path: str = "output"
) -> None:
    """Check that two outputs are of the same classes and differ by `tolerance` at most.

    Args:
        expected: a tensor, or any nesting of lists, tuples, mappings and dataclasses.
        actual: the same.
        tolerance: relative to the largest value of each tensor.
        path: where this is in the whole output.
    """
    assert type(actual) is type(expected), f"{path}: {type(actual)} is not {type(expected)}"
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, f"{path}: {actual.dtype} is not {expected.dtype}"
        if expected.is_floating_point() and expected.numel():
            assert bool(expected.isfinite().all()), f"{path}: the expected output is not finite"
            error = relative_error(expected, actual)
            assert error <= tolerance, f"{path}: relative error {error}"
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, Mapping) or is_dataclass(expected):
        if isinstance(expected, Mapping):
            assert list(actual) == list(expected), f"{path}: keys {list(actual)}"
            for key, value in expected.items():
                assert_outputs_agree(value, actual[key], tolerance, f"{path}[{key!r}]")
        for field in fields(expected) if is_dataclass(expected) else ():
            first, second = (getattr(value, field.name) for value in (expected, actual))
            assert_outputs_agree(first, second, tolerance, f"{path}.{field.name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{path}: {len(actual)} parts"
        for index, (first, second) in enumerate(zip(expected, actual, strict=True)):
            assert_outputs_agree(first, second, tolerance, f"{path}[{index}]")
    else:
        assert actual == expected, f"{path}: {actual} is not {expected}"
