"""The diverse branch block."""

from __future__ import annotations

from typing import Any

from torch import nn

from repnet.blocks.block import Block, aligned
from repnet.layers import PadBatchNorm, Sum, conv, conv_bn, identity_conv


class DiverseBranchBlock(Block):
    """KxK, 1x1, 1x1 then KxK, 1x1 then average pooling, each with batch norm, in this order.

    arXiv:2103.13425, section 3.3. The sequences pad between their layers, with what the norm makes
    of zero. As in the authors' code, the 1x1 of the third branch starts as the identity, and a
    depthwise block (`groups`, input and output channels are equal) pools its input as it is, has no
    1x1 branch, and has twice as many channels inside the third one.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of every branch.
        groups: of every convolution.
        kernel_size: K, pixels.
        padding: pixels on each side; None for `(kernel_size - 1) // 2`.
        internal_channels: between the 1x1 and the KxK of the third branch, a multiple of `groups`;
            None for `in_channels`, in a depthwise block for twice as many. The 1x1 starts as the
            identity only if they equal `in_channels`.
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
        padding: int | None = None,
        internal_channels: int | None = None,
        **options: Any,
    ) -> None:
        padding = (kernel_size - 1) // 2 if padding is None else padding
        depthwise = groups == in_channels == out_channels
        internal = internal_channels or in_channels * (2 if depthwise else 1)
        pointwise = None
        if depthwise:
            pool = nn.Sequential(nn.AvgPool2d(kernel_size, stride, padding))
            if 2 * padding > kernel_size:  # more than AvgPool2d can pad
                pooled = nn.AvgPool2d(kernel_size, stride)
                pool = nn.Sequential(nn.Sequential(nn.ZeroPad2d(padding), pooled))
        else:
            pointwise = conv_bn(in_channels, out_channels, 1, stride=stride, groups=groups)
            pool = nn.Sequential(
                conv(in_channels, out_channels, 1, groups=groups, bias=False),
                PadBatchNorm(out_channels, padding),
                nn.AvgPool2d(kernel_size, stride),
            )
        sequence = nn.Sequential(
            identity_conv(in_channels, groups=groups)
            if internal == in_channels
            else conv(in_channels, internal, 1, groups=groups, bias=False),
            PadBatchNorm(internal, padding),
            nn.Conv2d(internal, out_channels, kernel_size, stride, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        square = conv_bn(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        branches = Sum(
            *aligned([square, pointwise], kernel_size, padding),
            sequence,
            pool.append(nn.BatchNorm2d(out_channels)),
        )
        super().__init__(branches, out_channels, **options)
