"""The shape that all blocks share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Layer = Callable[[], nn.Module]
ChannelLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """An affine map, then attention, then an activation.

    The affine map is called `conv` before and after folding, so that the folded weights of every
    block fit the same network.

    Args:
        conv: whatever folds into one convolution.
        out_channels: of `conv`.
        attention: called with `out_channels`, for instance squeeze-and-excitation.
        activation: called without arguments; None for a linear block.
    """

    def __init__(
        self,
        conv: nn.Module,
        out_channels: int,
        attention: ChannelLayer | None = None,
        activation: Layer | None = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.attention = attention(out_channels) if attention else nn.Identity()
        self.activation = activation() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.attention(self.conv(x)))
