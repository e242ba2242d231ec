"""The QARepVGG block."""

from __future__ import annotations

from typing import Any

from torch import nn

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, Sum, conv, conv_bn, identity


class QARepVGGBlock(Block):
    """`norm(conv_bn(x) + conv1x1(x) + x)`, a RepVGG block that int8 harms less.

    arXiv:2212.01593: only the large convolution has a norm of its own, and one norm
    follows the sum.

    Args:
        in_channels: of the input.
        out_channels: of the output; `x` is added only where it equals `in_channels`.
        stride: `x` is added only at 1.
        groups: of both convolutions.
        kernel_size: of the large convolution, pixels.
        padding: pixels on each side; None for `(kernel_size - 1) // 2`.
        **options: `attention` and `activation` of `Block`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        kernel_size: Size = 3,
        padding: Size | None = None,
        **options: Any,
    ) -> None:
        branches = [
            conv_bn(in_channels, out_channels, kernel_size, stride=stride, groups=groups),
            conv(in_channels, out_channels, 1, stride=stride, groups=groups, bias=False),
            identity(in_channels, out_channels, stride=stride),
        ]
        norm = nn.BatchNorm2d(out_channels)
        layers = nn.Sequential(Sum(*aligned(branches, kernel_size, padding)), norm)
        super().__init__(layers, out_channels, **options)
