"""Branches, and the modules that combine them: the parts of a block's affine map."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation

Size = int | tuple[int, int]


class Sum(nn.ModuleList):
    """`x -> branch_0(x) + branch_1(x) + ...`; None among the branches is left out."""

    def __init__(self, *branches: nn.Module | None) -> None:
        super().__init__(b for b in branches if b is not None)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (branch(x) for branch in self)
        # The first is the largest kernel as a rule, and a fold copies the weights of partial sums.
        return reduce(add, others) + first if others else first


class Concat(nn.ModuleList):
    """`x -> cat([branch_0(x), branch_1(x), ...])` over channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


class Scale(nn.Module):
    """`x -> value * x`: a fixed number, or with `channels` a trained one for each (layer scale).

    Args:
        value: the number, or the initial value.
        channels: None for a fixed number.
    """

    def __init__(self, value: float, channels: int | None = None) -> None:
        super().__init__()
        self.value = value
        self.weight = (
            None if channels is None else nn.Parameter(torch.full((channels, 1, 1), float(value)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.value if self.weight is None else self.weight)

    def extra_repr(self) -> str:
        return f"{self.value}" if self.weight is None else f"{self.value}, {len(self.weight)}"


class PadBatchNorm(nn.Module):
    """Batch norm, then padding with what the norm makes of zero.

    In evaluation that is zero padding before the norm, and so a border that a pointwise convolution
    in front lets through. In training the statistics are those of the unpadded input, as in
    Diverse Branch Block (arXiv:2103.13425, section 3.3).

    Args:
        channels: of the input.
        padding: pixels on every side.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        pad = [self.padding] * 4
        if not self.training:
            return self.norm(functional.pad(x, pad))
        x, norm = self.norm(x), self.norm
        border = functional.batch_norm(
            x.new_zeros(1, x.shape[1], 1, 1),
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            eps=norm.eps,
        )
        return functional.pad(x - border, pad) + border


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: Size = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """Return a convolution that keeps the size at stride 1, for odd kernels."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return nn.Conv2d(
        in_channels,
        out_channels,
        (height, width),
        stride=stride,
        padding=(dilation * (height - 1) // 2, dilation * (width - 1) // 2),
        dilation=dilation,
        groups=groups,
        bias=bias,
    )


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: Size = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Return `conv` without bias, then batch norm: the branch of most re-parameterizable nets."""
    convolution = conv(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        dilation=dilation,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out_channels)))


def conv_transpose_bn(
    in_channels: int, out_channels: int, padding: int = 0, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a transposed convolution, then batch norm: the image grows `stride` times.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        padding: pixels cropped on every side; the kernel has `stride + 2 * padding`.
        stride: output pixels for each input pixel.
        groups: of the convolution.
    """
    convolution = nn.ConvTranspose2d(
        in_channels,
        out_channels,
        stride + 2 * padding,
        stride=stride,
        padding=padding,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out_channels)))


def identity_conv(channels: int, *, groups: int = 1) -> Sum:
    """Return `x -> x + conv1x1(x)`, which starts as the identity: the convolution starts at zero.

    In Diverse Branch Block it takes the place of a 1x1 convolution between equal channels.
    """
    convolution = conv(channels, channels, 1, groups=groups, bias=False)
    nn.init.zeros_(convolution.weight)
    return Sum(nn.Identity(), convolution)


def identity(
    in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1
) -> nn.Identity | None:
    """Return the identity branch, or None where the shape changes."""
    return nn.Identity() if in_channels == out_channels and stride == 1 else None


def identity_bn(
    in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1
) -> nn.BatchNorm2d | None:
    """Return batch norm as a branch of its own, or None where the shape changes."""
    return nn.BatchNorm2d(out_channels) if in_channels == out_channels and stride == 1 else None


def global_pool(dropout: float = 0.0) -> nn.Sequential:
    """Return average pooling to `(batch, channels)`, what stands before a linear head.

    Args:
        dropout: probability that a channel is zero in training; 0 for no such layer.
    """
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return pool.append(nn.Dropout(dropout)) if dropout else pool


def squeeze_excitation(channels: int, reduction: int = 16) -> SqueezeExcitation:
    """Return attention over channels, with `channels // reduction` of them inside, at least one."""
    return SqueezeExcitation(channels, max(1, channels // reduction))


def branch_norms(model: nn.Module) -> Iterable[nn.BatchNorm2d]:
    """Yield the batch norms that are a branch of a `Sum` themselves, without a convolution."""
    for module in model.modules():
        if isinstance(module, Sum):
            yield from (b for b in module if isinstance(b, nn.BatchNorm2d))
