"""Blocks, one file each, called as `block(in_channels, out_channels, stride=, groups=)`."""

from repnet.blocks.block import Block
from repnet.blocks.composed import ComposedBlock
from repnet.blocks.plain import PlainBlock
from repnet.blocks.repvgg import RepVGGBlock
from repnet.blocks.residual import ResidualBlock

__all__ = ["Block", "ComposedBlock", "PlainBlock", "RepVGGBlock", "ResidualBlock"]
