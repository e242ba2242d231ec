"""`ConvKernel`, which stands for "the input, after the convolution so far", and its laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Sizes = tuple[int, ...]
CONVOLUTIONS = (None, functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (
    None,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)


class NotFoldableError(ValueError):
    """A computation is not one convolution; the message is the mathematical reason."""


class NotAffineError(NotFoldableError):
    """An operation has no rule: it is not affine, depends on sizes, or cannot be followed."""


@dataclass(frozen=True, eq=False)
class ConvKernel:
    """The map `x -> conv(pad(upsample(x)), weight, stride, dilation, groups) + bias`.

    There are as many spatial axes as `weight` has: 2 for images, 1 and 3 for sequences and
    volumes, none for the features of a linear layer. `upsample` puts `upsample - 1` zeros between
    neighbouring samples (the stride of a transposed convolution). A negative padding crops.
    Instances are values: laws return new ones, and every law is differentiable in `weight` and
    `bias`. Only a forward that changes its tensors in place changes them, see `overwrite`.

    A kernel may be handed to a module in place of an input: each torch function that is affine
    and shift-invariant then returns the next kernel, every other one raises `NotFoldableError`
    (the rules stand in `repnet.symbolic`).

    Args:
        weight: `(out, in / groups, kernel height, kernel width)`, with as many sizes as axes.
        bias: `(out,)`, or None where it is structurally zero, which matters at borders. Weight
            and bias are held in the higher of their dtypes.
        stride: `(vertical, horizontal)`; here and below, empty means 1, or 0 for padding.
        padding: zeros around the (upsampled) input, `((top, bottom), (left, right))`.
        dilation: lattice step of the taps.
        upsample: 1 for an ordinary convolution.
        groups: divides the input and the output channels.
        precision: a dtype that the laws compute in, if it is higher than that of the weight, which
            they convert where they multiply it: most time goes into fresh memory.

    Raises:
        ValueError: the parts do not fit together.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Sizes = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: Sizes = ()
    upsample: Sizes = ()
    groups: int = 1
    precision: torch.dtype | None = None

    _is_identity = False  # known to be, so that nothing need be multiplied
    _is_shared = False  # may stand for memory that another value of a forward stands for too

    def __post_init__(self) -> None:
        if not 2 <= self.weight.ndim <= 5:
            raise ValueError(f"weight must be 2-D to 5-D, got shape {tuple(self.weight.shape)}")
        for name, default in (("stride", 1), ("padding", (0, 0)), ("dilation", 1), ("upsample", 1)):
            values = tuple(getattr(self, name)) or (default,) * self.axes
            if len(values) != self.axes:
                raise ValueError(f"{name} must have {self.axes} entries, got {values}")
            object.__setattr__(self, name, values)
        if self.bias is not None and self.bias.shape != (self.out_channels,):
            raise ValueError(
                f"bias must have shape ({self.out_channels},), got {tuple(self.bias.shape)}"
            )
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            dtype = torch.promote_types(self.bias.dtype, self.weight.dtype)
            object.__setattr__(self, "weight", self.weight.to(dtype))
            object.__setattr__(self, "bias", self.bias.to(dtype))
        if self.groups < 1 or self.out_channels % self.groups:
            raise ValueError(f"groups={self.groups} must divide {self.out_channels} channels")
        if min((1, *self.stride, *self.dilation, *self.upsample)) < 1:
            raise ValueError("stride, dilation and upsample must be positive")

    @classmethod
    def identity(
        cls,
        channels: int,
        *,
        axes: int = 2,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ConvKernel:
        """Return `x -> x`: a pointwise kernel with one group per channel, `(channels, 1, 1, 1)`."""
        weight = torch.ones(channels, 1, *(1,) * axes, dtype=dtype, device=device)
        kernel = cls(weight, groups=channels)
        object.__setattr__(kernel, "_is_identity", True)
        return share(kernel, kernel)  # with the caller, who may read the input of a module again

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return self.weight.ndim - 2

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> Sizes:
        return tuple(self.weight.shape[2:])

    @property
    def is_pointwise(self) -> bool:
        return self.weight.shape[2:].numel() == 1

    @property
    def is_channelwise(self) -> bool:
        """Whether every output is its own input times a number: batch norm, scale, identity."""
        return (
            self.is_pointwise
            and self.groups == self.in_channels == self.out_channels
            and max((1, *self.stride, *self.upsample)) == 1
            and all(side == (0, 0) for side in self.padding)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map to `x`, `(batch, in, height, width)` -> `(batch, out, height', width')`."""
        exact = self.exact()
        if self.axes == 0:
            grouped = x.unflatten(1, (self.groups, -1))  # (batch, groups, in / groups)
            weight = exact.weight.unflatten(0, (self.groups, -1))
            product = torch.einsum("bgi,goi->bgo", grouped, weight).flatten(1)
            return product if exact.bias is None else product + exact.bias
        if max(self.upsample) > 1:
            sizes = [u * (n - 1) + 1 for u, n in zip(self.upsample, x.shape[2:], strict=True)]
            spread = x.new_zeros(*x.shape[:2], *sizes)
            samples = [slice(None, None, step) for step in self.upsample]
            spread[(slice(None), slice(None), *samples)] = x
            x = spread
        padding = [before for before, _ in self.padding]
        if any(before != after or before < 0 for before, after in self.padding):
            x = functional.pad(x, [side for sides in reversed(self.padding) for side in sides])
            padding = [0] * self.axes
        convolve = CONVOLUTIONS[self.axes]
        assert convolve is not None
        return convolve(
            x, exact.weight, exact.bias, self.stride, padding, self.dilation, self.groups
        )

    def with_groups(self, groups: int) -> ConvKernel:
        """Return the same map written with fewer groups: the blocks stand on a zero matrix.

        Args:
            groups: a divisor of `self.groups`; the identity can so be written at any grouping.

        Raises:
            ValueError: `groups` is not a divisor of `self.groups`.
        """
        if groups == self.groups:
            return self
        if groups < 1 or self.groups % groups:
            raise ValueError(f"a kernel of {self.groups} groups cannot be written with {groups}")
        parts = self.groups // groups
        # (groups, parts, out / old groups, in / old groups, kh, kw)
        blocks = self.weight.reshape(groups, parts, -1, *self.weight.shape[1:])
        weight = blocks.new_zeros(groups, parts, blocks.shape[2], parts, *blocks.shape[3:])
        part = torch.arange(parts, device=weight.device)
        weight[:, part, :, part] = blocks.transpose(0, 1)
        weight = weight.reshape(self.out_channels, self.in_channels // groups, *self.kernel_size)
        return replace(self, weight=weight, groups=groups)

    def exact(self) -> ConvKernel:
        """Return the same map with weight and bias in the dtype that the laws compute in."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return replace(self, weight=self.weight.to(self.dtype), bias=bias)

    def over(self, axes: int) -> ConvKernel:
        """Return the same channelwise map over another number of spatial axes.

        Raises:
            ValueError: it is more than a channelwise map.
        """
        if not self.is_channelwise:
            raise ValueError("only a channelwise map is the same over any number of axes")
        weight = self.weight.reshape(-1, 1, *(1,) * axes)
        return ConvKernel(weight, self.bias, groups=self.groups, precision=self.precision)

    def then(self, other: ConvKernel) -> ConvKernel:
        """Return `x -> other(self(x))`.

        Tap b of `other` reads tap a of `self` at `dilation_a * a + stride_a * dilation_b * b`.
        Both are written on one lattice, and one transposed convolution of the two weights sums the
        products. The border law: zeros that `other` inserts, around its input or between its
        samples, must be zeros of `self` too. So `self` must have no bias; where zeros are added, it
        must be zero beyond its own output, as a pointwise kernel is, or one that is padded by its
        whole reach; and where `other` upsamples, it must have stride 1, and its taps spread.

        Raises:
            NotFoldableError: the border law forbids it.
            ValueError: the channels do not fit.
        """
        if self.out_channels != other.in_channels:
            raise ValueError(
                f"{self.out_channels} channels cannot enter a kernel of {other.in_channels}"
            )
        if self.axes != other.axes:
            raise NotFoldableError(
                f"a map over {self.axes} spatial axes enters one over {other.axes}"
            )
        dtype = torch.promote_types(self.dtype, other.dtype)
        if self._is_identity:
            return other if dtype == other.dtype else replace(other, precision=dtype)
        self._check_border(other)
        stride, padding, dilation, upsample = [], [], [], []
        taps: list[tuple[int, int]] = []  # lattice steps between the taps of self, of other
        for axis in range(self.axes):
            (before, after), (extra_before, extra_after) = self.padding[axis], other.padding[axis]
            step = self.stride[axis] * other.dilation[axis]
            spread = self.dilation[axis] * other.upsample[axis]
            own = spread if self.kernel_size[axis] > 1 else 0
            theirs = step if other.kernel_size[axis] > 1 else 0
            unit = gcd(own, theirs) or 1
            up, hop = other.upsample[axis], self.stride[axis]
            taps.append((own // unit or 1, theirs // unit or 1))
            dilation.append(unit)
            stride.append(hop * other.stride[axis])
            upsample.append(self.upsample[axis] * up)
            padding.append((up * before + hop * extra_before, up * after + hop * extra_after))
        groups = gcd(self.groups, other.groups)
        if self.is_channelwise:
            weight, groups = _scale_inputs(other, self.weight.flatten().to(dtype)), other.groups
        elif other.is_channelwise:
            weight, groups = _scaled(self.weight, other.weight, dtype), self.groups
        else:
            weight = _merge(self.with_groups(groups), other.with_groups(groups), taps)
        return ConvKernel(
            weight,
            _add_optional(other.bias, _through(other, self.bias)),
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            upsample=tuple(upsample),
            groups=groups,
            precision=dtype,
        )

    def _check_border(self, other: ConvKernel) -> None:
        """Raise unless zeros that `other` inserts into the output of `self` are its zeros too."""
        padded = any(max(side) > 0 for side in other.padding)
        upsampled = any(step > 1 for step in other.upsample)
        if not (padded or upsampled):
            return
        inserts = "pads its input with zeros" if padded else "inserts zeros between its samples"
        if self.bias is not None:
            raise NotFoldableError(
                f"the second map {inserts}, but the first has a bias, so that a zero of its input "
                "becomes that bias; pad before the bias instead"
            )
        for axis in range(self.axes):
            (before, after), (added_before, added_after) = self.padding[axis], other.padding[axis]
            # Beyond its output the first map is zero only where its taps find nothing but zeros.
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if (added_before > 0 and before < reach + 1 - self.stride[axis]) or (
                added_after > 0 and after < reach
            ):
                raise NotFoldableError(
                    f"the second map {inserts}, but the first, a {_size(self)} kernel, is not zero "
                    "beyond its output, where it also reads samples; move all padding into the "
                    "first map"
                )
            if other.upsample[axis] > 1 and self.stride[axis] > 1:
                raise NotFoldableError(
                    "the second map upsamples what the first has strided: that keeps the samples "
                    "at some positions only, and so is not shift-invariant"
                )

    # What makes a kernel usable as the input of a module's forward.

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from repnet.symbolic import apply_rule  # the rules are written in terms of this module

        return apply_rule(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Send `kernel.method(...)` to the rule of `torch.Tensor.method`."""
        method = None if name.startswith("_") else getattr(Tensor, name, None)
        if method is None:
            raise AttributeError(f"'ConvKernel' object has no attribute '{name}'")
        if not callable(method):
            raise NotFoldableError(f"forward reads '{name}' of its input, which a kernel lacks")
        return lambda *args, **kwargs: self._call(method, *args, **kwargs)

    def _call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (ConvKernel,), (self, *args), kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """What the laws compute in."""
        return torch.promote_types(self.weight.dtype, self.precision or self.weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    def __add__(self, other: Any) -> Any:
        return self._call(torch.add, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._call(torch.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._call(torch.rsub, other)

    def __mul__(self, other: Any) -> Any:
        return self._call(torch.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._call(torch.div, other)

    def __neg__(self) -> Any:
        return self._call(torch.neg)

    def __getitem__(self, index: Any) -> Any:
        return self._call(Tensor.__getitem__, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._call(Tensor.__setitem__, index, value)

    def __iadd__(self, other: Any) -> Any:
        return self._call(Tensor.add_, other)

    def __isub__(self, other: Any) -> Any:
        return self._call(Tensor.sub_, other)

    def __imul__(self, other: Any) -> Any:
        return self._call(Tensor.mul_, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._call(Tensor.div_, other)

    def _compared(self, other: Any = None) -> Any:
        raise NotAffineError("forward compares values of its input, which is not affine")

    # Without these, Python would compare identities, and take every kernel for true.
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _compared
    __hash__ = object.__hash__


class UnfilledKernel(ConvKernel):
    """A kernel with a bias that was padded with zeros, until its border is filled with the bias.

    The border law refuses the zeros. But a forward may write its norm's value for a zero over them,
    as the blocks of arXiv:2103.13425 do: then the zeros stood in front of the bias. Until then
    nothing can be done with the object, which has no weight; after that it is a `ConvKernel`.

    Args:
        filled: the kernel once it is filled, with the padding in front of its bias.
        border: what is still zero, as axes, counted from the batch, and ranges along them.
        reason: why the zeros are refused.
    """

    def __init__(self, filled: ConvKernel, border: list[tuple[int, slice]], reason: str) -> None:
        vars(self).update(_filled=filled, _border=border, _reason=reason)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotFoldableError(self._reason)

    def fill(self, ranges: Sequence[slice], value: Tensor) -> None:
        """Write a value per channel, `(out,)`, to what `ranges` say, one for each axis.

        Raises:
            NotFoldableError: this is more or less than one side, or the value is not the bias.
        """
        written = [(n, part) for n, part in enumerate(ranges) if part != slice(None)]
        bias = self._filled.bias
        if len(written) != 1 or written[0] not in self._border:
            raise NotFoldableError("forward assigns to other parts of a tensor than its padding")
        if not bias.is_meta:
            tolerance = 1e-9 if bias.dtype == torch.float64 else 1e-5
            error, size = (float(t.detach().abs().max()) for t in (value - bias, bias))
            if not error <= tolerance * size:
                raise NotFoldableError("forward pads with other values than what zeros become")
        self._border.remove(written[0])
        if not self._border:
            overwrite(self, self._filled)
            object.__setattr__(self, "__class__", ConvKernel)


def share(kernel: ConvKernel, view: ConvKernel) -> ConvKernel:
    """Return `view`, after noting that it and `kernel` may stand for the same memory."""
    vars(kernel)["_is_shared"] = vars(view)["_is_shared"] = True
    return view


def overwrite(kernel: ConvKernel, new: ConvKernel) -> ConvKernel:
    """Turn `kernel` itself into `new`: every name that a forward has for it sees the change.

    Raises:
        NotFoldableError: other kernels may stand for the same memory, and would not see it.
    """
    if kernel._is_shared:
        raise NotFoldableError(
            "forward changes a tensor in place that is its input, or may share memory with another "
            "one, as slices do; write `x = x + y` instead of `x += y`"
        )
    vars(kernel).clear()
    vars(kernel).update(vars(new))
    return kernel


def add(kernels: Sequence[ConvKernel]) -> ConvKernel:
    """Return `x -> sum of k(x)`: tap k of a kernel reads offset `dilation * k - padding`.

    Args:
        kernels: at least one, with equal channels, stride and upsampling, and outputs of equal
            size for every size of input.

    Raises:
        NotFoldableError: the kernels read different lattices, or differ in channels or size.
    """
    if len({(k.in_channels, k.out_channels) for k in kernels}) > 1:
        raise NotFoldableError(
            "the summands differ in channels: "
            + ", ".join(f"{k.in_channels} -> {k.out_channels}" for k in kernels)
        )
    groups = gcd(*(k.groups for k in kernels))
    kernels = [k.with_groups(groups) for k in kernels]
    geometry, size, places = _align(kernels)
    dtype = reduce(torch.promote_types, (k.dtype for k in kernels))
    whole = next((n for n, k in enumerate(kernels) if k.kernel_size == size), None)
    if whole is None:
        weight = kernels[0].weight.new_zeros(*kernels[0].weight.shape[:2], *size, dtype=dtype)
    else:
        weight = kernels[whole].weight.to(dtype, copy=True)
    bias = None
    for n, (kernel, place) in enumerate(zip(kernels, places, strict=True)):
        if n != whole and not weight.is_meta:
            weight[place] += kernel.weight
        bias = _add_optional(bias, kernel.bias)
    return replace(geometry, weight=weight, bias=bias, precision=dtype)


def concat(kernels: Sequence[ConvKernel]) -> ConvKernel:
    """Return `x -> cat([k(x) for k in kernels], dim=1)`.

    Args:
        kernels: at least one, of one input, with equal stride, upsampling and output size.

    Raises:
        NotFoldableError: the kernels read different lattices, or differ in input channels or size.
    """
    if len({k.in_channels for k in kernels}) > 1:
        raise NotFoldableError("the concatenated kernels differ in input channels")
    kernels = [k.with_groups(1) for k in kernels]
    geometry, size, places = _align(kernels)
    dtype = reduce(torch.promote_types, (k.dtype for k in kernels))
    weights, biases = [], []
    for kernel, place in zip(kernels, places, strict=True):
        weight = kernel.weight.new_zeros(*kernel.weight.shape[:2], *size, dtype=dtype)
        weight[place] = kernel.weight
        weights.append(weight)
        zero = kernel.weight.new_zeros(kernel.out_channels, dtype=dtype)
        biases.append(zero if kernel.bias is None else kernel.bias)
    structural = all(kernel.bias is None for kernel in kernels)
    bias = None if structural else torch.cat(biases)
    return replace(geometry, weight=torch.cat(weights), bias=bias, precision=dtype)


def select(kernel: ConvKernel, start: int, stop: int) -> ConvKernel:
    """Return `x -> k(x)[:, start:stop]`, with `0 <= start < stop <= out`."""
    dense = kernel.with_groups(1)
    bias = None if dense.bias is None else dense.bias[start:stop]
    return replace(dense, weight=dense.weight[start:stop], bias=bias)


def _align(
    kernels: Sequence[ConvKernel],
) -> tuple[ConvKernel, Sizes, list[tuple[slice, ...]]]:
    """Put all kernels on one lattice.

    Returns:
        A kernel with the common geometry, the common kernel size, and where in a weight of that
        size the taps of each kernel lie.
    """
    first = kernels[0]
    for name in ("stride", "upsample", "axes"):
        if len(values := sorted({getattr(k, name) for k in kernels})) > 1:
            listing = " and ".join(str(v) for v in values)
            raise NotFoldableError(
                f"{name} {listing} in one sum or concatenation: the parts read different lattices"
            )
    dilation, padding, size = [], [], []
    places: list[list[slice]] = [[slice(None), slice(None)] for _ in kernels]
    for axis in range(first.axes):
        # output size = floor((upsampled size - 1 + growth) / stride) + 1
        reach = [k.dilation[axis] * (k.kernel_size[axis] - 1) for k in kernels]
        growths = {sum(k.padding[axis]) - r for k, r in zip(kernels, reach, strict=True)}
        if len(growths) > 1:
            raise NotFoldableError(
                "the outputs of the parts differ in size: by "
                f"{max(growths) - min(growths)} samples along axis {axis} before striding"
            )
        before = max(k.padding[axis][0] for k in kernels)
        steps = [k.dilation[axis] for k in kernels if k.kernel_size[axis] > 1]
        step = gcd(*steps, *(before - k.padding[axis][0] for k in kernels)) or 1
        end = max(r - k.padding[axis][0] for k, r in zip(kernels, reach, strict=True))
        extent = end + before
        dilation.append(step)
        padding.append((before, growths.pop() + extent - before))
        size.append(extent // step + 1)
        for kernel, place in zip(kernels, places, strict=True):
            start = (before - kernel.padding[axis][0]) // step
            hop = max(1, kernel.dilation[axis] // step)
            place.append(slice(start, start + hop * (kernel.kernel_size[axis] - 1) + 1, hop))
    geometry = replace(first, padding=tuple(padding), dilation=tuple(dilation))
    return geometry, tuple(size), [tuple(place) for place in places]


def _merge(first: ConvKernel, second: ConvKernel, taps: Sequence[tuple[int, int]]) -> Tensor:
    """Return the weight of `first.then(second)`, `(out, in / groups, kh, kw)`.

    Args:
        first: has as many groups as `second`.
        second: reads the output channels of `first`.
        taps: per axis, the lattice steps between the taps of `first` and of `second`.
    """
    dtype = torch.promote_types(first.dtype, second.dtype)
    groups = first.groups
    outer = second.weight.to(dtype).unflatten(0, (groups, -1))  # (groups, out / groups, middle, ..)
    inner = first.weight.to(dtype)
    if first.is_pointwise:  # a product of matrices, which is many times faster
        matrices = inner.flatten(1).unflatten(0, (groups, -1))
        return torch.einsum("gom...,gmi->goi...", outer, matrices).flatten(0, 1)
    if second.is_pointwise:
        kernels = inner.unflatten(0, (groups, -1))
        return torch.einsum("gom,gmi...->goi...", outer.flatten(2), kernels).flatten(0, 1)
    convolve = TRANSPOSED[first.axes]
    assert convolve is not None
    # The output channels of each group are the batch: (out / groups, middle, kh, kw).
    merged = convolve(
        outer.transpose(0, 1).flatten(1, 2),
        inner,
        stride=[step for _, step in taps],
        dilation=[step for step, _ in taps],
        groups=groups,
    )
    return merged.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight * scale` in `dtype`."""
    if weight.dtype == dtype or torch.is_grad_enabled():
        return weight.to(dtype) * scale
    return weight.to(dtype).mul_(scale)  # of the conversion, which nobody else has


def _scale_inputs(kernel: ConvKernel, scale: Tensor) -> Tensor:
    """Return the weight of `kernel` with input channel i multiplied by `scale[i]`."""
    grouped = kernel.weight.unflatten(0, (kernel.groups, -1))  # (groups, out / groups, in / g, ...)
    scale = scale.reshape(kernel.groups, 1, -1, *(1,) * kernel.axes)
    return (grouped * scale).flatten(0, 1)


def _through(kernel: ConvKernel, constant: Tensor | None) -> Tensor | None:
    """Return what `kernel` adds to its output when `constant`, `(in,)`, is added to its input."""
    if constant is None:
        return None
    return _scale_inputs(kernel, constant).flatten(1).sum(1)


def _add_optional(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _size(kernel: ConvKernel) -> str:
    return "x".join(str(side) for side in kernel.kernel_size)
