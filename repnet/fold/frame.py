"""`Frame`: one call of one module, as the graph of what its own forward did."""

from __future__ import annotations

import dis
import inspect
import operator
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from repnet.equivalence import tensors_in
from repnet.fold.sizes import Dim, Ratio

if TYPE_CHECKING:
    from repnet.fold.record import Recorder

_FREE = "free"


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
        parameters, reads = signature_of(self.module)
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
        self.inputs = mapped((arguments.args, arguments.kwargs), Tensor, Shape)
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
        if not holds_tensors(value):
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
        elif isinstance(getattr(value, "__dict__", None), dict) and holds_tensors(value):
            for key, item in vars(value).items():
                self._bind_item(item, node, getattr, key)
        return value

    def _bind_item(self, value: Any, node: fx.Node, function: Any, key: Any) -> Any:
        if not holds_tensors(value) and not isinstance(value, Dim | Ratio | torch.Size):
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
        node.meta["constant"] = is_constant(node)
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
        if isinstance(value, tuple | list | Mapping) and holds_tensors(value):
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


class Shape:
    """What `explore` makes a tensor of."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


@cache
def _of_forward(forward: Callable[..., Any]) -> tuple[list[inspect.Parameter], frozenset[str]]:
    function: Any = inspect.unwrap(forward)
    parameters = list(inspect.signature(forward).parameters.values())
    code = getattr(function, "__code__", None)
    read = {p.name for p in parameters}
    if isinstance(code, CodeType) and function is getattr(forward, "__func__", forward):
        loaded = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD")}
        read &= loaded | set(code.co_cellvars)
    return parameters, frozenset(read)


def signature_of(module: nn.Module) -> tuple[list[inspect.Parameter], frozenset[str]]:
    """Return the parameters of a forward, and the names of those that it reads."""
    own = vars(module).get("forward")
    if own is not None:
        return _of_forward(own)
    parameters, read = _of_forward(type(module).forward)
    return parameters[1:], read


def is_constant(node: fx.Node) -> bool:
    """Return whether no input reaches what a node reads."""
    return all(i.meta.get("constant") for i in node.all_input_nodes)


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


def holds_tensors(value: Any) -> bool:
    """Return whether there is a tensor in nested containers or attributes."""
    return next(tensors_in(value), None) is not None


def mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return containers with `function` of what is of a kind, and with plain numbers."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, Dim | Ratio):
        return value._plain()
    if type(value) is dict:
        return {k: mapped(v, kind, function) for k, v in value.items()}
    if type(value) in (tuple, list, torch.Size):
        items = [mapped(v, kind, function) for v in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            return type(value)(items)
    return value
