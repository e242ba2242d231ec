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

import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.overrides import TorchFunctionMode

from repnet import meta_device
from repnet.equivalence import tensors_in
from repnet.fold.frame import Decision, Frame, holds_tensors, is_constant, mapped, signature_of
from repnet.fold.sizes import Dim, sizes_followed

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
_HERE = str(Path(__file__).parent)  # whose functions stand between a forward and its decision


class RecordingError(RuntimeError):
    """A run cannot be recorded on these inputs."""


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
        self.constants: dict[int, str] = {}  # names of tensors by identity
        self.held: list[Tensor] = []  # these, so that no other tensor gets their identity
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            own = {**module._parameters, **module._buffers, **vars(module)}
            for key, value in own.items():
                if isinstance(value, Tensor):
                    self.held.append(value)
                    self.constants.setdefault(id(value), prefix + key)
                elif isinstance(value, list | tuple | dict) and not key.startswith("_"):
                    for tensor in tensors_in(value):
                        self.held.append(tensor)
                        self.constants.setdefault(id(tensor), f"{prefix}{key}.?")
        self.watched: list[Any] = []  # functions that took a decision and run on
        self.steered: set[str] = set()  # modules whose attributes another one sets
        self.frames: list[Frame] = []  # whose forward is running, the innermost last
        self.calls: dict[str, list[Frame]] = {}
        self.leaves: dict[str, list[tuple[Frame, fx.Node]]] = {}
        self.paused = 0
        self.inside_leaf = False
        self.gradients = False
        self.autocast = _autocast()
        self.dtype = self.dtype_of_model()

    def dtype_of_model(self) -> torch.dtype:
        """Return the dtype of the first weight, which other runs may change."""
        found = (t.dtype for t in self.model.parameters() if t.is_floating_point())
        return next(found, torch.get_default_dtype())

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, gradients: bool = False
    ) -> None:
        """Run the model under observation.

        Args:
            args: of its forward.
            kwargs: of its forward.
            gradients: whether they are enabled. They need tensors longer than the forward does, so
                that nothing can be said of those that it keeps aside.
        """
        self.gradients = gradients
        original, set_attribute = nn.Module.__call__, nn.Module.__setattr__
        recorder = self

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._called(module, original, args, kwargs)

        def set_noted(module: nn.Module, name: str, value: Any) -> None:
            frame = recorder.frames[-1] if recorder.frames else None
            if frame is not None and module is not frame.module:
                recorder.steered.add(recorder.names.get(module, ""))
                frame.keeps = True
                old = vars(module).get(name)
                if not (old is None or old is value or isinstance(old, Tensor)):
                    frame.unclear = frame.unclear or f"it changes '{name}' from call to call"
            set_attribute(module, name, value)

        nn.Module.__call__ = called  # type: ignore[method-assign]
        nn.Module.__setattr__ = set_noted  # type: ignore[method-assign,assignment]
        try:
            with torch.set_grad_enabled(gradients), self, sizes_followed(self.model):
                output = self.model(*args, **kwargs)
            if not gradients:
                self._mark_escaped(output)
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
            for name in self.steered:
                for frame in self.calls.get(name, ()):
                    frame.unclear = frame.unclear or "another module sets its attributes"

    def watch(self, frame: Frame, decision: Decision) -> None:
        """Note when the function returns that takes a decision, if it is not the forward itself."""
        caller: Any = sys._getframe(1)
        while caller is not None and caller.f_code.co_filename.startswith(_HERE):
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

    def _mark_escaped(self, output: Any) -> None:
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
        with self._bookkeeping():
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
                with self._pause():
                    plain = mapped((args, kwargs), Tensor, _same)
                    output = original(module, *plain[0], **plain[1])
            finally:
                self.inside_leaf = before
        else:
            child, output = self._framed(module, name, original, args, kwargs, frame)
            node.meta["frame"] = child
        with self._bookkeeping():
            return self._result(frame, node, output, tensors, versions)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Let torch compute without seeing it."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        """Read tensors without a torch function for each attribute, which would take longer."""
        with self._pause(), torch._C.DisableTorchFunction():
            yield

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
        try:
            with self._bookkeeping():
                args, kwargs = frame.enter(args, kwargs)
            output = original(module, *args, **kwargs)
            with self._bookkeeping():
                frame.leave(output)
        except Exception as error:
            frame.unclear = f"it raises {type(error).__name__}"
            raise
        finally:
            self.frames.pop()
        after = _state(module)
        for key in before.keys() | after.keys():
            old, new = before.get(key), after.get(key)
            same = old is new or (isinstance(old, _Held) and isinstance(new, _Held) and old == new)
            frame.keeps = frame.keeps or not same
            if not same and old is not None and not isinstance(old, weakref.ref) and old != _Held():
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
            return meta_device.run(func, args, kwargs)
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
        output = meta_device.run(func, mapped(args, Tensor, _same), mapped(kwargs, Tensor, _same))
        changes = any(_version(t) != v for t, v in zip(tensors, versions, strict=True))
        if not changes and not holds_tensors(output):
            return output
        node = frame.graph.create_node(*_target(func), *nodes)
        node.meta["constant"] = func.__name__ not in RANDOM and is_constant(node)
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


def _positional(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with as few keywords as possible."""
    if not kwargs:
        return args, kwargs
    rest = dict(kwargs)
    for parameter in signature_of(module)[0][len(args) :]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name not in rest:
            break
        args = (*args, rest.pop(parameter.name))
    return args, rest


class _Held:
    """What was in a container, or in an object, to be compared by identity."""

    def __init__(self, value: Any = ()) -> None:
        self.items = list(_items(value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and list(map(id, self.items)) == list(map(id, other.items))

    __hash__ = None  # type: ignore[assignment]


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value
        value = value.values()
    for item in value:
        if isinstance(item, list | tuple | set | Mapping):
            yield from _items(item)
        else:
            yield item


def _state(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module as they are now: tensors weakly, containers by contents."""
    state: dict[str, Any] = {}
    for key, value in vars(module).items():
        if isinstance(value, Tensor):
            state[key] = weakref.ref(value)
        elif isinstance(value, list | set | Mapping):
            state[key] = _Held(value)
        elif type(getattr(value, "__dict__", None)) is dict and not isinstance(value, nn.Module):
            state[key] = _Held([value, *vars(value).values()])
        else:
            state[key] = value
    return state


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


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _same(value: Any) -> Any:
    return value
