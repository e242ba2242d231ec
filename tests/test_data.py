"""Data sets, on small local files in the real layouts."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from repnet.data import CIFAR10, MNIST, Digits, FakeImages, FashionMNIST, ImageFolder
from repnet.data.base import TensorImages
from repnet.errors import InputError


def hashes(split: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_split_once_and_for_all() -> None:
    data = Digits()
    data.setup()
    assert data.splits is not None
    train, val, test = data.splits
    assert [len(split) for split in data.splits] == [1257, 180, 360]  # type: ignore[arg-type]
    assert data.class_names == [str(n) for n in range(10)]
    assert data.input_shape == (1, 8, 8)
    assert not hashes(test) & hashes(train)
    assert not hashes(test) & hashes(val)
    counts = Counter(test.labels.tolist())  # type: ignore[attr-defined]
    assert max(counts.values()) - min(counts.values()) <= 2
    again = Digits()
    again.setup()
    assert again.splits is not None
    assert torch.equal(again.splits[2].images, test.images)  # type: ignore[attr-defined]


@pytest.mark.parametrize("data", [Digits(), FakeImages(image_size=12, classes=7)])
def test_images_are_normalized_and_only_training_images_augmented(data: Any) -> None:
    data.augment = [v2.RandomVerticalFlip(p=1)]
    plain = type(data)() if isinstance(data, Digits) else FakeImages(image_size=12, classes=7)
    for module in (data, plain):
        module.setup()
    for index in range(3):
        flipped, labels = data.splits[index].__getitems__([0, 3])
        images, expected = plain.splits[index].__getitems__([0, 3])
        assert torch.equal(labels, expected)
        torch.testing.assert_close(flipped.flip(2) if index == 0 else flipped, images)
    values = torch.cat([plain.splits[0][i][0].flatten() for i in range(len(plain.splits[0]))])
    assert abs(values.mean()) < 0.2
    assert 0.8 < values.std() < 1.3


def test_a_batch_is_its_images() -> None:
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    data = TensorImages(images, torch.arange(5), mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    batch, labels = data.__getitems__([4, 1])
    for row, index in enumerate([4, 1]):
        image, label = data[index]
        torch.testing.assert_close(batch[row], image)
        assert labels[row] == label == index
    expected = v2.functional.normalize(images[4] / 255, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(batch[0], expected)


def test_loaders_cover_every_evaluation_sample_once() -> None:
    data = FakeImages(train_size=50, batch_size=8)
    assert sum(len(y) for _, y in data.test_dataloader()) == 10
    assert sum(len(y) for _, y in data.train_dataloader()) == 48  # full batches only


def write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    contents = header + array.astype(np.uint8).tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(contents))
    else:
        path.write_bytes(contents)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
def test_mnist_layout(tmp_path: Path, cls: Any, packed: bool) -> None:
    folder = tmp_path / cls.__name__ / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for prefix, n in (("train", 60), ("t10k", 20)):
        arrays[prefix] = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte", arrays[prefix], packed)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10, packed)
    before = sorted(folder.iterdir())
    data = cls(root=str(tmp_path), val_size=15)
    data.setup()
    train, val, test = data.splits
    assert [len(train), len(val), len(test)] == [45, 15, 20]
    assert not hashes(train) & hashes(val)
    assert torch.equal(test.images[:, 0], torch.from_numpy(arrays["t10k"]).byte())
    assert test.labels.tolist() == [n % 10 for n in range(20)]
    assert data.num_classes == 10
    assert sorted(folder.iterdir()) == before
    with pytest.raises(InputError, match="val_size"):
        cls(root=str(tmp_path), val_size=60).setup()


def test_a_damaged_file_is_bad_input(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(InputError, match="cannot read MNIST under data.root"):
        MNIST(root=str(tmp_path)).setup()


def test_cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 32, 32), dtype=np.uint8)
    for name, images in zip(names, pixels, strict=True):
        entry = {"data": images.reshape(4, -1), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(entry))
    classes = [f"class {n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    data = CIFAR10(root=str(tmp_path), val_size=5)
    data.setup()
    assert data.splits is not None
    train, val, test = data.splits
    assert [len(train), len(val), len(test)] == [15, 5, 4]  # type: ignore[arg-type]
    assert torch.equal(test.images, torch.from_numpy(pixels[5]))  # type: ignore[attr-defined]
    assert data.class_names == classes


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST, CIFAR10])
def test_a_missing_data_set_says_what_to_do(tmp_path: Path, cls: Any) -> None:
    with pytest.raises(InputError, match=r"data\.root=DIR.*data\.download=true"):
        cls(root=str(tmp_path)).setup()


def image_folder(root: Path, splits: dict[str, list[str]]) -> Path:
    for split, classes in splits.items():
        for shade, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                size = (30 + index, 24)
                Image.new("RGB", size, (90 * shade, 50, 0)).save(folder / f"{index}.png")
    return root


def test_image_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    data = ImageFolder(str(root), image_size=16, batch_size=2)
    data.setup()
    assert data.class_names == ["cat", "dog"]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (2, 3, 16, 16)
        assert images.dtype == torch.float32
        assert set(labels.tolist()) <= {0, 1}
    image, label = data.splits[1][5]  # type: ignore[index]
    expected = (torch.tensor([90, 50, 0]) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(image[:, 8, 8], expected)
    assert label == 1
    assert data.describe()["resize"] == 18


def test_image_folder_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold train/CLASS/IMAGE"):
        ImageFolder(str(tmp_path)).setup()
    root = image_folder(tmp_path / "other", {"train": ["cat", "dog"], "val": ["cat", "fox"]})
    with pytest.raises(InputError, match="dog, fox"):
        ImageFolder(str(root)).setup()
    (root / "train" / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        ImageFolder(str(root)).setup()


@pytest.mark.parametrize("contents", [b"", b"not an image", b"\x89PNG\r\n\x1a\n truncated"])
def test_an_unreadable_image_is_named(tmp_path: Path, contents: bytes) -> None:
    root = image_folder(tmp_path, {"train": ["cat"], "val": ["cat"]})
    bad = root / "val" / "cat" / "1.png"
    bad.write_bytes(contents)
    data = ImageFolder(str(root), image_size=16)
    data.setup()
    with pytest.raises(InputError, match=f"cannot read the image '{bad}'"):
        list(data.val_dataloader())
