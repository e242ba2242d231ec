"""Writing a folded model: copies with other modules in them, and graphs in the place of modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from repnet.fold.frame import Frame
from repnet.fold.regions import Region
from repnet.fold.survey import Survey, is_identity
from repnet.symbolic import kept_tensors

Module = TypeVar("Module", bound=nn.Module)


class GraphError(RuntimeError):
    """A frame cannot be written as a graph."""


def copy_with(source: Module, replaced: Mapping[int, Any]) -> Module:
    """Return a deep copy of `source` with other modules in it.

    Args:
        source: not changed; what is replaced is not copied.
        replaced: new modules by the identity of the old, wherever they occur.
    """
    return deepcopy(source, {**kept_tensors(source), **replaced})


def with_attributes(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return `new` with the attributes that others hung on `old`, such as tags and indices."""
    for key, value in vars(old).items():
        own = key.startswith("_") or key == "original_bias" or callable(value)
        if not own and key not in vars(new) and not hasattr(type(new), key):
            plain = isinstance(value, int | float | str | None)
            vars(new)[key] = value if plain else deepcopy(value, kept_tensors(old))
    return new


def identity_like(old: nn.Module) -> nn.Module:
    """Return an identity with the attributes of what it stands for."""
    return with_attributes(nn.Identity(), old).eval()


