"""What each torch function does to a `ConvKernel`, and `kernel_of`, which runs a module on one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from math import prod
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from repnet.kernel import (
    ConvKernel,
    NotAffineError,
    NotFoldableError,
    Sizes,
    add,
    concat,
    overwrite,
    select,
    share,
)
from repnet.precision import InFloat64


def kernel_of(
    module: nn.Module,
    in_channels: int,
    *,
    axes: int = 2,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> ConvKernel:
    """Return the one convolution that `module` computes in evaluation mode.

    This is `module(ConvKernel.identity(in_channels))`: the fold is what `forward` does to the
    kernel. It is differentiable in the module's parameters. Weights in half precision are folded in
    float64. The training flags are as before when this returns.

    Args:
        module: takes and returns one `(batch, channels, height, width)` tensor.
        in_channels: channels of its input.
        axes: spatial axes of its input: 0 for a linear layer, 1 for a sequence, 3 for a volume.
        dtype: fold in this dtype if it is more precise than the module's.
        device: for a module without tensors; None for the module's device.

    Raises:
        NotAffineError: forward does something that has no rule, or fails on a kernel.
        NotFoldableError: the module is not affine and shift-invariant; the message is the reason.

    Example:
        >>> kernel_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 3).weight.shape
        torch.Size([8, 3, 3, 3])
    """
    tensors = chain(module.parameters(), module.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    exact = torch.promote_types(_exact_dtype(like.dtype), dtype or like.dtype)
    identity = ConvKernel.identity(
        in_channels, axes=axes, dtype=exact, device=device or like.device
    )
    try:
        exactly = InFloat64() if exact == torch.float64 else nullcontext()
        with evaluating(module), exactly:
            kernel = module(identity)
    except NotFoldableError:
        raise
    except Exception as error:  # forward is anyone's code, and may do anything to its input
        raise NotAffineError(f"forward cannot be followed: {error}") from error
    if not isinstance(kernel, ConvKernel):
        raise NotAffineError(f"forward returns {type(kernel).__name__}, not one feature map")
    return kernel.exact()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode, and each submodule back into its own mode at the end."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def twin(
    module: nn.Module, *, device: str | None = None, replaced: Mapping[int, Any] | None = None
) -> nn.Module:
    """Return an uncompiled copy that shares the parameters, and so takes next to no memory.

    State that a forward pass caches or writes into buffers stays in the copy.

    Args:
        module: not changed.
        device: "meta" for a copy without values.
        replaced: new modules by the identity of the old ones.
    """
    shared = {**kept_tensors(module), **{id(p): p for p in module.parameters()}}
    if device is not None:
        for key, tensor in shared.items():
            if isinstance(tensor, Tensor):
                shared[key] = tensor.detach().to(device)
            if isinstance(tensor, nn.Parameter):
                shared[key] = nn.Parameter(shared[key], requires_grad=tensor.requires_grad)
    try:
        copy = deepcopy(module, {**shared, **(replaced or {})})
    except Exception as error:  # a module may hold anything
        raise ValueError(f"the model cannot be copied: {error}") from error
    for m in copy.modules():
        m._compiled_call_impl = None
    return copy


def kept_tensors(module: nn.Module) -> dict[int, Any]:
    """Return copies of the tensors that a module keeps, except parameters, for a `deepcopy`.

    `deepcopy` refuses a tensor that a gradient can flow back from, which a forward may have kept.
    The empty dicts of hooks would take most of its time, so they are copied here, too.

    Returns:
        The copies by the identity of the originals.
    """
    found: dict[int, Any] = {}
    for m in module.modules():
        for key, value in vars(m).items():
            if type(value) is OrderedDict and not value:
                found[id(value)] = OrderedDict()
            elif key in ("_parameters", "_modules"):
                continue
            elif isinstance(value, Tensor | dict | list | tuple):
                found |= {id(t): t for t in tree_leaves(value) if isinstance(t, Tensor)}
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def apply_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return `func(*args, **kwargs)` where at least one argument is a `ConvKernel`.

    Raises:
        NotAffineError: `func` has no rule.
        NotFoldableError: `func` is not affine and shift-invariant on these arguments.
    """
    rule = RULES.get(func)
    if rule is None:
        name = getattr(func, "__name__", str(func))
        reason = REASONS.get(name.rstrip("_"), "is not known to be affine and shift-invariant")
        raise NotAffineError(f"{name} {reason}")
    if kwargs:
        kwargs = {KEYWORDS.get(key, key): value for key, value in kwargs.items()}
        if kwargs.pop("out", None) is not None:
            raise NotFoldableError("out= writes into a tensor that other names may share")
    return rule(*args, **kwargs)


