"""`Regions`: finds the parts of a recorded graph that are one convolution of one value.

One pass over the graph gives every node its kernels: one for each node before it, its *roots*, from
whose value its own can be computed by a convolution. Then the nodes are taken from the last to the
first, and for each the furthest root whose convolution costs no more than the nodes in between,
provided that nothing else reads what is inside. Going backwards makes the regions as large as
possible. All of this runs on kernels without values, so that trying many roots is cheap; the
numbers are computed once, when the plan is built.

A layer may be called several times. Its weights disappear from the model only if every call is
inside a region, and these regions share one new layer only if they are the same, node by node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repnet.convolution import as_module
from repnet.fold.frame import Frame
from repnet.fold.kernels import Kernels, argument_of, steps_of
from repnet.fold.survey import readers_of
from repnet.kernel import ConvKernel, NotFoldableError

MOST_ROOTS = 16  # of which a node keeps a kernel; more would only cost time


@dataclass(frozen=True)
class Region:
    """Nodes that together are one convolution of the value of `root`.

    Args:
        root: a node outside.
        nodes: in order; the last one has the result.
        name: of the convolution, in the model.
        frame: name of the module whose forward it is.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    name: str
    frame: str

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def signature(self) -> str:
        """What two regions share if they are two runs of the same layers."""
        order = {node: f"%{n}" for n, node in enumerate((self.root, *self.nodes))}

        def written(node: fx.Node) -> Any:
            """Return a node with all its arguments, down to the tensors of the model."""
            arguments = map_arg((node.args, node.kwargs), lambda i: order.get(i) or written(i))
            return node.op, str(node.target), arguments

        return repr([written(node) for node in self.nodes])

    @property
    def is_linear(self) -> bool:
        """Whether modules follow each other, so that the tree can be edited."""
        before = (self.root, *self.nodes)
        return all(
            node.op == "call_module" and node.args == (given,) and not node.kwargs
            for given, node in zip(before, self.nodes, strict=False)
        )


