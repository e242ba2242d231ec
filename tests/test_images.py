"""`repnet.images`: resizing without torch."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from repnet.images import open_rgb, resize

SIZES = [(17, 23), (64, 64), (97, 300), (300, 97), (211, 8), (9, 40)]


def noise(channels: int, height: int, width: int) -> np.ndarray:
    """Return noise, half of it black and white, which shows every rounding."""
    pixels = np.random.default_rng(height).integers(0, 256, (channels, height, width), np.uint8)
    pixels[:, ::2] = np.where(pixels[:, ::2] > 127, 255, 0)
    return pixels


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("wanted", [(32, 32), (17, 23), (8, 301), (150, 97)], ids=str)
def test_resizing_is_that_of_torchvision(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    pixels = noise(3, *size)
    expected = functional.resize(torch.from_numpy(pixels), list(wanted), antialias=True)
    assert np.array_equal(resize(pixels, *wanted), expected)
    assert np.array_equal(resize(pixels[:1], *wanted), expected[:1])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop", [(32, 32), (31, 40), (50, 33), (5, 6), (37, 44)], ids=str)
def test_only_the_center_is_computed(size: tuple[int, int], crop: tuple[int, int]) -> None:
    pixels = noise(1, *size)
    expected = functional.resize(torch.from_numpy(pixels), [36, 41], antialias=True)
    found = resize(pixels, 36, 41, crop=crop)
    assert np.array_equal(found, functional.center_crop(expected, list(crop)))


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((800, 800), (100, 100)), ((400, 200), (100, 50)), ((800, 199), (800, 199))],
    ids=str,
)
def test_a_jpeg_is_decoded_at_the_size_that_its_shorter_side_needs(
    size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", size, (90, 60, 30)).save(file, "JPEG")
    assert open_rgb(file.getvalue(), decode_at=50).size == decoded
    assert open_rgb(file.getvalue()).size == size
