"""One convolution with batch norm: what the multi-branch blocks are compared with."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, conv_bn


class PlainBlock(Block):
    """Convolution and batch norm, the block of VGG with norms.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the convolution.
        groups: of the convolution.
        kernel_size: pixels.
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
        branch = conv_bn(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        (layers,) = aligned([branch], kernel_size, padding)
        super().__init__(layers, out_channels, **options)
