"""`ConvKernel`, a value that stands for "the input, after the convolution so far", and its laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Sizes = tuple[int, ...]


class NotFoldableError(ValueError):
    """A computation is not one convolution; the message is the mathematical reason."""


class NotAffineError(NotFoldableError):
    """An operation has no rule: it is not affine, depends on sizes, or cannot be followed."""


def _sends_to(func: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: ConvKernel.__torch_function__(func, (), args, kwargs)


class Axis(NamedTuple):
    """The geometry of a kernel along one spatial axis."""

    size: int
    stride: int
    before: int  # padding
    after: int
    dilation: int  # 0 if there is one tap
    upsample: int

    @property
    def reach(self) -> int:
        return self.dilation * (self.size - 1)


@dataclass(frozen=True, eq=False)
class ConvKernel:
    """The map `x -> conv(pad(upsample(x)), weight, stride, dilation, groups) + bias`.

    There are as many spatial axes as `weight` has: 2 for images, 1 and 3 for sequences and
    volumes, none for the features of a linear layer. `upsample` puts `upsample - 1` zeros between
    neighboring samples (the stride of a transposed convolution). A negative padding crops.
    Instances are values: the laws return new ones and are differentiable in `weight` and `bias`.
    Only a forward that works in place changes a kernel, see `overwrite`.

    A module accepts a kernel in place of its input: each torch function that is affine and
    shift-invariant returns the next kernel, and every other one raises `NotFoldableError`. The
    rules are in `repnet.symbolic`.

    Args:
        weight: `(out, in / groups, kernel height, kernel width)`, with as many sizes as axes.
        bias: `(out,)`, or None where it is structurally zero, which matters at borders. Weight
            and bias are stored in the higher of their dtypes.
        stride: `(vertical, horizontal)`; here and below, empty means 1, or 0 for padding.
        padding: zeros around the (upsampled) input, `((top, bottom), (left, right))`.
        dilation: distance between the taps.
        upsample: 1 for an ordinary convolution.
        groups: divides the input and the output channels.
        precision: the laws compute in this dtype where it is higher than that of the weight. They
            convert the weight only where they multiply it, because fresh memory is slow.

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

    _is_identity = False  # True only if nothing has to be multiplied
    _is_shared = False  # True if another value of the forward may use the same memory

    def __post_init__(self) -> None:
        if not 2 <= self.weight.ndim <= 5:
            raise ValueError(f"weight must be 2-D to 5-D, got shape {tuple(self.weight.shape)}")
        for name, default in (("stride", 1), ("padding", (0, 0)), ("dilation", 1), ("upsample", 1)):
            values = tuple(getattr(self, name)) or (default,) * self.axes
            if len(values) != self.axes:
                raise ValueError(f"{name} must have {self.axes} entries, got {values}")
            vars(self)[name] = values
        if self.bias is not None and self.bias.shape != (self.out_channels,):
            raise ValueError(
                f"bias must have shape ({self.out_channels},), got {tuple(self.bias.shape)}"
            )
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            dtype = torch.promote_types(self.bias.dtype, self.weight.dtype)
            vars(self).update(weight=self.weight.to(dtype), bias=self.bias.to(dtype))
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
        vars(kernel)["_is_identity"] = True
        return share(kernel, kernel)  # the caller may read the input of a module again

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
        plain = Axis(size=1, stride=1, before=0, after=0, dilation=0, upsample=1)
        return self.groups == self.in_channels == self.out_channels and all(
            axis == plain for axis in self._geometry
        )

    @property
    def _geometry(self) -> list[Axis]:
        fields = (self.kernel_size, self.stride, self.padding, self.dilation, self.upsample)
        return [
            Axis(size, stride, *padding, dilation if size > 1 else 0, upsample)
            for size, stride, padding, dilation, upsample in zip(*fields, strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map to `x`, `(batch, in, height, width)` -> `(batch, out, height', width')`."""
        if self.axes == 0:  # a sequence of one sample
            return replace(self, weight=self.weight[..., None])(x[..., None])[..., 0]
        if max(self.upsample) > 1:
            sizes = [u * (n - 1) + 1 for u, n in zip(self.upsample, x.shape[2:], strict=True)]
            spread = x.new_zeros(*x.shape[:2], *sizes)
            samples: Any = (..., *(slice(None, None, step) for step in self.upsample))
            spread[samples] = x
            x = spread
        x = functional.pad(x, [side for sides in reversed(self.padding) for side in sides])
        convolve = getattr(functional, f"conv{self.axes}d")
        exact = self.exact()
        return convolve(x, exact.weight, exact.bias, self.stride, 0, self.dilation, self.groups)

    def with_groups(self, groups: int) -> ConvKernel:
        """Return the same map written with fewer groups: the blocks stand on a zero matrix.

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
        return self.map(lambda tensor: tensor.to(self.dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> ConvKernel:
        """Return the kernel with `function` of its weight and of its bias."""
        bias = None if self.bias is None else function(self.bias)
        return replace(self, weight=function(self.weight), bias=bias)

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
        Both kernels are written on one lattice, and one transposed convolution of the two weights
        sums the products.

        The border law: zeros that `other` inserts, around its input or between its samples, must
        be zeros of `self` too. So `self` must have no bias. Where `other` pads, `self` must be zero
        beyond its own output, as it is if it is pointwise or padded by its whole reach. Where
        `other` upsamples, `self` must have stride 1.

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
        bias = other.bias
        if self.bias is not None:
            through = _scale_inputs(other, self.bias).flatten(1).sum(1)
            bias = through if bias is None else bias + through
        pairs = list(zip(self._geometry, other._geometry, strict=True))
        steps = [(a.dilation * b.upsample, a.stride * b.dilation) for a, b in pairs]
        units = tuple(gcd(*step) or 1 for step in steps)
        taps = [(a // n or 1, b // n or 1) for (a, b), n in zip(steps, units, strict=True)]
        return ConvKernel(
            _merge(self, other, taps),
            bias,
            stride=tuple(a.stride * b.stride for a, b in pairs),
            padding=tuple(
                (
                    b.upsample * a.before + a.stride * b.before,
                    b.upsample * a.after + a.stride * b.after,
                )
                for a, b in pairs
            ),
            dilation=units,
            upsample=tuple(a.upsample * b.upsample for a, b in pairs),
            groups=gcd(self.groups, other.groups),
            precision=dtype,
        )

    def _check_border(self, other: ConvKernel) -> None:
        """Raise unless zeros that `other` inserts into the output of `self` are its zeros too."""
        pads = any(max(side) > 0 for side in other.padding)
        if not pads and max((1, *other.upsample)) == 1:
            return
        inserts = "pads its input with zeros" if pads else "inserts zeros between its samples"
        if self.bias is not None:
            raise NotFoldableError(
                f"the second map {inserts}, but the first has a bias, so that a zero of its input "
                "becomes that bias; pad before the bias instead"
            )
        for a, b in zip(self._geometry, other._geometry, strict=True):
            # Beyond its output the first map is zero only where its taps find nothing but zeros.
            if (b.before > 0 and a.before < a.reach + 1 - a.stride) or (
                b.after > 0 and a.after < a.reach
            ):
                raise NotFoldableError(
                    f"the second map {inserts}, but the first, a "
                    f"{'x'.join(map(str, self.kernel_size))} kernel, is not zero beyond its "
                    "output, where it also reads samples; move all padding into the first map"
                )
            if b.upsample > 1 and a.stride > 1:
                raise NotFoldableError(
                    "the second map upsamples what the first has strided: that keeps the samples "
                    "at some positions only, and so is not shift-invariant"
                )

    # The methods of a tensor, for a module's forward.

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
        return partial(_sends_to(method), self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the laws compute in."""
        return torch.promote_types(self.weight.dtype, self.precision or self.weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    __add__ = __radd__ = _sends_to(torch.add)
    __sub__ = _sends_to(torch.sub)
    __rsub__ = _sends_to(torch.rsub)
    __mul__ = __rmul__ = _sends_to(torch.mul)
    __truediv__ = _sends_to(torch.div)
    __neg__ = _sends_to(torch.neg)
    __getitem__ = _sends_to(Tensor.__getitem__)
    __setitem__ = _sends_to(Tensor.__setitem__)
    __iadd__ = _sends_to(Tensor.add_)
    __isub__ = _sends_to(Tensor.sub_)
    __imul__ = _sends_to(Tensor.mul_)
    __itruediv__ = _sends_to(Tensor.div_)

    def _compared(self, other: Any = None) -> Any:
        raise NotAffineError("forward compares values of its input, which is not affine")

    # Otherwise Python would compare identities, and every kernel would be true.
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _compared
    __hash__ = object.__hash__


def share(kernel: ConvKernel, view: ConvKernel) -> ConvKernel:
    """Return `view`, and record that it and `kernel` may use the same memory."""
    vars(kernel)["_is_shared"] = vars(view)["_is_shared"] = True
    return view


def overwrite(kernel: ConvKernel, new: ConvKernel) -> ConvKernel:
    """Turn `kernel` itself into `new`, so that every name that a forward has for it changes.

    Raises:
        NotFoldableError: another kernel may use the same memory and would not change.
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
    rows = slice(0, kernels[0].out_channels)
    return _place([k.with_groups(groups) for k in kernels], [rows] * len(kernels))


def concat(kernels: Sequence[ConvKernel]) -> ConvKernel:
    """Return `x -> cat([k(x) for k in kernels], dim=1)`.

    Args:
        kernels: at least one, of one input, with equal stride, upsampling and output size.

    Raises:
        NotFoldableError: the kernels read different lattices, or differ in input channels or size.
    """
    if len({k.in_channels for k in kernels}) > 1:
        raise NotFoldableError("the concatenated kernels differ in input channels")
    stops = list(accumulate(k.out_channels for k in kernels))
    rows = [slice(stop - k.out_channels, stop) for k, stop in zip(kernels, stops, strict=True)]
    return _place([k.with_groups(1) for k in kernels], rows)


def select(kernel: ConvKernel, start: int, stop: int) -> ConvKernel:
    """Return `x -> k(x)[:, start:stop]`, with `0 <= start < stop <= out`."""
    return kernel.with_groups(1).map(lambda tensor: tensor[start:stop])


def _place(kernels: Sequence[ConvKernel], rows: Sequence[slice]) -> ConvKernel:
    """Return the map whose output channels `rows[n]` are the sum of all kernels with these rows."""
    for name in ("stride", "upsample", "axes"):
        if len(values := sorted({getattr(k, name) for k in kernels})) > 1:
            raise NotFoldableError(
                f"{name} {' and '.join(map(str, values))} in one sum or concatenation: the parts "
                "read different lattices"
            )
    dilation, padding, size = [], [], []
    places: list[list[slice]] = [[row, slice(None)] for row in rows]
    for n, axes in enumerate(zip(*(k._geometry for k in kernels), strict=True)):
        # output size = floor((upsampled size - 1 + growth) / stride) + 1
        growths = {a.before + a.after - a.reach for a in axes}
        if len(growths) > 1:
            raise NotFoldableError(
                "the outputs of the parts differ in size: by "
                f"{max(growths) - min(growths)} samples along axis {n} before striding"
            )
        before = max(a.before for a in axes)
        step = gcd(*(a.dilation for a in axes), *(before - a.before for a in axes)) or 1
        reach = before + max(a.reach - a.before for a in axes)
        dilation.append(step)
        padding.append((before, growths.pop() + reach - before))
        size.append(reach // step + 1)
        for a, place in zip(axes, places, strict=True):
            start, hop = (before - a.before) // step, max(1, a.dilation // step)
            place.append(slice(start, start + hop * (a.size - 1) + 1, hop))
    first, out_channels = kernels[0], rows[-1].stop
    dtype = reduce(torch.promote_types, (k.dtype for k in kernels))
    shape = (out_channels, first.weight.shape[1], *size)
    whole = next((n for n, k in enumerate(kernels) if k.weight.shape == shape), None)
    if whole is None:
        weight = first.weight.new_zeros(shape, dtype=dtype)
    else:
        weight = kernels[whole].weight.to(dtype, copy=True)
    bias = None
    if any(k.bias is not None for k in kernels):
        bias = first.weight.new_zeros(out_channels, dtype=dtype)
    for n, kernel in enumerate([] if weight.is_meta else kernels):  # slow without values
        if n != whole:
            weight[tuple(places[n])] += kernel.weight
        if bias is not None and kernel.bias is not None:
            bias[rows[n]] += kernel.bias
    return replace(
        first,
        weight=weight,
        bias=bias,
        padding=tuple(padding),
        dilation=tuple(dilation),
        precision=dtype,
    )


def _merge(first: ConvKernel, second: ConvKernel, taps: Sequence[tuple[int, int]]) -> Tensor:
    """Return the weight of `first.then(second)`; `taps` are the lattice steps between theirs."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    if first.is_channelwise:
        return _scale_inputs(second, first.weight.flatten().to(dtype))
    if second.is_channelwise:
        exact = first.weight.to(dtype)
        if exact is first.weight or torch.is_grad_enabled():
            return exact * second.weight
        return exact.mul_(second.weight)  # fresh memory takes most of the time
    groups = gcd(first.groups, second.groups)
    inner = first.with_groups(groups).weight.to(dtype)
    outer = second.with_groups(groups).weight.to(dtype).unflatten(0, (groups, -1))
    if first.is_pointwise or second.is_pointwise:  # a product of matrices is many times faster
        inner = inner.unflatten(0, (groups, -1))
        return torch.einsum("gom...,gmi...->goi...", outer, inner).flatten(0, 1)
    # The output channels of each group are the batch: (out / groups, middle, kh, kw).
    merged = getattr(functional, f"conv_transpose{first.axes}d")(
        outer.transpose(0, 1).flatten(1, 2),
        inner,
        stride=[step for _, step in taps],
        dilation=[step for step, _ in taps],
        groups=groups,
    )
    return merged.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


def _scale_inputs(kernel: ConvKernel, scale: Tensor) -> Tensor:
    """Return the weight of `kernel` with input channel i multiplied by `scale[i]`."""
    grouped = kernel.weight.unflatten(0, (kernel.groups, -1))  # (groups, out / groups, in / g, ...)
    return (grouped * scale.reshape(kernel.groups, 1, -1, *(1,) * kernel.axes)).flatten(0, 1)
