"""`decode`: the contents of an image file as RGB pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
import torchvision  # registers torch.ops.image
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")

MAX_PIXELS = 89_478_485  # from here on, PIL warns of an image: 270 MB when decoded
_LEAST = 4  # 1600 x 1200 with resizing: 23 ms instead of 34; 1024 x 768 at half: the same time
_RGB = 3  # torchvision.io.ImageReadMode.RGB


def decode(
    contents: bytes, *, decode_at: int | None = None, formats: tuple[str, ...] | None = None
) -> Tensor:
    """Return the pixels, uint8 `(3, height, width)`, of an image file of any kind.

    Gray levels are repeated, palettes looked up, transparency is dropped, 16 bits lose the lower 8.
    As in torchvision's data sets, an EXIF orientation is not applied.

    Args:
        contents: of the file.
        decode_at: pixels of the shorter side that are enough: a JPEG of four or eight times that is
            decoded at a quarter or an eighth of its size (half would save nothing); None for all.
        formats: of PIL that may be tried; None for all.

    Raises:
        ValueError: this is no image, not a whole one, or one of more than `MAX_PIXELS`.
    """
    wanted = formats is None or "JPEG" in formats
    if wanted and _decode_jpeg is not None and contents[:2] == b"\xff\xd8":
        with suppress(Exception):  # what it cannot read, PIL may, or say why not
            width, height = _size(contents)
            enough = decode_at is not None and min(width, height) >= _LEAST * decode_at
            if width * height <= MAX_PIXELS and not enough:
                return _decode_jpeg(torch.frombuffer(bytearray(contents), dtype=torch.uint8))
    return _pixels(open_rgb(contents, decode_at=decode_at, formats=formats))


def open_rgb(
    contents: bytes, *, decode_at: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Return the same as `decode` for PIL, in mode RGB.

    Raises:
        ValueError: this is no image, not a whole one, or one of more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(contents), formats=formats) as image:
            if decode_at is not None and min(image.size) >= _LEAST * decode_at:  # of JPEG only
                image.draft(None, (decode_at, decode_at))
            width, height = image.size  # of the header; nothing is decoded yet
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"it has {width:,} x {height:,} pixels, at most {MAX_PIXELS:,} are decoded"
                )
            if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits
                raise ValueError("its pixels are 32-bit integers; save it with 8 bits")
            if image.mode.startswith("I"):  # PIL would clip 16 bits at 255
                pixels = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
                return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
            if "transparency" in image.info:  # of a palette: PIL warns of the direct way
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:
        reason = "it is empty" if not contents else "it is no image, or of an unknown format"
        raise ValueError(reason) from None
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # decoders of damaged files fail in every way that there is
        raise ValueError(str(error) or type(error).__name__) from error


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
