"""The asymmetric convolution block of ACNet."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, Sum, conv_bn


class ACBlock(Block):
    """Square, vertical (Kx1) and horizontal (1xK) convolutions, each with batch norm.

    arXiv:1908.03930, section 3.2. The branches stand in this order.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of every branch.
        groups: of every branch.
        kernel_size: K, pixels.
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
        kernel_size: int = 3,
        padding: Size | None = None,
        **options: Any,
    ) -> None:
        sizes = [(kernel_size, kernel_size), (kernel_size, 1), (1, kernel_size)]
        branches = [
            conv_bn(in_channels, out_channels, k, stride=stride, groups=groups) for k in sizes
        ]
        super().__init__(Sum(*aligned(branches, kernel_size, padding)), out_channels, **options)
