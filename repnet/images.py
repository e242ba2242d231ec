"""Image files as RGB pixels, and resizing as torchvision does it, without torch."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")

MAX_PIXELS = 89_478_485  # from here on, PIL warns of an image: 270 MB when decoded
LEAST = 4  # 1600 x 1200 with resizing: 23 ms instead of 34; 1024 x 768 at half: the same time
_STEP = 16  # pixels of a row of the result that are computed at once


def open_rgb(
    contents: bytes, *, decode_at: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Return an image file of any kind, in mode RGB.

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
    try:
        with Image.open(io.BytesIO(contents), formats=formats) as image:
            if decode_at is not None and min(image.size) >= LEAST * decode_at:  # of JPEG only
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
            if image.mode == "RGB":
                image.load()
                return image  # a conversion would copy it
            return image.convert("RGB")
    except UnidentifiedImageError:
        reason = "it is empty" if not contents else "it is no image, or of an unknown format"
        raise ValueError(reason) from None
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # decoders of damaged files fail in every way that there is
        raise ValueError(str(error) or type(error).__name__) from error


def resize(
    pixels: np.ndarray, height: int, width: int, *, crop: tuple[int, int] | None = None
) -> np.ndarray:
    """Return uint8 `(channels, height, width)` in another size.

    This is torchvision's antialiased bilinear resizing of uint8 tensors, to the last bit: weights
    are rounded to 16 bits, and pixels after the horizontal and after the vertical pass.

    Args:
        pixels: uint8 `(channels, height, width)`.
        height: of the result.
        width: of the result.
        crop: height and width of the center that is kept; black borders are added where it is
            larger. The rest is not computed.
    """
    rows, columns = crop or (height, width)
    pixels = _resize_axis(pixels, 2, width, columns)
    return _resize_axis(pixels, 1, height, rows)


def _resize_axis(pixels: np.ndarray, axis: int, length: int, kept: int) -> np.ndarray:
    if kept > length:  # as torchvision: half of the border, rounded down, comes first
        border = [(0, 0)] * 3
        border[axis] = ((kept - length) // 2, kept - length - (kept - length) // 2)
        return np.pad(_resize_axis(pixels, axis, length, length), border)
    old, start = pixels.shape[axis], round((length - kept) / 2)
    if old == length:
        return np.take(pixels, np.arange(start, start + kept), axis)
    # The first pixel, cropped or not, comes along in front: its weights are the largest of all.
    targets = np.r_[0, start : start + kept]
    centers = (targets + 0.5) * (old / length)
    support = max(old / length, 1.0)
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), old)
    sources = first[:, None] + np.arange((last - first).max())  # (targets, taps)
    weights = np.maximum(1 - np.abs(sources - centers[:, None] + 0.5) / support, 0)
    weights[sources >= last[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    # As many bits as leave the largest weight below 2^15.
    bits = next((b for b in range(22) if int(0.5 + weights.max() * 2 ** (b + 1)) >= 2**15), 22)
    whole = np.floor(weights[1:] * 2**bits + 0.5)
    sources = sources[1:]
    shape = list(pixels.shape)
    shape[axis] = kept
    resized = np.empty(shape, np.uint8)
    # Products with the few pixels at a time whose weights are not zero; float64 holds all sums.
    step = _STEP if support < _STEP**2 else 1
    for at in range(0, kept, step):
        part, weight = sources[at : at + step], whole[at : at + step]
        low, high = part[0, 0], min(part[-1, -1] + 1, old)
        matrix = np.zeros((high - low, len(part)))
        places = np.minimum(part, high - 1) - low, np.arange(len(part))[:, None]
        np.add.at(matrix, places, weight / 2**bits)
        if axis == 2:
            sums = pixels[:, :, low:high].astype(np.float64) @ matrix
            resized[:, :, at : at + step] = np.floor(sums + 0.5)
        else:
            sums = matrix.T @ pixels[:, low:high].astype(np.float64)
            resized[:, at : at + step] = np.floor(sums + 0.5)
    return resized
