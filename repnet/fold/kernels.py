"""`Kernels`: runs the nodes of recorded frames on a `ConvKernel` in the place of their input.

A node is run by calling what it calls: the torch function, or the `forward` of a module, receives
kernels where the recorded run had tensors, and the algebra of `ConvKernel` returns the next kernel
or refuses with the reason. So nothing here knows a type of layer, and a subclass that does
something else than its parent cannot deceive it. A child module is run once, on the identity, and
its kernel is composed with that of its input wherever it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from repnet.convolution import Layer
from repnet.fold.frame import Frame, is_constant
from repnet.kernel import ConvKernel, NotAffineError, NotFoldableError
from repnet.precision import InFloat64

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
UPSAMPLING = tuple(getattr(functional, f"conv_transpose{axes}d") for axes in (1, 2, 3))
CONVOLVING = (
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, *UPSAMPLING
)  # fmt: skip


def argument_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, which may have been given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def steps_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the node, or the steps of the forward that it calls, down to single functions."""
    child: Frame | None = node.meta.get("frame")
    if child is None:
        yield node
        return
    for inner in child.graph.nodes:
        yield from steps_of(inner)


class Kernels:
    """Runs the nodes of frames on kernels, in float64.

    Args:
        model: whose frames they are; a copy on the meta device for shapes alone.
        is_uniform: whether every call of a module, by its name, does the same.
    """

    def __init__(self, model: nn.Module, is_uniform: Callable[[str], bool]) -> None:
        self.is_uniform = is_uniform
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.model = model
        tensors = chain(model.parameters(), model.buffers())
        self.device = next((t.device for t in tensors), torch.device("cpu"))
        self.constants: dict[fx.Node, Any] = {}
        self.calls: dict[tuple[Any, int], Any] = {}  # what `module` returned or raised

    def identity(self, node: fx.Node) -> ConvKernel:
        """Return `x -> x` for the tensor of a node, `(batch, channels, ...)`."""
        shape = node.meta.get("shape", ())
        if not 2 <= len(shape) <= 5:
            raise NotFoldableError("a kernel has 0 to 3 spatial axes")
        return ConvKernel.identity(
            shape[1], axes=len(shape) - 2, dtype=torch.float64, device=self.device
        )

    def alone(self, node: fx.Node) -> Any:
        """Return what a node makes of its first argument, whatever comes before it.

        Raises:
            NotFoldableError: it is no kernel, or it reads something else as well.
        """
        given = node.args[0] if node.args else None
        if not isinstance(given, fx.Node):
            raise NotAffineError("it takes no tensor")
        return self.node(node, {given: self.identity(given)})

    def frame(self, frame: Frame, kernel: ConvKernel) -> Any:
        """Return what the forward of a frame makes of a kernel.

        Raises:
            NotFoldableError: not a kernel.
        """
        values: dict[fx.Node, Any] = {}
        for node in frame.graph.nodes:
            if node.op == "placeholder":
                if "shape" in node.meta:
                    values[node] = kernel
            elif node.op == "output":
                (result,) = node.args
                return values.get(result) if isinstance(result, fx.Node) else None
            elif not node.meta.get("constant") and node.users:
                values[node] = self.node(node, values)
        return None

    def node(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Return what a node computes.

        Args:
            node: neither placeholder nor output.
            values: of the nodes that it reads, except the constants.

        Raises:
            NotFoldableError: it is no kernel.
        """

        def value(argument: fx.Node) -> Any:
            if argument.meta.get("changed"):
                raise NotAffineError("a view of a tensor is changed in place")
            if argument in values:
                return values[argument]
            if argument.meta.get("constant"):
                return self.constant(argument)
            raise NotAffineError("it depends on a size, or on another input")

        args: Any = map_arg(node.args, value)
        kwargs: Any = map_arg(node.kwargs, value)
        try:
            if node.op == "call_module":
                return self._module(node, args, kwargs)
            if is_constant(node):
                raise NotAffineError("it is random")
            with InFloat64():
                return run(node, *self._placed(args, kwargs))
        except NotFoldableError:
            raise
        except Exception as error:  # anything may be called
            raise NotAffineError(f"it cannot be followed: {error}") from error

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], ConvKernel):
            raise NotAffineError("it takes more than one tensor")
        x = args[0]
        identity = ConvKernel.identity(
            x.out_channels, axes=x.axes, dtype=torch.float64, device=x.device
        )
        found = self.module(str(node.target), node.meta.get("frame"), identity)
        if not isinstance(found, ConvKernel) or found.in_channels != x.out_channels:
            raise NotAffineError("it is no convolution of its input")
        return x.then(found)

    def module(self, name: str, child: Frame | None, identity: ConvKernel) -> Any:
        """Return what a module makes of an identity, computed once.

        Args:
            name: of the module.
            child: its frame; None if it is called as a whole.
            identity: of as many channels as it takes.

        Raises:
            NotFoldableError: it makes no kernel of it.
        """
        key = (name if child is None else child, identity.axes)
        if key not in self.calls:
            try:
                self.calls[key] = self._call(name, child, identity)
            except NotFoldableError as error:
                self.calls[key] = error
        found = self.calls[key]
        if isinstance(found, NotFoldableError):
            raise found
        return found

    def _call(self, name: str, child: Frame | None, identity: ConvKernel) -> Any:
        """Return what a module makes of an identity."""
        if child is not None:
            if not self.is_uniform(child.name):
                raise NotAffineError("its forward branches, or cannot be followed")
            return self.frame(child, identity)
        module = self.modules[name]
        if module.training and isinstance(module, _BatchNorm | _DropoutNd):
            raise NotFoldableError("it is in training mode")
        with InFloat64():
            return module.forward(identity)  # without hooks, which are anyone's code

    def constant(self, node: fx.Node) -> Any:
        """Return the value of a node that no input reaches."""
        if node not in self.constants:
            if node.op == "get_attr":
                value: Any = self.model
                for name in str(node.target).split("."):
                    if name == "?":
                        raise NotFoldableError("a tensor is kept in a container")
                    value = getattr(value, name)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self.constant)
                with torch.no_grad(), InFloat64():
                    value = run(node, *self._placed(args, kwargs))
            self.constants[node] = value
        return self.constants[node]

    def _placed(self, args: Any, kwargs: Any) -> Any:
        """Return arguments that name the device of this model."""
        return map_aggregate(
            (args, kwargs), lambda v: self.device if isinstance(v, torch.device) else v
        )

    def weight(self, node: fx.Node) -> Tensor | None:
        """Return the weight of a call of a convolution or linear layer, None for anything else."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return module.weight if isinstance(module, Layer) else None
        if node.op == "call_function" and node.target in CONVOLVING:
            found = argument_of(node, 1, "weight")
            if isinstance(found, fx.Node) and found.meta.get("constant"):
                weight = self.constant(found)
                return weight if isinstance(weight, Tensor) else None
        return None

    def multiplications(self, node: fx.Node) -> int:
        """Return the multiplications of all convolution and linear layers that a node runs."""
        return sum(self._multiplications(step) for step in steps_of(node))

    def _multiplications(self, step: fx.Node) -> int:
        weight = self.weight(step)
        if weight is None:
            return 0
        if step.op == "call_module":
            upsamples = isinstance(self.modules[str(step.target)], TRANSPOSED)
        else:
            upsamples = step.target in UPSAMPLING
        values = step.all_input_nodes[0] if upsamples else step  # each meets one row of the weight
        return weight[0].numel() * values.meta.get("shape", torch.Size([0])).numel()

    def convolutions(self, node: fx.Node) -> int:
        """Return how many convolution and linear layers a node runs."""
        return sum(self.weight(step) is not None for step in steps_of(node))

    def norms(self, node: fx.Node) -> int:
        """Return how many batch norms a node runs."""
        return sum(
            isinstance(self.modules[str(step.target)], _BatchNorm)
            if step.op == "call_module"
            else step.target is functional.batch_norm
            for step in steps_of(node)
        )


def run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return the result of the function or method that a node calls, on other arguments."""
    if node.meta.get("in_place"):
        args = (_separate(args[0]), *args[1:])
    if node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        result = node.target(*args, **kwargs)
    return args[0] if result is None else result


def _separate(value: Any) -> Any:
    """Return a copy to change in place: the graph has nodes of its own for before and after."""
    if not isinstance(value, ConvKernel):
        return value.clone() if isinstance(value, Tensor) else value
    value = copy.copy(value)
    vars(value).pop("_is_shared", None)
    if "_border" in vars(value):
        vars(value)["_border"] = [*vars(value)["_border"]]
    return value
