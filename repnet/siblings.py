"""`find_chains`: norms that alone consume a convolution, though no module holds just the two."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.equivalence import Inputs
from repnet.kernel import ConvKernel, NotAffineError, NotFoldableError
from repnet.precision import InFloat64
from repnet.shapes import Calls
from repnet.symbolic import kernel_of, twin
from repnet.tracing import RecordingError, record, run_node, tidy

# What moves values and changes none.
REARRANGING = {
    "contiguous", "flatten", "permute", "reshape", "reshape_as", "squeeze", "swapaxes",
    "swapdims", "transpose", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """A convolution or linear layer and what follows it.

    Args:
        names: of the layer and of the layers that each alone consume what comes before; all but
            the first are channelwise, or begin so; the last one holds parameters or buffers.
        axes: spatial axes of the input of the followers.
        shared: the first of the names that `forward` also uses in another way, None where none is.
    """

    names: tuple[str, ...]
    axes: int
    shared: str | None


def find_chains(
    model: nn.Module,
    calls: Mapping[str, Calls],
    producer: Callable[[nn.Module], bool],
    failures: dict[str, str],
    name: str = "",
) -> Iterator[Chain]:
    """Yield the chains in all parts of `model` whose run can be recorded, in order of execution.

    Args:
        model: in evaluation mode, on the meta device.
        calls: of its modules, by the names that they have in the whole.
        producer: whether a module is a convolution or linear layer.
        failures: receives the reason by name of each module whose run cannot be recorded.
        name: of `model` in the whole.
    """
    layers = [m for m in model.modules() if producer(m)]
    inside = {m for layer in layers for m in layer.modules()}
    if (
        name not in calls
        or not layers
        or not any(
            True
            for m in model.modules()
            if m not in inside
            for _ in chain(m.parameters(False), m.buffers(False))
        )
    ):
        return  # no convolution, or nothing with statistics or weights that could go into one
    prefix = f"{name}." if name else ""
    try:
        with torch.device("meta"):  # also for what forward makes itself
            recording = record(model, calls[name].inputs, lambda m: producer(m) or _is_leaf(m))
    except RecordingError as error:  # its parts are tried
        failures[name] = str(error)
        for child_name, child in model.named_children():
            yield from find_chains(child, calls, producer, failures, prefix + child_name)
        return
    graph, decisions = recording.graph, recording.decisions | recording.dimension_decisions
    for inner, reason in recording.opaque.items():
        failures[prefix + inner] = reason
        for child_name, child in model.get_submodule(inner).named_children():
            path = f"{prefix}{inner}.{child_name}"
            yield from find_chains(child, calls, producer, failures, path)
    followed = [follow(model, node, producer) for node in graph.nodes]
    chains = [
        (tuple(str(node.target) for node in nodes), axes)
        for nodes, axes in followed
        if not _depends_on_a_decision(nodes, decisions)
    ]
    read = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    for (names, axes), count in Counter(chains).items():
        if len(names) < 2:
            continue
        whole = tuple(prefix + name for name in names)
        uses = [
            calls[w].count + sum(r.startswith(f"{n}.") for r in read)
            for n, w in zip(names, whole, strict=True)
        ]
        alone = next((i for i, n in enumerate(uses) if n != count), len(uses))
        if alone > 1:
            yield Chain(whole[:alone], axes, None)
        else:
            yield Chain(whole, axes, whole[alone])


def _depends_on_a_decision(nodes: Sequence[fx.Node], decisions: set[str]) -> bool:
    """Return whether a forward that calls the nodes, from their common one on, branches.

    Then they follow each other in the recorded run, and perhaps in no other.
    """
    scopes = [node.meta["scope"].split(".") for node in nodes]
    common = [a[0] for a in itertools.takewhile(lambda a: len(set(a)) == 1, zip(*scopes))]  # noqa: B905
    between = {".".join(scope[:n]) for scope in scopes for n in range(len(common), len(scope) + 1)}
    return bool(between & decisions)


def split(
    layer: nn.Module, channels: int, axes: int, device: torch.device
) -> tuple[ConvKernel, nn.Module | None]:
    """Return the channelwise map that a layer begins with, and what remains of it after that.

    Args:
        layer: such as a norm, with or without an activation of its own.
        channels: of its input.
        axes: spatial axes of its input.
        device: of its input.

    Returns:
        The map, in float64, and the rest of the layer, None if there is nothing more.

    Raises:
        NotFoldableError: the layer does not begin with a channelwise map.
    """
    try:
        kernel = kernel_of(layer, channels, axes=axes, dtype=torch.float64, device=device)
    except NotAffineError:
        return _split(layer, channels, axes, device)
    if not kernel.is_channelwise:
        raise NotFoldableError("it is more than a channelwise map")
    return kernel, None


def _split(
    layer: nn.Module, channels: int, axes: int, device: torch.device
) -> tuple[ConvKernel, nn.Module | None]:
    sketch = twin(layer, device="meta").double()
    image = torch.empty(1, channels, *(2,) * axes, dtype=torch.float64, device="meta")
    try:
        recording = record(sketch, Inputs((image,)), _is_leaf)
    except RecordingError as error:
        raise NotFoldableError(f"it cannot be recorded: {error}") from error
    graph = fx.GraphModule(recording.root, recording.graph).graph
    if recording.decisions:
        raise NotFoldableError("its forward branches on its input")
    identity = ConvKernel.identity(channels, axes=axes, dtype=torch.float64, device=device)
    begin = next(iter(graph.nodes))
    node, kernel = begin, identity
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            break
        try:
            with InFloat64():
                following = run_node(layer, user, {node: kernel})
        except NotFoldableError:
            break
        if not isinstance(following, ConvKernel) or not following.is_channelwise:
            break
        node, kernel = user, following
    if node is begin:
        raise NotFoldableError("it does not begin with a channelwise map")
    node.replace_all_uses_with(begin)
    tidy(graph)
    return kernel, _shortest(layer, graph)


def _shortest(model: nn.Module, graph: fx.Graph) -> nn.Module:
    """Return the module of a graph: the layer itself where the graph calls but one."""
    modules = [
        model.get_submodule(str(node.target)) if node.op == "call_module" else None
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
    ]
    modules = [m for m in modules if not isinstance(m, nn.Identity)]
    if len(modules) == 1 and modules[0] is not None:
        return modules[0]
    return fx.GraphModule(model, graph)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None or isinstance(module, _BatchNorm)


def follow(
    model: nn.Module, node: fx.Node, producer: Callable[[nn.Module], bool]
) -> tuple[list[fx.Node], int]:
    """Return the calls of a layer and of its followers, and the spatial axes of these.

    Args:
        model: whose graph it is.
        node: of the layer; without a call of a producer there is no chain.
        producer: whether a module is a convolution or linear layer.
    """
    first = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if first is None or not producer(first) or "shape" not in node.meta:
        return [], 0
    chained, length, axes, begin, whole = [node], 1, 0, node, True
    channel_axis = -1 if isinstance(first, nn.Linear) else 1
    device = next(first.parameters()).device
    while whole:
        users = [user for user in node.users if not _reads_shape(user, node)]
        if len(users) != 1 or users[0].args[:1] != (node,):
            break
        (user,) = users
        if user.op == "call_module" and len(user.args) == 1 and not user.kwargs:
            layer, channels = (
                model.get_submodule(str(user.target)),
                begin.meta["shape"][channel_axis],
            )
            if not _keeps_channels(begin, node, channel_axis):
                break
            try:
                whole = split(layer, channels, len(node.meta["shape"]) - 2, device)[1] is None
            except NotFoldableError:
                break
            chained.append(user)
            axes = len(node.meta["shape"]) - 2
            if any(True for _ in chain(layer.parameters(), layer.buffers())):
                length = len(chained)  # a dropout or a fixed number at the end stays
        elif not (user.op in ("call_method", "call_function") and _name(user) in REARRANGING):
            break
        node = user
    return chained[:length], axes


def _keeps_channels(begin: fx.Node, end: fx.Node, channel_axis: int) -> bool:
    """Return whether axis 1 at `end` is the channel axis of `begin`, however values were moved."""
    path = [end]
    while path[-1] is not begin:
        path.append(path[-1].all_input_nodes[0])
    shape = begin.meta["shape"]
    axis_shape = [1] * len(shape)
    axis_shape[channel_axis] = -1
    labels = torch.arange(shape[channel_axis]).reshape(axis_shape).expand(shape)
    for node in reversed(path[:-1]):
        if node.op != "call_module":  # what is called is channelwise
            labels = run_node(nn.Module(), node, {node.all_input_nodes[0]: labels})
    channels = torch.arange(shape[channel_axis]).reshape(-1, *(1,) * (labels.ndim - 2))
    return labels.ndim > 1 and labels.shape[1] == len(channels) and bool((labels == channels).all())


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    return user.args[0] is not node and _name(user) in ("reshape_as", "view_as", "expand_as")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
