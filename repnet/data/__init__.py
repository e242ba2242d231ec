"""Data sets: one LightningDataModule each."""

from repnet.data.base import ImageDataModule
from repnet.data.digits import Digits
from repnet.data.fake import FakeImages
from repnet.data.folder import ImageFolder
from repnet.data.huggingface import HuggingFace
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
    "Shards",
]
