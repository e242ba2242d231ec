"""The large convolution of RepLKNet."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block
from repnet.layers import Sum, conv_bn


class LargeKernelBlock(Block):
    """A large and a small convolution, each with batch norm (arXiv:2203.06717, guideline 3).

    In the paper the block is depthwise, that is `groups` are the channels.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of both branches.
        groups: of both branches.
        kernel_size: of the large one, pixels, odd.
        small_kernel_size: of the other one, pixels, odd.
        **options: `attention` and `activation` of `Block`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        kernel_size: int = 31,
        small_kernel_size: int = 5,
        **options: Any,
    ) -> None:
        branches = Sum(
            conv_bn(in_channels, out_channels, kernel_size, stride=stride, groups=groups),
            conv_bn(in_channels, out_channels, small_kernel_size, stride=stride, groups=groups),
        )
        super().__init__(branches, out_channels, **options)
