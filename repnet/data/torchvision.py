"""Data sets of torchvision, held in memory."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor

from repnet.data.base import ImageDataModule, Splits, TensorImages, split_indices
from repnet.data.encoded import check_labels
from repnet.errors import InputError


class _TorchvisionImages(ImageDataModule):
    """A torchvision data set with an official test split; part of its train split validates.

    Args:
        root: directory that holds the data set in torchvision's layout.
        download: fetch it into `root` if it is not there.
        val_size: images of the official train split that are held out, the same in every run.
        **options: of `ImageDataModule`, except mean and std.
    """

    dataset: ClassVar[Any]
    channel_mean: ClassVar[Sequence[float]]
    channel_std: ClassVar[Sequence[float]]

    def __init__(
        self, root: str = "data", *, download: bool = False, val_size: int = 5000, **options: Any
    ) -> None:
        super().__init__(mean=self.channel_mean, std=self.channel_std, **options)
        self.root = root
        self.download = download
        self.val_size = val_size

    def load(self) -> Splits:
        images, labels = self.read(train=True)
        test_images, test_labels = self.read(train=False)
        self.input_shape = (images.shape[1], images.shape[2], images.shape[3])
        if not 0 < self.val_size < len(images):
            raise InputError(
                f"data.val_size={self.val_size} must lie between 1 and {len(images) - 1}"
            )
        train, val = split_indices(len(images), self.val_size)
        normal: dict[str, Any] = {"mean": self.mean, "std": self.std}
        return (
            TensorImages(images[train], labels[train], **normal, augment=self.augment),
            TensorImages(images[val], labels[val], **normal),
            TensorImages(test_images, test_labels, **normal),
        )

    def read(self, *, train: bool) -> tuple[Tensor, Tensor]:
        """Return uint8 images `(n, channels, height, width)` and labels of one official split.

        Raises:
            InputError: the data set is not there, or damaged.
        """
        name = self.dataset.__name__
        try:
            data = self._open(train)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise InputError(
                f"cannot read {name} under data.root='{self.root}': {error}. Pass the directory "
                f"that holds it as data.root=DIR, or fetch it with data.download=true"
            ) from error
        self.class_names = list(data.classes)
        labels = torch.as_tensor(data.targets)
        check_labels(labels, self.class_names, f"{name} in data.root='{self.root}'")
        return self.as_images(data.data), labels

    def _open(self, train: bool) -> Any:
        return self._open_at(self.root, train, self.download)

    def _open_at(self, root: str, train: bool, download: bool = False) -> Any:
        return self.dataset(root, train=train, download=download)

    @staticmethod
    @abstractmethod
    def as_images(data: Any) -> Tensor:
        """Return torchvision's array as uint8 `(n, channels, height, width)`."""


class MNIST(_TorchvisionImages):
    """70,000 handwritten digits of 28 x 28 pixels, `ROOT/MNIST/raw/*-ubyte[.gz]`."""

    dataset: ClassVar[Any] = torchvision.datasets.MNIST
    channel_mean: ClassVar[Sequence[float]] = [0.1307]
    channel_std: ClassVar[Sequence[float]] = [0.3081]

    def _open(self, train: bool) -> Any:
        folder = Path(self.root) / self.dataset.__name__ / "raw"
        packed = list(folder.glob("*-ubyte.gz"))
        if self.download or not packed or any(folder.glob("*-ubyte")):
            return super()._open(train)
        # torchvision reads plain files only; the user's directory stays as it is.
        with tempfile.TemporaryDirectory() as root:
            copy = Path(root) / self.dataset.__name__ / "raw"
            copy.mkdir(parents=True)
            for path in packed:
                with gzip.open(path) as source, (copy / path.stem).open("wb") as target:
                    shutil.copyfileobj(source, target)
            return self._open_at(root, train)

    @staticmethod
    def as_images(data: Any) -> Tensor:
        return data[:, None]


class FashionMNIST(MNIST):
    """70,000 clothes of 28 x 28 pixels (arXiv:1708.07747), `ROOT/FashionMNIST/raw/*-ubyte[.gz]`."""

    dataset: ClassVar[Any] = torchvision.datasets.FashionMNIST
    channel_mean: ClassVar[Sequence[float]] = [0.2860]
    channel_std: ClassVar[Sequence[float]] = [0.3530]


class KMNIST(MNIST):
    """70,000 cursive Japanese letters of 28 x 28 pixels (arXiv:1812.01718), `ROOT/KMNIST/raw/`."""

    dataset: ClassVar[Any] = torchvision.datasets.KMNIST
    channel_mean: ClassVar[Sequence[float]] = [0.1918]
    channel_std: ClassVar[Sequence[float]] = [0.3483]


class EMNIST(MNIST):
    """Handwritten letters and digits of 28 x 28 pixels (arXiv:1702.05373), `ROOT/EMNIST/raw/`.

    Args:
        root: directory that holds the data set in torchvision's layout.
        subset: `balanced` (47 classes), `byclass` (62), `bymerge` (47), `letters` (26, of both
            cases), `digits` or `mnist` (10).
        **options: of the other data sets of torchvision.
    """

    dataset: ClassVar[Any] = torchvision.datasets.EMNIST
    channel_mean: ClassVar[Sequence[float]] = [0.1736]
    channel_std: ClassVar[Sequence[float]] = [0.3317]

    def __init__(self, root: str = "data", *, subset: str = "balanced", **options: Any) -> None:
        super().__init__(root, **options)
        self.subset = subset

    def read(self, *, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().read(train=train)
        images = images.transpose(2, 3).contiguous()  # the files hold them transposed
        if self.subset == "letters":  # torchvision has a class 0 without images
            self.class_names = self.class_names[1:]
            labels = labels - 1
        return images, labels

    def _open_at(self, root: str, train: bool, download: bool = False) -> Any:
        return self.dataset(root, split=self.subset, train=train, download=download)


class CIFAR10(_TorchvisionImages):
    """60,000 color images of 32 x 32 pixels, `ROOT/cifar-10-batches-py/`."""

    dataset: ClassVar[Any] = torchvision.datasets.CIFAR10
    channel_mean: ClassVar[Sequence[float]] = [0.4914, 0.4822, 0.4465]
    channel_std: ClassVar[Sequence[float]] = [0.2470, 0.2435, 0.2616]

    @staticmethod
    def as_images(data: Any) -> Tensor:
        return torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()


class CIFAR100(CIFAR10):
    """60,000 color images of 32 x 32 pixels in 100 classes, `ROOT/cifar-100-python/`."""

    dataset: ClassVar[Any] = torchvision.datasets.CIFAR100
    channel_mean: ClassVar[Sequence[float]] = [0.5071, 0.4865, 0.4409]
    channel_std: ClassVar[Sequence[float]] = [0.2673, 0.2564, 0.2762]
