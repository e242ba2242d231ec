"""Folding by replacing modules: class, forward and names of the model stay."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import Layer, as_module
from repnet.equivalence import Inputs
from repnet.kernel import ConvKernel, NotAffineError, NotFoldableError
from repnet.proof import Fold, FoldReport, prove
from repnet.scaling import absorb
from repnet.shapes import observe
from repnet.siblings import Chain, find_chains, split
from repnet.surroundings import has_hooks
from repnet.symbolic import kept_tensors, kernel_of, twin
from repnet.tracing import RecordingError, record

Norms = Literal["absorb", "keep"]
NORMS = {0: nn.BatchNorm1d, 3: nn.BatchNorm3d}  # by spatial axes; all others have two


def fold_modules(
    source: nn.Module, inputs: Inputs, norms: Norms = "absorb"
) -> tuple[nn.Module, FoldReport]:
    """Return a copy of `source` in which convolutions stand for blocks and chains, with proof.

    Args:
        source: not changed.
        inputs: in float64.
        norms: see `reparameterize`.

    Raises:
        FoldMismatchError: the copy differs.
        ValueError: the model cannot run on the inputs.
    """
    surgery = _Surgery(source, inputs, norms)
    model, report = surgery.operate(), surgery.report
    prove(report, source, model, inputs, surgery.compared, surgery.made)
    return model, report


class _Surgery:
    """One folding of one model.

    What becomes a convolution is decided on a copy without values, where the algebra costs
    nothing; then each convolution is computed once, and the result is a copy of the model in which
    it stands in the place of its layers.
    """

    def __init__(self, source: nn.Module, inputs: Inputs, norms: Norms) -> None:
        self.source, self.norms = source, norms
        self.report = FoldReport()
        self.made: list[tuple[nn.Module, torch.dtype]] = []
        self.failures: dict[str, str] = {}  # reasons of modules that cannot be recorded
        self.compared: list[str] = []  # modules after which both forms have the same tensor
        self.calls = observe(source, inputs)
        self.owners: dict[int, set[str]] = defaultdict(set)  # modules by their tensors
        for name, module in source.named_modules():
            for tensor in chain(module.parameters(False), module.buffers(False)):
                self.owners[id(tensor)].add(name)
        self.activations = [
            name
            for name, module in source.named_modules()
            if type(module).__module__ == nn.ReLU.__module__
        ]
        self.sketch = bare(source, device="meta").double()
        self.planned: dict[str, nn.Module] = {}  # the convolutions of blocks, without values
        self.replaced: dict[int, Any] = {}  # what stands in the copy, by identity of the original

    def operate(self) -> nn.Module:
        """Return the folded copy, with the new layers in float64."""
        self._plan(self.sketch, "")
        blocks = {id(self.sketch.get_submodule(n)): m for n, m in self.planned.items()}
        convolutions = set(self.planned.values())
        chains = find_chains(
            copy_with(self.sketch, blocks),
            self.calls,
            lambda module: isinstance(module, Layer) or module in convolutions,
            self.failures,
        )
        # deepcopy hands out what is in its memo, so the planned convolutions are still themselves
        for found in chains:
            try:
                self._fold_chain(found)
            except NotFoldableError as error:
                self.report.skipped.update(dict.fromkeys(found.names[1:], str(error)))
        for name in self.planned:
            if id(self.source.get_submodule(name)) not in self.replaced:
                self._replace(name, self._made(self._kernel(name), [name]))
                self.compared.append(name)
        model = copy_with(self.source, self.replaced)
        self._report_norms(model)
        return model

    # Blocks

    def _plan(self, module: nn.Module, name: str) -> None:
        """Decide for `module`, or else for its children, whether they are convolutions."""
        layers = [n for n, m in module.named_modules(prefix=name) if _owns_tensors(m)]
        if (len(layers) >= 2 or _computes_its_weight(module)) and not self._activates(name):
            try:
                self.planned[name] = self._sketch(module, name)
            except NotAffineError:
                pass  # an ordinary container, such as a stage with its activations
            except NotFoldableError as error:
                self.report.skipped[name] = str(error)
            else:
                self.report.folded.append(Fold(name, tuple(layers)))
                return
        for child_name, child in module.named_children():
            self._plan(child, f"{name}.{child_name}" if name else child_name)

    def _activates(self, name: str) -> bool:
        """Return whether an activation of torch runs inside, which saves trying the algebra."""
        return any(_within(inner, name) and inner in self.calls for inner in self.activations)

    def _sketch(self, module: nn.Module, name: str) -> nn.Module:
        """Return the convolution that `module` would become, without values."""
        call = self.calls.get(name)
        if call is None or call.shapes is None:
            raise NotAffineError("it was not run, or not from one tensor to another")
        if self.norms == "keep" and self._is_plain(module, name):
            raise NotAffineError("it is a convolution with its norm")
        before, after = call.shapes
        kernel = kernel_of(module, before[1], axes=len(before) - 2)
        if kernel.out_channels != after[1] or len(after) != len(before):
            raise NotFoldableError("forward does something else to a kernel than to a tensor")
        inside = [c for n, c in self.calls.items() if _within(n, name)]
        cost = sum(c.multiplications * c.count for c in inside) // call.count
        if not cost:
            raise NotAffineError("it holds no convolution, and norms alone never become one")
        self._refuse_entangled([name])
        positions = before if max((1, *kernel.upsample)) > 1 else after
        new_cost = kernel.weight.numel() * (positions.numel() // positions[1])
        size = sum(t.numel() for t in chain(module.parameters(), module.buffers()))
        new_size = kernel.weight.numel() + (0 if kernel.bias is None else kernel.bias.numel())
        if new_cost > cost or new_size > size:
            raise NotFoldableError(
                f"one convolution would be larger: {new_cost:,} instead of {cost:,} "
                f"multiplications, {new_size:,} instead of {size:,} values"
            )
        return as_module(kernel, like=module)

    def _is_plain(self, module: nn.Module, name: str) -> bool:
        """Return whether layers follow each other and a norm comes last, as in plain networks."""
        if hasattr(module, "original_bias"):  # it took the place of a convolution
            return False
        layers = [m for m in module.children() if not isinstance(m, nn.Identity)]
        if isinstance(module, nn.Sequential) and layers and isinstance(layers[-1], _BatchNorm):
            return True
        if _computes_its_weight(module):
            return False
        try:
            graph = record(module, self.calls[name].inputs, lambda m: not list(m.children())).graph
        except RecordingError:
            return False
        return all(len(node.users) <= 1 and len(node.all_input_nodes) <= 1 for node in graph.nodes)

    # Chains

    def _fold_chain(self, found: Chain) -> None:
        """Fold the layers that follow a convolution into it."""
        first, *others = found.names
        if self.norms == "keep" and first not in self.planned:
            return
        if found.shared is not None:
            raise NotFoldableError(f"'{found.shared}' is also used elsewhere")
        self._refuse_entangled(found.names)
        if self.norms == "keep":
            self._move_bias(first, others[0])
            return
        channels = self._channels(first)
        device = next(self.source.get_submodule(first).parameters()).device
        kernel = ConvKernel.identity(channels, axes=found.axes, dtype=torch.float64, device=device)
        rest: nn.Module | None = None
        for name in others:
            layer = bare(self.source.get_submodule(name))
            part, rest = split(layer, channels, found.axes, device)
            kernel = kernel.then(part)
        self._replace(first, self._scaled(first, kernel, found.names))
        for name in others:
            self._replace(name, nn.Identity())
        if rest is not None:
            self._replace(others[-1], deepcopy(rest))
        self.report.folded = [fold for fold in self.report.folded if fold.name != first]
        self.report.folded.append(Fold(first, found.names, end=others[-1]))
        self.compared.append(others[-1])

    def _channels(self, name: str) -> int:
        layer = self.planned.get(name) or self.source.get_submodule(name)
        output = self.calls[name].output
        return int(output.shape[-1 if isinstance(layer, nn.Linear) else 1])

    def _scaled(self, name: str, norm: ConvKernel, names: Sequence[str]) -> nn.Module:
        """Return the layer `name` with its output scaled and shifted as `norm` does."""
        if name in self.planned:
            kernel = self._kernel(name)
            return self._made(kernel.then(norm.over(kernel.axes)), names)
        layer = bare(self.source.get_submodule(name))
        assert isinstance(layer, Layer)
        new = absorb(layer, norm, self.calls[name].inputs)
        for parameter in new.parameters():
            parameter.requires_grad_(self._trainable(names))
        self.made.append((new, _dtype(layer)))
        return new

    def _move_bias(self, first: str, norm_name: str) -> None:
        """Fold the block `first` without its bias, which the norm after it subtracts instead."""
        norm = self.source.get_submodule(norm_name)
        kernel = self._kernel(first)
        plain = getattr(self.source.get_submodule(first), "original_bias", False) is False
        if not plain or kernel.bias is None or not isinstance(norm, _BatchNorm):
            return
        if norm.running_mean is None:
            return
        moved = deepcopy(norm).eval()
        moved.running_mean = norm.running_mean.double() - kernel.bias.detach()
        self.made.append((moved, norm.running_mean.dtype))
        self._replace(norm_name, moved)
        self._replace(first, self._made(replace(kernel, bias=None), [first]))
        self.compared.append(norm_name)

    # Both

    def _kernel(self, name: str) -> ConvKernel:
        """Return the kernel of a planned block, in float64."""
        shapes = self.calls[name].shapes
        assert shapes is not None
        before, _ = shapes
        with torch.no_grad():
            return kernel_of(
                bare(self.source.get_submodule(name)),
                before[1],
                axes=len(before) - 2,
                dtype=torch.float64,
            )

    def _trainable(self, names: Sequence[str]) -> bool:
        modules = (self.source.get_submodule(name) for name in names)
        return any(p.requires_grad for module in modules for p in module.parameters())

    def _made(self, kernel: ConvKernel, names: Sequence[str]) -> nn.Module:
        """Return the layer of `kernel`, which stands for the modules of these names."""
        like = nn.ModuleList(self.source.get_submodule(n) for n in names)
        layer = as_module(kernel, like=like)
        self.made.append((layer, _dtype(like)))
        return layer

    def _replace(self, name: str, new: nn.Module) -> None:
        self.replaced[id(self.source.get_submodule(name))] = new

    def _refuse_entangled(self, names: Sequence[str]) -> None:
        """Raise if code outside could see that these modules are gone."""
        for name in names:
            for inner, m in self.source.get_submodule(name).named_modules(prefix=name):
                if has_hooks(m):
                    where = inner or type(m).__name__
                    raise NotFoldableError(f"'{where}' has a forward hook; remove it first")
                for tensor in chain(m.parameters(False), m.buffers(False)):
                    for owner in self.owners[id(tensor)]:
                        if not any(_within(owner, n) for n in names):
                            raise NotFoldableError(f"'{inner}' shares a tensor with '{owner}'")

    def _report_norms(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                self.report.left.append(name)
                reason = why_left(module, name, name in self.calls, self.failures)
                if self.norms == "keep":
                    reason = "norms='keep'"
                self.report.skipped.setdefault(name, reason)


def why_left(norm: nn.Module, name: str, run: bool, failures: Mapping[str, str]) -> str:
    """Return why a batch norm remains that no chain or region took in.

    Args:
        norm: the norm.
        name: of it.
        run: whether it was.
        failures: reasons by name of modules that cannot be recorded.
    """
    if not run:
        return "it was not run on the example input"
    home = name.rpartition(".")[0]
    if home in failures:
        where = f"'{home}'" if home else "the model"
        return f"the forward of {where} cannot be recorded: {failures[home]}"
    try:
        axes = next((a for a, kind in NORMS.items() if isinstance(norm, kind)), 2)
        split(bare(norm, device="meta"), norm.num_features, axes, torch.device("meta"))  # type: ignore
    except NotFoldableError as error:
        return str(error)
    return "no convolution before it feeds it alone"


def bare(module: nn.Module, *, device: str | None = None) -> nn.Module:
    """Return a copy in evaluation mode, with shared tensors and without hooks.

    Hooks are anyone's code, and must not see kernels or proxies.
    """
    copy = twin(module, device=device).eval()
    for m in copy.modules():
        m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
    return copy


def copy_with(source: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    """Return a deep copy of `source` in evaluation mode with other modules in it.

    Args:
        source: not changed; what is replaced is not copied.
        replaced: new modules by the identity of the old, wherever they occur.
    """
    return deepcopy(source, {**kept_tensors(source), **replaced}).eval()


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _owns_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(False), module.buffers(False)))


def _computes_its_weight(module: nn.Module) -> bool:
    """Return whether a convolution is of a class that computes something from its weight."""
    plain = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(module).forward not in plain
    )


def _dtype(module: nn.Module) -> torch.dtype:
    tensors = chain(module.parameters(), module.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
