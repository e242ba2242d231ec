"""`reparameterize`: every affine block of any model becomes its one convolution, with proof."""

from __future__ import annotations

from collections import Counter, OrderedDict
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import as_module
from repnet.equivalence import Equivalence, FoldMismatchError, Inputs, compare
from repnet.kernel import NotAffineError, NotFoldableError
from repnet.siblings import Chain, Convolution, find_chains
from repnet.symbolic import kernel_of

# float64: a fold adds about 1e-15. Errors of all blocks together may grow in deep nets whose
# activations explode, so that the outputs get more room than a single block.
BLOCK_TOLERANCE = 1e-9
OUTPUT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Fold:
    """The layers named in `replaced` became one convolution called `name`.

    Args:
        name: of the convolution.
        replaced: names of the layers.
        end: of a chain, its last layer, after which both forms have the same tensor.
    """

    name: str
    replaced: tuple[str, ...]
    end: str | None = None


@dataclass
class FoldReport:
    """What `reparameterize` did.

    Args:
        folded: in the order of the module tree.
        skipped: reason by module name, for affine blocks that are not one convolution and for
            every batch norm that remains.
        left: names of the batch norms that remain.
        was_training: the model came in training mode; the returned copy is in evaluation mode.
        proof: comparison in float64 on the example input; None on the meta device.
    """

    folded: list[Fold] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    was_training: bool = False
    proof: Equivalence | None = None

    def __str__(self) -> str:
        lines = [
            f"folded {sum(len(f.replaced) for f in self.folded)} layers into "
            f"{len(self.folded)} convolutions"
        ]
        if self.proof is not None:
            lines[0] += f", relative error {self.proof.max_relative_error:.1e} in float64"
        if self.was_training:
            lines.append("the model was in training mode; its evaluation was folded")
        lines += [f"skipped '{name}': {reason}" for name, reason in self.skipped.items()]
        if self.left:
            lines.append(f"batch norms left: {', '.join(self.left)}")
        return "\n".join(lines)


@overload
def reparameterize(
    model: nn.Module, example_input: Any, *, return_report: Literal[False] = False
) -> nn.Module: ...


@overload
def reparameterize(
    model: nn.Module, example_input: Any, *, return_report: Literal[True]
) -> tuple[nn.Module, FoldReport]: ...


