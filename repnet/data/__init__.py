"""Data sets: one LightningDataModule each."""

from repnet.data.base import ImageDataModule
from repnet.data.digits import Digits
from repnet.data.fake import FakeImages
from repnet.data.folder import ImageFolder
from repnet.data.torchvision import CIFAR10, MNIST, FashionMNIST

__all__ = [
    "CIFAR10",
    "MNIST",
    "Digits",
    "FakeImages",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
]
