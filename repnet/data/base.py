"""`ImageDataModule`, what all data sets share, and `TensorImages`, images held in memory."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repnet.data.batch_augment import BatchTransform
from repnet.data.sampling import EpochLoader, EvaluationBatches, SeededDataset, TrainBatches
from repnet.errors import InputError
from repnet.lightning import EitherLightning

Augment = Callable[[Tensor], Tensor]
Splits = tuple[Dataset[Any], Dataset[Any], Dataset[Any]]


class ImageDataModule(EitherLightning, LightningDataModule, ABC):
    """Three splits of labelled images, each with its loader.

    A subclass implements `load`. After `setup`, `class_names` and `input_shape` are known. Each
    process gets its share of the images: pass `use_distributed_sampler=False` to the Trainer.

    Args:
        mean: per channel, of images scaled to 0 ... 1.
        std: per channel.
        batch_size: images of one step on one device.
        num_workers: processes that load; 0 loads in the training process, which is the fastest for
            images in memory.
        augment: v2 transforms, applied in order to each training image, uint8 `(channels, height,
            width)`; a `BatchTransform` is given whole batches of images in memory.
        on_device: keep images in memory on the training device, and augment there.
        balanced: draw the training images of each class equally often; those of a rare class come
            several times in an epoch, of a frequent one some are left for the next.
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
        augment: Sequence[Augment] | None = (),
        on_device: bool = False,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.balanced = balanced
        self.on_device = on_device
        self.mean, self.std = list(mean), list(std)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = list(augment or ())
        self.splits: Splits | None = None
        self.notes: list[str] = []  # what one should know of the splits

    @abstractmethod
    def load(self) -> Splits:
        """Return the train, validation and test split, and set `class_names` and `input_shape`."""

    def setup(self, stage: str | None = None) -> None:
        if self.splits is None:
            if self.on_device and self.num_workers > 0:
                raise InputError(
                    f"data.on_device=true needs data.num_workers=0, not {self.num_workers}: "
                    "nothing is left to load"
                )
            splits = self.load()
            if self.on_device and not all(isinstance(split, TensorImages) for split in splits):
                raise InputError(
                    f"data.on_device=true is for images in memory; {type(self).__name__} reads its "
                    "images one by one"
                )
            self.splits = splits
            if splits[1] is splits[2]:
                self.notes.append(
                    "the test images are the validation images, which choose the best checkpoint: "
                    "its accuracy comes out too high"
                )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def class_counts(self) -> list[int]:
        """Return the number of training images of each class."""
        labels: Tensor = self._split(0).labels
        return labels.bincount(minlength=self.num_classes).tolist()

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint tells of the data: input shape, normalization, class names."""
        return {
            "input_shape": list(self.input_shape),
            "mean": self.mean,
            "std": self.std,
            "class_names": self.class_names,
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process; its order follows torch's seed and the epoch.

        Raises:
            InputError: the batches of one step hold more images than the split.
        """
        split = self._split(0)
        batches = TrainBatches(
            len(split),
            self.batch_size,
            seed=torch.initial_seed(),
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            labels=split.labels if self.balanced else None,
            **self._share(),
        )
        return self._loader(split, batches, train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_dataloader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_dataloader(2)

    def evaluation_dataloader(self, split: int) -> DataLoader[Any]:
        """Return a loader without augmentation, in order: 1 for validation, 2 for test."""
        images = self._split(split)
        return self._loader(
            images, EvaluationBatches(len(images), self.batch_size, **self._share())
        )

    def calibration(self, count: int, seed: int = 0) -> tuple[Tensor, list[int]]:
        """Return training images as evaluation would see them, for statistics of activations.

        Args:
            count: of images; all where there are fewer.
            seed: of the choice.

        Returns:
            Float images `(count, channels, height, width)`, and their indices in the split.
        """
        loader, indices = self.sample(count, seed)
        return torch.cat([images for images, _ in loader]), indices

    def sample(self, count: int, seed: int = 0) -> tuple[DataLoader[Any], list[int]]:
        """Return a loader of the same images, and their indices."""
        split = self.unaugmented(self._split(0))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(split), generator=generator).tolist()
        indices = list(islice((i for i in order if self._readable(split, i)), count))
        size = self.batch_size
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        return self._loader(split, batches), indices

    def corrupt_images(self, split: int | None = None) -> list[str]:
        """Return the names of the images that were skipped so far because they cannot be read.

        Args:
            split: 0 training, 1 validation, 2 test; None for all.
        """
        return []

    def _readable(self, split: Any, index: int) -> bool:
        """Return whether an image is one that `skip_corrupt` would not skip."""
        return True

    def unaugmented(self, split: Any) -> Any:
        """Return a split with the images of evaluation."""
        plain = copy.copy(split)
        plain.augment = ()
        return plain

    def _share(self) -> dict[str, int]:
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _split(self, index: int) -> Any:
        self.setup()
        assert self.splits is not None
        return self.splits[index]

    def _collate(self, split: Any) -> Any:
        return _keep if isinstance(split, TensorImages) else None

    def _loader(self, split: Any, batches: Any, *, train: bool = False) -> DataLoader[Any]:
        if self.on_device and self.trainer is not None:
            split = split.to(self.trainer.strategy.root_device)
        return (EpochLoader if train else DataLoader)(
            SeededDataset(split) if train else split,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available() and not self.on_device,
            collate_fn=self._collate(split),
            generator=torch.Generator(),  # else each start would draw from the global one
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

    def read(self, index: int) -> Tensor:
        """Return the image as it is stored, uint8 `(channels, height, width)`."""
        return self.images[index]

    def to(self, device: torch.device) -> TensorImages:
        """Return the same images on a device.

        Raises:
            InputError: an augmentation takes images one by one, which would be slow there.
        """
        for transform in self.augment:
            if not isinstance(transform, BatchTransform):
                raise InputError(
                    f"data.on_device=true needs augmentations of whole batches, as in "
                    f"repnet.data.batch_augment; {type(transform).__name__} takes one image"
                )
        moved = copy.copy(self)
        for name in ("images", "labels", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return float images `(batch, channels, height, width)` and labels `(batch,)`."""
        images = self.images[indices]
        for transform in self.augment:
            if isinstance(transform, BatchTransform):
                images = transform(images)
            else:
                images = torch.stack([transform(image) for image in images])
        return (images.float() / 255 - self.mean) / self.std, self.labels[indices]


def split_indices(n: int, held_out: int) -> tuple[list[int], list[int]]:
    """Return the indices of a fixed random split, the same in every run: `(rest, held out)`."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(n, generator=generator).tolist()
    return order[held_out:], order[:held_out]


def stratified_split(labels: Tensor, share: float) -> tuple[list[int], list[int]]:
    """Return the indices of a fixed random split of each class: `(rest, held out)`, both in order.

    Of a class with two images or more at least one is held out, and one is not.

    Args:
        labels: int64 `(n,)`.
        share: of the images of each class that is held out, in (0, 1).
    """
    generator = torch.Generator().manual_seed(0)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        size = min(max(1, round(share * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:size]]] = True
    return (~held_out).nonzero().flatten().tolist(), held_out.nonzero().flatten().tolist()


def _keep(batch: Any) -> Any:
    return batch
