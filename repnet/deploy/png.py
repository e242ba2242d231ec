"""Small pictures as text that a page can hold: PNG in `data:` addresses."""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from typing import Any

import numpy

PREFIX = "data:image/png;base64,"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Dark to light with growing lightness, told apart by color-blind people and in gray (viridis).
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def encode(pixels: numpy.ndarray, *, largest: int | None = None) -> str:
    """Return a picture as the address of an image.

    Args:
        pixels: uint8 `(height, width)`, `(height, width, 1)`, `(height, width, 3)`, or with a
            fourth channel of opacity.
        largest: side of the picture, pixels; a larger one is made smaller. None for as it is.
    """
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if largest is not None:
        image.thumbnail((largest, largest))
    image.save(buffer, "PNG", optimize=True)
    return PREFIX + base64.b64encode(buffer.getvalue()).decode("ascii")


def size(address: Any) -> tuple[int, int] | None:
    """Return `(width, height)` of a PNG in a `data:` address, None for anything else.

    What this accepts consists of base64 after `PREFIX` and begins as a PNG does, so that nothing
    else can hide in it.
    """
    if not isinstance(address, str) or not address.startswith(PREFIX):
        return None
    text = address.removeprefix(PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text):
        return None
    try:
        head = base64.b64decode(text[:32])
    except binascii.Error:
        return None
    if len(head) < 24 or not head.startswith(_SIGNATURE) or head[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", head[16:24])
    return (width, height) if width and height else None


def ramp(values: numpy.ndarray) -> numpy.ndarray:
    """Return the colors of values in 0 ... 1, uint8 with a last axis of red, green and blue."""
    places = numpy.linspace(0, 1, len(_RAMP))
    channels = [numpy.interp(values, places, channel) for channel in zip(*_RAMP, strict=True)]
    return numpy.stack(channels, -1).round().astype(numpy.uint8)
