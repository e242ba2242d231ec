"""`GraphFolding`: every region of one graph that is one convolution becomes this convolution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from repnet.convolution import Layer, as_module
from repnet.equivalence import BlockError, Inputs, relative_difference
from repnet.kernel import ConvKernel, NotFoldableError
from repnet.modulewise import bare, copy_with, why_left
from repnet.precision import InFloat64
from repnet.proof import Fold, FoldReport
from repnet.scaling import absorb
from repnet.shapes import without_values
from repnet.siblings import follow, split
from repnet.surroundings import has_hooks
from repnet.tracing import arguments_of, run_node, same_as_recorded, tidy

UPSAMPLING = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
CONVOLVING = (
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    *UPSAMPLING,
)
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOST_ROOTS = 16  # of which a node keeps a kernel; more would only cost time


@dataclass
class Results:
    """What the folding of all graphs of a model adds up to.

    Args:
        report: of the whole.
        made: the new layers, each with the dtype that it is to have.
        errors: of the new layers.
        failures: reasons by name of modules that cannot be recorded.
    """

    report: FoldReport
    made: list[tuple[nn.Module, torch.dtype]] = field(default_factory=list)
    errors: list[BlockError] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def leave(self, name: str, reason: str) -> None:
        """Report a norm that remains."""
        self.report.left.append(name)
        self.report.skipped.setdefault(name, reason)


@dataclass(frozen=True)
class _Region:
    """Nodes that together are one convolution of the value of `root`."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]  # in order, the last one has the result

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two regions share if they are two runs of the same layers."""
        order = {node: n for n, node in enumerate([self.root, *self.nodes])}

        def written(node: fx.Node) -> str:
            """Return a node with all its arguments, down to the tensors of the model."""
            arguments = map_arg(
                (node.args, node.kwargs), lambda i: order.get(i) or _Text(written(i))
            )
            return f"{node.op} {node.target}{arguments}"

        order[self.root] = -1
        return tuple(written(node) for node in self.nodes)


class GraphFolding:
    """One folding of one graph.

    For every node, its value as a kernel of earlier nodes (its roots) is found without numbers;
    then, from the last node to the first, the largest region that is one convolution is taken.

    Args:
        model: the recorded graph; changed.
        prefix: of its names in the whole.
        inputs: of the graph.
        results: receives what the folding finds.
    """

    def __init__(
        self, model: fx.GraphModule, prefix: str, inputs: Inputs, results: Results
    ) -> None:
        self.model, self.graph, self.prefix, self.inputs = model, model.graph, prefix, inputs
        self.results = results
        self.bare = bare(model)
        self.sketch = bare(model, device="meta").double()
        self.constants: dict[fx.Node, Any] = {}  # values of nodes that no input reaches
        self.users: dict[str, list[fx.Node]] = defaultdict(list)  # of modules and tensors
        self.changing = [node for node in self.graph.nodes if "changes" in node.meta]
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                self.users[str(node.target)].append(node)
            sources = node.all_input_nodes
            if node.op == "get_attr":
                self.constants[node] = run_node(self.bare, node, {})
            elif node.op != "output" and sources and all(i in self.constants for i in sources):
                with torch.no_grad(), InFloat64():
                    self.constants[node] = run_node(self.bare, node, self.constants)

        self._write_out_numbers()

    def _write_out_numbers(self) -> None:
        """Put numbers that no input reaches, such as the shape of a weight, into what reads them.

        Otherwise a weight would have to stay for the sake of its shape.
        """
        for node, value in list(self.constants.items())[::-1]:
            if isinstance(value, torch.Size):
                value = tuple(value)
            plain = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(number, int | float) for number in plain):
                continue
            for user in list(node.users):
                if user.target is same_as_recorded:
                    self.graph.erase_node(user)
                    continue
                user.args, user.kwargs = _written_out(user, node, value)
            if not node.users:
                self.graph.erase_node(node)
                del self.constants[node]

    def fold(self) -> nn.Module:
        """Return the folded graph module, with its new layers in float64."""
        original = deepcopy(self.graph)
        made = [(region, region.signature) for region in self._regions()]  # before it changes
        names = {key: self._make(region) for key, region in {k: r for r, k in made}.items()}
        checks = [self._replace(region, names[key]) for region, key in made]
        tidy(self.graph)
        for node in list(self.graph.nodes):
            self._absorb(node)
        tidy(self.graph)
        self._measure(original, {end: (root, name) for root, end, name in checks})
        for node in self.graph.nodes:
            if node.op == "call_module" and isinstance(self._module(node), _BatchNorm):
                name = self.prefix + str(node.target)
                reason = why_left(self._module(node), name, True, self.results.failures)
                self.results.leave(name, reason)
            elif node.target is functional.batch_norm:
                statistics = node.args[1] if len(node.args) > 1 else None
                owner = str(getattr(statistics, "target", node.name)).rpartition(".")[0]
                self.results.leave(self.prefix + owner, "no convolution alone feeds it")
        folded = fx.GraphModule(self.model, self.graph, type(self.model).__name__)
        for node in folded.graph.nodes:
            node.meta.clear()  # shapes of the example
        # Of its own, but for what is new.
        return copy_with(folded, {id(layer): layer for layer, _ in self.results.made})

    # Which nodes are one convolution

    def _regions(self) -> list[_Region]:
        """Return the largest regions, in order, each with layers that no other node uses."""
        kernels = self._kernels()
        taken: set[fx.Node] = set()
        regions: list[_Region] = []
        for node in reversed(self.graph.nodes):
            if node in taken:
                continue
            for root, kernel in kernels.get(node, {}).items():  # the furthest first
                region = _Region(root, self._between(root, node)) if root is not node else None
                if region and self._is_better(region, kernel) and not taken & set(region.nodes):
                    taken |= set(region.nodes)
                    regions.append(region)
                    break
        while True:
            groups: dict[Any, list[_Region]] = defaultdict(list)
            for region in regions:
                groups[region.signature].append(region)
            kept = [r for r in regions if self._is_everywhere(r, groups[r.signature])]
            if len(kept) == len(regions):
                return kept[::-1]
            regions = kept

    def _kernels(self) -> dict[fx.Node, dict[fx.Node, Any]]:
        """Return each node's value as a kernel, without numbers, of each of its roots."""
        constants = {n: tree_map(_sketched, v) for n, v in self.constants.items()}
        kernels: dict[fx.Node, dict[fx.Node, Any]] = {}
        for node in self.graph.nodes:
            if node in constants or node.op == "output":
                continue
            own = kernels[node] = {}
            sources = [i for i in node.all_input_nodes if i not in constants]
            roots = list(kernels[sources[0]]) if sources else []
            common = [r for r in roots if all(r in kernels[i] for i in sources)]
            for root in common[-MOST_ROOTS:]:
                values = {**constants, **{i: kernels[i][root] for i in sources}}
                try:
                    value = run_node(self.sketch, node, values)
                except Exception:  # no rule, or a layer that a kernel cannot enter
                    continue
                if isinstance(value, ConvKernel | tuple):
                    own[root] = value
            shape = node.meta.get("shape", ())
            if 2 <= len(shape) <= 5:
                own[node] = _identity(shape, "meta")
        return kernels

    def _between(self, root: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that lead from `root` to `end`, in order."""
        found, open_nodes = set(), [end]
        while open_nodes:
            node = open_nodes.pop()
            if node is not root and node not in found and node not in self.constants:
                found.add(node)
                open_nodes += node.all_input_nodes
        return tuple(node for node in self.graph.nodes if node in found)

    def _is_better(self, region: _Region, kernel: Any) -> bool:
        """Return whether one convolution can and should take the place of a region."""
        inside = set(region.nodes)
        if not isinstance(kernel, ConvKernel) or any(
            user not in inside for node in region.nodes[:-1] for user in node.users
        ):
            return False
        if self._changes_within(region):
            return False
        convolutions = [(n, w) for n in region.nodes if (w := self._weight(n)) is not None]
        if not convolutions or any(
            has_hooks(self._module(n)) for n in region.nodes if n.op == "call_module"
        ):
            return False
        if len(region.nodes) == 1 and self._is_plain(region.end):
            return False
        try:
            layer = as_module(kernel, like=nn.Module())
        except NotFoldableError:
            return False
        if isinstance(layer, nn.Sequential) and len(region.nodes) <= len(layer):
            return False  # a padding and a convolution already
        cost = sum(w.numel() * _positions(n, self._upsamples(n)) for n, w in convolutions)
        size = sum(t.numel() for t in self._tensors(region).values())
        shape = (region.root if max((1, *kernel.upsample)) > 1 else region.end).meta["shape"]
        new_size = kernel.weight.numel() + (0 if kernel.bias is None else kernel.bias.numel())
        return new_size <= size and kernel.weight.numel() * (shape.numel() // shape[1]) <= cost

    def _changes_within(self, region: _Region) -> bool:
        """Return whether the root is changed in place while the region still reads it."""
        if not self.changing:
            return False
        order = {node: n for n, node in enumerate(self.graph.nodes)}
        first, last = order[region.nodes[0]], order[region.end]
        return any(
            region.root in node.meta["changes"]
            and first <= order[node] <= last
            and (node not in region.nodes or node.meta.get("kept"))
            for node in self.changing
        )

    def _is_everywhere(self, region: _Region, twins: list[_Region]) -> bool:
        """Return whether every use of the region's layers is in a region of the same layers."""
        inside = {node for twin in twins for node in twin.nodes}
        sources = self._sources(inside)
        uses = {use for name in self._tensors(region) for use in self._uses(name)}
        uses |= {user for source in sources for user in source.users}
        return uses <= inside | sources

    def _uses(self, tensor: str) -> list[fx.Node]:
        """Return the nodes that read a tensor, directly or as part of a module."""
        parts = tensor.split(".")
        paths = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return [node for path in paths for node in self.users[path]]

    # What a region consists of

    def _module(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(str(node.target))

    def _weight(self, node: fx.Node) -> Tensor | None:
        """Return the weight of a convolution or linear layer, None for anything else."""
        if node.op == "call_module":
            module = self._module(node)
            return module.weight if isinstance(module, Layer) else None
        if node.target in CONVOLVING:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            return self.constants.get(weight)  # type: ignore[arg-type]
        return None

    def _upsamples(self, node: fx.Node) -> bool:
        transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
        if node.op == "call_module":
            return isinstance(self._module(node), transposed)
        return node.target in UPSAMPLING

    def _is_plain(self, node: fx.Node) -> bool:
        """Return whether a node is a layer of torch already, with a weight that it holds."""
        if node.op == "call_module":
            return type(self._module(node)) in (*PLAIN, nn.ConvTranspose2d)
        return all(i.op == "get_attr" for i in node.all_input_nodes if i in self.constants)

    def _sources(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return the constants that nodes read, and those that these are computed from."""
        found: set[fx.Node] = set()
        open_nodes = list(nodes)
        while open_nodes:
            inputs = [i for i in open_nodes.pop().all_input_nodes if i in self.constants]
            open_nodes += [i for i in inputs if i not in found]
            found.update(inputs)
        return found

    def _tensors(self, region: _Region) -> dict[str, Tensor]:
        """Return parameters and buffers that a region reads, by name."""
        found: dict[str, Tensor] = {}
        for node in (*region.nodes, *self._sources(region.nodes)):
            if node.op == "get_attr":
                found[str(node.target)] = self.constants[node]
            elif node.op == "call_module":
                module = self._module(node)
                for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                    found[f"{node.target}.{name}"] = tensor
        return found

    # What is put in its place

    def _make(self, region: _Region) -> str:
        """Add the layer of a region to the model; return its name."""
        tensors, name = self._tensors(region), self._name(region)
        device = next(iter(tensors.values())).device
        values = {**self.constants, region.root: _identity(region.root.meta["shape"], device)}
        with torch.no_grad(), InFloat64():
            for node in region.nodes:
                values[node] = run_node(self.bare, node, values)
        parameters = [t for t in tensors.values() if isinstance(t, nn.Parameter)]
        layer = as_module(values[region.end], like=nn.ParameterList(parameters))
        self._add(name, layer, tensors)
        return name

    def _replace(self, region: _Region, name: str) -> tuple[str, str, str]:
        """Call a layer in the place of a region; return the names of root, end and layer."""
        first = region.nodes[0]  # where in-place functions have not yet changed the root
        (root,) = {i for i in first.all_input_nodes if i not in self.constants}
        with self.graph.inserting_before(first):
            call = self.graph.call_module(name, (root,))
        call.meta = dict(region.end.meta)
        region.end.replace_all_uses_with(call)
        return region.root.name, region.end.name, name

    def _name(self, region: _Region) -> str:
        """Return the name of the first convolution of a region, if nothing else needs it."""
        first = next(n for n in region.nodes if self._weight(n) is not None)
        if first.op == "call_module":
            name = str(first.target)
        else:
            weight = first.args[1] if len(first.args) > 1 else first.kwargs["weight"]
            tensors = [i for i in self._ancestors(weight) if i.op == "get_attr"]
            name = str(tensors[0].target).rpartition(".")[0] if tensors else first.name
        mine = set(self._tensors(region))
        if not name or any(
            used.startswith(f"{name}.") and used not in mine and nodes
            for used, nodes in self.users.items()
        ):
            name = f"{name}_folded".lstrip("_")
        return name

    def _ancestors(self, node: Any) -> list[fx.Node]:
        found = [node]
        for each in found:
            found += [i for i in each.all_input_nodes if i not in found]
        return found

    def _add(self, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model.add_submodule(name, layer)
        floating = [t for t in tensors.values() if t.is_floating_point()]
        weight = max(floating, key=lambda t: t.numel())
        self.results.made.append((layer, weight.dtype))
        owners = dict.fromkeys(self.prefix + t.rpartition(".")[0] for t in tensors)
        self.results.report.folded.append(Fold(self.prefix + name, tuple(owners)))

    def _absorb(self, node: fx.Node) -> None:
        """Fold norms into the layer that `node` calls, where values are moved in between."""
        nodes, axes = follow(self.model, node, lambda module: isinstance(module, Layer))
        own = [f"{n.target}.{key}" for n in nodes for key, _ in self._module(n).named_parameters()]
        if len(nodes) < 2 or any(
            user not in nodes for tensor in own for user in self._uses(tensor)
        ):
            return
        if any(len(self.users[str(n.target)]) > 1 for n in nodes):
            return
        names = [str(n.target) for n in nodes]
        layers = [self._module(n) for n in nodes]
        if any(has_hooks(layer) for layer in layers):
            return
        channels = node.meta["shape"][-1 if isinstance(layers[0], nn.Linear) else 1]
        try:
            device = next(layers[0].parameters()).device
            kernels = [split(bare(layer), channels, axes, device) for layer in layers[1:]]
            if kernels[-1][1] is not None:
                return
            norm = kernels[0][0]
            for kernel, _ in kernels[1:]:
                norm = norm.then(kernel)
            shapes = Inputs(tuple(tree_map(_shaped, a) for a in node.args))
            layer = absorb(bare(layers[0]), norm, shapes)  # type: ignore[arg-type]
        except NotFoldableError as error:
            self.results.report.skipped.update(
                dict.fromkeys((self.prefix + n for n in names[1:]), str(error))
            )
            return
        tensors = {
            f"{n}.{key}": t
            for n, m in zip(names, layers, strict=True)
            for key, t in chain(m.named_parameters(), m.named_buffers())
        }
        self._add(names[0], layer, tensors)
        for follower in nodes[1:]:
            follower.replace_all_uses_with(follower.args[0])  # type: ignore[arg-type]

    def _measure(self, original: fx.Graph, checks: Mapping[str, tuple[str, str]]) -> None:
        """Compare each new layer with the nodes that it stands for, on their own input."""
        if any(t.is_meta for t in chain(self.bare.parameters(), self.bare.buffers())):
            return
        errors = _Measurement(self.bare, original, self.model, checks).errors(self.inputs)
        self.results.errors += [
            BlockError(self.prefix + name, error) for name, error in errors.items()
        ]


class _Measurement(fx.Interpreter):
    """Runs the original graph, and each new layer as soon as there is its input."""

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        layers: nn.Module,
        checks: Mapping[str, tuple[str, str]],
    ) -> None:
        super().__init__(root, graph=graph)
        self.layers, self.checks = layers, checks
        self.found: dict[str, float] = {}
        self.expected: dict[str, Any] = {}

    def errors(self, inputs: Inputs) -> dict[str, float]:
        """Return the relative error of each layer by its name, in order of execution."""
        args = tree_map(_copied, list(arguments_of(self.module, inputs).values()))
        with torch.no_grad(), InFloat64():
            self.run(*args)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        """Run one node of the original."""
        result = super().run_node(n)
        for end, (root, name) in self.checks.items():
            if root == n.name:
                self.expected[end] = self.layers.get_submodule(name)(result)
        if n.name in self.expected:
            name = self.checks[n.name][1]
            error = relative_difference(result, self.expected.pop(n.name))
            self.found[name] = max(error, self.found.get(name, 0.0))
        return result


class _Text(str):
    """A string that is printed as it is inside a container."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _written_out(user: fx.Node, node: fx.Node, value: Any) -> Any:
    """Return the arguments of `user` with `value` in the place of `node`."""
    return map_arg((user.args, user.kwargs), lambda n: value if n is node else n)


def _identity(shape: torch.Size, device: torch.device | str) -> ConvKernel:
    return ConvKernel.identity(shape[1], axes=len(shape) - 2, dtype=torch.float64, device=device)


def _positions(node: fx.Node, upsamples: bool) -> int:
    """Return how often a convolution applies its weight."""
    source = next(i for i in node.all_input_nodes if "shape" in i.meta)
    shape = (source if upsamples else node).meta["shape"]
    return shape.numel() // shape[1]


def _sketched(value: Any) -> Any:
    value = without_values(value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shaped(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return torch.empty(argument.meta["shape"], dtype=torch.float64, device="meta")
    return argument


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
