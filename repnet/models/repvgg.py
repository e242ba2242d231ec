"""RepVGG: Making VGG-style ConvNets Great Again (arXiv:2101.03697)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from repnet.blocks import RepVGGBlock
from repnet.layers import global_pool

BASE_CHANNELS = (64, 128, 256, 512)


class RepVGG(nn.Module):
    """A stem and four stages of blocks, global average pooling, a linear head.

    Any block fits: the network knows nothing of its branches. Sizes by name stand in
    `configs/model/`.

    Args:
        depths: blocks in each of the four stages.
        widths: factors of 64, 128, 256 and 512 channels; the stem has `min(64, 64 * widths[0])`.
        num_classes: outputs of the head.
        in_channels: of the image.
        block: called as `block(in_channels, out_channels, stride=, groups=)`, and with
            `attention=` where `squeeze_excitation` is set.
        groups: of every second block after the stem, up to the 26th (table 3: B1g4 and others).
        squeeze_excitation: after each block's convolution, with a 16th of the channels (D2se).
        strides: of the stem and of the first block of each stage.
        dropout: probability of a zero before the head, in training.

    Raises:
        ValueError: not as many depths, widths or strides as stages, or `dropout` is not within 0
            to 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[float],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        block: Callable[..., nn.Module] = RepVGGBlock,
        groups: int = 1,
        squeeze_excitation: bool = False,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if {len(depths), len(widths), len(strides) - 1} != {len(BASE_CHANNELS)}:
            raise ValueError("depths and widths need 4 values, one for each stage, and strides 5")
        options: dict[str, Any] = {"attention": _squeeze} if squeeze_excitation else {}
        channels = min(64, int(64 * widths[0]))
        self.stem = block(in_channels, channels, stride=strides[0], groups=1, **options)
        self.stages = nn.Sequential()
        index = 0  # of the block, counted from the stem
        for base, depth, width, stride in zip(
            BASE_CHANNELS, depths, widths, strides[1:], strict=True
        ):
            stage = nn.Sequential()
            for position in range(depth):
                index += 1
                out_channels = int(base * width)
                stage.append(
                    block(
                        channels,
                        out_channels,
                        stride=1 if position else stride,
                        groups=groups if index % 2 == 0 and index <= 26 else 1,
                        **options,
                    )
                )
                channels = out_channels
            self.stages.append(stage)
        self.pool = global_pool(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(batch, num_classes)` of images `(batch, in_channels, height, width)`."""
        return self.head(self.pool(self.stages(self.stem(x))))


def _squeeze(channels: int) -> SqueezeExcitation:
    return SqueezeExcitation(channels, channels // 16)
