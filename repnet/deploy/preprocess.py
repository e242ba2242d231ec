"""`Preprocessed`: resizing, cropping and normalizing as part of the network that is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repnet.errors import InputError

if TYPE_CHECKING:
    from repnet.data import ImageDataModule


class Preprocessed(nn.Module):
    """A network of uint8 images, with the arithmetic of the data that it was evaluated on.

    Without `resize` that of `TensorImages`. With it that of `EncodedDataModule`: the shorter side
    to `resize`, the longer in proportion, the center, rounded to whole numbers as torchvision does
    with uint8: after the horizontal and after the vertical pass, with weights of 16 bits. Resizing
    is written as two matrix products, whose matrices are computed from the size of the image. So it
    needs none of the antialiasing operators, which formats lack or define in their own ways.

    Args:
        model: of float images `(batch, channels, *size)`.
        mean: per channel, of images scaled to 0 ... 1.
        std: per channel.
        size: height and width that the model sees, pixels.
        resize: pixels of the shorter side before the center crop; None where images have `size`.

    Raises:
        InputError: `resize` is less than `size`, where torchvision would add black borders.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int],
        resize: int | None = None,
    ) -> None:
        super().__init__()
        if resize is not None and resize < max(size):
            raise InputError(
                f"preprocessing cannot resize the shorter side to {resize} pixels and crop "
                f"{size[0]} x {size[1]}: pass a data.resize of at least {max(size)}"
            )
        self.model = model
        self.size = size
        self.resize = resize
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """Return what the model returns for uint8 images `(batch, channels, height, width)`."""
        return self.model(self.preprocess(images))

    def preprocess(self, images: Tensor) -> Tensor:
        """Return float32 images `(batch, channels, *size)`, normalized."""
        if self.resize is None:
            return (images.float() / 255 - self.mean) / self.std
        height, width = images.shape[2:]
        rows = _resizing(height, width, self.resize, self.size[0], images.device)
        columns = _resizing(width, height, self.resize, self.size[1], images.device)
        wide = _whole(images.float() @ columns.mT)  # (batch, channels, height, size[1])
        return (_whole(rows @ wide) - 255 * self.mean) * (1 / (255 * self.std))


def preprocessed(model: nn.Module, data: ImageDataModule) -> Preprocessed:
    """Return a network that prepares images as a data set does for evaluation.

    Raises:
        InputError: the data set's rule cannot be part of a network, or it does not give its images
            as they are stored.
    """
    assert data.splits is not None
    for split in data.splits:
        if not hasattr(split, "read"):
            raise InputError(
                f"export.preprocess=true needs the images as they are stored; the split "
                f"'{type(split).__name__}' has no method read(index) that returns them"
            )
    height, width = data.input_shape[1:]
    resize = getattr(data, "resize", None)
    return Preprocessed(model, mean=data.mean, std=data.std, size=(height, width), resize=resize)


def _resizing(length: int, other: int, resize: int, size: int, device: torch.device) -> Tensor:
    """Return the matrix `(size, length)` that resizes one axis and crops its center.

    Args:
        length: of the axis.
        other: length of the other axis.
        resize: pixels of the shorter one afterwards.
        size: pixels of this one after the crop.
        device: of the image.
    """
    # Tensors, since an export would take a branch on Python numbers for good.
    old = torch.full((), length, device=device)
    resized = _quotient(resize * old, torch.minimum(old, torch.full_like(old, other)))
    excess = resized - size
    # Half of it, rounded to the even number, as Python's `round` does in torchvision.
    start = _quotient(excess + _quotient(excess, 2) % 2, 2)
    # The first pixel, cropped or not, comes along in front: its weights are the largest of all.
    steps = torch.arange(size + 1, device=device)
    targets = torch.where(steps > 0, start + steps - 1, 0)[:, None]
    pixels = torch.arange(length, device=device)
    # The distance between two centers is less than the support. Whole numbers so far.
    distance = (2 * pixels + 1) * resized - (2 * targets + 1) * old
    share = (2 * torch.maximum(old, resized) - distance.abs()).clamp(min=0)
    # A power, as what OpenVINO makes of a division is not kept from bfloat16.
    inverse = share.sum(1, keepdim=True).float() ** -1.0
    share = share.float()
    # As many bits as leave the largest weight below 2^15. All constants are exact in float16.
    powers = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], device=device)
    largest = (share * inverse).amax((0, 1)) * 2**15
    unit = 2**14 * torch.where(largest * powers + 0.5 < 2**15, 2 * powers, 1).amax(0)
    return (share[1:] * unit * inverse[1:] + 0.5).floor() / unit


def _quotient(numbers: Tensor, divisor: Tensor | int) -> Tensor:
    """Return whole quotients; "floor" instead of "trunc" would be exported as float arithmetic."""
    return torch.div(numbers, divisor, rounding_mode="trunc")


def _whole(values: Tensor) -> Tensor:
    """Return values rounded as fixed-point arithmetic does, within those of a pixel."""
    return (values + 0.5).floor().clamp(0, 255)
