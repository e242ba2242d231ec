"""`Preprocessed`: the arithmetic of the data modules, as a network and as exported files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repnet.data import FakeImages, ImageFolder
from repnet.data.base import TensorImages
from repnet.data.encoded import IMAGENET_MEAN, IMAGENET_STD
from repnet.deploy.formats import format_named
from repnet.deploy.preprocess import Preprocessed, preprocessed
from repnet.errors import InputError

SIZES = [(375, 500), (500, 333), (80, 100), (256, 256), (231, 257), (64, 900), (721, 1081)]
STEP = 1 / (255 * min(IMAGENET_STD))  # of a pixel, in normalized images
# What a precision does to a normalized pixel, and how many pixels may be a step away.
ROUNDING = {"fp32": (1e-6, 1e-3), "fp16": (2e-3, 1e-3), "bf16": (1.5e-2, 0.2)}


def photograph(height: int, width: int) -> Tensor:
    """Return smooth shapes with noise and saturated parts, uint8 `(3, height, width)`."""
    y, x = torch.linspace(0, 9, height)[:, None], torch.linspace(0, 9, width)
    colors = torch.tensor([[[1.0]], [[1.3]], [[0.7]]])
    shapes = (torch.sin(3 * x * colors) + torch.cos(2 * y + x)) * 80 + 128
    return (shapes + 40 * torch.randn(3, height, width)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_the_same_to_the_last_bit(channels: int) -> None:
    images = torch.randint(0, 256, (16, channels, 8, 8), dtype=torch.uint8)
    mean, std = [0.1307, 0.4, 0.7][:channels], [0.3081, 0.2, 0.9][:channels]
    expected, _ = TensorImages(images, torch.zeros(16), mean=mean, std=std).__getitems__(
        [*range(16)]
    )
    model = Preprocessed(nn.Identity(), mean=mean, std=std, size=(8, 8))
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (74, 63), (224, 224)])
def test_photographs_are_the_same_but_for_rounding(
    size: tuple[int, int], resize: int, crop: int
) -> None:
    image = photograph(*size)
    data = ImageFolder("unused", image_size=crop, resize=resize)
    expected = data.reading(train=False)["transform"](image)
    model = Preprocessed(nn.Identity(), **data_options(data))
    difference = (model(image[None])[0] - expected).abs()
    assert difference.max() <= STEP * 1.01
    assert (difference > STEP / 100).float().mean() < 1e-3


def data_options(data: ImageFolder) -> dict[str, object]:
    size = data.input_shape[1:]
    return {"mean": data.mean, "std": data.std, "size": size, "resize": data.resize}


def test_a_crop_beyond_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="data.resize of at least 224"):
        Preprocessed(nn.Identity(), mean=[0.5], std=[0.5], size=(224, 224), resize=200)


def test_a_split_that_does_not_give_its_pixels_is_refused() -> None:
    data = FakeImages(image_size=8)
    data.setup()
    assert preprocessed(nn.Identity(), data).size == (8, 8)
    assert data.splits is not None
    train, val, test = data.splits
    data.splits = (train, [val[0]], test)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"'list' has no method read\(index\)"):
        preprocessed(nn.Identity(), data)


def pixels(resize: int | None) -> Preprocessed:
    """Return a network whose logits are its pixels."""
    convolution = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(3).reshape(3, 3, 1, 1))
    network = nn.Sequential(convolution, nn.Flatten()).requires_grad_(False).eval()
    return Preprocessed(network, mean=IMAGENET_MEAN, std=IMAGENET_STD, size=(64, 64), resize=resize)


@pytest.mark.parametrize(
    ("name", "stored", "precisions"),
    [
        ("onnx", "fp32", ["fp32"]),
        ("onnx", "fp16", ["fp16"]),
        ("openvino", "fp32", ["fp32", "bf16"]),
        ("openvino", "fp16", ["fp16"]),
    ],
)
def test_files_resize_as_the_network_does(
    name: str, stored: str, precisions: list[str], tmp_path: Path
) -> None:
    format, model = format_named(name), pixels(73)
    path = tmp_path / format.file_name(stored)
    format.export(model, torch.zeros(2, 3, 73, 73, dtype=torch.uint8), path, precision=stored)
    for precision in precisions:
        run = format.load(path, precision=precision)
        rounding, rare = ROUNDING[precision]
        for height, width in SIZES:
            images = torch.stack([photograph(height, width), photograph(height, width)])
            for batch in (images, images[:1]):
                difference = (run(batch) - model(batch)).abs()
                assert difference.max() < STEP * 1.01 + rounding
                assert (difference > rounding).float().mean() < rare


def test_files_normalize_as_the_network_does(tmp_path: Path) -> None:
    format, model = format_named("openvino"), pixels(None)  # made from that of ONNX
    path = tmp_path / format.file_name()
    format.export(model, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), path)
    run = format.load(path)
    for batch in (1, 3):
        images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
        torch.testing.assert_close(run(images), model(images), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError):
        run(torch.zeros(1, 3, 64, 64))
