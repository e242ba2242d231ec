"""The shape that all blocks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from repnet.layers import Size

Layer = Callable[[], nn.Module]
ChannelLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """An affine map, then attention, then an activation.

    The affine map is called `conv` before and after folding, so that the folded weights of every
    block fit the same network. It always becomes one convolution, even if that is larger than its
    branches together.

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
        conv.deploys_as_one = True  # type: ignore[assignment]  # even if that costs more
        self.attention = attention(out_channels) if attention else nn.Identity()
        self.activation = activation() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.attention(self.conv(x)))


def aligned(
    branches: Sequence[nn.Module | None], kernel_size: Size, padding: Size | None
) -> list[nn.Module]:
    """Return the branches that exist, each reading the middle of the window of a large kernel.

    A smaller kernel then needs less padding than the large one. Below zero it reads a cropped
    input, and in an even window one pixel more is cropped on one side than on the other.

    Args:
        branches: each has at most one convolution; without any it is pointwise. Changed.
        kernel_size: of the window, pixels.
        padding: of the window, pixels; None for `(kernel_size - 1) // 2`.
    """
    sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    paddings = tuple((size - 1) // 2 for size in sizes) if padding is None else padding
    paddings = (paddings, paddings) if isinstance(paddings, int) else paddings
    return [_align(branch, sizes, paddings) for branch in branches if branch is not None]


def _align(branch: nn.Module, sizes: tuple[int, int], paddings: tuple[int, ...]) -> nn.Module:
    conv = next((m for m in branch.modules() if isinstance(m, nn.Conv2d)), None)
    sides: list[int] = []  # left, right, top, bottom
    for axis in (1, 0):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv else 0
        spare = sizes[axis] - 1 - reach
        sides += [paddings[axis] - spare // 2, paddings[axis] - spare + spare // 2]
    left, right, top, bottom = sides
    if conv is not None:
        plain = left == right >= 0 and top == bottom >= 0
        conv.padding = (top, left) if plain else (0, 0)
        sides = [] if plain else sides
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), branch) if any(sides) else branch
