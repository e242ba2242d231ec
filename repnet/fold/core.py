"""`Folding`: decides what becomes one convolution in a model, and writes the result.

From the recorded frames (`record.py`) three kinds of folds are planned, each by the algebra alone,
on modules without values:

- a module whose whole forward is one convolution is replaced under its own name;
- a convolution takes in the norms that alone consume it (`norm_chains.py`), and modules in a row
  become one (`regions.py`): the tree is edited, every class and forward stays;
- a forward that writes branches itself becomes a small graph in the place of this one module.

Then the kernels are computed once, in float64, and put into a copy of the model. What fails its
proof (`proof.py`) is excluded, and the plan is made again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import Layer, as_module
from repnet.fold.frame import Frame
from repnet.fold.kernels import TRANSPOSED, Kernels, argument_of, steps_of
from repnet.fold.norm_chains import Chains, Head, Link, prefix_of
from repnet.fold.regions import Region, Regions, growth, sources_of, tensors_of
from repnet.fold.report import Fold
from repnet.fold.rewrite import GraphError, copy_with, graph_of, identity_like, with_attributes
from repnet.fold.survey import Survey, is_identity, readers_of, within
from repnet.kernel import ConvKernel, NotAffineError, NotFoldableError
from repnet.symbolic import transpose_weight

Norms = Literal["absorb", "keep"]


@dataclass
class Plan:
    """What is to become one convolution.

    Args:
        whole: modules, by name.
        graphs: regions of the modules that become graphs, by the name of these.
        rows: regions of modules in a row, which stay modules.
        chains: followers of each convolution, by its name.
        fronts: the norm in front of a convolution, by the name of this.
        skipped: reasons, by the name of what is left.
        grown: how much larger a convolution is than what it replaces, by its name.
    """

    whole: dict[str, Frame] = field(default_factory=dict)
    graphs: dict[str, list[Region]] = field(default_factory=dict)
    rows: list[Region] = field(default_factory=list)
    chains: dict[str, tuple[Link, ...]] = field(default_factory=dict)
    fronts: dict[str, Head] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    grown: dict[str, str] = field(default_factory=dict)


@dataclass
class Built:
    """A folded model, whose new layers are in float64.

    Args:
        model: the folded copy.
        folds: what was done, each with the module after which both forms have the same tensor.
        graphs: names of the modules that are graphs.
        made: the new layers, each with the name of its fold and the dtype that it is stored in.
    """

    model: nn.Module
    folds: list[tuple[Fold, str]]
    graphs: list[str]
    made: list[tuple[str, nn.Module, torch.dtype]]


class RefusedError(Exception):
    """A fold cannot be built.

    Args:
        name: of the fold, as in `Folding.excluded`.
        reason: why not.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let errors name the fold that they belong to."""
    try:
        yield
    except (NotFoldableError, GraphError) as error:  # values may tell what shapes do not
        raise RefusedError(name, str(error)) from error


class Folding:
    """One folding of one model.

    Args:
        source: the model; not changed.
        survey: of runs of it.
        norms: see `reparameterize`.
        may_grow: whether a convolution may cost more than what it replaces, by its name.
        graphs: names of the modules that become graphs in any case; None to write only those where
            a forward holds branches.
        edit_only: write no graphs at all.
    """

    def __init__(
        self,
        source: nn.Module,
        survey: Survey,
        norms: Norms = "absorb",
        *,
        may_grow: Callable[[str], bool] = lambda name: False,
        graphs: Sequence[str] | None = None,
        edit_only: bool = False,
    ) -> None:
        self.source, self.survey, self.norms = source, survey, norms
        self.forced, self.edit_only = graphs, edit_only
        self.may_grow = lambda name: (
            may_grow(name) or getattr(survey.modules.get(name), "deploys_as_one", False)
        )
        self.sketch = Kernels(survey.sketch.double(), survey.is_uniform)
        self.kernels = Kernels(source, survey.is_uniform)
        self.excluded: dict[str, str] = {}  # reason by name of a fold that failed
        self._plain: dict[Frame, bool] = {}

    # Which modules and regions

    def plan(self) -> Plan:
        """Return what to fold, without what is excluded."""
        self._planned = plan = Plan(skipped=dict(self.excluded))
        self._consumed: set[str] = set()  # names of modules that are part of a region
        self._visit("", self.source, set())
        regions = [*plan.rows, *(r for found in plan.graphs.values() for r in found)]
        chains = Chains(self.survey, self.sketch, plan.whole, regions)
        found = chains.find()
        plan.chains = {tail: own for tail, own in found.items() if tail not in self.excluded}
        if self.norms == "keep":
            plan.chains = {t: own[:1] for t, own in plan.chains.items() if t in plan.whole}
        else:
            absorbed = {link.head.name for own in plan.chains.values() for link in own}
            fronts = chains.fronts(absorbed)
            plan.fronts = {c: head for c, head in fronts.items() if c not in self.excluded}
        for name, reason in chains.reasons.items():
            plan.skipped.setdefault(name, reason)
        return plan

    def _visit(self, name: str, module: nn.Module, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        plan = self._planned
        if name in self.survey.frames:
            if self.forced is None or name not in self.forced:
                try:
                    self._check_whole(name)
                except NotAffineError:
                    pass  # an ordinary module, such as a stage with its activations
                except NotFoldableError as error:
                    plan.skipped.setdefault(name, str(error))
                else:
                    plan.whole[name] = self.survey.frames[name][0]
                    return
            for region in self._regions(name):
                self._consumed |= {str(n.target) for n in region.nodes if n.op == "call_module"}
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if path not in self._consumed:
                self._visit(path, child, seen)

    def _check_whole(self, name: str) -> None:
        """Do nothing if a module can and should be replaced by one convolution.

        Raises:
            NotAffineError: it is something else.
            NotFoldableError: it is affine, but there is a reason against it.
        """
        survey, kernels = self.survey, self.sketch
        if name in self.excluded or not survey.is_uniform(name):
            raise NotAffineError("it is not the same for every input")
        if survey.keeps(name):
            raise NotAffineError("it keeps something aside")
        frame = survey.frames[name][0]
        given, result = survey.tensor_argument(frame), survey.output(frame)
        if given is None or result is None or result is given:
            raise NotAffineError("it does not go from one tensor to another")
        calls = [step for node in frame.graph.nodes for step in steps_of(node)]
        convolutions = sum(kernels.weight(n) is not None for n in calls)
        layers = sum(_owns_tensors(n, kernels) for n in calls)
        computed = any(kernels.weight(n) is not None and _is_computed(n) for n in calls)
        if not convolutions:
            raise NotAffineError("it holds no convolution, and norms alone never become one")
        if self.norms == "keep" and not computed and self._is_plain(frame):
            raise NotAffineError("it is a convolution with its norm")
        kernel = kernels.module(name, frame, kernels.identity(given))
        before, after = given.meta["shape"], result.meta["shape"]
        if not isinstance(kernel, ConvKernel) or len(after) != len(before):
            raise NotAffineError("it returns no feature map")
        if kernel.out_channels != after[1]:
            raise NotFoldableError("forward does something else to a kernel than to a tensor")
        nodes = frame.graph.nodes
        if given.meta.get("changed") or any(
            n.meta.get("in_place") and n.args[0] is given for n in nodes
        ):
            raise NotFoldableError("forward changes its input in place")
        if reason := survey.entanglement([name]):
            raise NotFoldableError(reason)
        if outside := survey.callers_outside(name):
            raise NotFoldableError(f"'{outside}' is also used elsewhere")
        module = survey.modules[name]
        cost = sum(kernels.multiplications(n) for n in frame.graph.nodes)
        grown = growth(kernel, before, after, cost, chain(module.parameters(), module.buffers()))
        if grown and not self.may_grow(name):
            raise NotFoldableError(f"{grown}; grow= allows it")
        layer = as_module(kernel, like=nn.Module())
        if layers < 2 and not computed:
            steps = [n for n in calls if "shape" in n.meta and not n.meta.get("constant")]
            steps = [n for n in steps if n.op != "placeholder" and not is_identity(n)]
            if len(steps) <= (len(layer) if isinstance(layer, nn.Sequential) else 1):
                raise NotAffineError("it is one layer already")
        if grown:
            self._planned.grown[name] = grown

    def _is_plain(self, frame: Frame) -> bool:
        """Return whether layers follow each other and a norm comes last, as in plain networks."""
        if frame not in self._plain:
            nodes = list(frame.graph.nodes)
            row = not hasattr(frame.module, "original_bias") and all(
                (n.op not in ("call_function", "call_method") or n.meta.get("constant"))
                and len(readers_of(n)) <= 1
                for n in nodes
            )
            last = self.survey.output(frame)
            self._plain[frame] = row and (
                (last is not None and isinstance(self._module(last), _BatchNorm))
                or all("frame" not in n.meta or self._is_plain(n.meta["frame"]) for n in nodes)
            )
        return self._plain[frame]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.survey.modules[str(node.target)] if node.op == "call_module" else None

    def _regions(self, name: str) -> list[Region]:
        """Plan the regions of one forward."""
        frame = self.survey.frames[name][0]
        if name in self.excluded:
            return []
        if not (self.survey.is_uniform(name) or self._is_forced(name)):
            return []
        finder = Regions(
            frame, self.sketch, lambda region: self._wants(name, region), self.may_grow
        )
        found = finder.find()
        rows = [r for r in found if r.is_linear and not self._is_forced(name)]
        branches = [r for r in found if r not in rows]
        self._planned.grown |= {
            r.name: finder.grown[r.name] for r in found if r.name in finder.grown
        }
        self._planned.rows += rows
        if branches or self._is_forced(name):
            self._planned.graphs[name] = branches
        for layer, reason in finder.refused.items():
            if layer and not any(layer == r.name for r in found):
                self._planned.skipped.setdefault(layer, reason)
        return found

    def _is_forced(self, name: str) -> bool:
        return self.forced is not None and name in self.forced

    def _wants(self, name: str, region: Region) -> bool:
        """Return whether a region is to be folded, and nothing outside reads what is in it."""
        kernels = self.sketch
        if region.name in self.excluded or name in self.excluded:
            return False
        convolutions = [kernels.convolutions(n) for n in region.nodes]
        calls = sum(convolutions) + sum(kernels.norms(n) for n in region.nodes)
        if self._is_forced(name):
            if len(region.nodes) == 1 and not _is_computed(region.end):
                return False
        elif calls < 2:
            return False
        elif region.is_linear:
            layers = [n for n in region.nodes if not is_identity(n)]
            if self.norms == "keep" or (
                convolutions[region.nodes.index(layers[0])] and sum(map(bool, convolutions)) == 1
            ):
                return False  # a convolution with what follows it: a chain
        else:
            frame = self.survey.frames[name][0]
            if self.edit_only or not frame.rewritable or self.survey.keeps(name):
                return False
            if name in self.survey.hooked:
                return False
            if frame.names_its_dtype():
                return False
            if self.norms == "keep":
                branching = any(
                    sum(not i.meta.get("constant") for i in n.all_input_nodes) > 1
                    for n in region.nodes
                )
                if not branching or kernels.norms(region.end):
                    return False
        names = [str(n.target) for n in region.nodes if n.op == "call_module"]
        return not self._entanglement(name, region, names)

    def _entanglement(self, name: str, region: Region, names: list[str]) -> str:
        survey = self.survey
        if reason := survey.entanglement(names):
            return reason
        for inner in names:
            if survey.keeps(inner):
                return f"'{inner}' keeps something aside"
            if survey.callers_outside(inner):
                return f"'{inner}' is also used elsewhere"
            uses = [n for f in survey.frames[name] for n in f.graph.nodes if n.target == inner]
            if survey.calls(inner) != len(uses):
                return f"'{inner}' is also used elsewhere"
        for key in tensors_of(region, self.sketch):
            if any(within(key.rpartition(".")[0], n) for n in names):
                continue
            if survey.readers[key] - {name}:
                return f"'{key}' is also read elsewhere"
            owner, _, own = key.rpartition(".")
            held = getattr(survey.every_name[owner], own)
            if len(survey.owners.get(id(held), ())) > 1:
                return f"'{key}' is shared"
            if survey.ran(owner) and owner != name:
                return f"'{owner}' is also called"
        return ""

    # What is put in their place

    @torch.no_grad()
    def build(self, plan: Plan) -> Built:
        """Return a folded copy of the model, with the new layers in float64."""
        replaced: dict[int, Any] = {}
        folds: list[tuple[Fold, str]] = []
        made: list[tuple[str, nn.Module, torch.dtype]] = []

        def put(fold: str, name: str, new: nn.Module, dtype: torch.dtype | None = None) -> None:
            replaced[id(self.survey.modules[name])] = new
            if dtype is not None:
                made.append((fold, new, dtype))

        for name in plan.whole:
            with _named(name):
                self._build_whole(name, plan, put, folds)
        for tail in dict.fromkeys([*plan.chains, *plan.fronts]):
            if tail not in plan.whole:
                with _named(tail):
                    self._build_chain(tail, plan, put, folds)
        for region in plan.rows:
            with _named(region.name):
                self._build_row(region, put, folds)
        layers: dict[str, dict[Region, nn.Module]] = {}
        for name, regions in plan.graphs.items():
            for part in self._parts(name, regions):
                replaced[id(part)] = identity_like(part)  # others may hold it, and nobody calls it
            layers[name] = {}
            signatures: dict[Any, nn.Module] = {}
            for region in regions:
                new = signatures.get(region.signature)
                if new is None:
                    with _named(region.name):
                        new = self._region_layer(region)
                        if region.name in self.survey.modules:
                            new = with_attributes(new, self.survey.modules[region.name])
                        signatures[region.signature] = new
                    dtype = self._dtype_of(tensors_of(region, self.kernels).values())
                    made.append((region.name, new, dtype))
                    folds.append((Fold(region.name, self._layers(region)), name))
                layers[name][region] = new
        model = copy_with(self.source, replaced)
        for name in sorted(plan.graphs, key=len, reverse=True):  # the innermost first
            frame = self.survey.frames[name][0]
            guarded = self.forced is not None
            with _named(name):
                model = graph_of(model, self.survey, frame, layers[name], guarded=guarded)
        graph_of_call = {  # a call that a graph leaves out cannot be seen any more
            str(n.target): name
            for name in plan.graphs
            for n in self.survey.frames[name][0].graph.nodes
            if n.op == "call_module"
        }
        folds = [(fold, graph_of_call.get(name, name)) for fold, name in folds]
        order = {name: n for n, name in enumerate(self.survey.modules)}
        folds.sort(key=lambda item: order.get(item[0].name, len(order)))
        return Built(model, folds, list(plan.graphs), made)

    def _parts(self, name: str, regions: Sequence[Region]) -> Iterator[nn.Module]:
        """Yield the modules of which nothing is left in a graph but the new layers."""
        nodes = [n for region in regions for n in (*region.nodes, *sources_of(region.nodes))]
        for node in nodes:
            target = str(node.target)
            owner = target.rpartition(".")[0]
            if node.op == "call_module":
                yield self.survey.modules[target]
            elif node.op == "get_attr" and owner != name and not self.survey.ran(owner):
                part = self.survey.every_name[owner]
                yield from [part] if not any(part.children()) else []

    def _build_whole(self, name: str, plan: Plan, put: Any, folds: list[Any]) -> None:
        links = plan.chains.get(name, ())
        given = self.survey.tensor_argument(plan.whole[name])
        assert given is not None
        kernel = self.kernels.frame(plan.whole[name], self.kernels.identity(given))
        names = [name, *(link.head.name for link in links)]
        if self.norms == "keep":
            kernel = self._moved_bias(name, kernel, links, put)
        elif links:
            kernel = kernel.then(self._norm(links, kernel.axes))
            self._remove(name, links, put)
        layer = with_attributes(self._layer(kernel, names), self.survey.modules[name])
        put(name, name, layer, self._dtype(names))
        inner = [n for n, m in self.survey.below(name).items() if _owns(m)]
        followers = names[1:] if self.norms == "absorb" else []
        folds.append((Fold(name, (*inner, *followers), names[-1] if links else None), names[-1]))

    def _build_chain(self, tail: str, plan: Plan, put: Any, folds: list[Any]) -> None:
        links, front = plan.chains.get(tail, ()), plan.fronts.get(tail)
        names = [tail, *(link.head.name for link in links)]
        first = [] if front is None else [front.name]
        norm = self._norm(links, 0) if links else None
        before = None if front is None else self._head(front)
        layer = self._absorbed(tail, before, norm, [*first, *names])
        put(tail, tail, layer, self._dtype([tail]))
        self._remove(tail, links, put)
        if front is not None:
            put(tail, front.name, identity_like(self.survey.modules[front.name]))
        folds.append((Fold(tail, (*first, *names), end=names[-1]), names[-1]))

    def _build_row(self, region: Region, put: Any, folds: list[Any]) -> None:
        layer = self._region_layer(region)
        names = [str(n.target) for n in region.nodes]
        for name in names:
            module = self.survey.modules[name]
            if name == region.name:
                put(name, name, with_attributes(layer, module), self._dtype(names))
            else:
                put(region.name, name, identity_like(module))
        folds.append((Fold(region.name, self._layers(region), end=names[-1]), names[-1]))

    def _layers(self, region: Region) -> tuple[str, ...]:
        names = (key.rpartition(".")[0] for key in tensors_of(region, self.kernels))
        return tuple(dict.fromkeys(names))

    def _region_layer(self, region: Region) -> nn.Module:
        values: dict[fx.Node, Any] = {region.root: self.kernels.identity(region.root)}
        for node in region.nodes:
            values[node] = self.kernels.node(node, values)
        parameters = [
            t for t in tensors_of(region, self.kernels).values() if isinstance(t, nn.Parameter)
        ]
        return as_module(values[region.end], like=nn.ParameterList(parameters))

    def _norm(self, links: Sequence[Link], axes: int) -> ConvKernel:
        """Return the map of all followers, on the channels of their convolution."""
        channels = links[0].stop - links[0].start
        total = ConvKernel.identity(
            channels, axes=axes, dtype=torch.float64, device=self.kernels.device
        )
        for link in links:
            kernel = self._head(link.head)
            part = slice(link.start, link.stop)
            bias = None if kernel.bias is None else kernel.bias[part]
            own = ConvKernel(kernel.weight[part], bias, groups=link.stop - link.start)
            total = total.then(own.over(axes))
        return total

    def _head(self, head: Head) -> ConvKernel:
        """Return the channelwise map that a module begins with, with values."""
        if head.name in self.survey.leaves:
            return self.kernels.alone(self.survey.leaves[head.name][0][1])
        frame = self.survey.frames[head.name][0]
        placeholder = self.survey.tensor_argument(frame)
        assert placeholder is not None
        if head.prefix:
            return prefix_of(placeholder, self.kernels)[1]
        return self.kernels.frame(frame, self.kernels.identity(placeholder))

    def _remove(self, fold: str, links: Sequence[Link], put: Any) -> None:
        for link in links:
            name = link.head.name
            module = self.survey.modules[name]
            if not link.head.prefix:
                put(fold, name, identity_like(module))
                continue
            frame = self.survey.frames[name][0]
            given = self.survey.tensor_argument(frame)
            assert given is not None
            nodes, _ = prefix_of(given, self.kernels)
            put(fold, name, graph_of(module, self.survey, frame, {}, without=nodes))

    def _absorbed(
        self, tail: str, front: ConvKernel | None, norm: ConvKernel | None, names: Sequence[str]
    ) -> nn.Module:
        """Return the layer `tail` with a map in front of it, and its output scaled and shifted."""
        layer = self.survey.modules[tail]
        assert isinstance(layer, Layer)
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or front is not None:
            # The weight is computed from other tensors, as by `weight_norm`, or its inputs change.
            kernel = self._layer_kernel(tail)
            if front is not None:
                kernel = front.over(kernel.axes).then(kernel)
            if norm is not None:
                kernel = kernel.then(norm.over(kernel.axes))
            return with_attributes(self._layer(kernel, names), layer)
        assert norm is not None
        groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
        exact = weight.detach().double()
        exact = transpose_weight(exact, groups) if groups else exact
        scale, shift = norm.weight.flatten(), norm.bias
        exact = exact * scale.reshape(-1, *(1,) * (exact.ndim - 1))
        exact = transpose_weight(exact, groups) if groups else exact
        total = torch.zeros_like(scale) if bias is None else bias.detach().double() * scale
        total = total if shift is None else total + shift
        copy = copy_with(layer, {id(weight): weight, id(bias): bias})
        trainable = self._trainable(names)
        last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        last = last and not weight.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        exact = exact.contiguous(memory_format=layout)
        copy.weight = nn.Parameter(exact, requires_grad=trainable)
        if bias is not None or shift is not None:
            copy.bias = nn.Parameter(total, requires_grad=trainable)
        return copy.eval()

    def _layer_kernel(self, name: str) -> ConvKernel:
        """Return the kernel of a convolution or linear layer, with values."""
        layer: Any = self.survey.modules[name]
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        identity = ConvKernel.identity(
            channels, axes=layer.weight.ndim - 2, dtype=torch.float64, device=self.kernels.device
        )
        return self.kernels.module(name, None, identity)

    def _moved_bias(
        self, name: str, kernel: ConvKernel, links: Sequence[Link], put: Any
    ) -> ConvKernel:
        """Move the bias of a block into the norm behind it, for `norms="keep"`."""
        module = self.survey.modules[name]
        if not links or kernel.bias is None or getattr(module, "original_bias", False):
            return kernel
        norm = self.survey.modules[links[0].head.name]
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or links[0].head.prefix:
            return kernel
        if (links[0].start, links[0].stop) != (0, norm.num_features):
            return kernel
        moved = copy_with(norm, {}).eval()
        moved.running_mean = norm.running_mean.double() - kernel.bias.detach()
        put(name, links[0].head.name, moved, norm.running_mean.dtype)
        return replace(kernel, bias=None)

    def _layer(self, kernel: ConvKernel, names: Sequence[str]) -> nn.Module:
        return as_module(kernel, like=nn.ModuleList(self.survey.modules[n] for n in names))

    def _trainable(self, names: Sequence[str]) -> bool:
        return any(p.requires_grad for n in names for p in self.survey.modules[n].parameters())

    def _dtype(self, names: Sequence[str]) -> torch.dtype:
        modules = [self.survey.modules[n] for n in names]
        return self._dtype_of(t for m in modules for t in chain(m.parameters(), m.buffers()))

    @staticmethod
    def _dtype_of(tensors: Any) -> torch.dtype:
        floating = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        kernels = [t for t in floating if t.ndim > 1]  # rather than statistics of norms
        return next(iter(kernels or floating)).dtype


def _owns_tensors(node: fx.Node, kernels: Kernels) -> bool:
    if node.op != "call_module":
        return kernels.weight(node) is not None
    return _owns(kernels.modules[str(node.target)])


def _owns(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(False), module.buffers(False)))


def _is_computed(node: fx.Node) -> bool:
    """Return whether a convolution computes its weight from other tensors."""
    weight = None if node.op == "call_module" else argument_of(node, 1, "weight")
    return isinstance(weight, fx.Node) and weight.op != "get_attr"
