"""Deep Residual Learning for Image Recognition (arXiv:1512.03385), with basic blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from repnet.blocks import PlainBlock
from repnet.layers import conv_bn, global_pool

Layer = Callable[..., nn.Module]


class ResNet(nn.Module):
    """A stem, stages of residual units, global average pooling, a linear head.

    As in the papers of ACNet and Diverse Branch Block, every convolution of the units is a block,
    while the stem and the 1x1 convolutions of the shortcuts stay plain. Sizes by name stand in
    `configs/model/`.

    Args:
        depths: units in each stage.
        width: channels of the stem and the first stage; each further stage has twice as many.
        num_classes: outputs of the head.
        in_channels: of the image.
        block: called as `block(in_channels, out_channels, stride=, groups=)`. The second of each
            unit comes before the sum and so has no activation: it is called with
            `activation=None` too, unless `block` takes no such argument and so decides itself.
        stem_kernel_size: pixels.
        strides: of the stem, of the max pooling after it (1 for none), and of the first unit of
            each stage; None for 2, 2, 1, and 2 in each further stage.
        dropout: probability of a zero before the head, in training.
        drop_path: stochastic depth (arXiv:1603.09382): probability that the last unit leaves out
            its blocks for an image in training; it grows linearly over the units, equation 4.

    Raises:
        ValueError: `depths` is empty, there are not two more strides than stages, or a probability
            lies outside 0 to 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 64,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        block: Layer = PlainBlock,
        stem_kernel_size: int = 7,
        strides: Sequence[int] | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not depths:
            raise ValueError("depths needs at least one stage")
        strides = strides or [2, 2, 1] + [2] * (len(depths) - 1)
        if len(strides) != len(depths) + 2:
            raise ValueError(
                f"{len(depths)} stages need {len(depths) + 2} strides: of the stem, of the max "
                f"pooling, and of each stage; got {len(strides)}"
            )
        self.stem = nn.Sequential(
            conv_bn(in_channels, width, stem_kernel_size, stride=strides[0]), nn.ReLU()
        )
        if strides[1] > 1:
            self.stem.append(nn.MaxPool2d(3, strides[1], 1))
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and less than 1, not {drop_path}")
        self.stages = nn.Sequential()
        channels = width
        units = 0
        for index, (depth, stride) in enumerate(zip(depths, strides[2:], strict=True)):
            stage = nn.Sequential()
            for position in range(depth):
                out_channels = width * 2**index
                units += 1
                stage.append(
                    ResidualUnit(
                        channels,
                        out_channels,
                        block,
                        stride=1 if position else stride,
                        drop_path=drop_path * units / sum(depths),
                    )
                )
                channels = out_channels
            self.stages.append(stage)
        self.pool = global_pool(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(batch, num_classes)` of images `(batch, in_channels, height, width)`."""
        return self.head(self.pool(self.stages(self.stem(x))))


class ResidualUnit(nn.Module):
    """`relu(second(first(x)) + shortcut(x))`, the "basic block" of figure 5.

    Args:
        in_channels: of the input.
        out_channels: of the output; the shortcut is the identity where it equals `in_channels`.
        block: `first` and `second`, see `ResNet`.
        stride: of `first`; the shortcut is the identity only at 1.
        drop_path: probability that an image takes only the shortcut in training; else
            `second(first(x))` is divided by the rest, so that the mean stays.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block: Layer,
        *,
        stride: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = block(in_channels, out_channels, stride=stride, groups=1)
        self.second = _without_activation(block)(out_channels, out_channels, stride=1, groups=1)
        keeps_shape = in_channels == out_channels and stride == 1
        self.shortcut = (
            nn.Identity() if keeps_shape else conv_bn(in_channels, out_channels, 1, stride=stride)
        )
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.drop_path(self.second(self.first(x))) + self.shortcut(x))


def _without_activation(block: Layer) -> Layer:
    parameters = inspect.signature(block).parameters
    takes_it = "activation" in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )
    return partial(block, activation=None) if takes_it else block
