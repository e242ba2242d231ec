"""Images that are decoded when they are read: what folders, shards and Hugging Face share."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from repnet.data.base import Augment, ImageDataModule
from repnet.data.decoding import decode
from repnet.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Transform = Callable[[Tensor], Tensor]


class EncodedImages(Dataset[Any], ABC):
    """Labelled images by index. A subclass implements `contents` and `name`.

    Args:
        labels: int64 `(n,)`.
        transform: of an image, uint8 `(3, height, width)`.
        decode_at: as in `decode`.
        skip_corrupt: do without images that cannot be read, and note them in `corrupt`.
        full_batches: read the next image instead of a corrupt one, as training needs; otherwise
            its place in the batch is left out, so that nothing is counted twice, unless the whole
            batch is corrupt.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        transform: Transform,
        decode_at: int | None = None,
        skip_corrupt: bool = False,
        full_batches: bool = False,
    ) -> None:
        self.labels = labels
        self.transform = transform
        self.decode_at = decode_at
        self.skip_corrupt = skip_corrupt
        self.full_batches = full_batches
        self.left_out: list[str] = []  # names of images that are known to be corrupt, not counted
        # Which images were found to be corrupt, also by worker processes.
        self.corrupt = torch.zeros(len(labels) if skip_corrupt else 0, dtype=torch.bool)
        self.corrupt.share_memory_()

    @abstractmethod
    def contents(self, index: int) -> bytes:
        """Return the file of the image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message calls the image."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """Return the image as it is stored, uint8 `(3, height, width)`.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return decode(self.contents(index), decode_at=self.decode_at)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read the image '{self.name(index)}' ({error}); replace or remove it, or "
                "pass data.skip_corrupt=true to do without such images"
            ) from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        if not self.skip_corrupt:
            return self._sample(index, self.read(index))
        for candidate in (*range(index, len(self)), *range(index)):
            if (image := self._try(candidate)) is not None:
                return self._sample(candidate, image)
        raise InputError(
            f"not one of {len(self):,} images can be read, '{self.name(0)}' and others"
        )

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        if not self.skip_corrupt or self.full_batches:
            return [self[index] for index in indices]
        images = [(index, self._try(index)) for index in indices]
        kept = [self._sample(index, image) for index, image in images if image is not None]
        return kept or [self[indices[0]]]  # a batch cannot be empty

    def corrupt_names(self) -> list[str]:
        """Return the names of the images that were skipped so far."""
        return self.left_out + [self.name(int(index)) for index in self.corrupt.nonzero().flatten()]

    def is_readable(self, index: int) -> bool:
        """Return whether the image can be read; needs `skip_corrupt`."""
        return self._try(index) is not None

    def _try(self, index: int) -> Tensor | None:
        if self.corrupt[index]:
            return None
        try:
            return self.read(index)
        except InputError:
            self.corrupt[index] = True
            return None

    def _sample(self, index: int, image: Tensor) -> tuple[Tensor, int]:
        return self.transform(image), int(self.labels[index])


class EncodedDataModule(ImageDataModule):
    """Splits of `EncodedImages`; evaluation resizes the shorter side and crops the center.

    Args:
        image_size: pixels, height and width of what the network sees.
        resize: pixels of the shorter side before the center crop; None for `image_size / 0.875`.
        mean: per channel, of images scaled to 0 ... 1.
        std: per channel.
        augment: transforms of a training image, uint8 `(3, height, width)` of any size, which must
            return `image_size`; None for a random resized crop and a flip.
        decode_at: pixels of the shorter side that are enough to decode; a JPEG of four times that
            and more is read in two thirds of the time; None for all. It blurs small crops.
        skip_corrupt: do without images that cannot be read instead of failing: training reads the
            next image, evaluation leaves the place in the batch out. `corrupt_images` counts them.
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augment: Sequence[Augment] | None = None,
        decode_at: int | None = None,
        skip_corrupt: bool = False,
        **options: Any,
    ) -> None:
        if augment is None:
            augment = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        super().__init__(mean=mean, std=std, augment=augment, **options)
        if decode_at is not None and decode_at < image_size:
            raise InputError(
                f"data.decode_at={decode_at} is less than data.image_size={image_size}; it is the "
                "shorter side that is decoded, at least the one that the network sees"
            )
        self.resize = resize or round(image_size / 0.875)
        self.decode_at = decode_at
        self.skip_corrupt = skip_corrupt
        self.input_shape = (3, image_size, image_size)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"resize": self.resize, "decode_at": self.decode_at}

    def setup(self, stage: str | None = None) -> None:
        fresh = self.splits is None
        super().setup(stage)
        if fresh:
            self._check_shape()

    def corrupt_images(self, split: int | None = None) -> list[str]:
        splits = (self.splits or ()) if split is None else [self._split(split)]
        unique = {id(images): images for images in splits if isinstance(images, EncodedImages)}
        return [name for images in unique.values() for name in images.corrupt_names()]

    def reading(self, *, train: bool) -> dict[str, Any]:
        """Return the options of `EncodedImages` for a split that trains, or one that evaluates."""
        size = self.input_shape[1]
        steps: Sequence[Any] = self.augment
        if not train:
            steps = [v2.Resize(self.resize, antialias=True), v2.CenterCrop(size)]
        return {
            "transform": _Steps(steps, self.mean, self.std),
            "decode_at": self.decode_at,
            "skip_corrupt": self.skip_corrupt,
            "full_batches": train,
        }

    def _readable(self, split: Any, index: int) -> bool:
        return not self.skip_corrupt or split.is_readable(index)

    def unaugmented(self, split: Any) -> Any:
        plain = copy.copy(split)
        plain.transform = self.reading(train=False)["transform"]
        return plain

    def _check_shape(self) -> None:
        assert self.splits is not None
        with torch.random.fork_rng(devices=[]):  # training draws what it would have drawn
            shape = tuple(self.splits[0][0][0].shape)
        if shape != self.input_shape:
            raise InputError(
                f"data.augment makes images of {shape}, but data.image_size is "
                f"{self.input_shape[1]}: end it with a crop or a resize to that size"
            )


class _Steps:
    """Transforms of an image, then scaling and normalization."""

    def __init__(
        self, steps: Sequence[Callable[[Any], Any]], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.steps = steps
        self.mean = 255 * torch.tensor(mean).reshape(-1, 1, 1)
        self.factor = 1 / (255 * torch.tensor(std).reshape(-1, 1, 1))

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        # Decoders interleave the channels; half the time of v2.ToDtype and v2.Normalize.
        return image.contiguous().float().sub_(self.mean).mul_(self.factor)


class Names(Sequence[str]):
    """Strings in one block of memory, which worker processes share as long as they live.

    A million Python strings would be copied into each worker, as reading them counts references.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


def check_labels(labels: Tensor, class_names: Sequence[object], where: str) -> None:
    """Refuse labels that are no index of `class_names`.

    Raises:
        InputError: there is one, or there is no image at all.
    """
    if len(labels) == 0:
        raise InputError(f"{where} holds no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(class_names):
        wrong = low if low < 0 else high
        raise InputError(
            f"{where} has the label {wrong}, which must lie between 0 and {len(class_names) - 1}: "
            f"there are {len(class_names)} classes"
        )
