"""Random blocks against `kernel_of`: equal to their one convolution, or refused for a true reason.

    python benchmarks/fuzz_fold.py --blocks 10000 --seed 0 --jobs 2

A folded block must agree with its module below 1e-10, relative, in float64. A refused block is
given to an oracle that knows no rule: it reads a candidate kernel off impulse responses in the
middle of a large image, and tries it on random images of several sizes. Where that convolution is
the module, borders included, the refusal was not necessary, and is listed as over-refused.
Exit code 1 if a block folds wrongly, or fails in another way than by `NotFoldableError`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from repnet.kernel import NotFoldableError
from repnet.layers import Concat, PadBatchNorm, Scale, Sum
from repnet.symbolic import kernel_of

FOLD_TOLERANCE = 1e-10
ORACLE_TOLERANCE = 1e-9
# Of all residues modulo 2, 3 and 4, which is what strides and ceil_mode can tell apart.
SIZES = ((14, 13), (11, 12), (13, 15), (12, 10))
ENLARGED = (48, 36)  # pixels to add for an interior; multiples of 12 keep all those residues
MAX_CHANNELS = 8
Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """What the parts of a sum must have in common.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: like every pair here, (vertical, horizontal).
        upsample: stride of a transposed convolution.
        growth: samples by which the upsampled size changes before striding.
    """

    in_channels: int
    out_channels: int
    stride: Pair = (1, 1)
    upsample: Pair = (1, 1)
    growth: Pair = (0, 0)

    @property
    def keeps_shape(self) -> bool:
        return self == Geometry(self.in_channels, self.in_channels)


class Difference(nn.Module):
    """`x -> first(x) - second(x)`."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.second(x)


class Channels(nn.Module):
    """`x -> x[:, start:stop]`."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}"


class Crop(nn.Module):
    """`x -> x[:, :, top:-bottom:step, left:-right:step]`.

    Args:
        sides: samples to leave out, `(top, bottom, left, right)`.
        steps: of which every n-th sample is kept, vertical and horizontal.
    """

    def __init__(self, sides: Sequence[int], steps: Pair = (1, 1)) -> None:
        super().__init__()
        top, bottom, left, right = sides
        self.rows = slice(top, -bottom or None, steps[0])
        self.columns = slice(left, -right or None, steps[1])

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.rows, self.columns]

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}"


class Accumulation(Sum):
    """A sum that is written in place."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self
        total = 0 + first(x)
        for module in others:
            total += module(x)
        return total


class NormAndPad(nn.Module):
    """A norm, and one row or column on each side of what it makes of zeros, written in place."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = norm
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pad(self.norm(x), (1, 1, 1, 1))
        value = self.norm(torch.zeros(1, self.channels, 1, 1))
        y[:, :, :1], y[:, :, -1:], y[..., :1], y[..., -1:] = [value] * 4
        return y


class Shift(nn.Module):
    """`x -> x + constant`, one value per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant


