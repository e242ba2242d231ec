"""Data sets, on small local files in the real layouts."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional
from torchvision.transforms import v2

from repnet.callbacks.corrupt_images import CorruptImages
from repnet.data import (
    CIFAR10,
    CIFAR100,
    EMNIST,
    KMNIST,
    MNIST,
    Digits,
    FakeImages,
    FashionMNIST,
    ImageDataModule,
    ImageFolder,
    decoding,
)
from repnet.data.base import TensorImages
from repnet.data.batch_augment import RandomCrop, RandomHorizontalFlip
from repnet.data.decoding import decode
from repnet.errors import InputError
from repnet.spec import build, choices, load_choice


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
@pytest.mark.parametrize("cls", [MNIST, FashionMNIST, KMNIST])
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


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=95)
    return file.getvalue()


def jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def png() -> bytes:
    return encoded(Image.new("RGB", (30, 24), (9, 8, 7)), "PNG")


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


def test_images_of_each_class_are_held_out_where_there_is_no_val_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat", "dog", "owl"]})
    for index in range(3, 20):
        shutil.copy(root / "train" / "cat" / "0.png", root / "train" / "cat" / f"{index}.png")
    for index in (1, 2):
        (root / "train" / "owl" / f"{index}.png").unlink()
    opened = []
    for share in (0.1, 0.1, 0.4):
        data = ImageFolder(str(root), image_size=16, val_share=share)
        data.setup()
        assert data.splits is not None
        train, val, test = data.splits
        assert test is val
        names = [{images.names[i] for i in range(len(images))} for images in (train, val)]
        assert not names[0] & names[1]
        assert names[0] | names[1] == {str(p.relative_to(root / "train"))
                                       for p in root.rglob("*.png")}  # fmt: skip
        opened.append((train.labels.bincount().tolist(), val.labels.bincount().tolist(), names[1]))
    assert opened[0] == opened[1]  # the same in every run
    assert opened[0][:2] == ([18, 2, 1], [2, 1])  # of one owl none is held out
    assert opened[2][:2] == ([12, 2, 1], [8, 1])
    assert data.splits[0].transform.steps == data.augment  # type: ignore[attr-defined]
    assert data.splits[1].transform.steps != data.augment  # type: ignore[attr-defined]
    assert data.notes[0].startswith("9 of the training images, 40% of each class, validate, as ")
    assert "the test images are the validation images" in data.notes[1]
    (root / "test").symlink_to(root / "train")
    data = ImageFolder(str(root), image_size=16)
    data.setup()
    assert len(data.notes) == 1  # it has test images


def test_what_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat", "dog"], "valid": ["cat", "dog"]})
    with pytest.raises(InputError, match="valid' is not read; rename it to val"):
        ImageFolder(str(root)).setup()
    shutil.rmtree(root / "valid")
    for share in (0.0, 1.0, -1):
        with pytest.raises(InputError, match=f"data.val_share={share} must lie between 0 and 1"):
            ImageFolder(str(root), val_share=share)
    (root / "train" / "cat" / "0.png").write_bytes(b"")
    data = ImageFolder(str(root), image_size=16, skip_corrupt=True)
    data.setup()
    assert data.corrupt_images() == [str(root / "train" / "cat" / "0.png")]  # once
    for path in root.rglob("[01].png"):
        path.unlink()
    with pytest.raises(InputError, match="no class in '.*train' has two images"):
        ImageFolder(str(root)).setup()


CORRUPT = [b"not an image", b"\x89PNG\r\n\x1a\n truncated", jpeg()[:-100], jpeg()[:9]]


@pytest.mark.parametrize("contents", CORRUPT)
def test_an_unreadable_image_is_named(tmp_path: Path, contents: bytes) -> None:
    root = image_folder(tmp_path, {"train": ["cat"], "val": ["cat"]})
    bad = root / "val" / "cat" / "1.png"
    bad.write_bytes(contents)
    data = ImageFolder(str(root), image_size=16)
    data.setup()
    with pytest.raises(InputError, match=f"cannot read the image '{bad}'.*skip_corrupt=true"):
        list(data.val_dataloader())


def test_an_empty_file_is_found_before_the_first_step(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat"], "val": ["cat"]})
    (root / "val" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 images in .* cat/1\.png.*skip_corrupt=true"):
        ImageFolder(str(root), image_size=16).setup()
    data = ImageFolder(str(root), image_size=16, skip_corrupt=True, batch_size=3)
    data.setup()
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 2
    assert data.corrupt_images() == [str(root / "val" / "cat" / "1.png")]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_skipped_and_counted(tmp_path: Path, workers: int) -> None:
    root = image_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    bad = [root / split / "cat" / f"{n}.png" for split, n in (("train", 1), ("val", 0))]
    for path in bad:
        path.write_bytes(b"broken")
    data = ImageFolder(
        str(root), image_size=16, batch_size=2, skip_corrupt=True, num_workers=workers
    )
    assert data.corrupt_images() == []
    assert [len(y) for _, y in data.train_dataloader()] == [2, 2, 2]  # the next one instead
    assert sorted(torch.cat([y for _, y in data.val_dataloader()]).tolist()) == [0, 0, 1, 1, 1]
    assert data.corrupt_images() == [str(path) for path in bad]  # once each, from the workers too
    assert data.splits is not None
    assert torch.equal(data.splits[1][0][0], data.splits[1][1][0])  # the next readable one
    for path in root.glob("val/*/*"):
        path.write_bytes(b"broken")
    broken = ImageFolder(str(root), image_size=16, skip_corrupt=True)
    with pytest.raises(InputError, match="not one of 6 images can be read"):
        list(broken.val_dataloader())


def test_skipped_images_are_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = ["a.jpg"]
    data = types.SimpleNamespace(corrupt_images=lambda: found)
    trainer: Any = types.SimpleNamespace(datamodule=data)
    callback = CorruptImages()
    for _ in range(2):
        callback.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    found = [*found, *(f"{n}.jpg" for n in range(7))]
    callback.on_test_end(trainer, None)  # type: ignore[arg-type]
    first, second = capsys.readouterr().err.splitlines()
    assert first == "skipped 1 images that cannot be read, 1 in all: 'a.jpg'"
    assert second.startswith("skipped 7 images that cannot be read, 8 in all: '0.jpg'")
    assert second.endswith("and 2 more")


def test_links_to_nothing_and_in_circles(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    (root / "train" / "cat" / "circle").symlink_to("..")
    (root / "train" / "cat" / "itself").symlink_to(".")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.png").write_bytes(png())
    (root / "train" / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    data = ImageFolder(str(root), image_size=16)
    data.setup()
    assert data.splits is not None
    assert len(data.splits[0]) == 3 + 3 + 1  # type: ignore[arg-type]
    (root / "train" / "cat" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"have no contents: cat/gone\.png"):
        ImageFolder(str(root), image_size=16).setup()


def test_names_of_all_kinds(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["Ünïcode 猫", "dog"], "val": ["Ünïcode 猫", "dog"]})
    folder = root / "train" / "Ünïcode 猫"
    (folder / "inner" / "most").mkdir(parents=True)
    (folder / "inner" / "most" / "a.b.JPEG").write_bytes(jpeg())
    (folder / "._0.png").write_bytes(b"what macOS leaves")
    (folder / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    with open(os.fsencode(folder) + b"/\xff\xfe.png", "wb") as file:  # noqa: PTH123
        file.write(png())
    data = ImageFolder(str(root), image_size=16)
    data.setup()
    assert data.class_names == ["dog", "Ünïcode 猫"]
    assert data.splits is not None
    assert len(data.splits[0]) == 3 + 3 + 2  # type: ignore[arg-type]
    assert data.describe()["class_names"] == data.class_names
    names = [data.splits[0].name(i) for i in range(8)]  # type: ignore[attr-defined]
    assert "inner/most/a.b.JPEG" in "".join(names)
    "".join(names).encode()
    data.splits[0].__getitems__(list(range(8)))  # type: ignore[attr-defined]
    (root / "train" / "only text").mkdir()
    (root / "train" / "only text" / "a.txt").write_text("no image")
    with pytest.raises(InputError, match=r"only text \(only 1 of \.txt\)"):
        ImageFolder(str(root)).setup()
    shutil.rmtree(root / "train" / "only text")
    os.mkdir(os.fsencode(root) + b"/train/\xff")  # noqa: PTH102
    with pytest.raises(InputError, match="not UTF-8"):
        ImageFolder(str(root)).setup()


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    color = Image.new("RGB", (20, 16), (200, 100, 40))
    alpha = color.convert("RGBA")
    alpha.putalpha(10)
    palette = color.quantize(4)
    two_colors = color.copy()
    two_colors.paste((1, 2, 3), (0, 0, 5, 5))
    clear = two_colors.quantize(4)
    clear.info["transparency"] = bytes([0, 100, 255, 255])
    gray16 = Image.fromarray(np.full((16, 20), 200 * 256 + 17, dtype=np.uint16))
    cases = [
        (color, "JPEG", (200, 100, 40)),
        (color.convert("CMYK"), "JPEG", (200, 100, 40)),
        (color.convert("L"), "JPEG", (color.convert("L").getpixel((0, 0)),) * 3),
        (alpha, "PNG", (200, 100, 40)),
        (palette, "PNG", (200, 100, 40)),
        (clear, "PNG", None),
        (palette, "GIF", (200, 100, 40)),
        (color.convert("1"), "PNG", None),
        (gray16, "PNG", (200, 200, 200)),
        (gray16, "TIFF", (200, 200, 200)),
        (color, "WEBP", (200, 100, 40)),
    ]
    for image, kind, expected in cases:
        pixels = decode(encoded(image, kind))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, 16, 20)
        if expected is not None:
            target = torch.tensor(expected)[:, None, None].expand(3, 16, 20)
            torch.testing.assert_close(pixels.float(), target.float(), atol=3, rtol=0)
    with pytest.raises(ValueError, match="floating-point"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))
    with pytest.raises(ValueError, match="32-bit integers"):  # which may well end at 255
        decode(encoded(Image.new("I", (4, 4), 200), "TIFF"))
    strange = encoded(Image.new("RGB", (4, 4)), "TGA")
    assert decode(strange).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="unknown format"):
        decode(strange, formats=("PNG", "JPEG"))
    with pytest.raises(ValueError, match="unknown format"):
        decode(encoded(color, "JPEG"), formats=("PNG",))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_decoders_agree(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).convert(mode)
    contents = encoded(image, "JPEG")
    fast = decode(contents)
    monkeypatch.setattr(decoding, "_decode_jpeg", None)
    torch.testing.assert_close(decode(contents), fast, atol=1, rtol=0)


def test_large_jpegs_are_decoded_in_part() -> None:
    contents = encoded(Image.linear_gradient("L").resize((400, 300)).convert("RGB"), "JPEG")
    assert decode(contents, decode_at=76).shape == (3, 300, 400)
    quarter = decode(contents, decode_at=75)
    assert quarter.shape == (3, 75, 100)
    full = functional.avg_pool2d(decode(contents).float(), 4)
    torch.testing.assert_close(quarter.float(), full, atol=3, rtol=0)
    assert decode(contents, decode_at=20).shape == (3, 38, 50)
    assert decode(png(), decode_at=2).shape == (3, 24, 30)
    with pytest.raises(InputError, match=r"decode_at=100 .*data\.image_size=128"):
        ImageFolder("nowhere", image_size=128, decode_at=100)


def test_augmentation_must_return_the_size(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat"], "val": ["cat"]})
    state = torch.get_rng_state()
    ImageFolder(str(root), image_size=16).setup()
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match=r"\(3, 20, 20\), but data.image_size is 16"):
        ImageFolder(str(root), image_size=16, augment=[v2.CenterCrop(20)]).setup()


def test_images_of_a_folder_are_normalized_as_torchvision_does(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    data = ImageFolder(str(root), image_size=16)
    data.setup()
    assert data.splits is not None
    steps = [v2.ToImage(), v2.Resize(18, antialias=True), v2.CenterCrop(16)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    theirs = torchvision.datasets.ImageFolder(str(root / "val"), v2.Compose(steps))
    for (image, label), (expected, expected_label) in zip(data.splits[1], theirs, strict=True):
        torch.testing.assert_close(image, expected.as_subclass(torch.Tensor))
        assert label == expected_label


def test_batches_are_augmented_as_their_images() -> None:
    images = torch.randint(256, (64, 3, 8, 6), dtype=torch.uint8)
    images[0] = torch.arange(48).reshape(8, 6)
    state = torch.get_rng_state()
    crops = RandomCrop(6, padding=2, fill=7)(images)
    torch.set_rng_state(state)
    rows, columns = torch.randint(12 - 6 + 1, (64, 1)), torch.randint(10 - 6 + 1, (64, 1))
    padded = functional.pad(images, (2, 2, 2, 2), value=7)
    for image, crop, row, column in zip(padded, crops, rows, columns, strict=True):
        assert torch.equal(crop, v2.functional.crop(image, int(row), int(column), 6, 6))
    assert len(set(zip(rows.flatten().tolist(), columns.flatten().tolist(), strict=True))) > 20
    flipped = RandomHorizontalFlip()(images)
    chosen = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, images, strict=True)]
    assert 15 < sum(chosen) < 49
    assert all(torch.equal(a, b) for a, b, c in zip(flipped, images, chosen, strict=True) if not c)
    assert torch.equal(RandomHorizontalFlip(p=1)(images[0]), images[0].flip(2))
    assert torch.equal(RandomHorizontalFlip(p=0)(images), images)
    with pytest.raises(ValueError, match="cannot crop 9 pixels from 8 x 6"):
        RandomCrop(9)(images)


def test_transforms_of_batches_and_of_images_mix() -> None:
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    options: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}
    augment = [RandomHorizontalFlip(p=1), v2.RandomVerticalFlip(p=1)]
    mixed = TensorImages(images, torch.arange(5), augment=augment, **options)
    torch.testing.assert_close(mixed.__getitems__([1, 2])[0], images[1:3].flip(2, 3) / 255)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_images_on_the_device_are_the_same(device: str) -> None:
    augment = [RandomCrop(12, padding=2), RandomHorizontalFlip()]
    batches = {}
    for on_device in (False, True):
        data = FakeImages(
            image_size=12, train_size=64, batch_size=16, on_device=on_device, augment=augment
        )
        root = types.SimpleNamespace(root_device=torch.device(device))
        data.trainer = types.SimpleNamespace(  # type: ignore[assignment]
            strategy=root, global_rank=0, world_size=1, overfit_batches=0
        )
        torch.manual_seed(0)
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
        batches[on_device] = [batch for loader in loaders for batch in loader]
    for (images, labels), (expected, expected_labels) in zip(*batches.values(), strict=True):
        assert expected.device.type == device
        torch.testing.assert_close(expected.cpu(), images)
        assert torch.equal(expected_labels.cpu(), labels)


def test_what_cannot_be_on_the_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_workers=0, not 2"):
        FakeImages(on_device=True, num_workers=2).setup()
    root = image_folder(tmp_path, {"train": ["cat"], "val": ["cat"]})
    with pytest.raises(InputError, match="ImageFolder reads its images one by one"):
        ImageFolder(str(root), image_size=16, on_device=True).setup()
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    split = TensorImages(
        images, torch.zeros(1), mean=[0.0] * 3, std=[1.0] * 3, augment=[v2.RandomCrop(4)]
    )
    with pytest.raises(InputError, match="RandomCrop takes one image"):
        split.to(torch.device("cpu"))


def test_a_label_without_a_class_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.zeros((20, 28, 28)), False)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(20), False)
    with pytest.raises(InputError, match="has the label 19, which must lie between 0 and 9"):
        MNIST(root=str(tmp_path)).setup()


@pytest.mark.parametrize("packed", [True, False])
def test_emnist_layout(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (52, 28, 28))
    for split in ("train", "test"):
        write_idx(folder / f"emnist-letters-{split}-images-idx3-ubyte", images, packed)
        labels = np.arange(52) % 26 + 1
        write_idx(folder / f"emnist-letters-{split}-labels-idx1-ubyte", labels, packed)
    data = EMNIST(root=str(tmp_path), subset="letters", val_size=10)
    data.setup()
    assert data.class_names == list("abcdefghijklmnopqrstuvwxyz")
    assert data.splits is not None
    test: Any = data.splits[2]
    assert test.labels.tolist() == [n % 26 for n in range(52)]
    assert torch.equal(test.images[3, 0], torch.from_numpy(images[3].T).byte())


def test_cifar100_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        entry = {"data": pixels, "fine_labels": [0, 99, 5, 6, 7, 8]}
        (folder / name).write_bytes(pickle.dumps(entry))
    classes = [f"class {n}" for n in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": classes}))
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    data = CIFAR100(root=str(tmp_path), val_size=2)
    data.setup()
    assert data.splits is not None
    assert [len(split) for split in data.splits] == [4, 2, 6]  # type: ignore[arg-type]
    assert data.class_names == classes


@pytest.mark.parametrize("name", choices("data"))
def test_every_config_builds(name: str) -> None:
    spec = load_choice("data", name)
    missing = {key: "nowhere" for key, value in spec.items() if value == "???"}
    data = build({**spec, **missing}, allowed=("repnet.data", "torchvision.transforms.v2"))
    assert isinstance(data, ImageDataModule)
