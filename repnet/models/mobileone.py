"""MobileOne: An Improved One millisecond Mobile Backbone (arXiv:2206.04040)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from repnet.blocks import MobileOneBlock
from repnet.layers import global_pool
from repnet.layers import squeeze_excitation as squeeze
from repnet.models.repvgg import BASE_CHANNELS


class MobileOne(nn.Module):
    """A stem and four stages of depthwise and pointwise blocks, pooling, a linear head.

    A unit is a depthwise block, then a pointwise one, so that unit i of a stage has the indices 2i
    and 2i + 1. Sizes by name stand in `configs/model/`.

    Args:
        depths: units in each of the four stages.
        widths: factors of 64, 128, 256 and 512 channels; the stem has `min(64, 64 * widths[0])`.
        num_classes: outputs of the head.
        in_channels: of the image.
        block: of the stem and all depthwise convolutions, called as `block(in_channels,
            out_channels, stride=, groups=)`, and with `attention=` where `squeeze_excitation` is
            set; None for MobileOne's own. The pointwise ones are always MobileOne's own.
        num_branches: equal convolutions in MobileOne's own blocks; the stem has one.
        squeeze_excitation: units at the end of each stage whose blocks, both of them, have
            attention, with a 16th of the channels (S4: 0, 0, 5, 1); a number is for all stages.
        strides: of the stem and of the first unit of each stage.
        dropout: probability of a zero before the head, in training.

    Raises:
        ValueError: not as many depths, widths, strides or counts of attention as stages, or
            `dropout` is not within 0 to 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[float],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        block: Callable[..., nn.Module] | None = None,
        num_branches: int = 4,
        squeeze_excitation: int | Sequence[int] = 0,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(BASE_CHANNELS)
        if isinstance(squeeze_excitation, int):
            squeeze_excitation = [squeeze_excitation] * stages
        if {len(depths), len(widths), len(squeeze_excitation), len(strides) - 1} != {stages}:
            raise ValueError(
                "depths, widths and squeeze_excitation need 4 values, one for each stage, "
                "and strides 5"
            )
        stem = block or partial(MobileOneBlock, num_branches=1)
        depthwise = block or partial(MobileOneBlock, num_branches=num_branches)
        pointwise = partial(MobileOneBlock, num_branches=num_branches, kernel_size=1)
        channels = min(64, int(64 * widths[0]))
        self.stem = stem(in_channels, channels, stride=strides[0], groups=1)
        self.stages = nn.Sequential()
        for base, depth, width, attentions, stride in zip(
            BASE_CHANNELS, depths, widths, squeeze_excitation, strides[1:], strict=True
        ):
            stage = nn.Sequential()
            for unit in range(depth):
                out_channels = int(base * width)
                options: dict[str, Any] = (
                    {"attention": squeeze} if unit >= depth - attentions else {}
                )
                stride = 1 if unit else stride
                stage.append(
                    depthwise(channels, channels, stride=stride, groups=channels, **options)
                )
                stage.append(pointwise(channels, out_channels, **options))
                channels = out_channels
            self.stages.append(stage)
        self.pool = global_pool(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(batch, num_classes)` of images `(batch, in_channels, height, width)`."""
        return self.head(self.pool(self.stages(self.stem(x))))
