"""`record`: one run of a model, with the graph of each module's own forward.

The model runs once, on real tensors (without values where that is possible), while a
`TorchFunctionMode` sees every torch function that a forward calls, and a patched
`nn.Module.__call__` sees every call of a child. Both are written into the `Frame` of the module
whose forward is running: a small `fx.Graph` in which the children are opaque calls. Nothing about
the run is pretended, so that whatever runs can be recorded: `isinstance`, asserts on dtypes,
lists, keyword calls, tensors kept in attributes.

What a run cannot show is what the forward would do with another input. Three things tell that:

- Sizes are `Dim`s, integers that know where they come from. Arithmetic on them becomes part of the
  graph; a comparison is noted as a decision of the frame. Reading the values of a tensor is one,
  too. `explore` runs a forward again with each decision taken the other way.
- Arguments that are not tensors, and those that were left out, are noted as `frozen`.
- `record` runs the model a second time with other sizes, another dtype and gradients enabled. What
  was frozen without being noted (`range(x.shape[2])`, `torch.is_grad_enabled()`) differs there.

A tensor that outlives the run without being returned was kept aside by someone: it has a user that
no graph shows, and is marked as escaped.
"""

from __future__ import annotations

import dis
import inspect
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import chain
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect, map_aggregate
from torch.overrides import TorchFunctionMode

from repnet import meta
from repnet.equivalence import tensors_in

# Read values of a tensor into Python.
VALUES = {
    "__array__", "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__",
    "allclose", "equal", "is_nonzero", "item", "numpy", "tolist",
}  # fmt: skip
# Give another result each time, and so are no constants.
RANDOM = {
    "bernoulli", "bernoulli_", "dropout", "multinomial", "normal", "normal_", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "randperm", "uniform_",
}  # fmt: skip
_MATH = {n: getattr(math, n) for n in ("sqrt", "log", "log2", "exp", "floor", "ceil")}
_MISSING = object()
_FREE = "free"
MOST_PATHS = 32  # through one forward, in an exploration
MOST_DECISIONS = 12


class RecordingError(RuntimeError):
    """A run cannot be recorded on these inputs."""


@dataclass(eq=False)
class Decision:
    """A value that a forward goes on with, and that another input may change.

    Args:
        node: computes the value.
        value: in this run.
        forced: whether another value can be put in its place: it is true or false.
        time: calls of modules before it.
        alive: calls of modules whose output could still be used by what comes.
        end: calls of modules before the function returned that took the decision, if it returned
            no numbers, so that nothing after it knows of the decision; else None.
    """

    node: fx.Node
    value: Any
    forced: bool
    time: int
    alive: set[fx.Node]
    end: int | None = None


