"""`reparameterize`: every affine block of any model becomes its one convolution, with proof."""

from __future__ import annotations

from collections import Counter, OrderedDict
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.equivalence import Equivalence, FoldMismatchError, Inputs, compare
from repnet.kernel import ConvKernel, NotAffineError, NotFoldableError
from repnet.symbolic import kernel_of

# float64: a fold adds about 1e-15. Errors of all blocks together may grow in deep nets whose
# activations explode, so that the outputs get more room than a single block.
BLOCK_TOLERANCE = 1e-9
OUTPUT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Fold:
    """The layers named in `replaced` became one convolution called `name`."""

    name: str
    replaced: tuple[str, ...]
    end: str | None = None  # where a chain ends: the module whose output the two forms share


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
    surgery = _Surgery(deepcopy(reference), inputs)
    folded, report = surgery.model, surgery.report
    report.was_training = model.training
    if not any(t.is_meta for t in model.parameters()):
        chained = {fold.name for fold in report.folded if fold.end}
        names = [f.end or f.name for f in report.folded if f.end or f.name not in chained]
        try:
            report.proof = compare(reference, folded, [inputs], names=names)
        except (AttributeError, TypeError, IndexError) as error:
            raise FoldMismatchError(
                f"the folded model does not run: {error}; folded were {', '.join(names)}"
            ) from error
        report.proof.check(BLOCK_TOLERANCE, OUTPUT_TOLERANCE)
    del reference
    _restore_dtypes(folded, model, [fold.name for fold in report.folded])
    return (folded, report) if return_report else folded


class _Surgery:
    """One folding of one float64 model, which is changed in place; the results are attributes."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.report = FoldReport()
        self.shapes, self.costs, self.calls = _observe(model, inputs)
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
        self._fold_norms(self.model, "")
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
                replacement = self._convolution(module)
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

    def _convolution(self, module: nn.Module) -> nn.Module:
        shapes = self.shapes.get(id(module))
        if shapes is None:
            raise NotAffineError("it was not run, or not from one 4-D tensor to another")
        self._refuse_hooks(module)
        (channels, positions), (_, out_positions) = shapes
        kernel = kernel_of(module, channels)
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
        return _as_module(kernel, like=module)

    def _fold_norms(self, module: nn.Module, name: str) -> None:
        """Fold norms into the convolutions before them, in all that torch.fx can trace."""
        if not any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in module.modules()):
            return
        try:
            graph = _Tracer().trace(module)
        except Exception:  # forward is anyone's code; where it branches, its parts are tried
            for child_name, child in module.named_children():
                self._fold_norms(child, f"{name}.{child_name}" if name else child_name)
            return
        calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
        read = tuple(str(n.target) for n in graph.nodes if n.op == "get_attr")
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                self._fold_chain(module, name, node, calls, read)

    def _refuse_hooks(self, module: nn.Module) -> None:
        for name, m in module.named_modules():
            if m in self.hooks:
                raise NotFoldableError(
                    f"'{name or type(m).__name__}' has a forward hook; remove it first"
                )

    def _fold_chain(
        self,
        root: nn.Module,
        prefix: str,
        node: fx.Node,
        calls: Counter[str],
        read: tuple[str, ...],
    ) -> None:
        """Fold into the convolution at `node` all channelwise layers that alone consume it."""
        conv = root.get_submodule(str(node.target))
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        full = f"{prefix}.{node.target}" if prefix else str(node.target)
        chain: list[tuple[str, nn.Module]] = []
        while len(node.users) == 1:
            (user,) = node.users
            if user.op != "call_module" or user.args != (node,) or user.kwargs:
                break
            layer = root.get_submodule(str(user.target))
            try:
                if not kernel_of(layer, conv.out_channels).is_channelwise:
                    break
            except NotFoldableError:
                break
            chain.append((str(user.target), layer))
            node = user
        while chain and not _layers(chain[-1][1], ""):
            chain.pop()
        norms = chain
        if not norms:
            return
        names = [full, *(f"{prefix}.{n}" if prefix else n for n, _ in norms)]
        shared = [
            n
            for n, m in [(str(full).removeprefix(f"{prefix}."), conv), *norms]
            if calls[n] > 1
            or self.calls[id(m)] > 1
            or self.names[id(m)] > 1
            or any(r.startswith(f"{n}.") for r in read)
        ]
        try:
            if shared:
                raise NotFoldableError(f"'{shared[0]}' is also used elsewhere")
            for _, layer in [("", conv), *norms]:
                self._refuse_hooks(layer)
            sequence = nn.Sequential(conv, *(layer for _, layer in chain))
            folded = _as_module(kernel_of(sequence, conv.in_channels), like=sequence)
        except NotFoldableError as error:
            self.report.skipped.update(dict.fromkeys(names[1:], str(error)))
            return
        root.set_submodule(names[0].removeprefix(f"{prefix}."), folded)
        for norm_name, _ in norms:
            root.set_submodule(norm_name, nn.Identity().eval())
        self.report.folded.append(Fold(full, tuple(names), names[-1]))


class _Tracer(fx.Tracer):
    """Stops at every layer without children, also at those of other libraries."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        no_children = next(module.children(), None) is None
        return no_children or super().is_leaf_module(module, qualified_name)


