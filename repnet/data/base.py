"""`ImageDataModule`, what all data sets share, and `TensorImages`, images held in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Augment = Callable[[Tensor], Tensor]
Splits = tuple[Dataset[Any], Dataset[Any], Dataset[Any]]


class ImageDataModule(LightningDataModule, ABC):
    """Three splits of labelled images, each with its loader.

    A subclass implements `load`. After `setup`, `class_names` and `input_shape` are known.

    Args:
        mean: per channel, of images scaled to 0 ... 1.
        std: per channel.
        batch_size: images of one step on one device.
        num_workers: processes that load; 0 loads in the training process, which is the fastest for
            images in memory.
        augment: v2 transforms, applied in order to each training image, uint8 `(channels, height,
            width)`.
    """

    class_names: list[str]
    input_shape: tuple[int, int, int]  # channels, height, width

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 64,
        num_workers: int = 0,
        augment: Sequence[Augment] = (),
    ) -> None:
        super().__init__()
        self.mean, self.std = list(mean), list(std)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = list(augment)
        self.splits: Splits | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Return the train, validation and test split, and set `class_names` and `input_shape`."""

    def setup(self, stage: str | None = None) -> None:
        if self.splits is None:
            self.splits = self.load()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint tells of the data: input shape, normalization, class names."""
        return {
            "input_shape": list(self.input_shape),
            "mean": self.mean,
            "std": self.std,
            "class_names": self.class_names,
        }

    def train_dataloader(self) -> DataLoader[Any]:
        split = self._split(0)
        # A last batch of one image has no variance for batch norm.
        return self._loader(split, shuffle=True, drop_last=len(split) > self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._split(1))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._split(2))

    def _split(self, index: int) -> Any:
        self.setup()
        assert self.splits is not None
        return self.splits[index]

    def _loader(self, split: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            split,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_keep if isinstance(split, TensorImages) else None,
            **options,
        )


class TensorImages(Dataset[Any]):
    """Images in memory, handed out as whole batches, scaled and normalized at once.

    Args:
        images: uint8 `(n, channels, height, width)`.
        labels: int64 `(n,)`.
        mean: per channel, of images scaled to 0 ... 1.
        std: per channel.
        augment: applied in order to each image; none for evaluation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[Augment] = (),
    ) -> None:
        self.images, self.labels = images, labels.long()
        self.mean = torch.tensor(mean).reshape(-1, 1, 1)
        self.std = torch.tensor(std).reshape(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return float images `(batch, channels, height, width)` and labels `(batch,)`."""
        images = self.images[indices]
        if self.augment:
            augmented = list(images)
            for transform in self.augment:
                augmented = [transform(image) for image in augmented]
            images = torch.stack(augmented)
        return (images.float() / 255 - self.mean) / self.std, self.labels[indices]


def split_indices(n: int, held_out: int) -> tuple[list[int], list[int]]:
    """Return the indices of a fixed random split, the same in every run: `(rest, held out)`."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(n, generator=generator).tolist()
    return order[held_out:], order[:held_out]


def _keep(batch: Any) -> Any:
    return batch