class Frame:
    """One call of one module, as the graph of what its own forward did.

    Nodes have in `node.meta`: "shape" and "dtype" of a tensor; "constant" where no input reaches
    it; "escaped" where somebody keeps the tensor; "changed" where a view of it was changed in
    place; "in_place" where the node changes its first argument; "frame" where it calls a module.

    Args:
        recorder: of the run.
        name: of the module in the model.
        module: which is running.
        parent: the frame that calls it, None for the model itself.
    """

    def __init__(
        self, recorder: Recorder, name: str, module: nn.Module, parent: Frame | None
    ) -> None:
        self.recorder, self.name, self.module, self.parent = recorder, name, module, parent
        self.graph = fx.Graph()
        self.frozen: dict[str, Any] = {}  # arguments that are no tensors, and that forward reads
        self.decisions: list[Decision] = []
        self.time = 0  # calls of modules so far
        self.unclear = ""  # why the graph does not tell what the forward does
        self.rewritable = True  # a graph can stand for the forward
        self.keeps = False  # it sets attributes, or somebody keeps a tensor of it
        self.plain_call = False  # one tensor came in, as the first argument
        self.known: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self.bound: list[tuple[weakref.ref[Tensor], fx.Node]] = []
        self.returned: list[weakref.ref[Tensor]] = []
        self.attributes: dict[str, fx.Node] = {}
        self.inputs: Any = None  # what `explore` needs to call it again

    # What comes in and goes out

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Make placeholders of the arguments of a call; return the arguments for it."""
        parameters, reads = _signature(self.module)
        try:
            bound = inspect.Signature(parameters).bind(*args, **kwargs).arguments
        except TypeError:  # forward will say what is wrong
            return args, kwargs
        self.plain_call = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        for parameter in parameters:
            name, given = parameter.name, parameter.name in bound
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                bound[name] = tuple(
                    self._argument(f"{name}_{n}", v) for n, v in enumerate(bound.get(name, ()))
                )
                self._freeze(name, len(bound[name]), reads)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                self._freeze(name, sorted(bound.get(name, {})), reads)
                bound[name] = {k: self._argument(k, v) for k, v in bound.get(name, {}).items()}
            elif given:
                bound[name] = self._argument(name, bound[name], parameter.default)
                if (structure := _structure(bound[name])) is not _FREE:
                    self._freeze(name, structure, reads)
            else:
                self._placeholder(name, parameter.default, parameter.default)
                self._freeze(name, parameter.default, reads)
        arguments = inspect.BoundArguments(inspect.Signature(parameters), bound)
        self.inputs = _map((arguments.args, arguments.kwargs), Tensor, _Shape)
        return arguments.args, arguments.kwargs

    def _freeze(self, name: str, value: Any, reads: frozenset[str]) -> None:
        if name in reads:
            self.frozen[name] = value

    def _placeholder(self, name: str, value: Any, default: Any = inspect.Parameter.empty) -> Any:
        default = () if default is inspect.Parameter.empty else (default,)
        node = self.graph.placeholder(name) if not default else self.graph.create_node(
            "placeholder", name, default
        )  # fmt: skip
        if _is_plain(value):
            node.meta["value"] = value
        return node

    def _argument(self, name: str, value: Any, default: Any = inspect.Parameter.empty) -> Any:
        node = self._placeholder(name, value, default)
        if self.parent is None and self.recorder.follow_numbers:
            value = self._numbers(value, node)
        if isinstance(value, list | dict):
            self.rewritable = False  # forward may change the container of its caller
        return self.bind(value, node)

    def _numbers(self, value: Any, node: fx.Node) -> Any:
        """Return an argument of the model with numbers that are followed."""
        if type(value) in (int, float):
            return (Dim if type(value) is int else Ratio)(value, self, node)
        if type(value) is tuple:
            items = (self._numbers(v, self.call(operator.getitem, (node, n)))
                     for n, v in enumerate(value))  # fmt: skip
            return tuple(items)
        return value

    def leave(self, output: Any) -> None:
        """Write down what the forward returns."""
        for tensor in tensors_in(output):
            self.returned.append(weakref.ref(tensor))
        self.graph.output(self._rebuilt(output))
        decided = {d.node for d in self.decisions}
        for node in reversed(self.graph.nodes):
            # Sizes that were read and not used are no users of a tensor.
            idle = node.op == "call_function" and not node.users and node not in decided
            if idle and ("shape" not in node.meta or node.target is getattr):
                self.graph.erase_node(node)

    def _rebuilt(self, value: Any) -> Any:
        """Return a value of the graph for an output, of the same class."""
        if isinstance(value, Tensor | Dim | Ratio):
            return self.node(value)
        kind = type(value)
        if kind in (tuple, list):
            return kind(self._rebuilt(v) for v in value)
        if kind is dict:
            return {k: self._rebuilt(v) for k, v in value.items()}
        if not _holds_tensors(value):
            if not isinstance(value, (int, float, str, bool, complex, type(None))):
                self.rewritable = False
            return value
        arguments: tuple[Any, ...] = ()
        named: dict[str, Any] = {}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            arguments = tuple(self._rebuilt(v) for v in value)
        elif is_dataclass(value):
            named = {f.name: self._rebuilt(getattr(value, f.name)) for f in fields(value)}
        elif isinstance(value, Mapping):
            arguments = ([(k, self._rebuilt(v)) for k, v in value.items()],)
        else:
            self.rewritable = False
            return [self._rebuilt(v) for v in tensors_in(value)]
        return self.graph.call_function(kind, arguments, named)

    # Which node a value has

    def bind(self, value: Any, node: fx.Node) -> Any:
        """Let `node` stand for `value`; return the value, with sizes that belong to this frame."""
        if isinstance(value, Tensor):
            self._bind_tensor(value, node)
            return value
        if isinstance(value, Dim | Ratio):
            return type(value)(value, self, node)
        if isinstance(value, torch.Size):
            return value
        if isinstance(value, tuple | list):
            items = [self._bind_item(v, node, operator.getitem, n) for n, v in enumerate(value)]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._bind_item(item, node, operator.getitem, key)
        elif is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                self._bind_item(getattr(value, field.name), node, getattr, field.name)
        elif isinstance(getattr(value, "__dict__", None), dict) and _holds_tensors(value):
            for key, item in vars(value).items():
                self._bind_item(item, node, getattr, key)
        return value

    def _bind_item(self, value: Any, node: fx.Node, function: Any, key: Any) -> Any:
        if not _holds_tensors(value) and not isinstance(value, Dim | Ratio | torch.Size):
            return value
        return self.bind(value, self.call(function, (node, key)))

    def _bind_tensor(self, value: Tensor, node: fx.Node) -> None:
        reference = weakref.ref(value)
        self.known[id(value)] = (reference, node)
        node.meta["shape"], node.meta["dtype"] = value.shape, value.dtype
        if node.op != "placeholder":
            self.bound.append((reference, node))

    def call(self, function: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """Add a call of a function on values or nodes."""
        node = self.graph.call_function(function, self.node(args), self.node(kwargs or {}))
        node.meta["constant"] = _is_constant(node)
        return node

    def node(self, value: Any) -> Any:
        """Return an argument with nodes in the place of tensors and sizes."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Dim | Ratio):
            if value.frame is self:
                return value.node
            self.decide(self.graph.call_function(abs, (0,)), value, forced=False)
            return int(value) if isinstance(value, int) else float(value)
        kind = type(value)
        if kind is torch.device and value.type == "meta":
            return self.recorder.device
        if kind in (tuple, list, torch.Size):
            items = [self.node(v) for v in value]
            return items if kind is list else tuple(items)
        if kind is dict:
            return {k: self.node(v) for k, v in value.items()}
        if kind is slice:
            return slice(self.node(value.start), self.node(value.stop), self.node(value.step))
        if isinstance(value, tuple | list | Mapping) and _holds_tensors(value):
            self.rewritable = False
            return [self.node(t) for t in tensors_in(value)]
        return value

    def _tensor(self, tensor: Tensor) -> fx.Node:
        found = self.known.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        name = self.recorder.constants.get(id(tensor))
        if name is not None:
            return self.attribute(name, tensor)
        for frame in self.recorder.frames[::-1]:
            other = frame.known.get(id(tensor))
            if other is not None and other[0]() is tensor:
                other[1].meta["escaped"] = True
        self.unclear = self.unclear or "it uses a tensor whose origin cannot be followed"
        node = self.graph.create_node("get_attr", "_unknown")
        self._bind_tensor(tensor, node)
        return node

    def attribute(self, name: str, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor that the model holds."""
        if name not in self.attributes:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                node = self.attributes[name] = self.graph.create_node("get_attr", name)
            node.meta.update(constant=True, shape=tensor.shape, dtype=tensor.dtype)
        return self.attributes[name]

    def decide(self, node: fx.Node, value: Any, *, forced: bool = True) -> Any:
        """Note that the forward goes on with a value; return it, or what a script says."""
        script = self.recorder.script
        if script is not None and forced and self is self.recorder.frames[0]:
            n = sum(d.forced for d in self.decisions)
            value = script[n] if n < len(script) else value
        alive = {n for r, n in self.bound if n.op == "call_module" and r() is not None}
        decision = Decision(node, value, forced, self.time, alive)
        self.decisions.append(decision)
        if not forced:
            self.recorder.watch(self, decision)
        return value

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def signature(self) -> list[Any]:
        """Return what two frames have in common that did the same, whatever the sizes."""
        order = {node: f"%{n}" for n, node in enumerate(self.graph.nodes)}

        def written(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return "its own" if value == self.recorder.dtype else value
            return order.get(value, value) if isinstance(value, fx.Node) else value

        found: list[Any] = [
            (
                n.op,
                n.target if n.op != "placeholder" else n.name,
                repr(map_aggregate((n.args, n.kwargs), written)),
            )
            for n in self.graph.nodes
        ]
        return [*found, repr(self.frozen), self.unclear, [d.value for d in self.decisions]]

    def names_its_dtype(self) -> bool:
        """Return whether the graph has the dtype of the model in it, as it was in this run."""
        found: list[Any] = []
        for node in self.graph.nodes:
            map_aggregate((node.args, node.kwargs), found.append)
        return any(isinstance(v, torch.dtype) and v == self.recorder.dtype for v in found)


class _Shape:
    """What `explore` makes a tensor of."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


class _Tracked:
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


class Dim(_Tracked, int):
    """An integer that a forward computed from sizes."""


class Ratio(_Tracked, float):
    """A floating-point number that a forward computed from sizes."""


def _plain(value: Any) -> Any:
    return value._plain() if isinstance(value, _Tracked) else value


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*values: Any) -> Any:
        if any(not isinstance(v, int | float) for v in values):
            return NotImplemented
        result = function(*(_plain(v) for v in values))
        if not isinstance(result, int | float):
            return result
        frame = next(v for v in values if isinstance(v, _Tracked)).frame
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
    setattr(_Tracked, f"__{_name}__", _arithmetic(_function))
    setattr(_Tracked, f"__r{_name}__", _swapped(_function))
