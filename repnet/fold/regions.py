"""`find_regions`: which parts of a recorded graph are one convolution of one value.

For every node, its value is followed as a kernel of the nodes before it (its roots), without
numbers. Then, from the last node to the first, the largest region that is one convolution of a root
is taken, if nothing else reads what is inside of it and the convolution costs no more than it does.
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
from repnet.fold.kernels import Kernels
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
    def signature(self) -> tuple[Any, ...]:
        """What two regions share if they are two runs of the same layers."""
        order = {node: n for n, node in enumerate(self.nodes)}
        order[self.root] = -1

        def written(node: fx.Node) -> str:
            """Return a node with all its arguments, down to the tensors of the model."""
            arguments = map_arg(
                (node.args, node.kwargs),
                lambda i: order[i] if i in order else _Text(written(i)),
            )
            return f"{node.op} {node.target}{arguments}"

        return tuple(written(node) for node in self.nodes)

    @property
    def is_linear(self) -> bool:
        """Whether modules follow each other, so that the tree can be edited."""
        before = self.root
        for node in self.nodes:
            if node.op != "call_module" or node.args != (before,) or node.kwargs:
                return False
            before = node
        return True


class _Text(str):
    """A string that is printed as it is inside a container."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def sources_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the constants that nodes read, and those that these are computed from."""
    found: dict[fx.Node, None] = {}
    open_nodes = list(nodes)
    while open_nodes:
        inputs = [i for i in open_nodes.pop().all_input_nodes if i.meta.get("constant")]
        open_nodes += [i for i in inputs if i not in found]
        found.update(dict.fromkeys(inputs))
    return list(found)


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
    """Return how much larger one convolution is than what it stands for; "" if it is not.

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
            groups: dict[Any, list[Region]] = defaultdict(list)
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
            if node.op != "placeholder" and not node.meta.get("changed"):
                sources = [i for i in node.all_input_nodes if not i.meta.get("constant")]
                roots = list(found[sources[0]]) if sources else []
                common = [r for r in roots if all(r in found[i] for i in sources)]
                for root in common[-MOST_ROOTS:]:
                    try:
                        value = self.kernels.node(node, {i: found[i][root] for i in sources})
                    except NotFoldableError:
                        continue
                    if isinstance(value, ConvKernel | tuple):
                        own[root] = value
            if "shape" in node.meta and not node.meta.get("changed"):
                try:
                    own[node] = self.kernels.identity(node)
                except NotFoldableError:
                    continue
        return found

    def _between(self, root: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that lead from `root` to `end`, in order."""
        found, open_nodes = set(), [end]
        while open_nodes:
            node = open_nodes.pop()
            if node is not root and node not in found and not node.meta.get("constant"):
                found.add(node)
                open_nodes += node.all_input_nodes
        return tuple(node for node in self.graph.nodes if node in found)

    def _is_better(self, root: fx.Node, nodes: tuple[fx.Node, ...], kernel: Any) -> bool:
        """Return whether one convolution can and should take the place of nodes."""
        inside, end = set(nodes), nodes[-1]
        if not isinstance(kernel, ConvKernel) or end.meta.get("constant"):
            return False
        for node in nodes:
            if node is not end and (
                node.meta.get("escaped") or any(user not in inside for user in readers_of(node))
            ):
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
        else:
            self.refused.setdefault(name, f"{reason}; grow= allows it")
        return name in self.grown

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
        best, area = "", 0
        for node in nodes:
            size, name = self._kernel_area(node)
            if size > area:
                best, area = name, size
        return best

    def _free(self, name: str, nodes: tuple[fx.Node, ...]) -> str:
        """Return a name for a new layer that nothing outside needs."""
        inside = {*nodes, *sources_of(nodes)}
        needed = any(
            node not in inside
            and node.op in ("call_module", "get_attr")
            and str(node.target).startswith(f"{name}.")
            for node in self.graph.nodes
        )
        if not name or name == self.frame or needed:
            prefix = f"{self.frame}." if self.frame else ""
            return prefix + f"{name[len(prefix) :]}_folded".lstrip("_").replace(".", "_")
        return name

    def _kernel_area(self, node: fx.Node) -> tuple[int, str]:
        """Return the positions of the largest kernel that a node runs, and its name."""
        child = node.meta.get("frame")
        if child is not None:
            areas = [self._kernel_area(n)[0] for n in child.graph.nodes]
            return max(areas, default=0), str(node.target)
        weight = self.kernels.weight(node)
        if weight is None:
            return 0, ""
        area = weight.shape[2:].numel() if weight.ndim > 2 else 1
        if node.op == "call_module":
            return area, str(node.target)
        argument: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        tensors = [n for n in [argument, *sources_of([argument])] if n.op == "get_attr"]
        owner = str(tensors[0].target).rpartition(".")[0] if tensors else ""
        return area, owner or f"{node.name}_folded"
