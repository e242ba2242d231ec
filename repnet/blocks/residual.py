"""The textbook residual block."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block
from repnet.layers import Sum, conv, identity


class ResidualBlock(Block):
    """`conv3x3(x) + conv1x1(x) + x`, without batch norm.

    Args:
        in_channels: of the input.
        out_channels: of the output; `x` is added only where it equals `in_channels`.
        stride: `x` is added only at 1.
        groups: of both convolutions.
        dilation: of the 3x3 convolution.
        **options: `attention` and `activation` of `Block`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        **options: Any,
    ) -> None:
        branches = Sum(
            conv(in_channels, out_channels, 3, stride=stride, groups=groups, dilation=dilation),
            conv(in_channels, out_channels, 1, stride=stride, groups=groups),
            identity(in_channels, out_channels, stride=stride),
        )
        super().__init__(branches, out_channels, **options)
