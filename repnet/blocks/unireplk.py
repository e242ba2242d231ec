"""The dilated block of UniRepLKNet."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, Sum, conv_bn

# The authors' small branches by the size of the large one: (kernel size, dilation).
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class DilatedReparamBlock(Block):
    """A large convolution and small dilated ones, each with batch norm (arXiv:2311.15599).

    A dilated kernel is a large one with zeros between its taps. In the paper the block
    is depthwise, that is `groups` are the channels, and linear.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of every branch.
        groups: of every branch.
        kernel_size: of the large convolution, pixels: 5, 7, 9, 11, 13, 15 or 17.
        padding: pixels on each side; None for `(kernel_size - 1) // 2`.
        **options: `attention` and `activation` of `Block`.

    Raises:
        ValueError: another `kernel_size`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        kernel_size: int = 13,
        padding: Size | None = None,
        **options: Any,
    ) -> None:
        if kernel_size not in BRANCHES:
            sizes = ", ".join(str(size) for size in BRANCHES)
            raise ValueError(f"kernel_size must be one of {sizes}, got {kernel_size}")
        branches = [
            conv_bn(in_channels, out_channels, k, stride=stride, dilation=d, groups=groups)
            for k, d in ((kernel_size, 1), *BRANCHES[kernel_size])
        ]
        super().__init__(Sum(*aligned(branches, kernel_size, padding)), out_channels, **options)
