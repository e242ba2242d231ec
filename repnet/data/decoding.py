"""`decode`: the contents of an image file as RGB pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torchvision  # registers torch.ops.image
from PIL import Image
from torch import Tensor

from repnet.images import LEAST, MAX_PIXELS, open_rgb

_RGB = 3  # torchvision.io.ImageReadMode.RGB


def decode(contents: bytes, *, decode_at: int | None = None) -> Tensor:
    """Return the pixels, uint8 `(3, height, width)`, of an image file of any kind.

    Args:
        contents: of the file.
        decode_at: as in `open_rgb`, and so is what becomes of other modes than RGB.

    Raises:
        ValueError: this is no image, not a whole one, or one of more than `MAX_PIXELS`.
    """
    if _decode_jpeg is not None and contents[:2] == b"\xff\xd8":
        with suppress(Exception):  # what it cannot read, PIL may, or say why not
            width, height = _size(contents)
            enough = decode_at is not None and min(width, height) >= LEAST * decode_at
            if width * height <= MAX_PIXELS and not enough:
                return _decode_jpeg(torch.frombuffer(bytearray(contents), dtype=torch.uint8))
    return _pixels(open_rgb(contents, decode_at=decode_at))


def _size(contents: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(contents)) as image:
        return image.size


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _torchvision_decoder() -> Callable[[Tensor], Tensor] | None:
    """Return torchvision's JPEG decoder, which takes two thirds of PIL's time for the same pixels.

    By its operator, as the function of the same name warns since 0.29 that it will be removed;
    None where it has been.
    """
    assert torchvision.__version__
    try:
        operator = torch.ops.image.decode_jpeg
    except AttributeError:
        return None
    return lambda data: operator(data, _RGB, False)


_decode_jpeg = _torchvision_decoder()
