"""`record`: the graph of a model, traced while it runs on an example."""

from __future__ import annotations

import inspect
import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect, map_aggregate, map_arg
from torch.utils._pytree import tree_map

from repnet.equivalence import Inputs
from repnet.symbolic import twin

Leaf = Callable[[nn.Module], bool]

# What reads of a tensor no values.
SHAPES = {
    "shape", "size", "ndim", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "element_size", "is_floating_point", "is_complex", "storage_offset",
}  # fmt: skip
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
# A kernel is a value, and what the recorder accepts reads nothing that was changed in place.
OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class RecordingError(RuntimeError):
    """The forward of a model cannot be recorded."""


@dataclass
class Recording:
    """A graph of torch functions and leaf modules.

    Args:
        root: a copy of the model, with shared parameters, and with the constants that forward made.
        graph: of it, with the shape of each node's tensor in `node.meta["shape"]`, the name of the
            module whose forward it belongs to in `"scope"`, the nodes whose tensors it changes in
            place in `"changes"`, and `"kept"` where these are read again, or nothing reads it.
        opaque: reason by name, of modules that could not be recorded; the graph calls them whole.
        decisions: names of the modules whose forward branches on a size or another argument.
        dimension_decisions: the same for the number of dimensions.
    """

    root: nn.Module
    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)
    decisions: set[str] = field(default_factory=set)
    dimension_decisions: set[str] = field(default_factory=set)


def record(model: nn.Module, inputs: Inputs, leaf: Leaf) -> Recording:
    """Return the graph of one run.

    Unlike symbolic tracing, every proxy carries the value that it has in this run. Sizes stay
    symbolic where they only enter other operations; where forward branches on one, the branch of
    this run is recorded, and the graph checks that later inputs take the same one. A module whose
    forward depends on the values of tensors, draws random numbers, or changes tensors of the model
    in place, is called as a whole.

    Args:
        model: in evaluation mode.
        inputs: of `forward`.
        leaf: which modules to call rather than to look into.

    Raises:
        RecordingError: the model's own forward cannot be recorded.
    """
    opaque: dict[str, str] = {}
    while True:
        own = twin(model)  # forward may keep proxies aside
        recorder = _Recorder(leaf, opaque, inputs)
        random = torch.random.get_rng_state()
        try:
            with torch.no_grad(), _recorded_factories():
                graph = recorder.trace(own)
        except Exception as error:  # forward is anyone's code
            names = {module: name for name, module in own.named_modules()}
            culprit = names.get(recorder.failed or own, "")
            if culprit == "" or culprit in opaque:
                raise RecordingError(str(error)) from error
            opaque[culprit] = str(error)
            continue
        if not torch.equal(random, torch.random.get_rng_state()):
            torch.random.set_rng_state(random)
            raise RecordingError("forward draws random numbers")
        for node in graph.nodes:
            if "changes" in node.meta and not node.users:
                node.meta["kept"] = True
        for node, value in recorder.decided.items():
            with graph.inserting_after(node):
                graph.call_function(same_as_recorded, (node, value))
        graph._tracer_cls = None  # so that a pickled graph is read back by fx's own
        root = twin(model)  # one that did not run
        for name, value in vars(own).items():
            if name.startswith("_tensor_constant"):
                setattr(root, name, value)
        return Recording(root, graph, opaque, recorder.decisions, recorder.dimension_decisions)


def tidy(graph: fx.Graph) -> None:
    """Remove the nodes that nothing reads, but for those that change what others read."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or bool(node.meta.get("kept")))


def arguments_of(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a call of `forward` by the names of a graph's placeholders."""
    signature = inspect.signature(type(model).forward)
    bound = signature.bind(model, *inputs.args, **(inputs.kwargs or {}))
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"{name}_{n}": v for n, v in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found


