"""The large convolution of RepLKNet."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, Sum, conv_bn


class LargeKernelBlock(Block):
    """A large and a small convolution, each with batch norm (arXiv:2203.06717, guideline 3).

    In the paper the block is depthwise, that is `groups` are the channels.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of both branches.
        groups: of both branches.
        kernel_size: of the large one, pixels.
        small_kernel_size: of the other one, pixels.
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
        kernel_size: Size = 31,
        small_kernel_size: Size = 5,
        padding: Size | None = None,
        **options: Any,
    ) -> None:
        branches = [
            conv_bn(in_channels, out_channels, k, stride=stride, groups=groups)
            for k in (kernel_size, small_kernel_size)
        ]
        super().__init__(Sum(*aligned(branches, kernel_size, padding)), out_channels, **options)
