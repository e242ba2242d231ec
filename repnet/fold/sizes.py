"""`Dim` and `Ratio`: numbers that a forward computes from sizes, and that are followed.

Arithmetic on them becomes part of the frame's graph; a comparison is noted as a decision of the
frame. `len`, `range` and `math` follow them where the forwards of a model look them up.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from repnet.fold.frame import Frame

_MATH = {name: value for name, value in vars(math).items() if callable(value)}
_MISSING = object()


class Tracked:
    """A number that a forward computed from sizes, with the node that computes it."""

    frame: Frame
    node: fx.Node

    def __new__(cls, value: Any, frame: Frame, node: fx.Node) -> Any:
        self = super().__new__(cls, _plain(value))  # type: ignore[call-arg]
        self.frame, self.node = frame, node
        node.meta.setdefault("value", self._plain())
        return self

    __hash__: Any

    def __reduce__(self) -> Any:
        return (int if isinstance(self, int) else float, (self._plain(),))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def _plain(self) -> Any:
        return int.__int__(self) if isinstance(self, int) else float.__float__(self)  # type: ignore


class Dim(Tracked, int):
    """An integer that a forward computed from sizes."""


class Ratio(Tracked, float):
    """A floating-point number that a forward computed from sizes."""


def _plain(value: Any) -> Any:
    return value._plain() if isinstance(value, Tracked) else value


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*values: Any) -> Any:
        if any(not isinstance(v, int | float) for v in values):
            return NotImplemented
        result = function(*(_plain(v) for v in values))
        frame = next(v for v in values if isinstance(v, Tracked)).frame
        if not isinstance(result, int | float):  # cannot be followed any further
            return frame.decide(frame.call(function, values), result, forced=False)
        kind = Dim if isinstance(result, int) else Ratio
        return kind(result, frame, frame.call(function, values))

    return compute


def _swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    compute = _arithmetic(function)
    return lambda self, other: compute(other, self)


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    def compare(self: Any, other: Any = None) -> Any:
        values = (self,) if function is bool else (self, other)
        if any(not isinstance(v, int | float) for v in values):
            return NotImplemented
        result = function(*(_plain(v) for v in values))
        return self.frame.decide(self.frame.call(function, values), result)

    return compare


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make of a size a number that cannot be followed any further."""

    def convert(self: Any) -> Any:
        return self.frame.decide(self.node, function(self._plain()), forced=False)

    return convert


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
    _function = getattr(operator, _name)
    setattr(Tracked, f"__{_name}__", _arithmetic(_function))
    setattr(Tracked, f"__r{_name}__", _swapped(_function))
for _name in ("neg", "pos", "abs"):
    setattr(Tracked, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _name in ("ceil", "floor", "trunc"):
    setattr(Tracked, f"__{_name}__", _arithmetic(getattr(math, _name)))
Tracked.__round__ = _arithmetic(round)  # type: ignore[attr-defined]
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tracked, f"__{_name}__", _comparison(getattr(operator, _name)))
Tracked.__bool__ = _comparison(bool)  # type: ignore[attr-defined]
Tracked.__hash__ = _number(hash)  # type: ignore[method-assign]
Tracked.__int__ = _number(int)  # type: ignore[attr-defined]
Tracked.__float__ = _number(float)  # type: ignore[attr-defined]


@contextmanager
def sizes_followed(model: nn.Module) -> Iterator[None]:
    """Let `len`, `range` and `math` follow sizes where the forwards of a model look them up.

    They would make plain numbers of them. Only the modules of Python that define the forwards are
    changed, and torch's are not.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    namespaces = {}
    for module in model.modules():
        names = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        if not str(names.get("__name__", "torch")).startswith("torch."):
            namespaces[id(names)] = names
    for names in namespaces.values():
        found: dict[str, Any] = {"len": _len, "range": _range}
        found = {name: function for name, function in found.items() if name not in names}
        for name, value in names.items():
            if value is math:
                found[name] = _Math()
            elif any(value is function for function in _MATH.values()):
                found[name] = _followed(value)
        for name, value in found.items():
            changed.append((names, name, names.get(name, _MISSING)))
            names[name] = value
    try:
        yield
    finally:
        for names, name, value in changed:
            if value is _MISSING:
                del names[name]
            else:
                names[name] = value


def _len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else len(value)


def _range(*limits: Any) -> range:
    for limit in limits:
        if isinstance(limit, Dim):
            limit.frame.decide(limit.node, limit._plain(), forced=False)
    return range(*limits)


class _Math:
    """The module `math`, whose functions follow sizes."""

    def __getattr__(self, name: str) -> Any:
        return _followed(_MATH[name]) if name in _MATH else getattr(math, name)


def _followed(function: Callable[..., Any]) -> Callable[..., Any]:
    compute = _arithmetic(function)

    def call(*values: Any) -> Any:
        tracked = any(isinstance(v, Tracked) for v in values)
        return compute(*values) if tracked else function(*values)

    return call