def reparameterize(
    model: nn.Module, example_input: Any, *, return_report: bool = False
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """Return a copy of `model` in which every block that is one convolution is one.

    Outermost first, each submodule that is affine in evaluation and holds at least two layers, one
    of them a convolution, is replaced under its own name; then each norm that alone consumes a
    convolution is folded into it (torch.fx finds them). Nothing grows: a block whose kernel would
    need more parameters or multiplications than its layers stays. Everything is computed in
    float64 from the stored weights, compared with the original on `example_input`, and cast last;
    dtype, device, memory format, class and other names stay. The argument is not changed. The
    result is in evaluation mode; to reparameterize it again changes nothing.

    Args:
        model: any module.
        example_input: what `forward` takes: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments, on the model's device.
        return_report: also return the `FoldReport`.

    Returns:
        The folded model, or `(model, report)`.

    Raises:
        FoldMismatchError: the folded copy differs from the model; names the first block that does.
        ValueError: the model cannot run on `example_input`.

    Example:
        >>> folded = reparameterize(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    """
    inputs = _as_inputs(example_input).to(torch.float64)
    reference = deepcopy(model).eval().double()
    surgery = _Surgery(reference, inputs)
    folded, report = surgery.model, surgery.report
    report.was_training = model.training
    if not any(t.is_meta for t in model.parameters()):
        chained = {fold.name for fold in report.folded if fold.end}
        names = [f.end or f.name for f in report.folded if f.end or f.name not in chained]
        try:
            report.proof = compare(reference, _twin(folded), [inputs], names=names)
        except (AttributeError, TypeError, IndexError) as error:
            raise FoldMismatchError(
                f"the folded model does not run: {error}; folded were {', '.join(names)}"
            ) from error
        report.proof.check(BLOCK_TOLERANCE, OUTPUT_TOLERANCE)
    del reference
    _restore_dtypes(folded, model, [fold.name for fold in report.folded])
    return (folded, report) if return_report else folded


class _Surgery:
    """One folding of a copy of one float64 model; the results are attributes."""

    def __init__(self, reference: nn.Module, inputs: Inputs) -> None:
        self.report = FoldReport()
        model = deepcopy(reference)
        # The copy itself is never run, only twins of it: what a forward keeps aside would stay.
        observed = _observe(_twin(reference), inputs, list(model.modules()))
        self.shapes, self.costs, self.calls = observed
        self.names = Counter(
            id(module) for _, module in model.named_modules(remove_duplicate=False)
        )
        self.done: dict[int, nn.Module] = {}
        # Hooks are anyone's code, and must not see kernels or proxies.
        self.hooks = {
            m: (m._forward_hooks, m._forward_pre_hooks)
            for m in model.modules()
            if m._forward_hooks or m._forward_pre_hooks
        }
        for m in self.hooks:
            m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
        self.model = self._fold(model, "")
        for chain in find_chains(_twin(self.model)):
            self._fold_chain(chain)
        for m, (hooks, pre_hooks) in self.hooks.items():
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks
        for norm_name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                self.report.left.append(norm_name)
                self.report.skipped.setdefault(
                    norm_name,
                    "no convolution before it feeds it alone"
                    if id(module) in self.shapes
                    else "it was not run on the example input",
                )

    def _fold(self, module: nn.Module, name: str) -> nn.Module:
        """Return the convolution that `module` is, else `module` with its children folded."""
        if id(module) in self.done:
            return self.done[id(module)]
        replacement = module
        layers = _layers(module, name)
        if len(layers) >= 2:
            try:
                replacement = self._convolution(module, name)
                self.report.folded.append(Fold(name, tuple(layers)))
            except NotAffineError:
                pass  # an ordinary container, such as a stage with its activations
            except NotFoldableError as error:
                self.report.skipped[name] = str(error)
        self.done[id(module)] = replacement
        if replacement is module:
            for child_name, child in list(module.named_children()):
                folded = self._fold(child, f"{name}.{child_name}" if name else child_name)
                for key, value in module._modules.items():
                    if value is child:
                        module._modules[key] = folded
        return replacement

    def _convolution(self, module: nn.Module, name: str) -> nn.Module:
        shapes = self.shapes.get(id(module))
        if shapes is None:
            raise NotAffineError("it was not run, or not from one 4-D tensor to another")
        self._refuse_hooks(module, name)
        (channels, positions), (_, out_positions) = shapes
        kernel = kernel_of(_twin(module), channels)
        cost = sum(self.costs.get(id(m), 0) for m in module.modules())
        if not cost:
            raise NotAffineError("it holds no convolution, and norms alone never become one")
        upsampled = kernel.upsample != (1, 1)
        new_cost = kernel.weight.numel() * (positions if upsampled else out_positions)
        size = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
        if new_cost > cost or kernel.weight.numel() > size:
            raise NotFoldableError(
                f"one convolution would be larger: {new_cost:,} instead of {cost:,} "
                f"multiplications, {kernel.weight.numel():,} instead of {size:,} values"
            )
        return as_module(kernel, like=module)

    def _fold_chain(self, chain: Chain) -> None:
        """Fold the layers that follow a convolution into it."""
        layers = {name: self.model.get_submodule(name) for name in chain.names}
        shared = chain.shared or next(
            (n for n, m in layers.items() if self.calls[id(m)] > 1 or self.names[id(m)] > 1), None
        )
        try:
            if shared is not None:
                raise NotFoldableError(f"'{shared}' is also used elsewhere")
            for name, layer in layers.items():
                self._refuse_hooks(layer, name)
            conv, *followers = layers.values()
            assert isinstance(conv, Convolution)
            sequence = nn.Sequential(conv, *followers)
            folded = as_module(kernel_of(sequence, conv.in_channels), like=sequence)
        except NotFoldableError as error:
            self.report.skipped.update(dict.fromkeys(chain.names[1:], str(error)))
            return
        first, *others = chain.names
        self.model.set_submodule(first, folded)
        for name in others:
            self.model.set_submodule(name, nn.Identity().eval())
        self.report.folded.append(Fold(first, chain.names, end=others[-1]))

    def _refuse_hooks(self, module: nn.Module, name: str) -> None:
        for full_name, m in module.named_modules(prefix=name):
            if m in self.hooks:
                where = full_name or type(m).__name__
                raise NotFoldableError(f"'{where}' has a forward hook; remove it first")


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares parameters and buffers, and so takes no memory."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)


def _observe(
    model: nn.Module, inputs: Inputs, modules: list[nn.Module]
) -> tuple[dict[int, Any], dict[int, int], Counter[int]]:
    """Run the model once; return shapes and multiplications by the identity of its `modules`.

    Args:
        model: what is run.
        inputs: of it.
        modules: of an equal model, in the same order.

    Returns:
        `((in channels, in positions), (out channels, out positions))` of each module that maps one
        4-D tensor to another, multiplications per sample of each convolution, and calls.
    """
    shapes: dict[int, Any] = {}
    costs: dict[int, int] = {}
    calls: Counter[int] = Counter()
    keys = {id(own): id(other) for own, other in zip(model.modules(), modules, strict=True)}

    def observe(module: nn.Module, args: Any, output: Any) -> None:
        key = keys[id(module)]
        calls[key] += 1
        pair = (*args, output)
        if len(pair) != 2 or not all(isinstance(t, Tensor) and t.ndim == 4 for t in pair):
            return
        counts = [(t.shape[1], t.shape[2] * t.shape[3]) for t in pair]
        shapes[key] = counts
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            positions = counts[1][1] if isinstance(module, nn.Conv2d) else counts[0][1]
            costs[key] = positions * module.weight.numel()

    handles = [m.register_forward_hook(observe) for m in model.modules()]
    try:
        with torch.no_grad():
            inputs(model)
    except Exception as error:  # forward is anyone's code
        raise ValueError(f"the model cannot run on example_input in float64: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return shapes, costs, calls


def _as_inputs(example_input: Any) -> Inputs:
    if isinstance(example_input, dict):
        return Inputs(kwargs=example_input)
    return Inputs(example_input if isinstance(example_input, tuple) else (example_input,))


def _layers(module: nn.Module, name: str) -> list[str]:
    """Return the names of the modules in `module` that own a parameter or buffer themselves."""
    return [
        n
        for n, m in module.named_modules(prefix=name)
        if next(m.parameters(recurse=False), None) is not None
        or next(m.buffers(recurse=False), None) is not None
    ]


def _restore_dtypes(folded: nn.Module, original: nn.Module, blocks: list[str]) -> None:
    """Cast each tensor to the dtype that it, or else the layer it stands for, had before."""
    modules = dict(original.named_modules())
    tensors = {**dict(original.named_parameters()), **dict(original.named_buffers())}
    for name, module in folded.named_modules():
        home = name
        while home not in modules:
            home = home.rpartition(".")[0]
        block = next((b for b in blocks if not b or f"{name}.".startswith(f"{b}.")), None)
        layer = modules[home if block is None else block]
        floating = (
            t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()
        )
        default = next(floating, torch.float32)
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None and tensor.is_floating_point():
                    same = tensors.get(f"{name}.{key}" if name else key) if block is None else None
                    tensor.data = tensor.data.to(default if same is None else same.dtype)
