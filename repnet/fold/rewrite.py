"""Writes a folded model: copies with other modules in them, and graphs in the place of modules.

Replacing a module is a deep copy whose memo already maps each old module to its new one, so that
every attribute and container that held the old one holds the new one, and nothing is copied only to
be thrown away. A forward that adds branches itself cannot be changed by replacing modules: for it,
its recorded graph is copied, the nodes of each region make way for one call, and the result takes
the place of this one module under the names that the module had for its parts.
"""

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
    is_root = not frame.name or model is original
    home = model if is_root else model.get_submodule(frame.name)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(frame.graph, copied))
    _rename_targets(survey, original, copied)
    added: dict[str, nn.Module] = {}
    for region, layer in layers.items():
        name = region.name.removeprefix(f"{frame.name}.")
        added[name] = layer
        with graph.inserting_before(copied[region.nodes[0]]):
            call = graph.call_module(name, (copied[region.root],))
        copied[region.end].replace_all_uses_with(call)
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
    new = _only_call(graph, home) if without else None
    if new is None:
        new = with_attributes(_built(graph, home, added, complete=not guarded), original)
    if home is model:
        return new
    for parent in list(model.modules()):
        for key, module in parent._modules.items():
            if module is home:
                parent._modules[key] = new
    return model


def _rename_targets(survey: Survey, original: nn.Module, copied: Mapping[fx.Node, fx.Node]) -> None:
    """Let the copied nodes name modules and tensors as the module itself does."""
    inside = {id(m): n for n, m in original.named_modules(remove_duplicate=False)}
    for node, copy in copied.items():
        if node.op not in ("call_module", "get_attr"):
            continue
        owner, key = str(node.target), ""
        if node.op == "get_attr":
            owner, _, key = owner.rpartition(".")
        name = inside.get(id(survey.every_name.get(owner)))
        if name is None:
            raise GraphError(f"it uses '{node.target}', which it does not hold")
        copy.target = f"{name}.{key}".strip(".")


def _only_call(graph: fx.Graph, home: nn.Module) -> nn.Module | None:
    """Return the module whose output a graph returns, if the graph does nothing but call it."""
    given, *calls, output = graph.nodes
    if len(calls) != 1 or calls[0].op != "call_module" or output.args != (calls[0],):
        return None
    is_plain = calls[0].args == (given,) and not calls[0].kwargs
    return home.get_submodule(str(calls[0].target)) if is_plain else None


def _built(
    graph: fx.Graph, home: nn.Module, added: Mapping[str, nn.Module], *, complete: bool
) -> fx.GraphModule:
    """Return the module of a graph, in evaluation mode.

    Args:
        graph: names parts of `home` and `added`.
        home: the module that the graph replaces.
        added: the new layers, by the names in the graph.
        complete: whether it also holds the children of `home` that it does not call.
    """
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            parts[target] = added[target] if target in added else home.get_submodule(target)
        elif node.op == "get_attr":
            owner, _, key = target.rpartition(".")
            parts[target] = getattr(home.get_submodule(owner), key)
    built = fx.GraphModule(parts, graph)
    for node in built.graph.nodes:
        node.meta.clear()  # sizes of the example
    for name, child in home.named_children():
        if complete and name not in {*built._modules, *added}:
            built.add_module(name, child)  # others may read it
    for part in built.modules():
        if part is built or type(part) is nn.Module:  # made by fx, to hold what it calls
            part.training = False
    return built


def _tidy(graph: fx.Graph, home: nn.Module, added: Mapping[str, nn.Module]) -> None:
    """Remove what nothing reads, and calls that return their argument."""
    for node in reversed(graph.nodes):
        target = str(node.target)
        idle = node.op == "call_module" and target not in added and len(node.args) == 1
        idle = idle and (is_identity(node) or type(home.get_submodule(target)) is nn.Identity)
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
    inputs = [n for n in frame.graph.nodes if n.op == "placeholder"]
    for node in inputs:
        if node.name in frame.frozen and "value" in node.meta:
            decided.append((node, node.meta["value"]))
        elif "shape" in node.meta:
            kind = (len(node.meta["shape"]), node.meta["dtype"].is_floating_point)
            with graph.inserting_after(copied[inputs[-1]]):
                graph.call_function(tensor_as_recorded, (copied[node], *kind))
    for node, value in decided:
        with graph.inserting_after(copied[inputs[-1] if node in inputs else node]):
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
