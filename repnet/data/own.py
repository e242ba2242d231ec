"""`OwnData`: any LightningDataModule in the place of one of repnet's."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from repnet.data.base import ImageDataModule, Splits
from repnet.errors import InputError

HOOKS = ("train_dataloader", "val_dataloader", "test_dataloader")


class OwnData(ImageDataModule):
    """The images of someone's own LightningDataModule, of `pytorch_lightning` or `lightning`.

    Calls `prepare_data`, `setup("fit")`, `setup("test")` and the three loader hooks, and takes data
    set, batch size, collation and workers out of the loaders. Each process of a training calls
    `prepare_data`, one after the other on each machine, so that the first one downloads. Shuffled
    training batches are drawn as those of every data set of repnet, so that a run can be resumed
    within an epoch and shared among devices. A training loader with another sampler is used as it
    is, on one device.

    Args:
        module: its loaders yield float images `(batch, channels, height, width)` and int64 labels
            `(batch,)`. It or its training data set has `class_names` or `classes`, or it has
            `num_classes`. If it has `mean` and `std`, per channel, of images scaled to 0 ... 1,
            deploy models know how to prepare images.

    Raises:
        InputError: the module lacks a loader, or yields something else.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        channels = getattr(module, "mean", None), getattr(module, "std", None)
        super().__init__(mean=channels[0] or [], std=channels[1] or [])
        self.normalized = None not in channels

    def load(self) -> Splits:
        with _preparing(type(self.module)):
            self.module.prepare_data()
        for stage in ("fit", "test"):
            self.module.setup(stage)
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            if not _from_lightning(getattr(type(self.module), hook)):
                raise self._error(
                    f"changes batches in {hook}, which a deployed model would not see; do that in "
                    "the data set"
                )
        self.loaders = [self._loader_of(hook) for hook in HOOKS]
        train, val, test = (loader.dataset for loader in self.loaders)
        self.batch_size = self.loaders[0].batch_size or len(self._batch(0)[1])
        self.num_workers = self.loaders[0].num_workers
        images = [self._batch(index)[0] for index in range(3)]
        self.input_shape = tuple(images[1].shape[1:])  # type: ignore[assignment]
        self.class_names = self._class_names(train)
        if not self.normalized:  # in pictures only: `describe` does not claim it
            self.mean, self.std = [0.0] * len(images[1][0]), [1.0] * len(images[1][0])
        return train, val, test

    def describe(self) -> dict[str, Any]:
        known = super().describe()
        left_out = () if self.normalized else ("mean", "std")
        return {key: value for key, value in known.items() if key not in left_out}

    def train_dataloader(self) -> DataLoader[Any]:
        self.setup()
        loader = self.loaders[0]
        if type(loader.sampler) is RandomSampler and loader.batch_size:
            return super().train_dataloader()
        if self.trainer is not None and self.trainer.world_size > 1:
            raise self._error(
                f"trains with a {type(loader.sampler).__name__}, which cannot be shared among "
                f"{self.trainer.world_size} devices; use shuffle=True, or one device"
            )
        return loader

    def unaugmented(self, split: Any) -> Any:
        return split  # nobody knows what its transforms are

    def _collate(self, split: Any) -> Any:
        return next(loader.collate_fn for loader in self.loaders if loader.dataset is split)

    def _loader_of(self, hook: str) -> DataLoader[Any]:
        if _from_lightning(getattr(type(self.module), hook)):
            raise self._error(f"has no {hook}; training, validation and test data are needed")
        loader = getattr(self.module, hook)()
        dataset = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
            raise self._error(
                f"returns {type(loader).__name__} of {type(dataset).__name__} from {hook}; one "
                "DataLoader of a data set with indices and a length is needed"
            )
        return loader

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the first sample of a split as a batch.

        Raises:
            InputError: it is not a batch of images and labels.
        """
        loader = self.loaders[index]
        batch: Any = loader.collate_fn([loader.dataset[0]])
        parts = list(batch) if isinstance(batch, list | tuple) else []
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if len(parts) == len(tensors) == 2:
            images, labels = tensors
            if images.is_floating_point() and images.ndim == 4 and labels.dtype == torch.int64:
                return images, labels
        found = ", ".join(
            f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
            if isinstance(part, Tensor)
            else type(part).__name__
            for part in parts or [batch]
        )
        raise self._error(
            f"yields ({found}) from {HOOKS[index]}; float images (batch, channels, height, width) "
            "and int64 labels (batch,) are needed"
        )

    def _class_names(self, train: Any) -> list[str]:
        while hasattr(train, "dataset"):  # a Subset
            train = train.dataset
        for holder in (self.module, train):
            for name in ("class_names", "classes"):
                if names := getattr(holder, name, None):
                    return [str(each) for each in names]
        if count := getattr(self.module, "num_classes", None):
            return [str(index) for index in range(count)]
        raise self._error("does not say its classes; give it the attribute class_names")

    def _error(self, reason: str) -> InputError:
        return InputError(f"{type(self.module).__qualname__} {reason}")


def _preparing(kind: type) -> FileLock:
    """Return the lock that only one process of a machine and a user holds at a time."""
    user = getattr(os, "getuid", int)()  # Windows has a directory for each user
    name = re.sub(r"\W", "_", f"{kind.__module__}.{kind.__qualname__}")
    return FileLock(Path(tempfile.gettempdir()) / f"repnet-{user}-{name[-100:]}.lock")


def as_image_data(data: Any) -> ImageDataModule:
    """Return a data module of repnet, or one of someone's own as `OwnData`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(data, ImageDataModule):
        return data
    if any(_from_lightning(cls) for cls in type(data).__mro__) and hasattr(data, HOOKS[0]):
        return OwnData(data)
    raise InputError(
        f"data does not describe a data set: {type(data).__name__} is no LightningDataModule"
    )


def _from_lightning(member: Any) -> bool:
    return member.__module__.partition(".")[0] in ("pytorch_lightning", "lightning")
