"""Base classes of objects that `pytorch_lightning` and `lightning` both take for their own.

The two packages hold the same code twice, and each asks `isinstance` with its own classes. A
subclass of `EitherLightning` derives from those of `pytorch_lightning`. Where `lightning` has been
imported when an object is made, the object's class also derives from the same class of that
package, which is not imported otherwise. Nothing else of an object or its name changes, so that
its state in a checkpoint fits under both.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Self

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint as _Checkpoint

# The same code under both names.
_OTHER = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}


class EitherLightning:
    """To be named in front of a class of `pytorch_lightning`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        joined: Any = _joined(cls, _counterpart(cls))  # type: ignore[arg-type]
        return super().__new__(joined)

    def __reduce__(self) -> Any:  # by the class that its module knows
        named: Any = getattr(self, "_joins", type(self))
        state = self.__getstate__()  # LightningModule leaves its trainer out
        return _new, (named,), state


class Callback(EitherLightning, pl.Callback):
    """A callback of either Trainer."""


class LightningModule(EitherLightning, pl.LightningModule):
    """A module for either Trainer."""

    # A removed hook. Each package looks whether it is overridden by comparing the code with its
    # own, which is the other's but for the names in its docstring.
    configure_sharded_model: Any = None


class Checkpoint(Callback, _Checkpoint):
    """A callback of either Trainer, which runs after all others."""


SHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")  # split weights


def is_a(value: Any, *names: str) -> bool:
    """Return whether a class of `value` has one of these names, whichever package it is from."""
    return any(cls.__name__ in names for cls in type(value).__mro__)


def _counterpart(cls: type) -> Any:
    """Return the class of the other package that the first base from Lightning stands for."""
    for base in cls.__mro__:
        package, _, rest = base.__module__.partition(".")
        if package in _OTHER:
            return getattr(sys.modules.get(f"{_OTHER[package]}.{rest}"), base.__name__, None)
    return None


@cache
def _joined(cls: Any, other: Any) -> Any:
    if other is None or issubclass(cls, other):
        return cls
    names = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__qualname__")}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls, other), {**names, "_joins": cls})


def _new(cls: Any) -> Any:
    return cls.__new__(cls)  # as copy and pickle make objects
