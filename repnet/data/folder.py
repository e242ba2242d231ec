"""Images in folders, one for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import v2

from repnet.data.base import Augment, ImageDataModule, Splits
from repnet.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFolder(ImageDataModule):
    """`ROOT/train/CLASS/IMAGE`, `ROOT/val/CLASS/IMAGE` and, if there is one, `ROOT/test/...`.

    Without a test folder the validation images are the test images, as is usual for ImageNet.
    Evaluation resizes the shorter side and crops the center.

    Args:
        root: directory with the split folders.
        image_size: pixels, height and width of what the network sees.
        resize: pixels of the shorter side before the center crop; None for `image_size / 0.875`.
        mean: per channel, of images scaled to 0 ... 1.
        std: per channel.
        augment: transforms of a training image, uint8 `(3, height, width)` of any size, which must
            return `image_size`; None for a random resized crop and a flip.
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        root: str,
        *,
        image_size: int = 224,
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augment: Sequence[Augment] | None = None,
        **options: Any,
    ) -> None:
        if augment is None:
            augment = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        super().__init__(mean=mean, std=std, augment=augment, **options)
        self.root = Path(root)
        self.resize = resize or round(image_size / 0.875)
        self.input_shape = (3, image_size, image_size)

    def load(self) -> Splits:
        train = self._open("train", self.augment)
        self.class_names = list(train.classes)
        size = self.input_shape[1]
        evaluation: list[Any] = [v2.Resize(self.resize, antialias=True), v2.CenterCrop(size)]
        val = self._open("val", evaluation)
        test = self._open("test", evaluation) if (self.root / "test").is_dir() else val
        return train, val, test

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"resize": self.resize}

    def _open(self, split: str, transforms: Sequence[Any]) -> torchvision.datasets.ImageFolder:
        folder = self.root / split
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        try:
            dataset = torchvision.datasets.ImageFolder(
                str(folder),
                transform=v2.Compose([v2.ToImage(), *transforms, *finish]),
                loader=_read_image,
            )
        except FileNotFoundError as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"data.root='{self.root}' must hold {split}/CLASS/IMAGE: {reason}"
            ) from error
        if split != "train" and dataset.classes != self.class_names:
            different = sorted(set(dataset.classes) ^ set(self.class_names))
            raise InputError(
                f"'{folder}' has other classes than '{self.root / 'train'}': {', '.join(different)}"
            )
        return dataset


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"cannot read the image '{path}' ({error}); replace or remove it"
        ) from error
