"""`record`: the graph of a model, traced while it runs on an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect, map_aggregate, map_arg

from repnet.equivalence import Inputs
from repnet.symbolic import twin

Leaf = Callable[[nn.Module], bool]


class RecordingError(RuntimeError):
    """The forward of a model cannot be recorded."""


@dataclass
class Recording:
    """A graph of torch functions and leaf modules.

    Args:
        root: a copy of the model, with shared tensors, and with the constants that forward made.
        graph: of it, with the shape of each node's tensor in `node.meta["shape"]`.
        opaque: reason by name, of modules that could not be recorded; the graph calls them whole.
    """

    root: nn.Module
    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)


def record(model: nn.Module, inputs: Inputs, leaf: Leaf) -> Recording:
    """Return the graph of one run.

    Unlike symbolic tracing, every proxy carries the value that it has in this run. Sizes stay
    symbolic where they only enter other operations; where forward branches on one, the branch of
    this run is recorded, and the graph checks that later inputs take the same one. A module whose
    forward depends on the values of tensors is called as a whole.

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
        try:
            with torch.no_grad():
                graph = recorder.trace(own)
        except Exception as error:  # forward is anyone's code
            names = {module: name for name, module in own.named_modules()}
            culprit = names.get(recorder.failed or own, "")
            if culprit == "" or culprit in opaque:
                raise RecordingError(str(error)) from error
            opaque[culprit] = str(error)
            continue
        for node, value in recorder.decided.items():
            with graph.inserting_after(node):
                graph.call_function(same_as_recorded, (node, value))
        root = twin(model)  # one that did not run
        for name, value in vars(own).items():
            if name.startswith("_tensor_constant"):
                setattr(root, name, value)
        return Recording(root, graph, opaque)


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
    return node.target(*args, **kwargs)


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
    if value != recorded:
        raise ValueError(
            f"this graph was recorded where a size is {recorded}, and here it is {value}, on which "
            "its forward branches; record it again with an example of this size"
        )


class _Proxy(fx.Proxy):
    """Stands for a value of the run, and knows it."""

    value: Any
    tracer: _Recorder
    __getitem__: Callable[..., Any]  # set by fx, like every operator

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.value, name)
        if value is None or isinstance(value, bool | str | torch.device | torch.dtype):
            return value
        if name in ("ndim", "layout", "names"):
            return value
        if name in ("dim", "ndimension") and isinstance(self.value, Tensor):
            return lambda: self.value.ndim
        if isinstance(self.value, Mapping) and name in ("keys", "values", "items"):
            return {
                "keys": lambda: list(self.value),
                "values": lambda: [self[key] for key in self.value],
                "items": lambda: [(key, self[key]) for key in self.value],
            }[name]
        return _Attribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, Mapping):
            return iter(list(self.value))
        return iter([self[index] for index in range(len(self.value))])

    def __len__(self) -> int:
        return len(self.value)

    def __contains__(self, item: Any) -> bool:
        return item in self.value

    def _decided(self) -> Any:
        """Return the value, for a decision that the graph then depends on."""
        if isinstance(self.value, Tensor):
            raise TypeError("forward depends on values of its input")
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
        return id(self)


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
        self.failed: nn.Module | None = None
        self.running = False

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return qualified_name in self.opaque or self.leaf(module)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        arguments = inspect.signature(root_fn).bind(
            self.root, *self.inputs.args, **(self.inputs.kwargs or {})
        )
        positional = [
            self._placeholder(f"input_{n}" if len(arguments.args) > 2 else "x", value)
            for n, value in enumerate(arguments.args[1:])
        ]
        named = {name: self._placeholder(name, v) for name, v in arguments.kwargs.items()}
        return lambda *args: root_fn(*args, **named), [self.root, *positional]

    def _placeholder(self, name: str, value: Any) -> _Proxy:
        proxy = self.create_proxy("placeholder", name, (), {})
        return self._keep(proxy, value)

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind not in ("placeholder", "output"):
            self._keep(proxy, self._run(kind, target, _values(args), _values(kwargs)))
        return proxy

    def _keep(self, proxy: Any, value: Any) -> _Proxy:
        proxy.value = value
        if isinstance(value, Tensor):
            proxy.node.meta["shape"] = value.shape
        else:
            proxy.node.meta["value"] = value
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
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise


def _values(arguments: Any) -> Any:
    return map_aggregate(arguments, lambda a: a.value if isinstance(a, fx.Proxy) else a)