class Draw:
    """One random block; the same seed draws the same block.

    Args:
        seed: of the shape; the weights come from torch's own generator.
    """

    def __init__(self, seed: str) -> None:
        self.random = Random(seed)

    def root(self) -> tuple[nn.Module, int]:
        """Return a block in evaluation mode, and the channels of its input."""
        r = self.random
        in_channels = r.randint(1, MAX_CHANNELS)
        geometry = Geometry(
            in_channels,
            in_channels if r.random() < 0.4 else r.randint(1, MAX_CHANNELS),
            stride=self._pair([1, 1, 1, 2, 3]),
            growth=self._pair([0, 0, 0, -1, 1, -2, 2]),
        )
        if r.random() < 0.15:
            geometry = self._with(geometry, stride=(1, 1), upsample=self._pair([1, 2, 2, 3]))
        elif r.random() < 0.3:
            geometry = Geometry(in_channels, in_channels)
        block = self._block(geometry, depth=r.choice([1, 2, 2, 3]))
        return randomize(block), in_channels

    def _block(self, geometry: Geometry, depth: int) -> nn.Module:
        if depth == 0 or self.random.random() < 0.1:
            return self._leaf(geometry)
        combine = self.random.choices(
            [self._sum, self._sequence, self._concat, self._difference, self._channels],
            [5, 5, 2, 1, 1],
        )[0]
        return combine(geometry, depth - 1)

    def _sum(self, geometry: Geometry, depth: int) -> nn.Module:
        kind = self.random.choice([Sum, Accumulation])
        return kind(*(self._block(self._near(geometry), depth) for _ in range(self._count())))

    def _difference(self, geometry: Geometry, depth: int) -> nn.Module:
        return Difference(self._block(geometry, depth), self._block(geometry, depth))

    def _concat(self, geometry: Geometry, depth: int) -> nn.Module:
        first = self.random.randint(0, geometry.out_channels)
        widths = [w for w in (first, geometry.out_channels - first) if w]
        return Concat(*(self._block(self._with(geometry, out_channels=w), depth) for w in widths))

    def _channels(self, geometry: Geometry, depth: int) -> nn.Module:
        """Return more output channels than are needed, and a slice of them."""
        start, extra = self.random.randint(0, 2), self.random.randint(0, 2)
        width = geometry.out_channels
        block = self._block(self._with(geometry, out_channels=start + width + extra), depth)
        return nn.Sequential(block, Channels(start, start + width))

    def _sequence(self, geometry: Geometry, depth: int) -> nn.Module:
        """Return two parts; half of the time so that the border law is kept."""
        r, middle = self.random, self.random.randint(1, MAX_CHANNELS)
        first = self._with(geometry, out_channels=middle, stride=(1, 1))
        second = Geometry(middle, geometry.out_channels, stride=geometry.stride)
        style = r.choice(["pad last", "pad first", "pad first", "anything"])
        if style == "pad last":  # after a pointwise part without bias
            first = Geometry(geometry.in_channels, middle)
            second = self._with(geometry, in_channels=middle)
            pointwise = nn.Conv2d(first.in_channels, middle, 1, bias=False)
            return nn.Sequential(pointwise, self._block(second, depth))
        if style == "pad first":  # before a part without padding
            reach, valid = self._valid(second)
            growth = (geometry.growth[0] + reach[0], geometry.growth[1] + reach[1])
            return nn.Sequential(self._block(self._with(first, growth=growth), depth), *valid)
        own = self._pair([0, 1, -1])
        rest = (geometry.growth[0] - own[0], geometry.growth[1] - own[1])
        return nn.Sequential(
            self._block(self._with(first, growth=rest), depth),
            self._block(self._with(second, growth=own), depth),
        )

    def _valid(self, geometry: Geometry) -> tuple[Pair, list[nn.Module]]:
        """Return the samples lost, and an unpadded convolution with what may follow it."""
        size, dilation = self._pair([1, 1, 2, 3, 4]), self._pair([1, 1, 2])
        conv = nn.Conv2d(
            geometry.in_channels,
            geometry.out_channels,
            size,
            stride=geometry.stride,
            dilation=dilation,
            groups=self._groups(geometry),
            bias=self._coin(),
        )
        reach = (dilation[0] * (size[0] - 1), dilation[1] * (size[1] - 1))
        return reach, [conv, *self._tail(geometry.out_channels)]

    def _leaf(self, geometry: Geometry) -> nn.Module:
        r, channels = self.random, geometry.in_channels
        if geometry.upsample != (1, 1):
            return self._transposed(geometry)
        if r.random() < 0.04 and (spoiler := self._not_affine(geometry)) is not None:
            return spoiler
        if geometry.keeps_shape and r.random() < 0.4:
            choices = [
                lambda: nn.Identity(),
                lambda: self._norm(channels),
                lambda: self._norm(channels),
                lambda: Scale(r.uniform(-2, 2)),
                lambda: Scale(r.uniform(-2, 2), channels),
                lambda: nn.Dropout(0.5),
                lambda: nn.Dropout2d(0.5),
                lambda: Shift(channels),
            ]
            return r.choice(choices)()
        if channels == geometry.out_channels and geometry.stride == (1, 1) and r.random() < 0.1:
            return self._pads(geometry.growth)
        if channels == geometry.out_channels and r.random() < 0.15:
            return self._pool(geometry)
        if channels == geometry.out_channels and max(geometry.growth) <= 0 and r.random() < 0.15:
            first = [r.randint(0, -total) for total in geometry.growth]
            sides = (first[0], -geometry.growth[0] - first[0])
            return Crop((*sides, first[1], -geometry.growth[1] - first[1]), geometry.stride)
        if geometry.stride == (1, 1) and r.random() < 0.1:
            return self._transposed(geometry)
        if geometry.keeps_shape and r.random() < 0.1 and channels > 1:
            filled = NormAndPad(self._norm(channels), channels)
            pad = r.choice([PadBatchNorm(channels, 1), filled])
            return nn.Sequential(pad, nn.Conv2d(channels, channels, 3))
        return self._conv(geometry)

    def _conv(self, geometry: Geometry) -> nn.Module:
        r = self.random
        size, dilation = self._pair([1, 1, 2, 3, 3, 4]), self._pair([1, 1, 1, 2, 3])
        wanted = [g + d * (k - 1) for g, d, k in zip(geometry.growth, dilation, size, strict=True)]
        pads: list[nn.Module] = []
        padding: str | Pair = (0, 0)
        if geometry.growth == (0, 0) and geometry.stride == (1, 1) and r.random() < 0.3:
            padding = "same"
        elif all(w >= 0 and w % 2 == 0 for w in wanted) and r.random() < 0.8:
            padding = (wanted[0] // 2, wanted[1] // 2)
        else:
            pads = [self._pads((wanted[0], wanted[1]))]
        mode: Literal["zeros", "circular", "replicate"] = "zeros"
        if r.random() < 0.02:
            mode = r.choice(["circular", "replicate"])
        conv = nn.Conv2d(
            geometry.in_channels,
            geometry.out_channels,
            size,
            stride=geometry.stride,
            padding=padding,
            dilation=dilation,
            groups=self._groups(geometry),
            bias=self._coin(),
            padding_mode=mode,
        )
        return nn.Sequential(*pads, conv, *self._tail(geometry.out_channels))

    def _transposed(self, geometry: Geometry) -> nn.Module:
        """Return a transposed convolution, cropped or padded to the growth.

        Its own is `d (k - 1) - 2 p + output padding`.
        """
        r, square = self.random, geometry.upsample[0] == geometry.upsample[1] > 1
        simple = square and geometry.in_channels == geometry.out_channels
        if simple and r.random() < 0.05:
            last = [geometry.upsample[0] - 1] * 2
            crop = (geometry.growth[0] - last[0], geometry.growth[1] - last[1])
            return nn.Sequential(nn.Upsample(scale_factor=geometry.upsample[0]), self._pads(crop))
        size, dilation = self._pair([1, 2, 3, 4]), self._pair([1, 1, 2])
        padding, extra, rest = [], [], []
        for axis in range(2):
            spare = dilation[axis] * (size[axis] - 1) - geometry.growth[axis]
            limit = max(geometry.upsample[axis], dilation[axis])
            padding.append(r.randint(0, max(spare // 2, 0)))
            extra.append(r.randint(0, limit - 1))
            rest.append(2 * padding[axis] - extra[axis] - spare)
        conv = nn.ConvTranspose2d(
            geometry.in_channels,
            geometry.out_channels,
            size,
            stride=geometry.upsample,
            padding=(padding[0], padding[1]),
            output_padding=(extra[0], extra[1]),
            dilation=dilation,
            groups=self._groups(geometry),
            bias=self._coin(),
        )
        pads = [self._pads((rest[0], rest[1]))] if any(rest) else []
        return nn.Sequential(conv, *pads, *self._tail(geometry.out_channels))

    def _pool(self, geometry: Geometry) -> nn.Module:
        r, size = self.random, self._pair([1, 2, 3, 3, 4])
        wanted = [g + k - 1 for g, k in zip(geometry.growth, size, strict=True)]
        half = (wanted[0] // 2, wanted[1] // 2)
        own = all(w % 2 == 0 and 0 <= w // 2 <= k // 2 for w, k in zip(wanted, size, strict=True))
        pool = nn.AvgPool2d(
            size,
            stride=geometry.stride,
            padding=half if own else 0,
            ceil_mode=r.random() < 0.1,
            count_include_pad=r.random() > 0.1,
            divisor_override=5 if r.random() < 0.1 else None,
        )
        return pool if own else nn.Sequential(self._pads((wanted[0], wanted[1])), pool)

    def _not_affine(self, geometry: Geometry) -> nn.Module | None:
        """Return a layer that no convolution is, of this geometry, None if there is none."""
        channels, (vertical, horizontal) = geometry.in_channels, geometry.growth
        if not self._with(geometry, growth=(0, 0)).keeps_shape:
            return None
        if vertical < 0 or horizontal < 0 or self.random.random() < 0.2:
            return nn.Sequential(nn.ReLU(), self._pads(geometry.growth))
        if (vertical, horizontal) != (0, 0):
            sides = (horizontal, 0, vertical, 0)
            return self.random.choice([nn.ConstantPad2d(sides, 1.5), nn.ReplicationPad2d(sides)])
        choices = [
            lambda: nn.ReLU(),
            lambda: nn.PReLU(),
            lambda: nn.Hardswish(),
            lambda: nn.MaxPool2d(3, 1, 1),
            lambda: nn.GroupNorm(1, channels),
            lambda: nn.BatchNorm2d(channels, track_running_stats=False),
            lambda: nn.Sequential(nn.ConstantPad2d(1, -0.5), nn.AvgPool2d(3, 1)),
            lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        ]
        return self.random.choice(choices)()

    def _tail(self, channels: int) -> list[nn.Module]:
        """Return what may follow a convolution."""
        draw = self.random.random()
        if draw < 0.5:
            return [self._norm(channels)]
        if draw < 0.6:
            return [nn.Dropout(0.3), self._norm(channels), Scale(0.5, channels)]
        return [nn.ReLU()] if draw < 0.61 else []

    def _norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, eps=10 ** self.random.uniform(-6, -1), affine=self._coin())

    def _pads(self, growth: Pair) -> nn.Module:
        """Return zero padding, uneven and in places negative, that adds `growth` samples."""
        sides: list[int] = []
        for total in reversed(growth):  # torch begins with the last axis
            before = self.random.randint(min(0, total), max(0, total))
            if self.random.random() < 0.1:
                before += self.random.choice([-1, 1])
            sides += [before, total - before]
        return nn.ZeroPad2d((sides[0], sides[1], sides[2], sides[3]))

    def _near(self, geometry: Geometry) -> Geometry:
        """Return the geometry, now and then another one that fits at some sizes only."""
        if geometry.stride == (1, 1) or self.random.random() > 0.05:
            return geometry
        return self._with(geometry, growth=(geometry.growth[0] - 1, geometry.growth[1]))

    def _groups(self, geometry: Geometry) -> int:
        pair = (geometry.in_channels, geometry.out_channels)
        return self.random.choice([1, *(g for g in range(1, 9) if not any(c % g for c in pair))])

    def _pair(self, values: list[int]) -> Pair:
        first = self.random.choice(values)
        return first, (first if self.random.random() < 0.6 else self.random.choice(values))

    def _count(self) -> int:
        return self.random.choice([2, 2, 3])

    def _coin(self) -> bool:
        return self.random.random() < 0.5

    @staticmethod
    def _with(geometry: Geometry, **changes: int | Pair) -> Geometry:
        return Geometry(**{**vars(geometry), **changes})


@torch.no_grad()
def randomize(block: nn.Module) -> nn.Module:
    """Return `block` in evaluation, with random batch norms and layer scales."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
            if module.affine:
                module.weight.normal_()
                module.bias.normal_()
        elif isinstance(module, Scale) and module.weight is not None:
            module.weight.normal_()
    return block.eval()


class Oracle:
    """The one convolution that a module is, if there is one, found without any rule of folding.

    A zero-padded convolution is `y[j] = bias + sum_i W[u i - s j] x[i]` along each axis, for
    upsampling u and stride s without a common divisor: W is read off impulses in the middle of a
    large image, where no border is seen, and then must hold everywhere.

    Args:
        module: takes and returns one feature map, in evaluation.
        channels: of its input.
    """

    def __init__(self, module: nn.Module, channels: int) -> None:
        self.module = module
        self.channels = channels

    def finds(self, images: list[Tensor]) -> bool | None:
        """Return whether one convolution is the module on `images`; None if it reaches too far."""
        if not self._is_affine(images[0]):
            return False
        blank = [
            torch.zeros(1, self.channels, *(n + more for n in images[0].shape[2:]))
            for more in ENLARGED
        ]
        zero, smaller = (self.module(x) for x in blank)
        rates = [
            Fraction(a - b, ENLARGED[0] - ENLARGED[1])
            for a, b in zip(zero.shape[2:], smaller.shape[2:], strict=True)
        ]
        if min(rates) <= 0:
            return False  # the size of the output does not follow that of the input
        self.upsample = [rate.numerator for rate in rates]
        self.stride = [rate.denominator for rate in rates]
        self.bias = zero[0, :, zero.shape[2] // 2, zero.shape[3] // 2]
        if self._read(blank[0], zero) is None:
            return None
        outputs = [self.module(x) for x in images]
        inputs = [x.shape for x in (*images, *blank)]
        shapes = list(zip(inputs, [y.shape for y in (*outputs, zero, smaller)], strict=True))
        if not all(self._one_growth(shapes, axis) for axis in range(2)):
            return False
        return all(
            relative_error(y, self._apply(x, y.shape)) < ORACLE_TOLERANCE
            for x, y in zip(images, outputs, strict=True)
        )

    def _is_affine(self, x: Tensor) -> bool:
        other = torch.randn_like(x)
        between = 3 * self.module(x) - 2 * self.module(other)
        return relative_error(between, self.module(3 * x - 2 * other)) < ORACLE_TOLERANCE

    def _read(self, blank: Tensor, zero: Tensor) -> Tensor | None:
        """Read the taps `(out, in, vertical, horizontal)` off impulses; None at a border.

        Args:
            blank: a large image of zeros.
            zero: what the module makes of it.
        """
        (up_h, up_w), (hop_h, hop_w) = self.upsample, self.stride
        height, width = zero.shape[2:]
        reach = [
            max(u * n, s * m)
            for u, s, n, m in zip(
                self.upsample, self.stride, blank.shape[2:], zero.shape[2:], strict=True
            )
        ]
        taps = zero.new_zeros(zero.shape[1], self.channels, 2 * reach[0] + 1, 2 * reach[1] + 1)
        middle, eye = [n // 2 for n in blank.shape[2:]], torch.arange(self.channels)
        for top in range(middle[0], middle[0] + hop_h):
            for left in range(middle[1], middle[1] + hop_w):
                image = blank.repeat(self.channels, 1, 1, 1)
                image[eye, eye, top, left] = 1
                response = (self.module(image) - zero).transpose(0, 1)
                edges = (response[..., (0, -1), :], response[..., (0, -1)])
                if max(float(e.abs().max()) for e in edges) > ORACLE_TOLERANCE:
                    return None
                rows = reach[0] + up_h * top - hop_h * torch.arange(height)
                columns = reach[1] + up_w * left - hop_w * torch.arange(width)
                taps[:, :, rows[:, None], columns] = response
        used = taps.abs().amax(dim=(0, 1)) > 1e-13  # rounding
        self.offset = []
        for axis in range(2):
            places = used.any(dim=1 - axis).nonzero().flatten().tolist() or [reach[axis]]
            self.offset.append(places[0] - reach[axis])
            taps = taps.narrow(2 + axis, places[0], places[-1] - places[0] + 1)
        self.taps = taps
        return taps

    def _one_growth(self, shapes: list[tuple[torch.Size, torch.Size]], axis: int) -> bool:
        """Return whether `floor((u (n - 1) + growth) / s) + 1` is the size for one growth."""
        up, hop = self.upsample[axis], self.stride[axis]
        sizes = [(before[2 + axis], after[2 + axis]) for before, after in shapes]
        lowest = max(hop * (m - 1) - up * (n - 1) for n, m in sizes)
        highest = min(hop * m - 1 - up * (n - 1) for n, m in sizes)
        return lowest <= highest

    def _apply(self, x: Tensor, shape: torch.Size) -> Tensor:
        up_h, up_w = self.upsample
        batch, channels, height, width = x.shape
        spread = x.new_zeros(batch, channels, up_h * (height - 1) + 1, up_w * (width - 1) + 1)
        spread[:, :, ::up_h, ::up_w] = x
        sides: list[int] = []
        for axis in (1, 0):
            length = self.stride[axis] * (shape[2 + axis] - 1) + self.taps.shape[2 + axis]
            before = -self.offset[axis]
            sides += [before, length - before - spread.shape[2 + axis]]
        # Zeros first, then crops: torch forbids to crop more than there is.
        spread = functional.pad(spread, [max(s, 0) for s in sides])
        spread = functional.pad(spread, [min(s, 0) for s in sides])
        return functional.conv2d(spread, self.taps, self.bias, (self.stride[0], self.stride[1]))


def relative_error(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    scale, difference = float(expected.abs().max()), float((expected - actual).abs().max())
    return difference / scale if scale > 0 else difference


@dataclass(frozen=True)
class Outcome:
    """What became of one block.

    Args:
        kind: "folded", "refused", "over-refused", "undecided", "not run" or "failure".
        reason: of a refusal, or of a failure.
        error: relative, of a folded block.
        index: of the block.
    """

    kind: str
    reason: str = ""
    error: float = 0.0
    index: int = 0


@contextmanager
def in_float64() -> Iterator[None]:
    """Make float64 the default: a module without parameters has no other way to ask for it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
            yield
    finally:
        torch.set_default_dtype(before)


def draw(seed: int, index: int) -> tuple[nn.Module, int]:
    """Return block `index`, in the default dtype, and the channels of its input."""
    torch.manual_seed(1_000_003 * seed + index)
    return Draw(f"{seed}/{index}").root()


def check(seed: int, index: int) -> Outcome:
    """Draw a block, fold it, and compare it or question the refusal."""
    with in_float64():
        block, channels = draw(seed, index)
        images = []
        for size in SIZES:
            image = 3 * torch.randn(2, channels, *size)
            try:
                block(image)
            except (RuntimeError, ValueError):
                continue  # too small, or sizes that do not fit
            images.append(image)
        if not images:
            return Outcome("not run", index=index)
        try:
            kernel = kernel_of(block, channels)
        except NotFoldableError as refusal:
            return _question(block, channels, images, str(refusal), index)
        except Exception as failure:
            return Outcome("failure", f"{type(failure).__name__}: {failure}", index=index)
        try:
            error = max(relative_error(block(image), kernel(image)) for image in images)
        except Exception as failure:
            return Outcome("failure", f"the kernel does not run: {failure}", index=index)
        if not error < FOLD_TOLERANCE:
            return Outcome("failure", f"relative error {error:.1e}", error, index)
        return Outcome("folded", error=error, index=index)


def _question(
    block: nn.Module, channels: int, images: list[Tensor], reason: str, index: int
) -> Outcome:
    try:
        found = Oracle(block, channels).finds(images)
    except (RuntimeError, ValueError):  # it runs at some sizes only, none of them large
        found = None
    if found is None:
        return Outcome("undecided", reason, index=index)
    if found and len(images) < len(SIZES):
        reason += " (the module itself runs at some sizes only)"
    return Outcome("over-refused" if found else "refused", reason, index=index)


def check_range(seed: int, start: int, stop: int) -> list[Outcome]:
    torch.set_num_threads(1)
    return [check(seed, index) for index in range(start, stop)]


def without_numbers(reason: str) -> str:
    """Return the reason with its figures left out, so that equal ones can be counted."""
    return re.sub(r"-?\d+(\.\d+)?", "#", reason)[:150]


def print_outcomes(console: Console, outcomes: list[Outcome]) -> None:
    table = Table("outcome", "blocks", "reason", "for example", title=f"{len(outcomes)} blocks")
    groups = Counter((o.kind, without_numbers(o.reason)) for o in outcomes)
    example = {(o.kind, without_numbers(o.reason)): o.index for o in reversed(outcomes)}
    for (kind, reason), count in sorted(groups.items(), key=lambda item: (item[0][0], -item[1])):
        table.add_row(kind, str(count), reason, str(example[kind, reason]))
    console.print(table)
    kinds = Counter(o.kind for o in outcomes)
    worst = max((o.error for o in outcomes if o.kind == "folded"), default=0.0)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    console.print(f"{counts}; worst relative error of a folded block {worst:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--show", type=int, metavar="INDEX", help="print one block and its outcome")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if arguments.show is not None:
        with in_float64():
            block, channels = draw(arguments.seed, arguments.show)
        outcome = check(arguments.seed, arguments.show)
        print(f"{block}\n{channels} input channels: {outcome}")
        return int(outcome.kind == "failure")
    start, step = time.perf_counter(), 100
    starts = range(0, arguments.blocks, step)
    stops = [min(s + step, arguments.blocks) for s in starts]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(check_range, [arguments.seed] * len(starts), starts, stops)
        outcomes = [outcome for part in parts for outcome in part]
    print_outcomes(console, outcomes)
    console.print(
        f"seed {arguments.seed}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s"
    )
    return int(any(o.kind == "failure" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