@contextmanager
def _recorded_factories() -> Iterator[None]:
    """Let functions that make tensors take proxies for sizes, which torch refuses at once."""

    def recorded(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            proxy = next(iter(_proxies((args, kwargs))), None)
            if proxy is None:
                return factory(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", factory, args, kwargs)

        return make

    originals = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, factory in originals.items():
            setattr(torch, name, recorded(factory))
        yield
    finally:
        for name, factory in originals.items():
            setattr(torch, name, factory)


def run_node(model: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return what a node of a recorded graph computes.

    Args:
        model: whose graph it is, or a copy of it.
        node: not a placeholder or output.
        values: of the nodes that it reads; of those that are not here, attributes of the model are
            looked up, numbers are those of the recorded run, and tensors have no values.
    """

    def value(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        if argument.op == "get_attr":
            return _attribute(model, str(argument.target))
        if "shape" in argument.meta:
            return torch.empty(argument.meta["shape"], device="meta")
        return argument.meta["value"]

    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        return _attribute(model, str(node.target))
    assert callable(node.target)
    function = node.target
    if not any(True for _ in _tensors((args, kwargs))):  # what is left are kernels and numbers
        function = OUT_OF_PLACE.get(function, function)
    return function(*args, **kwargs)


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


@has_side_effect
def same_as_recorded(value: Any, recorded: Any) -> None:
    """Do nothing if a value that forward branches on is that of the recorded run.

    Raises:
        ValueError: it is another one, and so forward may take another way.
    """
    if isinstance(value, fx.Proxy):  # fx traces a pickled graph when it is read
        value.tracer.create_proxy("call_function", same_as_recorded, (value, recorded), {})
    elif value != recorded:
        raise ValueError(
            f"this graph was recorded where a value is {recorded}, and here it is {value}, on "
            "which its forward branches; record it again with an example of this kind"
        )


class _Proxy(fx.Proxy):
    """Stands for a value of the run, and knows it."""

    value: Any
    tracer: _Recorder
    tainted = False  # it is no tensor, but depends on the values of one
    __getitem__: Callable[..., Any]  # set by fx, like every operator

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.value, name)
        if value is None or isinstance(value, bool | str | torch.device | torch.dtype):
            return value
        if isinstance(self.value, Tensor) and name in ("ndim", "dim", "ndimension"):
            self.tracer.dimension_decisions.add(self.tracer.scopes[-1])
            return value if name == "ndim" else lambda: self.value.ndim
        if name in ("layout", "names"):
            return value
        if isinstance(self.value, Mapping) and name in ("keys", "values", "items"):
            pairs = [(key, self[key]) for key in self]
            found = {"keys": list(self), "values": [v for _, v in pairs], "items": pairs}
            return lambda: found[name]
        return _Attribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter(self._decide(tuple))
        size = len(self.value) if isinstance(self.value, torch.Size) else len(self)
        return iter([self[index] for index in range(size)])

    def keys(self) -> Any:
        """Return the keys of a mapping; fx has a method of this name."""
        return list(self)

    def __len__(self) -> int:
        if isinstance(self.value, torch.Size):
            self.tracer.dimension_decisions.add(self.tracer.scopes[-1])
            return len(self.value)
        return self._decide(len)

    def __contains__(self, item: Any) -> bool:
        return self._decide(operator.contains, item)

    def _decide(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})._decided()

    def _decided(self) -> Any:
        """Return the value, for a decision that the graph then depends on."""
        if isinstance(self.value, Tensor) or self.tainted:
            raise TypeError("forward depends on values of its input")
        self.tracer.decisions.add(self.tracer.scopes[-1])
        self.tracer.decided[self.node] = self.value
        return self.value

    def __bool__(self) -> bool:
        return bool(self._decided())

    def __int__(self) -> int:
        return int(self._decided())

    def __index__(self) -> int:
        return int(self._decided())

    def __float__(self) -> float:
        return float(self._decided())

    def __ceil__(self) -> int:
        return self._decided().__ceil__()

    def __floor__(self) -> int:
        return self._decided().__floor__()

    def __trunc__(self) -> int:
        return self._decided().__trunc__()

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._decided(), digits)

    def __hash__(self) -> int:
        return id(self) if isinstance(self.value, Tensor) else hash(self._decided())

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)


class _Attribute(fx.proxy.Attribute, _Proxy):
    """An attribute of a proxy, such as `x.shape`, or a method before its call."""

    @property
    def value(self) -> Any:
        return getattr(self.root.value, self.attr)


class _Recorder(fx.Tracer):
    """Traces and runs at once; see `record`."""

    proxy_buffer_attributes = True

    def __init__(self, leaf: Leaf, opaque: dict[str, str], inputs: Inputs) -> None:
        super().__init__()
        self.leaf, self.opaque, self.inputs = leaf, opaque, inputs
        self.decided: dict[fx.Node, Any] = {}
        self.decisions: set[str] = set()
        self.dimension_decisions: set[str] = set()
        self.scopes = [""]  # modules whose forward is running, the innermost last
        self.aliases: dict[int, list[weakref.ref[_Proxy]]] = defaultdict(list)  # by storage
        self.changed: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # in place, by which nodes
        self.autocast = _autocast()
        self.failed: nn.Module | None = None
        self.running = self.shape_only = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        values = tree_map(_clone, arguments_of(self.root, self.inputs))  # forward may change them
        proxies = {name: self._placeholder(name, value) for name, value in values.items()}

        def called(root: nn.Module) -> Any:
            parameters = list(inspect.signature(root_fn).parameters.values())[1:]
            named, extra = dict(proxies), []
            for parameter in parameters:
                if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                    prefix = f"{parameter.name}_"
                    names = [
                        n for n in named if n.startswith(prefix) and n[len(prefix) :].isdigit()
                    ]
                    extra = [named.pop(n) for n in names]
            if not extra:
                return root_fn(root, **named)
            before = [named.pop(p.name) for p in parameters if p.name in named and p.kind <= 1]
            return root_fn(root, *before, *extra, **named)

        return called, [self.root]

    def _placeholder(self, name: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", name, (), {})
        self._keep(proxy, value)
        if value is None or isinstance(value, bool | str):
            self.decided[proxy.node] = value
            return value
        return proxy

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Proxy) and not self.shape_only:
            for node in self.changed[a.node]:
                node.meta["kept"] = True
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> Any:
        if self.autocast != _autocast():
            raise TypeError("forward turns autocast on or off")
        self.shape_only = target in SHAPES or (target is getattr and args[1] in SHAPES)
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        proxy.node.meta["scope"] = self.scopes[-1]
        if kind not in ("placeholder", "output"):
            given = _values((args, kwargs))
            tensors = list(_tensors(given))
            versions = [tensor._version for tensor in tensors]
            value = self._run(kind, target, *given)
            changed = [t for t, v in zip(tensors, versions, strict=True) if t._version != v]
            self._note(proxy.node, changed)
            self._keep(proxy, value)
            if not isinstance(value, Tensor) and not any(True for _ in _tensors(value)):
                sources = [p for p in _proxies((args, kwargs)) if p is not proxy]
                proxy.tainted = any(p.tainted for p in sources) or (
                    not self.shape_only
                    and target is not len
                    and any(isinstance(p.value, Tensor) for p in sources)
                )
        return proxy

    def _note(self, node: fx.Node, changed: list[Tensor]) -> None:
        """Note that `node` has changed tensors in place, and of which others it is a view."""
        for tensor in changed:
            known = [ref() for ref in self.aliases[tensor.untyped_storage()._cdata]]
            alive = [proxy for proxy in known if proxy is not None]
            if not alive or any(proxy.node.op == "get_attr" for proxy in alive):
                raise TypeError("forward changes a tensor of the model in place")
            for proxy in alive:
                self.changed[proxy.node].append(node)
                node.meta.setdefault("changes", []).append(proxy.node)

    def _keep(self, proxy: Any, value: Any) -> _Proxy:
        proxy.value = value
        if isinstance(value, Tensor):
            proxy.node.meta["shape"] = value.shape
        else:
            proxy.node.meta["value"] = value
        for tensor in _tensors(value):
            self.aliases[tensor.untyped_storage()._cdata].append(weakref.ref(proxy))
        return proxy

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        with self._plainly():
            if kind == "get_attr":
                return _attribute(self.root, target)
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            return target(*args, **kwargs)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Let modules compute; their calls and parameters are otherwise recorded."""
        before, self.running = self.running, True
        try:
            yield
        finally:
            self.running = before

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if name in self.opaque or self.leaf(m):
            return self.create_proxy("call_module", name, args, kwargs)
        self.scopes.append(name)
        try:
            return forward(*args, **kwargs)
        except Exception:
            self.failed = self.failed or m
            raise
        finally:
            self.scopes.pop()


def _values(arguments: Any) -> Any:
    return map_aggregate(arguments, lambda a: a.value if isinstance(a, fx.Proxy) else a)


def _proxies(arguments: Any) -> list[Any]:
    found: list[Any] = []
    map_aggregate(arguments, lambda a: found.append(a) if isinstance(a, fx.Proxy) else None)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
