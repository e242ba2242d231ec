"""The MobileOne block."""

from __future__ import annotations

from typing import Any

from repnet.blocks.block import Block, aligned
from repnet.layers import Size, Sum, conv_bn, identity_bn


class MobileOneBlock(Block):
    """Equal convolutions, a pointwise one and identity, each with batch norm.

    arXiv:2206.04040, figure 3. The branches stand in this order; there is no second pointwise
    branch where the convolutions are pointwise themselves.

    Args:
        in_channels: of the input.
        out_channels: of the output; the identity exists only where it equals `in_channels`.
        stride: the identity exists only at 1.
        groups: of all convolutions.
        kernel_size: pixels.
        padding: pixels on each side; None for `(kernel_size - 1) // 2`.
        num_branches: equal convolutions; the paper's k.
        **options: `attention` and `activation` of `Block`.

    Raises:
        ValueError: `num_branches` is less than 1.
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
        num_branches: int = 4,
        **options: Any,
    ) -> None:
        if num_branches < 1:
            raise ValueError(f"num_branches must be at least 1, got {num_branches}")
        sizes = [kernel_size] * num_branches + [1] * (kernel_size != 1)
        branches = [
            *(conv_bn(in_channels, out_channels, k, stride=stride, groups=groups) for k in sizes),
            identity_bn(in_channels, out_channels, stride=stride),
        ]
        super().__init__(Sum(*aligned(branches, kernel_size, padding)), out_channels, **options)
