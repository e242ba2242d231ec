"""A multi-branch transposed convolution."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block
from repnet.layers import Sum, conv_transpose_bn


class TransposedBlock(Block):
    """Two transposed convolutions, each with batch norm: the image grows `stride` times.

    In one, whose kernel has `stride` pixels, every output reads one sample. The other overlaps with
    its neighbors: 4 pixels at stride 2, 3 at stride 1, where both are ordinary convolutions.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: output pixels for each input pixel.
        groups: of both branches.
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
            *(
                conv_transpose_bn(in_channels, out_channels, padding, stride=stride, groups=groups)
                for padding in ((stride + 1) // 2, 0)
            )
        )
        super().__init__(branches, out_channels, **options)
