"""The handwritten digits that scikit-learn ships."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from repnet.data.base import ImageDataModule, Splits, TensorImages


class Digits(ImageDataModule):
    """1,797 real digits of 8 x 8 pixels: 1,257 to train, 180 to validate, 360 to test.

    The split is fixed and stratified; there is nothing to download.

    Args:
        **options: of `ImageDataModule`, except mean and std.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(mean=[0.3053], std=[0.3763], **options)

    def load(self) -> Splits:
        digits = load_digits()
        images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target)
        rest, test = train_test_split(
            range(len(labels)), test_size=360, stratify=labels, random_state=0
        )
        train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
        self.class_names = [str(name) for name in digits.target_names]
        self.input_shape = (1, 8, 8)

        def split(indices: list[int], augment: Any = ()) -> TensorImages:
            return TensorImages(
                images[indices], labels[indices], mean=self.mean, std=self.std, augment=augment
            )

        return split(train, self.augment), split(val), split(test)
