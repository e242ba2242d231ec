"""The RepVGG block."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, Sum, conv_bn, identity_bn


class RepVGGBlock(Block):
    """KxK, 1x1 and identity, each with batch norm (arXiv:2101.03697, figure 4).

    Args:
        in_channels: of the input.
        out_channels: of the output; the identity exists only where it equals `in_channels`.
        stride: the identity exists only at 1.
        groups: of both convolutions.
        kernel_size: K, pixels; 3 in the paper.
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
            conv_bn(in_channels, out_channels, 1, stride=stride, groups=groups),
            identity_bn(in_channels, out_channels, stride=stride),
        ]
        super().__init__(Sum(*aligned(branches, kernel_size, padding)), out_channels, **options)