def _observe(
    model: nn.Module, inputs: Inputs
) -> tuple[dict[int, Any], dict[int, int], Counter[int]]:
    """Run the model once; return shapes and multiplications by module identity.

    Returns:
        `((in channels, in positions), (out channels, out positions))` of each module that maps one
        4-D tensor to another, and multiplications per sample of each convolution.
    """
    shapes: dict[int, Any] = {}
    costs: dict[int, int] = {}
    calls: Counter[int] = Counter()

    def observe(module: nn.Module, args: Any, output: Any) -> None:
        calls[id(module)] += 1
        pair = (*args, output)
        if len(pair) != 2 or not all(isinstance(t, Tensor) and t.ndim == 4 for t in pair):
            return
        counts = [(t.shape[1], t.shape[2] * t.shape[3]) for t in pair]
        shapes[id(module)] = counts
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            positions = counts[1][1] if isinstance(module, nn.Conv2d) else counts[0][1]
            costs[id(module)] = positions * module.weight.numel()

    handles = [m.register_forward_hook(observe) for m in model.modules()]
    try:
        with torch.no_grad():
            inputs(model)
    except Exception as error:  # forward is anyone's code
        raise ValueError(f"the model cannot run on example_input: {error}") from error
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


def _as_module(kernel: ConvKernel, *, like: nn.Module) -> nn.Module:
    """Return the layer that computes `kernel`; it is trainable and channels-last as `like` is.

    Raises:
        NotFoldableError: torch has no such layer.
    """
    (top, bottom), (left, right) = kernel.padding
    settings: dict[str, Any] = {
        "in_channels": kernel.in_channels,
        "out_channels": kernel.out_channels,
        "kernel_size": kernel.kernel_size,
        "dilation": kernel.dilation,
        "groups": kernel.groups,
        "bias": kernel.bias is not None,
        "device": "meta",
    }
    layer: nn.Module
    conv: nn.Conv2d | nn.ConvTranspose2d
    weight = kernel.weight
    if kernel.upsample == (1, 1):
        if (top, left) == (bottom, right) and min(top, left) >= 0:
            layer = conv = nn.Conv2d(**settings, stride=kernel.stride, padding=(top, left))
        else:
            conv = nn.Conv2d(**settings, stride=kernel.stride)
            layer = nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)
    else:
        reach = [d * (k - 1) for d, k in zip(kernel.dilation, kernel.kernel_size, strict=True)]
        padding = (reach[0] - top, reach[1] - left)
        output_padding = (bottom - top, right - left)
        limits = [max(s, d) for s, d in zip(kernel.upsample, kernel.dilation, strict=True)]
        if (
            kernel.stride != (1, 1)
            or min(*padding, *output_padding) < 0
            or any(o >= limit for o, limit in zip(output_padding, limits, strict=True))
        ):
            raise NotFoldableError(
                "torch has no transposed convolution with this stride and padding"
            )
        layer = conv = nn.ConvTranspose2d(
            **settings, stride=kernel.upsample, padding=padding, output_padding=output_padding
        )
        weight = weight.unflatten(0, (kernel.groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    trainable = any(p.requires_grad for p in like.parameters())
    memory_format = torch.contiguous_format
    if any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in like.parameters()
    ):
        memory_format = torch.channels_last
    weight = weight.detach().contiguous(memory_format=memory_format)
    conv.weight = nn.Parameter(weight, requires_grad=trainable)
    if kernel.bias is not None:
        conv.bias = nn.Parameter(kernel.bias.detach(), requires_grad=trainable)
    return layer.eval()


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