def graph_of(
    model: nn.Module,
    survey: Survey,
    frame: Frame,
    layers: Mapping[Region, nn.Module],
    *,
    without: Sequence[fx.Node] = (),
    guarded: bool = False,
) -> nn.Module:
    """Return `model` with a graph in the place of a module, or the graph if it is the model.

    Args:
        model: holds the module of the frame, or is it; changed.
        survey: that the frame is from.
        frame: of the module.
        layers: convolutions that take the place of regions of the frame.
        without: nodes that are left out.
        guarded: whether the graph compares what forward decided on with the recorded values.

    Raises:
        GraphError: the graph would need something that the module does not hold.
    """
    original = survey.modules[frame.name]
    inside = {id(m): n for n, m in original.named_modules(remove_duplicate=False)}
    home = model if _is_alone(model, original, frame) else model.get_submodule(frame.name)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(frame.graph, copied))
    _check_targets(frame, survey, inside, copied)
    added: dict[str, nn.Module] = {}
    for region, layer in layers.items():
        name = _relative(frame.name, region.name)
        with graph.inserting_before(copied[region.nodes[0]]):
            call = graph.call_module(name, (copied[region.root],))
        copied[region.end].replace_all_uses_with(call)
        added[name] = layer
        for node in reversed(region.nodes):
            for idle in [n for n in copied[node].users if not n.users]:
                graph.erase_node(idle)
            graph.erase_node(copied[node])
        copied[region.end] = call  # another region may begin there
    for node in without:
        copied[node].replace_all_uses_with(copied[node.args[0]])  # type: ignore[index]
        graph.erase_node(copied[node])
    if guarded:
        _guard(graph, frame, copied)
    _tidy(graph, home, added)
    built = fx.GraphModule(_objects(graph, home, added), graph)
    for node in built.graph.nodes:
        node.meta.clear()  # sizes of the example
    for name, child in home.named_children():
        if name not in {*built._modules, *added} and not guarded:
            built.add_module(name, child)  # others may read it
    for part in built.modules():
        if part is built or type(part) is nn.Module:  # made by fx, to hold what it calls
            part.training = False
    alone = [n for n in built.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    new: nn.Module = built
    if without and len(alone) <= 1 and len(_inputs(built.graph)) == 1:  # what follows a norm
        if not alone:
            new = identity_like(original)
        elif _is_call(alone[0]):
            new = home.get_submodule(str(alone[0].target))
    if new is built:
        with_attributes(built, original)
    if home is model:
        return new
    for parent in list(model.modules()):
        for key, module in parent._modules.items():
            if module is home:
                parent._modules[key] = new
    return model


def _objects(graph: fx.Graph, home: nn.Module, added: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return the modules and tensors that a graph names."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            found[target] = added[target] if target in added else home.get_submodule(target)
        elif node.op == "get_attr":
            owner, _, key = target.rpartition(".")
            found[target] = getattr(home.get_submodule(owner), key)
    return found


def _is_alone(model: nn.Module, original: nn.Module, frame: Frame) -> bool:
    return not frame.name or model is original


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module" and len(node.args) == 1 and not node.kwargs


def _relative(outer: str, name: str) -> str:
    return name[len(outer) + 1 :] if outer and name.startswith(f"{outer}.") else name


def _check_targets(
    frame: Frame, survey: Survey, inside: Mapping[int, str], copied: Mapping[fx.Node, fx.Node]
) -> None:
    """Let the copied nodes name modules and tensors as the module itself does."""
    for node, copy in copied.items():
        if node.op == "call_module":
            module = survey.modules[str(node.target)]
            if id(module) not in inside:
                raise GraphError(f"it calls '{node.target}', which it does not hold")
            copy.target = inside[id(module)]
        elif node.op == "get_attr":
            owner, _, key = str(node.target).rpartition(".")
            module = survey.every_name.get(owner)
            if module is None or id(module) not in inside:
                raise GraphError(f"it reads '{node.target}', which it does not hold")
            prefix = inside[id(module)]
            copy.target = f"{prefix}.{key}" if prefix else key


def _tidy(graph: fx.Graph, home: nn.Module, added: Mapping[str, nn.Module]) -> None:
    """Remove what nothing reads, and calls that return their argument."""
    for node in reversed(graph.nodes):
        target = str(node.target)
        idle = (
            node.op == "call_module"
            and target not in added
            and (is_identity(node) or type(home.get_submodule(target)) is nn.Identity)
            and len(node.args) == 1
        )
        if idle:
            node.replace_all_uses_with(node.args[0])
        pure = node.op in ("call_function", "call_method") and not (
            node.meta.get("in_place") or node.target in (same_as_recorded, tensor_as_recorded)
        )
        if not node.users and (idle or pure or node.op == "get_attr"):
            graph.erase_node(node)


def _guard(graph: fx.Graph, frame: Frame, copied: Mapping[fx.Node, fx.Node]) -> None:
    """Let the graph compare what forward decided on with the values of the recorded run."""
    decided = [(d.node, d.value) for d in frame.decisions]
    for node in frame.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in frame.frozen and "value" in node.meta:
            decided.append((node, node.meta["value"]))
        elif "shape" in node.meta:
            kind = (len(node.meta["shape"]), node.meta["dtype"].is_floating_point)
            with graph.inserting_after(_inputs(graph)[-1]):
                graph.call_function(tensor_as_recorded, (copied[node], *kind))
    for node, value in decided:
        where = _inputs(graph)[-1] if node.op == "placeholder" else copied[node]
        with graph.inserting_after(where):
            graph.call_function(same_as_recorded, (copied[node], value))


@has_side_effect
def same_as_recorded(value: Any, recorded: Any) -> None:
    """Do nothing if a value that forward branches on is that of the recorded run.

    Raises:
        ValueError: it is another one, and so forward may take another way.
    """
    if isinstance(value, fx.Proxy):
        _traced(value, same_as_recorded, (value, recorded))
    elif value is not recorded and value != recorded:
        raise ValueError(
            f"this graph was recorded where a value is {recorded}, and here it is {value}, on "
            "which its forward branches; record it again with an example of this kind"
        )


@has_side_effect
def tensor_as_recorded(value: Any, dimensions: int, is_floating_point: bool) -> None:
    """Do nothing if an argument is a tensor of the recorded kind.

    Raises:
        ValueError: it is something else, and so forward may take another way.
    """
    if isinstance(value, fx.Proxy):
        _traced(value, tensor_as_recorded, (value, dimensions, is_floating_point))
        return
    kind = (value.ndim, value.is_floating_point()) if isinstance(value, Tensor) else type(value)
    if kind != (dimensions, is_floating_point):
        number = "floating-point" if is_floating_point else "integer"
        raise ValueError(
            f"this graph was recorded with a {number} tensor of {dimensions} dimensions, and not "
            f"with {'another kind of tensor' if isinstance(value, Tensor) else value}; record it "
            "again with an example of this kind"
        )


def _traced(value: fx.Proxy, function: Any, arguments: tuple[Any, ...]) -> None:
    """Put a check into the graph that fx traces where a pickled graph is read."""
    value.tracer.create_proxy("call_function", function, arguments, {})