def _convolve(
    x: ConvKernel,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> ConvKernel:
    axes = weight.ndim - 2
    dilation = _sizes(dilation, axes)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in _sizes(0 if isinstance(padding, str) else padding, axes)]
    return _then(
        x,
        weight,
        _exact(bias, x),
        stride=_sizes(stride, axes),
        padding=tuple(sides),
        dilation=dilation,
        groups=groups,
        precision=_exact_dtype(weight.dtype),
    )


def _linear(x: ConvKernel, weight: Tensor, bias: Tensor | None = None) -> ConvKernel:
    if x.axes:
        raise NotFoldableError("a linear layer mixes the last axis of its input, not the channels")
    return _convolve(x, weight, bias)


def _convolve_transposed(
    x: ConvKernel,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> ConvKernel:
    axes = weight.ndim - 2
    sizes = (_sizes(n, axes) for n in (dilation, padding, output_padding))
    sides = []
    for size, step, crop, extra in zip(weight.shape[2:], *sizes, strict=True):
        full = step * (size - 1) - crop
        sides.append((full, full + extra))
    return _then(
        x,
        transpose_weight(_exact(weight, x), groups),
        _exact(bias, x),
        padding=tuple(sides),
        dilation=_sizes(dilation, axes),
        upsample=_sizes(stride, axes),
        groups=groups,
    )


def transpose_weight(weight: Tensor, groups: int) -> Tensor:
    """Turn `(in, out / groups, kh, kw)` of a transposed convolution into `(out, in / groups, ...)`.

    A transposed convolution is the adjoint of a convolution, so the weight is also flipped. The
    same function turns it back.
    """
    blocks = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return blocks.flip(*range(2, weight.ndim))


def _batch_norm(
    x: ConvKernel,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ConvKernel:
    mean, variance = _exact(running_mean, x), _exact(running_var, x)
    if training or mean is None or variance is None:
        raise NotFoldableError(
            "batch_norm without running statistics divides by those of its batch"
        )
    if variance.is_meta:  # where each operation takes torch a millisecond
        return _channelwise(x, variance, variance)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * _exact(weight, x)
    shift = -mean * scale
    return _channelwise(x, scale, shift if bias is None else shift + _exact(bias, x))


def _average_pool(
    x: ConvKernel,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ConvKernel:
    sizes = _sizes(kernel_size, x.axes)
    if ceil_mode and max(_sizes(stride or sizes, x.axes)) > 1:
        raise NotFoldableError(
            "avg_pool with ceil_mode=True averages over fewer samples at the border; "
            "set ceil_mode=False"
        )
    if max(_sizes(padding, x.axes)) > 0 and not count_include_pad and divisor_override is None:
        raise NotFoldableError(
            "avg_pool with count_include_pad=False weights the border differently; "
            "set count_include_pad=True"
        )
    weight = torch.full(
        (x.out_channels, 1, *sizes),
        1 / (divisor_override or prod(sizes)),
        dtype=x.dtype,
        device=x.device,
    )
    return _convolve(x, weight, None, stride or sizes, padding, 1, x.out_channels)


def _pad(
    x: ConvKernel, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> ConvKernel:
    if not any(pad):
        return replace(x)  # torch copies, too
    if mode != "constant" or value:
        kind = f"mode '{mode}'" if mode != "constant" else f"the constant {value}"
        raise NotFoldableError(f"pad with {kind} is not the zero padding of a convolution")
    if any(pad[2 * x.axes :]):
        raise NotFoldableError("pad beyond height and width adds channels or samples")
    sides = [*zip(pad[::2], pad[1::2], strict=True), *[(0, 0)] * x.axes][: x.axes][::-1]
    try:
        return _resample(x, sides)
    except NotFoldableError as error:
        if x.bias is None:
            raise
        filled = replace(_resample(replace(x, bias=None), sides), bias=x.bias)
        before = [(n + 2, slice(None, side[0])) for n, side in enumerate(sides) if side[0] > 0]
        after = [(n + 2, slice(-side[1], None)) for n, side in enumerate(sides) if side[1] > 0]
        return UnfilledKernel(filled, before + after, str(error))


def _resample(
    x: ConvKernel, padding: Sequence[tuple[int, int]], stride: Sequence[int] = ()
) -> ConvKernel:
    """Return `x` padded or, where `padding` is negative, cropped, and then every n-th sample."""
    ones = torch.ones(x.out_channels, 1, *(1,) * x.axes, dtype=x.dtype, device=x.device)
    return _then(x, ones, padding=tuple(padding), stride=tuple(stride), groups=x.out_channels)


def _add(x: Any, y: Any, *, alpha: float = 1) -> ConvKernel:
    y = y * alpha if alpha != 1 else y
    kernel, constant = (x, y) if isinstance(x, ConvKernel) else (y, x)
    if isinstance(constant, ConvKernel):
        return add([x, y])
    if isinstance(constant, int | float) and constant == 0:  # where Python's sum() starts
        return replace(kernel)
    shift = _constant(kernel, constant)
    return _channelwise(kernel, torch.ones_like(shift), shift)


def _sub(x: Any, y: Any, *, alpha: float = 1) -> ConvKernel:
    return _add(x, y, alpha=-alpha)


def _mul(x: Any, y: Any) -> ConvKernel:
    kernel, constant = (x, y) if isinstance(x, ConvKernel) else (y, x)
    if isinstance(constant, ConvKernel):
        raise NotFoldableError("the product of two maps of the input is not affine")
    return _channelwise(kernel, _constant(kernel, constant))


def _div(x: Any, y: Any, *, rounding_mode: str | None = None) -> ConvKernel:
    if isinstance(y, ConvKernel):
        raise NotFoldableError("division by a map of the input is not affine")
    if rounding_mode is not None:
        raise NotFoldableError("division with rounding is not affine")
    return _channelwise(x, 1 / _constant(x, y))


def _cat(tensors: Sequence[Any], dim: int = 0) -> ConvKernel:
    if not all(isinstance(t, ConvKernel) for t in tensors):
        raise NotFoldableError("cat with a constant tensor, which has a size and so a border")
    if dim not in (1, 1 - tensors[0].ndim):
        raise NotFoldableError(f"cat along dim {dim}: only channels, dim 1, can be concatenated")
    return concat(list(tensors))


def _split(x: ConvKernel, sizes: int | Sequence[int], dim: int = 0) -> tuple[ConvKernel, ...]:
    if dim not in (1, 1 - x.ndim):
        raise NotFoldableError(f"a split along dim {dim} is not shift-invariant")
    if isinstance(sizes, int):
        starts = range(0, x.out_channels, sizes)
        sizes = [min(sizes, x.out_channels - start) for start in starts]
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(share(x, select(x, stop - n, stop)) for n, stop in zip(sizes, stops, strict=True))


def _narrow(x: ConvKernel, dim: int, start: int, length: int) -> ConvKernel:
    start %= x.out_channels  # it counts from the end if negative
    return _split(x, [start, length, x.out_channels - start - length], dim)[1]


def _getitem(x: ConvKernel, index: Any) -> ConvKernel:
    """Return a range of channels, and of each spatial axis all but margins, or every n-th."""
    batch, channels, *space = _ranges(x, index)
    if batch != slice(None):
        raise NotFoldableError("slicing samples of the batch is not shift-invariant")
    start, stop, step = channels.indices(x.out_channels)
    if step != 1 or stop <= start:
        raise NotFoldableError("only a contiguous range of channels, x[:, a:b], can be followed")
    for part in space:
        if (part.start or 0) < 0 or (part.stop is not None and part.stop >= 0):
            raise NotFoldableError(
                "slicing by size is not shift-invariant; x[:, :, a:-b], which crops, can be folded"
            )
    view = x if stop - start == x.out_channels else select(x, start, stop)
    if any(part != slice(None) for part in space):
        margins = [(-(part.start or 0), part.stop or 0) for part in space]
        view = _resample(view, margins, [part.step or 1 for part in space])
    return share(x, view)


class UnfilledKernel(ConvKernel):
    """A kernel with a bias after padding with zeros, until the forward fills the border.

    The border law refuses these zeros. But a forward may overwrite them with what its norm makes of
    a zero, as the blocks of arXiv:2103.13425 do. The result is a kernel that pads before its bias.
    Until then every use raises `reason`; afterwards this object is an ordinary `ConvKernel`.
    """

    def __init__(self, filled: ConvKernel, border: list[tuple[int, slice]], reason: str) -> None:
        # `border` lists the parts that are still zero: a dimension and the range along it.
        vars(self).update(_filled=filled, _border=border, _reason=reason)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotFoldableError(self._reason)


def _setitem(x: ConvKernel, index: Any, value: Any) -> None:
    """Fill one side of a padded kernel with its bias."""
    if not isinstance(x, UnfilledKernel):
        raise NotFoldableError("forward assigns to a part of a tensor, which may be its border")
    filled, border, bias = x._filled, x._border, x._filled.bias
    written = [(n, part) for n, part in enumerate(_ranges(filled, index)) if part != slice(None)]
    if len(written) != 1 or written[0] not in border:
        raise NotFoldableError("forward assigns to other parts of a tensor than its padding")
    error = (_constant(filled, value) - bias).abs().max()
    tolerance = 1e-9 if bias.dtype == torch.float64 else 1e-5
    if not bias.is_meta and not error <= tolerance * bias.abs().max():
        raise NotFoldableError("forward pads with other values than what zeros become")
    border.remove(written[0])
    if not border:
        overwrite(x, filled)
        object.__setattr__(x, "__class__", ConvKernel)


def _ranges(x: ConvKernel, index: Any) -> list[slice]:
    """Return one slice for each dimension of `x`, with None for a start at 0."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice | EllipsisType) for i in index):
        raise NotFoldableError("an index that is no slice is not shift-invariant")
    at = index.index(...) if ... in index else len(index)
    missing = [slice(None)] * (x.ndim - len(index) + (at < len(index)))
    parts = [*index[:at], *missing, *index[at + 1 :]]
    return [slice(part.start or None, part.stop, part.step) for part in parts]


def _size(x: ConvKernel, dim: int | None = None) -> int:
    if dim not in (1, 1 - x.ndim):
        raise NotFoldableError("forward reads the batch or image size, which a kernel lacks")
    return x.out_channels


def _dropout(x: ConvKernel, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training:
        raise NotFoldableError("dropout in training is random")
    return x


def _cast(x: ConvKernel, *args: Any, **kwargs: Any) -> ConvKernel:
    """Return `x`: the laws keep their precision whatever dtype or device the forward names."""
    for target in (*args, *kwargs.values()):
        dtype = target.dtype if isinstance(target, Tensor) else target
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise NotFoldableError(f"a cast to {dtype} is not affine")
    return share(x, x.exact())


def _in_place(rule: Callable[..., ConvKernel]) -> Callable[..., ConvKernel]:
    """Return the rule of a function that writes what `rule` returns into its first argument."""

    def change(x: Any, *args: Any, **kwargs: Any) -> ConvKernel:
        new = rule(x, *args, **kwargs)
        if not isinstance(x, ConvKernel):
            raise NotFoldableError("forward adds maps of its input to a constant in place")
        return overwrite(x, new)

    return change


def _then(x: ConvKernel, weight: Tensor, bias: Tensor | None = None, **geometry: Any) -> ConvKernel:
    """Return `x`, followed by the kernel of these parts."""
    kernel = ConvKernel(weight, bias, **geometry)
    if x.out_channels != kernel.in_channels:
        raise NotFoldableError(
            f"{x.out_channels} channels enter a layer that expects {kernel.in_channels}"
        )
    return x.then(kernel)


def _channelwise(x: ConvKernel, scale: Tensor, shift: Tensor | None = None) -> ConvKernel:
    """Return `x * scale + shift`, both `(channels,)`."""
    return _then(x, scale.reshape(-1, 1, *(1,) * x.axes), shift, groups=scale.numel())


def _constant(kernel: ConvKernel, constant: Any) -> Tensor:
    """Return a constant operand as one value per channel, `(channels,)`."""
    dtype = kernel.dtype  # that of the result, too, unless the constant is a more exact tensor
    if isinstance(constant, Tensor):
        constant = _exact(constant, kernel)
        dtype = torch.promote_types(constant.dtype, dtype)
    value = torch.as_tensor(constant, dtype=dtype, device=kernel.device)
    channels, ones = kernel.out_channels, (1,) * kernel.axes
    shape = (1,) * (kernel.ndim - value.ndim) + tuple(value.shape)
    if shape not in ((1, 1, *ones), (1, channels, *ones)):
        raise NotFoldableError(
            f"a constant of shape {tuple(value.shape)} varies in space; one value per channel, "
            f"({channels}, 1, 1), can be folded"
        )
    return value.flatten().expand(channels)


def _exact(tensor: Any, kernel: ConvKernel) -> Any:
    """Return a tensor in at least the precision of `kernel`, half precision in float64."""
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(_exact_dtype(tensor.dtype), kernel.dtype))


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sizes(value: int | Sequence[int], axes: int) -> Sizes:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    function: rule
    for namespaces, names, rule in (
        ((functional,), "conv1d conv2d conv3d", _convolve),
        ((functional,), "conv_transpose1d conv_transpose2d conv_transpose3d", _convolve_transposed),
        ((functional,), "linear", _linear),
        ((functional,), "batch_norm", _batch_norm),
        ((functional,), "avg_pool1d avg_pool2d avg_pool3d", _average_pool),
        ((functional,), "pad", _pad),
        ((functional,), "dropout dropout1d dropout2d dropout3d", _dropout),
        ((torch,), "cat concat concatenate", _cat),
        ((Tensor,), "__getitem__", _getitem),
        ((Tensor,), "__setitem__", _setitem),
        ((Tensor,), "to type type_as cpu cuda float double half bfloat16", _cast),
        ((Tensor,), "size", _size),
        ((Tensor,), "dim", lambda x: x.ndim),
        ((torch, Tensor), "add __add__ __radd__", _add),
        ((torch, Tensor), "sub subtract __sub__", _sub),
        ((torch, Tensor), "rsub __rsub__", lambda x, y, alpha=1: _sub(y, x, alpha=alpha)),
        ((torch, Tensor), "mul multiply __mul__ __rmul__", _mul),
        ((torch, Tensor), "div divide true_divide __truediv__", _div),
        ((torch, Tensor), "neg negative __neg__", lambda x: _mul(x, -1)),
        ((torch, Tensor), "add_ __iadd__", _in_place(_add)),
        ((torch, Tensor), "sub_ subtract_ __isub__", _in_place(_sub)),
        ((torch, Tensor), "mul_ multiply_ __imul__", _in_place(_mul)),
        ((torch, Tensor), "div_ divide_ true_divide_ __itruediv__", _in_place(_div)),
        ((torch, Tensor), "split split_with_sizes", _split),
        ((torch, Tensor), "chunk", lambda x, n, dim=0: _split(x, -(-x.out_channels // n), dim)),
        ((torch, Tensor), "narrow", _narrow),
        ((torch, Tensor), "clone", lambda x, **options: replace(x)),
        ((torch, Tensor), "contiguous", lambda x, **options: share(x, x)),
        ((torch, Tensor), "detach", lambda x: share(x, x.map(Tensor.detach))),
    )
    for name in names.split()
    for namespace in namespaces
    if (function := getattr(namespace, name, None)) is not None
}

KEYWORDS = {  # torch's names for the arguments of the rules
    "input": "x",
    "tensor": "x",
    "other": "y",
    "chunks": "n",
    "split_size": "sizes",
    "split_sizes": "sizes",
    "split_size_or_sections": "sizes",
}

REASONS = {
    name: reason
    for reason, names in (
        (
            "depends on the size of its input",
            "adaptive_avg_pool2d interpolate upsample flatten view reshape mean",
        ),
        (
            "is not affine",
            "relu relu6 silu gelu sigmoid tanh hardswish hardtanh softmax leaky_relu elu mish "
            "prelu hardsigmoid max_pool2d",
        ),
        ("divides by statistics of its own input", "layer_norm group_norm instance_norm"),
    )
    for name in names.split()
}
