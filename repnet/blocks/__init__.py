"""Blocks, one file each, called as `block(in_channels, out_channels, stride=, groups=)`."""

from repnet.blocks.ac import ACBlock
from repnet.blocks.block import Block
from repnet.blocks.composed import ComposedBlock
from repnet.blocks.dbb import DiverseBranchBlock
from repnet.blocks.mobileone import MobileOneBlock
from repnet.blocks.plain import PlainBlock
from repnet.blocks.qarepvgg import QARepVGGBlock
from repnet.blocks.replk import LargeKernelBlock
from repnet.blocks.repmixer import RepMixerBlock
from repnet.blocks.repvgg import RepVGGBlock
from repnet.blocks.repvit import RepViTBlock
from repnet.blocks.residual import ResidualBlock
from repnet.blocks.transposed import TransposedBlock
from repnet.blocks.unireplk import DilatedReparamBlock

__all__ = [
    "ACBlock",
    "Block",
    "ComposedBlock",
    "DilatedReparamBlock",
    "DiverseBranchBlock",
    "LargeKernelBlock",
    "MobileOneBlock",
    "PlainBlock",
    "QARepVGGBlock",
    "RepMixerBlock",
    "RepVGGBlock",
    "RepViTBlock",
    "ResidualBlock",
    "TransposedBlock",
]