for _name in ("neg", "pos", "abs"):
    setattr(_Tracked, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _name in ("ceil", "floor", "trunc"):
    setattr(_Tracked, f"__{_name}__", _arithmetic(getattr(math, _name)))
_Tracked.__round__ = _arithmetic(round)  # type: ignore[attr-defined]
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Tracked, f"__{_name}__", _comparison(getattr(operator, _name)))
_Tracked.__bool__ = _comparison(bool)  # type: ignore[attr-defined]
_Tracked.__hash__ = _number(hash)  # type: ignore[method-assign]
_Tracked.__int__ = _number(int)  # type: ignore[attr-defined]
_Tracked.__float__ = _number(float)  # type: ignore[attr-defined]


class Recorder(TorchFunctionMode):
    """Sees a run; `calls` has its frames, `leaves` the calls of modules without a frame.

    Args:
        model: which runs.
        opaque: whether a module is called as a whole.
        inlined: whether what a module does is written into the frame of its caller.
        script: what the first frame is to decide, in order; None to let it decide.
        device: of the real model, for a copy without values.
        follow_numbers: whether numbers that the model is given are followed like sizes.
    """

    def __init__(
        self,
        model: nn.Module,
        opaque: Callable[[nn.Module, str], bool],
        inlined: Callable[[str], bool] = lambda name: False,
        script: Sequence[Any] | None = None,
        follow_numbers: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.device = device or torch.device("cpu")
        self.follow_numbers = follow_numbers
        self.model, self.opaque, self.inlined, self.script = model, opaque, inlined, script
        self.names = {module: name for name, module in model.named_modules()}
        self.constants: dict[int, str] = {}
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            own = {**module._parameters, **module._buffers, **vars(module)}
            for key, value in own.items():
                if isinstance(value, Tensor):
                    self.constants.setdefault(id(value), prefix + key)
                elif isinstance(value, list | tuple | dict) and not key.startswith("_"):
                    for tensor in tensors_in(value):
                        self.constants.setdefault(id(tensor), f"{prefix}{key}.?")
        self.watched: list[Any] = []  # functions that took a decision and run on
        self.steered: set[str] = set()  # modules whose attributes another one sets
        self.frames: list[Frame] = []  # whose forward is running, the innermost last
        self.calls: dict[str, list[Frame]] = {}
        self.leaves: dict[str, list[tuple[Frame, fx.Node]]] = {}
        self.paused = 0
        self.inside_leaf = False
        self.autocast = _autocast()
        self.dtype = self.dtype_of_model()

    def dtype_of_model(self) -> torch.dtype:
        """Return the dtype of the first weight, which other runs may change."""
        found = (t.dtype for t in self.model.parameters() if t.is_floating_point())
        return next(found, torch.get_default_dtype())

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model under observation; return its output.

        Raises:
            RecordingError: there is no output.
        """
        original, set_attribute = nn.Module.__call__, nn.Module.__setattr__
        recorder = self

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._called(module, original, args, kwargs)

        def set_noted(module: nn.Module, name: str, value: Any) -> None:
            if recorder.frames and module is not recorder.frames[-1].module:
                recorder.steered.add(recorder.names.get(module, ""))
            set_attribute(module, name, value)

        nn.Module.__call__ = called  # type: ignore[method-assign]
        nn.Module.__setattr__ = set_noted  # type: ignore[method-assign,assignment]
        try:
            with self, _sizes_followed(self.model):
                return self.model(*args, **kwargs)
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
            for name in self.steered:
                for frame in self.calls.get(name, ()):
                    frame.unclear = frame.unclear or "another module sets its attributes"

    def watch(self, frame: Frame, decision: Decision) -> None:
        """Note when the function returns that takes a decision, if it is not the forward itself."""
        caller: Any = sys._getframe(1)
        while caller is not None and caller.f_code.co_filename == __file__:
            caller = caller.f_back
        forward = getattr(type(frame.module).forward, "__code__", None)
        if caller is None or caller.f_code is forward or (sys.getprofile() and not self.watched):
            return
        if not self.watched:
            sys.setprofile(self._returned)
        self.watched.append((caller, forward, frame, decision))

    def _returned(self, current: Any, event: str, value: Any) -> None:
        """See a function of Python return that took a decision."""
        if event != "return":
            return
        for watch in [w for w in self.watched if w[0] is current]:
            self.watched.remove(watch)
            _, forward, frame, decision = watch
            outer = current.f_back
            if isinstance(value, Tensor | None):
                decision.end = frame.time
            elif outer is not None and outer.f_code is not forward:
                self.watched.append((outer, forward, frame, decision))
        if not self.watched:
            sys.setprofile(None)

    def mark_escaped(self, output: Any) -> None:
        """Mark the tensors that are still there, though nobody returned them.

        Args:
            output: of the run; what it is a view of is there for its sake.
        """
        bases = {id(t._base) for t in tensors_in(output) if t._base is not None}
        for frame in chain.from_iterable(self.calls.values()):
            for reference, node in frame.bound:
                tensor = reference()
                if tensor is None or id(tensor) in self.constants or id(tensor) in bases:
                    continue
                if not any(r() is tensor for r in frame.returned):
                    node.meta["escaped"] = True
                    frame.keeps = True

    def _called(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.paused:
            if not self.inside_leaf and self.frames:
                self.frames[-1].unclear = "it calls a module from inside a torch function"
            return original(module, *args, **kwargs)
        name = self.names.get(module)
        frame = self.frames[-1] if self.frames else None
        if frame is None:
            assert name is not None
            return self._framed(module, name, original, args, kwargs, None)[1]
        if name is None:
            frame.unclear = "it calls a module that the model does not hold"
            return original(module, *args, **kwargs)
        leaf = self.opaque(module, name)
        if self.inlined(name) and not leaf:
            return original(module, *args, **kwargs)
        with self._pause():
            given = _positional(module, args, kwargs)
            node = frame.graph.call_module(name, frame.node(given[0]), frame.node(given[1]))
            node.meta["time"] = frame.time
            frame.time += 1
            tensors = list(tensors_in((args, kwargs)))
            versions = [_version(t) for t in tensors]
            if leaf:
                self.leaves.setdefault(name, []).append((frame, node))
                before, self.inside_leaf = self.inside_leaf, True
                try:
                    plain = _map((args, kwargs), Tensor, _same)
                    output = original(module, *plain[0], **plain[1])
                finally:
                    self.inside_leaf = before
            else:
                child, output = self._framed(module, name, original, args, kwargs, frame)
                node.meta["frame"] = child
            return self._result(frame, node, output, tensors, versions)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Let torch compute without seeing it."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def _framed(
        self,
        module: nn.Module,
        name: str,
        original: Callable[..., Any],
        args: Any,
        kwargs: Any,
        parent: Frame | None,
    ) -> tuple[Frame, Any]:
        frame = Frame(self, name, module, parent)
        self.calls.setdefault(name, []).append(frame)
        before = _state(module)
        self.frames.append(frame)
        paused, self.paused = self.paused, 1
        try:
            args, kwargs = frame.enter(args, kwargs)
            self.paused = 0
            output = original(module, *args, **kwargs)
            self.paused = 1
            frame.leave(output)
        except Exception as error:
            frame.unclear = f"it raises {type(error).__name__}"
            raise
        finally:
            self.paused = paused
            self.frames.pop()
        after = _state(module)
        for key in before.keys() | after.keys():
            old, new = before.get(key), after.get(key)
            frame.keeps = frame.keeps or old is not new
            if old is not new and old is not None and not isinstance(old, weakref.ref):
                frame.unclear = frame.unclear or f"it changes '{key}' from call to call"
        return frame, output

    def _result(
        self,
        frame: Frame,
        node: fx.Node,
        output: Any,
        tensors: Sequence[Tensor],
        versions: Sequence[int],
    ) -> Any:
        """Bind the output of a node, and note what it changed in place."""
        changed = [t for t, v in zip(tensors, versions, strict=True) if _version(t) != v]
        for tensor in changed:
            self._changed(frame, node, tensor, output)
        if isinstance(output, Tensor) and any(output is t for t in tensors):
            if any(output is t for t in changed) or node.meta.get("constant"):
                frame._bind_tensor(output, node)
            else:  # it returned its argument: the argument keeps its node
                node.meta["shape"], node.meta["dtype"] = output.shape, output.dtype
            return output
        return frame.bind(output, node)

    def _changed(self, frame: Frame, node: fx.Node, tensor: Tensor, output: Any) -> None:
        storage = _storage(tensor)
        if id(tensor) in self.constants or storage is None:
            frame.unclear = "it changes a tensor of the model in place"
            return
        if output is tensor or output is None:
            node.meta["in_place"] = True
            if output is None:
                frame._bind_tensor(tensor, node)
        elif (known := frame.known.get(id(tensor))) is not None:
            known[1].meta["changed"] = True
        for other in self.frames:
            for reference, alias in other.known.values():
                found = reference()
                if found is None or found is tensor or alias is node:
                    continue
                if _storage(found) == storage:
                    alias.meta["changed"] = True

    # Torch functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or not self.frames:
            return meta.run(func, args, kwargs)
        with self._pause():
            return self._seen(func, args, kwargs)

    def _seen(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame, name = self.frames[-1], getattr(func, "__name__", "")
        if name == "__get__":
            return self._read(frame, func, args)
        if name == "size" and isinstance(args[0], Tensor):
            shape = self._shape(frame, args[0])
            index = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if index is None else shape[index]
        if name in ("numel", "nelement", "__len__") and not self._is_constant(frame, args[0]):
            value = func(*args, **kwargs)
            if name == "__len__":  # Python makes a plain number of it
                return frame.decide(frame.call(_length, args), value, forced=False)
            return Dim(value, frame, frame.call(Tensor.numel, args))
        if name == "__iter__" and isinstance(args[0], Tensor):
            frame.decide(frame.call(_length, args), len(args[0]), forced=False)
            return iter(self._recorded(frame, torch.unbind, args, {}))
        if name in VALUES:
            return self._value(frame, func, name, args, kwargs)
        return self._recorded(frame, func, args, kwargs)

    def _read(self, frame: Frame, func: Any, args: tuple[Any, ...]) -> Any:
        """Return an attribute of a tensor."""
        owner = func.__self__
        attribute = getattr(owner, "__name__", "") or getattr(owner.fget, "__name__", "")
        if attribute == "shape":
            return self._shape(frame, args[0])
        value = func(*args)
        if isinstance(value, Tensor) and attribute != "grad":
            node = frame.call(getattr, (args[0], attribute))
            frame._bind_tensor(value, node)
        return value

    def _shape(self, frame: Frame, tensor: Tensor) -> torch.Size:
        if self._is_constant(frame, tensor):
            return tensor.shape
        shape = frame.call(getattr, (tensor, "shape"))
        shape.meta["value"] = tensor.shape
        return torch.Size(
            Dim(size, frame, frame.call(operator.getitem, (shape, n)))
            for n, size in enumerate(tensor.shape)
        )

    def _is_constant(self, frame: Frame, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return True
        found = frame.known.get(id(value))
        if found is not None and found[0]() is value:
            return bool(found[1].meta.get("constant"))
        return id(value) in self.constants

    def _value(
        self, frame: Frame, func: Callable[..., Any], name: str, args: Any, kwargs: Any
    ) -> Any:
        if all(self._is_constant(frame, t) for t in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        node = frame.call(func, args, kwargs)
        if self.script is not None:  # nothing has values
            if name != "__bool__":
                raise RecordingError("forward reads values of its input")
            return frame.decide(node, True)
        return frame.decide(node, func(*args, **kwargs), forced=name == "__bool__")

    def _recorded(
        self, frame: Frame, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.autocast != _autocast():
            frame.unclear = "it turns autocast on or off"
        tensors = list(tensors_in((args, kwargs)))
        nodes = frame.node(args), frame.node(kwargs)
        versions = [_version(t) for t in tensors]
        output = meta.run(func, _map(args, Tensor, _same), _map(kwargs, Tensor, _same))
        changes = any(_version(t) != v for t, v in zip(tensors, versions, strict=True))
        if not changes and not _holds_tensors(output):
            return output
        node = frame.graph.create_node(*_target(func), *nodes)
        node.meta["constant"] = func.__name__ not in RANDOM and _is_constant(node)
        if _counts_a_size(func, args, kwargs):
            frame.decide(frame.call(len, (node,)), len(output), forced=False)
        return self._result(frame, node, output, tensors, versions)


def _counts_a_size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a function returns as many tensors as an axis of its input has steps."""
    if func.__name__ == "unbind":
        return True
    if func.__name__ != "split" or len(args) < 2 or not isinstance(args[1], int):
        return False
    return (args[2] if len(args) > 2 else kwargs.get("dim", 0)) != 1


def _length(tensor: Tensor) -> int:
    return tensor.shape[0]


@contextmanager
def _sizes_followed(model: nn.Module) -> Iterator[None]:
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
        tracked = any(isinstance(v, _Tracked) for v in values)
        return compute(*values) if tracked else function(*values)

    return call


def explore(frame: Frame, opaque: Callable[[nn.Module, str], bool]) -> list[Frame]:
    """Return a frame for each way that a forward may take, whatever its sizes and values are.

    Args:
        frame: of a call that was recorded without values, or can be run so.
        opaque: of `Recorder`.

    Raises:
        RecordingError: not all ways can be run.
    """
    scripts: list[list[Any]] = [[]]
    frames: list[Frame] = []
    while scripts:
        script = scripts.pop()
        recorder = Recorder(
            frame.module, lambda module, name: True, script=script, device=frame.recorder.device
        )
        recorder.names = dict(frame.recorder.names)
        recorder.constants = frame.recorder.constants
        args, kwargs = _map(frame.inputs, _Shape, lambda shape: _empty(shape, frame.recorder))
        try:
            with torch.no_grad(), torch.device("meta"):
                recorder.run(args, kwargs)
        except Exception as error:  # forward is anyone's code
            raise RecordingError(str(error)) from error
        (found,) = recorder.calls[frame.name]
        found.parent = frame.parent
        taken = [d.value for d in found.decisions if d.forced]
        if len(taken) > MOST_DECISIONS or len(frames) > MOST_PATHS:
            raise RecordingError("it branches too often")
        frames.append(found)
        for n in range(len(script), len(taken)):
            scripts.append([*taken[:n], not taken[n]])
    return frames


def _empty(shape: _Shape, recorder: Recorder) -> Tensor:
    dtype = recorder.dtype_of_model() if shape.dtype.is_floating_point else shape.dtype
    return torch.empty(shape.shape, dtype=dtype, device="meta")


@cache
def _signature_of(forward: Callable[..., Any]) -> tuple[list[inspect.Parameter], frozenset[str]]:
    function: Any = inspect.unwrap(forward)
    parameters = list(inspect.signature(forward).parameters.values())
    code = getattr(function, "__code__", None)
    read = {p.name for p in parameters}
    if isinstance(code, CodeType) and function is getattr(forward, "__func__", forward):
        loaded = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD")}
        read &= loaded | set(code.co_cellvars)
    return parameters, frozenset(read)


def _signature(module: nn.Module) -> tuple[list[inspect.Parameter], frozenset[str]]:
    """Return the parameters of a forward, and the names of those that it reads."""
    own = vars(module).get("forward")
    if own is not None:
        return _signature_of(own)
    parameters, read = _signature_of(type(module).forward)
    return parameters[1:], read


def _positional(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with as few keywords as possible."""
    if not kwargs:
        return args, kwargs
    rest = dict(kwargs)
    for parameter in _signature(module)[0][len(args) :]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name not in rest:
            break
        args = (*args, rest.pop(parameter.name))
    return args, rest


def _state(module: nn.Module) -> dict[str, Any]:
    return {k: weakref.ref(v) if isinstance(v, Tensor) else v for k, v in vars(module).items()}


@has_side_effect
def set_items(tensor: Any, index: Any, value: Any) -> Any:
    """Assign to a part of a tensor; return the tensor."""
    tensor[index] = value
    return tensor


def _target(func: Any) -> tuple[str, Any]:
    """Return operation and target of a node that calls `func`."""
    name = func.__name__
    qualified = getattr(func, "__qualname__", "")
    method = getattr(Tensor, name, None)
    if method is func or (qualified.startswith("Tensor") and method is not None):
        if name == "__getitem__":
            return "call_function", operator.getitem
        if name == "__setitem__":
            return "call_function", set_items
        return "call_method", name
    return "call_function", func


def _is_constant(node: fx.Node) -> bool:
    return all(i.meta.get("constant") for i in node.all_input_nodes)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_plain(v) for v in value)
    return isinstance(value, int | float | str | bool | None)


def _structure(value: Any) -> Any:
    """Return what a forward may decide on without being seen; `_FREE` for a tensor or number."""
    if isinstance(value, Tensor | Dim | Ratio):
        return _FREE
    if type(value) is tuple:
        inner = [_structure(v) for v in value]
        return _FREE if all(i is _FREE for i in inner) else inner
    if isinstance(value, list | tuple):
        return [len(value), *(_structure(v) for v in value)]
    if isinstance(value, Mapping):
        return {str(k): _structure(v) for k, v in value.items()}
    return value


def _holds_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _same(value: Any) -> Any:
    return value


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return containers with `function` of what is of a kind, and with plain numbers."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, Dim | Ratio):
        return value._plain()
    if type(value) is dict:
        return {k: _map(v, kind, function) for k, v in value.items()}
    if type(value) in (tuple, list, torch.Size):
        items = [_map(v, kind, function) for v in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            return type(value)(items)
    return value
