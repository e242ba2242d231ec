"""The token mixer of FastViT."""

from __future__ import annotations

from typing import Any

from torch import nn

from repnet.blocks.block import Block
from repnet.layers import Scale, Sum, conv_bn, identity_bn


class RepMixerBlock(Block):
    """`x + scale * (mixer(x) - norm(x))`, where the mixer is a MobileOne block of one branch.

    arXiv:2303.14189, section 3.2; the scale of each channel is trained from 1e-5. Where the shape
    changes, only the mixer remains. In the paper the block is depthwise, that is `groups` are the
    channels, and linear.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the mixer.
        groups: of both convolutions of the mixer.
        kernel_size: of the mixer, pixels, odd.
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
        **options: Any,
    ) -> None:
        layers = Sum(
            conv_bn(in_channels, out_channels, kernel_size, stride=stride, groups=groups),
            conv_bn(in_channels, out_channels, 1, stride=stride, groups=groups),
            identity_bn(in_channels, out_channels, stride=stride),
        )
        if in_channels == out_channels and stride == 1:
            difference = Sum(layers, nn.Sequential(nn.BatchNorm2d(out_channels), Scale(-1)))
            layers = Sum(nn.Identity(), nn.Sequential(difference, Scale(1e-5, out_channels)))
        super().__init__(layers, out_channels, **options)
