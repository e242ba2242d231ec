"""Random images, for trying out sizes and speeds."""

from __future__ import annotations

from typing import Any

import torch

from repnet.data.base import ImageDataModule, Splits, TensorImages


class FakeImages(ImageDataModule):
    """Random pixels and labels of any size, the same in every run; nothing can be learned.

    Args:
        image_size: pixels, height and width.
        channels: of an image.
        classes: number of labels.
        train_size: images to train with; validation and test have a fifth each.
        **options: of `ImageDataModule`, except mean and std.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 3,
        classes: int = 10,
        train_size: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(mean=[0.5] * channels, std=[0.25] * channels, **options)
        self.input_shape = (channels, image_size, image_size)
        self.class_names = [str(index) for index in range(classes)]
        self.train_size = train_size

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)

        def split(n: int, augment: Any = ()) -> TensorImages:
            size = (n, *self.input_shape)
            images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
            labels = torch.randint(self.num_classes, (n,), generator=generator)
            return TensorImages(images, labels, mean=self.mean, std=self.std, augment=augment)

        part = max(1, self.train_size // 5)
        return split(self.train_size, self.augment), split(part), split(part)
