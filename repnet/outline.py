"""`outline`: a network without memory, from a description that came out of a file.

A description of a few bytes can ask for a million blocks, or for weights of terabytes. An outline
is built on torch's device `meta`, where weights take no memory, and given up as soon as it has more
modules than a network of so many tensors can have. Only what is about as large as the weights that
lie beside the description may then be built in earnest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from repnet.errors import InputError
from repnet.spec import build

# Modules of a train form per tensor of its folded network: RepVGG has 5, the diverse branch block
# 10. A module takes 5 kB, so that the largest outline takes 1 GB.
_PER_TENSOR, _SMALL, _MOST = 30, 5_000, 200_000
_SPARE = 1_000_000  # elements
_LARGEST = 10_000_000  # number in a description: loops run so often, lists become so long


def outline(
    spec: Any,
    *,
    allowed: Iterable[str],
    tensors: int,
    elements: int,
    factor: int = 2,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """Return the network that `spec` describes, on the device `meta`.

    Args:
        spec: as in `build`.
        allowed: as in `build`.
        tensors: in the file with its weights.
        elements: of all these tensors.
        factor: how many times as many elements the network may have.
        change: of the network, part of the description too.

    Raises:
        InputError: it has many more modules or elements than the file; as `build` raises it.
    """
    if (largest := max(_integers(spec), default=0)) > _LARGEST:
        raise InputError(f"it describes a network of {largest:,} parts of one kind")
    with torch.device("meta"), _at_most(min(_SMALL + _PER_TENSOR * tensors, _MOST), tensors):
        model = build(spec, allowed=allowed)
        if not isinstance(model, nn.Module):
            raise InputError("it does not describe a network")
        model = change(model)
    found = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    if found > factor * elements + _SPARE:
        raise InputError(
            f"it describes a network of {found:,} elements, but its weights have {elements:,}"
        )
    return model


def _integers(spec: Any) -> Iterator[int]:
    if isinstance(spec, int):
        yield spec
    elif isinstance(spec, dict | list | tuple):
        for part in spec.values() if isinstance(spec, dict) else spec:
            yield from _integers(part)


@contextmanager
def _at_most(modules: int, tensors: int) -> Iterator[None]:
    """Give up a network of this thread that has too many modules."""
    thread, count = threading.get_ident(), 0

    def check(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > modules:
            raise InputError(
                f"it describes a network of more than {modules:,} modules, but its weights are "
                f"{tensors:,} tensors"
            )

    hook = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()
