"""Data sets: one LightningDataModule each, and `OwnData` around someone's own."""

from repnet.data.base import ImageDataModule
from repnet.data.digits import Digits
from repnet.data.fake import FakeImages
from repnet.data.folder import ImageFolder
from repnet.data.huggingface import HuggingFace
from repnet.data.own import OwnData, as_image_data
from repnet.data.shards import Shards
from repnet.data.torchvision import CIFAR10, CIFAR100, EMNIST, KMNIST, MNIST, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EMNIST",
    "KMNIST",
    "MNIST",
    "Digits",
    "FakeImages",
    "FashionMNIST",
    "HuggingFace",
    "ImageDataModule",
    "ImageFolder",
    "OwnData",
    "Shards",
    "as_image_data",
]
