"""The RepVGG block."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block
from repnet.layers import Sum, conv_bn, identity_bn


class RepVGGBlock(Block):
    """3x3, 1x1 and identity, each with batch norm (arXiv:2101.03697, figure 4).

    Args:
        in_channels: of the input.
        out_channels: of the output; the identity exists only where it equals `in_channels`.
        stride: the identity exists only at 1.
        groups: of both convolutions.
        **options: `attention` and `activation` of `Block`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        **options: Any,
    ) -> None:
        branches = Sum(
            conv_bn(in_channels, out_channels, 3, stride=stride, groups=groups),
            conv_bn(in_channels, out_channels, 1, stride=stride, groups=groups),
            identity_bn(in_channels, out_channels, stride=stride),
        )
        super().__init__(branches, out_channels, **options)