def _upstream(nodes: Iterable[fx.Node], wanted: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the wanted nodes that others read, and the wanted ones that those read."""
    found: dict[fx.Node, None] = {}
    open_nodes = list(nodes)
    while open_nodes:
        inputs = [i for i in open_nodes.pop().all_input_nodes if wanted(i) and i not in found]
        open_nodes += inputs
        found.update(dict.fromkeys(inputs))
    return list(found)


def sources_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the constants that nodes read, and those that these are computed from."""
    return _upstream(nodes, lambda node: bool(node.meta.get("constant")))


def tensors_of(region: Region, kernels: Kernels) -> dict[str, Any]:
    """Return parameters and buffers that a region reads, by name."""
    found: dict[str, Any] = {}
    for node in (*region.nodes, *sources_of(region.nodes)):
        if node.op == "get_attr":
            found[str(node.target)] = kernels.constant(node)
        elif node.op == "call_module":
            module = kernels.modules[str(node.target)]
            prefix = f"{node.target}."
            found |= {prefix + n: t for n, t in module.named_parameters(remove_duplicate=False)}
            found |= {prefix + n: t for n, t in module.named_buffers(remove_duplicate=False)}
    return found


def growth(
    kernel: ConvKernel, before: torch.Size, after: torch.Size, cost: int, tensors: Iterable[Tensor]
) -> str:
    """Return how much larger one convolution is than what it replaces; "" if it is not.

    Args:
        kernel: of the convolution.
        before: shape of its input.
        after: shape of its output.
        cost: multiplications that it replaces.
        tensors: that it replaces.
    """
    positions = before if max((1, *kernel.upsample)) > 1 else after
    new_cost = kernel.weight.numel() * (positions.numel() // positions[1])
    size = sum(t.numel() for t in tensors)
    new_size = kernel.weight.numel() + (0 if kernel.bias is None else kernel.bias.numel())
    if new_cost <= cost and new_size <= size:
        return ""
    return (
        f"one convolution is larger: {new_cost:,} instead of {cost:,} multiplications, "
        f"{new_size:,} instead of {size:,} values"
    )


class Regions:
    """Finds the regions of one frame.

    Args:
        frame: whose forward does the same for every input.
        kernels: without values.
        wanted: whether a region may be taken.
        may_grow: whether it may cost more than its layers, by its name.
    """

    def __init__(
        self,
        frame: Frame,
        kernels: Kernels,
        wanted: Callable[[Region], bool],
        may_grow: Callable[[str], bool],
    ) -> None:
        self.graph, self.frame = frame.graph, frame.name
        self.kernels, self.wanted, self.may_grow = kernels, wanted, may_grow
        self.refused: dict[str, str] = {}  # reason by name of a layer, where a kernel would grow
        self.grown: dict[str, str] = {}  # the same where it may

    def find(self) -> list[Region]:
        """Return the largest regions, in order, each with layers that no other node reads."""
        found = self._kernels()
        taken: set[fx.Node] = set()
        regions: list[Region] = []
        for node in reversed(self.graph.nodes):
            if node in taken:
                continue
            for root, kernel in found.get(node, {}).items():  # the furthest first
                if root is node:
                    continue
                nodes = self._between(root, node)
                if taken & set(nodes) or not self._is_better(root, nodes, kernel):
                    continue
                region = Region(root, nodes, self._free(self._name(nodes), nodes), self.frame)
                if self.wanted(region):
                    taken |= set(nodes)
                    regions.append(region)
                    break
        return self._complete(regions)[::-1]

    def _complete(self, regions: list[Region]) -> list[Region]:
        """Return the regions whose layers are read by nothing but regions of the same layers."""
        while True:
            groups: dict[str, list[Region]] = defaultdict(list)
            for region in regions:
                groups[region.signature].append(region)
            kept = [r for r in regions if self._is_everywhere(r, groups[r.signature])]
            if len(kept) == len(regions):
                return kept
            regions = kept

    def _kernels(self) -> dict[fx.Node, dict[fx.Node, Any]]:
        """Return each node's value as a kernel, without numbers, of each of its roots."""
        found: dict[fx.Node, dict[fx.Node, Any]] = {}
        for node in self.graph.nodes:
            if node.meta.get("constant") or node.op == "output":
                continue
            own = found[node] = {}
            sources = [i for i in node.all_input_nodes if not i.meta.get("constant")]
            roots = found[sources[0]] if sources else {}
            common = [root for root in roots if all(root in found[i] for i in sources)]
            for root in common[-MOST_ROOTS:]:
                try:
                    value = self.kernels.node(node, {i: found[i][root] for i in sources})
                except NotFoldableError:
                    continue
                if isinstance(value, ConvKernel | tuple):
                    own[root] = value
            if "shape" in node.meta:
                try:
                    own[node] = self.kernels.identity(node)
                except NotFoldableError:
                    continue
        return found

    def _between(self, root: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that lead from `root` to `end`, in order."""
        found = {
            end,
            *_upstream([end], lambda node: node is not root and not node.meta.get("constant")),
        }
        return tuple(node for node in self.graph.nodes if node in found)

    def _is_better(self, root: fx.Node, nodes: tuple[fx.Node, ...], kernel: Any) -> bool:
        """Return whether one convolution can and should take the place of nodes."""
        inside, end = set(nodes), nodes[-1]
        if not isinstance(kernel, ConvKernel):
            return False
        for node in nodes:
            seen = node.meta.get("escaped") or not inside.issuperset(readers_of(node))
            if seen and node is not end:
                return False
            if node.meta.get("in_place") and node.args[0] not in inside:
                return False
        if not any(self.kernels.convolutions(n) for n in nodes):
            return False
        try:
            layer = as_module(kernel, like=nn.Module())
        except NotFoldableError:
            return False
        if isinstance(layer, nn.Sequential) and len(nodes) <= len(layer):
            return False  # a padding and a convolution already
        region = Region(root, nodes, "", self.frame)
        tensors = {id(t): t for t in tensors_of(region, self.kernels).values()}.values()
        cost = sum(self.kernels.multiplications(n) for n in nodes)
        reason = growth(kernel, root.meta["shape"], end.meta["shape"], cost, tensors)
        if not reason:
            return True
        name = self._name(nodes)
        if self.may_grow(name):
            self.grown[name] = reason
            return True
        self.refused.setdefault(name, f"{reason}; grow= allows it")
        return False

    def _is_everywhere(self, region: Region, twins: list[Region]) -> bool:
        """Return whether every use of the region's layers is in a region of the same layers."""
        inside = {node for twin in twins for node in twin.nodes}
        sources = set(sources_of(inside))
        names = set(tensors_of(region, self.kernels))
        for node in self.graph.nodes:
            if node in inside or node in sources:
                continue
            if any(i in sources for i in node.all_input_nodes):
                return False
            if node.op == "call_module" and any(n.startswith(f"{node.target}.") for n in names):
                return False
            if node.op == "get_attr" and str(node.target) in names:
                return False
        return True

    def _name(self, nodes: tuple[fx.Node, ...]) -> str:
        """Return the name of the branch with the largest kernel."""
        return self._owner(max(nodes, key=self._kernel_area))

    def _kernel_area(self, node: fx.Node) -> int:
        """Return the positions of the largest kernel that a node runs."""
        weights = map(self.kernels.weight, steps_of(node))
        return max((w.shape[2:].numel() for w in weights if w is not None), default=0)

    def _owner(self, convolution: fx.Node) -> str:
        """Return the name of the module that a call of a convolution takes its weight from."""
        if convolution.op == "call_module":
            return str(convolution.target)
        weight = argument_of(convolution, 1, "weight")
        tensors = [n for n in (weight, *sources_of([weight])) if n.op == "get_attr"]
        owner = str(tensors[0].target).rpartition(".")[0] if tensors else ""
        return owner or f"{convolution.name}_folded"

    def _free(self, name: str, nodes: tuple[fx.Node, ...]) -> str:
        """Return a name for a new layer that nothing outside needs."""
        inside = {*nodes, *sources_of(nodes)}
        needed = any(
            node not in inside
            and node.op in ("call_module", "get_attr")
            and str(node.target).startswith(f"{name}.")
            for node in self.graph.nodes
        )
        if name == self.frame or needed:
            prefix = f"{self.frame}." if self.frame else ""
            return prefix + f"{name[len(prefix) :]}_folded".lstrip("_").replace(".", "_")
        return name
