"""Images in folders, one for each class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repnet.data.base import Splits, stratified_split
from repnet.data.decoding import SUFFIXES
from repnet.data.encoded import EncodedDataModule, EncodedImages, Names
from repnet.errors import InputError
from repnet.text import printable


class ImageFolder(EncodedDataModule):
    """`ROOT/train/CLASS/IMAGE` and, where they are there, `ROOT/val/...` and `ROOT/test/...`.

    Without a val folder a share of each class's training images validates, the same ones in every
    run. Without a test folder the validation images are the test images, as is usual for ImageNet.
    A class may have folders within; names that begin with a dot are passed over.

    Args:
        root: directory with the split folders.
        val_share: of the training images of each class, where there is no val folder.
        **options: of `EncodedDataModule`.
    """

    def __init__(self, root: str, *, val_share: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share={val_share} must lie between 0 and 1")
        self.root = Path(root)
        self.val_share = val_share

    def load(self) -> Splits:
        train, val = self._train_and_val()
        test = self._images(self._scan("test")) if (self.root / "test").is_dir() else val
        return train, val, test

    def _train_and_val(self) -> tuple[FolderImages, FolderImages]:
        listing = self._scan("train")
        if (self.root / "val").is_dir():
            return self._images(listing, train=True), self._images(self._scan("val"))
        for name in ("valid", "validation"):
            if (self.root / name).is_dir():
                raise InputError(f"'{self.root / name}' is not read; rename it to val")
        rest, held_out = stratified_split(listing.labels, self.val_share)
        if not held_out:
            raise InputError(
                f"there is no '{self.root / 'val'}', and no class in '{listing.folder}' has two "
                "images, one of which could validate"
            )
        self.notes.append(
            f"{len(held_out):,} of the training images, {self.val_share:.0%} of each class, "
            f"validate, as there is no '{self.root / 'val'}'"
        )
        val = replace(listing.part(held_out), empty_files=[])  # they count once
        return self._images(listing.part(rest), train=True), self._images(val)

    def _scan(self, split: str) -> Listing:
        listing = scan(self.root, split)
        if split == "train":
            self.class_names = listing.class_names
        else:
            check_classes(listing, self.class_names, self.root)
        if listing.empty_files and not self.skip_corrupt:
            raise InputError(
                f"{len(listing.empty_files)} images in '{listing.folder}' have no contents: "
                f"{_some(listing.empty_files)}; replace or remove them, or pass "
                "data.skip_corrupt=true to do without them"
            )
        return listing

    def _images(self, listing: Listing, *, train: bool = False) -> FolderImages:
        images = FolderImages(
            listing.folder, listing.names, listing.labels, **self.reading(train=train)
        )
        images.left_out = [str(listing.folder / name) for name in listing.empty_files]
        return images


class FolderImages(EncodedImages):
    """Files below a folder.

    Args:
        folder: that the names are relative to.
        names: of the files.
        labels: int64 `(n,)`.
        **options: of `EncodedImages`.
    """

    def __init__(self, folder: Path, names: Names, labels: Tensor, **options: Any) -> None:
        super().__init__(labels, **options)
        self.folder = str(folder)
        self.names = names

    def contents(self, index: int) -> bytes:
        with open(self._path(index), "rb") as file:  # noqa: PTH123  half the time of a Path
            return file.read()

    def name(self, index: int) -> str:
        return printable(self._path(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])  # noqa: PTH118


@dataclass(frozen=True)
class Listing:
    """The images of a split, `FOLDER/CLASS/.../IMAGE`.

    Args:
        folder: of the split.
        class_names: in alphabetical order.
        names: of the files, relative to `folder`, by class, then in alphabetical order.
        sizes: bytes of each file.
        labels: int64 `(n,)`.
        empty_files: names of files without contents, which are not among the others.
    """

    folder: Path
    class_names: list[str]
    names: Names
    sizes: list[int]
    labels: Tensor
    empty_files: list[str]

    def part(self, indices: Sequence[int]) -> Listing:
        """Return a listing of some of the images."""
        return replace(
            self,
            names=Names(self.names[i] for i in indices),
            sizes=[self.sizes[i] for i in indices],
            labels=self.labels[list(indices)],
        )


def scan(root: Path, split: str) -> Listing:
    """Return the images below `root/split`.

    Raises:
        InputError: there is no such folder, or a class without images.
    """
    folder = root / split
    if not folder.is_dir():
        raise InputError(
            f"data.root='{root}' must hold {split}/CLASS/IMAGE: there is no '{folder}'"
        )
    class_names = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )
    if not class_names:
        raise InputError(
            f"data.root='{root}' must hold {split}/CLASS/IMAGE: '{folder}' has no class folders"
        )
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    empty_files: list[str] = []
    empty_classes: list[str] = []
    for label, class_name in enumerate(class_names):
        if re.search("[\ud800-\udfff]", class_name):  # bytes that are not UTF-8
            raise InputError(
                f"the name of the folder '{printable(class_name)}' in '{folder}' is not UTF-8; "
                "rename it, as it becomes the name of the class"
            )
        others: Counter[str] = Counter()
        found = len(names) + len(empty_files)
        for name in _files(str(folder), class_name):
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  a million times
            if suffix not in SUFFIXES:
                others[suffix or "no suffix"] += 1
                continue
            try:
                size = os.stat(f"{folder}/{name}").st_size  # noqa: PTH116
            except OSError:  # a link to nothing
                size = 0
            if size:
                names.append(name)
                sizes.append(size)
                labels.append(label)
            else:
                empty_files.append(printable(name))
        if len(names) + len(empty_files) == found:
            kinds = ", ".join(f"{n} of {suffix}" for suffix, n in others.most_common(3))
            empty_classes.append(f"{class_name}{f' (only {kinds})' if kinds else ''}")
    if empty_classes:
        raise InputError(
            f"{len(empty_classes)} class folders in '{folder}' hold no images: "
            f"{_some(empty_classes)}. Remove them from every split, or put images there "
            f"({' '.join(SUFFIXES)})"
        )
    return Listing(
        folder,
        class_names,
        Names(names),
        sizes,
        torch.tensor(labels, dtype=torch.int64),
        empty_files,
    )


def check_classes(listing: Listing, class_names: list[str], root: Path) -> None:
    """Refuse a split that has other classes than the train split.

    Raises:
        InputError: it has.
    """
    if listing.class_names != class_names:
        different = sorted(set(listing.class_names) ^ set(class_names))
        raise InputError(
            f"'{listing.folder}' has other classes than '{root / 'train'}': {', '.join(different)}"
        )


def _files(folder: str, class_name: str) -> Iterator[str]:
    """Yield the files below a class folder, in a fixed order, relative to `folder`."""
    for place, folders, files in os.walk(f"{folder}/{class_name}", followlinks=True):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and not _is_loop(f"{place}/{name}")
        )
        prefix = place[len(folder) + 1 :]
        yield from (f"{prefix}/{name}" for name in sorted(files) if name[0] != ".")


def _is_loop(path: str) -> bool:
    """Return whether a link leads to a folder that it is in: its images would count many times."""
    if not os.path.islink(path):  # noqa: PTH114
        return False
    target = Path(path).resolve()
    return target in Path(path).parent.resolve().joinpath("any").parents


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
