"""Data sets of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repnet.data.base import Splits, split_indices
from repnet.data.encoded import EncodedDataModule, EncodedImages, check_labels
from repnet.errors import InputError


class HuggingFace(EncodedDataModule):
    """An image classification data set of the Hub, or of a local directory.

    `path` is a name on the Hub, a directory that `save_to_disk` wrote, or one that
    `datasets.load_dataset` reads (`imagefolder`, Parquet). Needs `pip install "repnet[datasets]"`.

    Args:
        path: name or directory.
        name: configuration of the data set.
        revision: of the Hub.
        data_dir: as in `datasets.load_dataset`.
        image_column: None for the only column of images.
        label_column: None for the only column of class labels.
        train_split: name of a split, slices as in `train[:90%]` allowed except for a directory
            that `save_to_disk` wrote. As the two others.
        val_split: None for `validation`, `valid` or `val`, if there is one, else `val_share` of
            the training images, the same in every run.
        test_split: None for `test`, if there is one, else the validation images.
        val_share: of the training images that are held out.
        **options: of `EncodedDataModule`.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        data_dir: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_share: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share={val_share} must lie between 0 and 1")
        self.path = path
        self.arguments = {"name": name, "revision": revision, "data_dir": data_dir}
        self.image_column, self.label_column = image_column, label_column
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.val_share = val_share

    def load(self) -> Splits:
        datasets = _datasets()
        available, read = self._open(datasets)
        train = read(self.train_split)
        image_column = self._column(train, self.image_column, "image", datasets.Image)
        label_column = self._column(train, self.label_column, "label", datasets.ClassLabel)
        self.class_names = list(getattr(train.features[label_column], "names", None) or ())
        highest = int(self._labels(train, label_column, self.train_split).max())
        self.class_names = self.class_names or [str(index) for index in range(highest + 1)]

        def images(dataset: Any, split: str, *, train: bool = False) -> HuggingFaceImages:
            return HuggingFaceImages(
                dataset.select_columns([image_column]).cast_column(
                    image_column, datasets.Image(decode=False)
                ),
                image_column,
                self._labels(dataset, label_column, split),
                name=f"{self.path}, {split}",
                **self.reading(train=train),
            )

        val_split = self.val_split or _first(available, "validation", "valid", "val")
        test_split = self.test_split or _first(available, "test")
        if val_split is None:
            held_out = max(1, round(self.val_share * len(train)))
            if held_out >= len(train):
                raise InputError(
                    f"'{self.path}' has too few images ({len(train)}) to hold some out"
                )
            rest, chosen = split_indices(len(train), held_out)
            val = images(train.select(sorted(chosen)), f"{self.train_split}, held out")
            train = train.select(sorted(rest))
        else:
            val = images(read(val_split), val_split)
        test = val if test_split is None else images(read(test_split), test_split)
        return images(train, self.train_split, train=True), val, test

    def _open(self, datasets: Any) -> tuple[list[str], Callable[[str], Any]]:
        """Return the names of the splits, and a function that reads one."""
        try:
            folder = Path(self.path)
            if any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
                stored = datasets.load_from_disk(self.path)
                if not isinstance(stored, dict):
                    stored = {self.train_split: stored}
                return list(stored), lambda split: self._read(lambda: stored[split], split, stored)
            options = {key: value for key, value in self.arguments.items() if key != "name"}
            names = datasets.get_dataset_split_names(self.path, self.arguments["name"], **options)
        except Exception as error:  # of the Hub, the network, the file system
            raise self._failure(error) from error
        return names, lambda split: self._read(
            lambda: datasets.load_dataset(self.path, split=split, **self.arguments), split, names
        )

    def _read(self, read: Callable[[], Any], split: str, names: Iterable[str]) -> Any:
        try:
            return read()
        except Exception as error:
            raise self._failure(error, f", split '{split}' of {', '.join(names)}") from error

    def _failure(self, error: Exception, where: str = "") -> InputError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return InputError(f"cannot read the data set data.path='{self.path}'{where}: {reason}")

    def _column(self, dataset: Any, wanted: str | None, kind: str, feature: type) -> str:
        columns = dataset.features
        if wanted is not None:
            if wanted not in columns:
                raise InputError(
                    f"'{self.path}' has no column data.{kind}_column={wanted}; it has "
                    f"{', '.join(columns)}"
                )
            return wanted
        found = [name for name, value in columns.items() if isinstance(value, feature)]
        if len(found) != 1:
            raise InputError(
                f"'{self.path}' has {len(found)} columns of type {feature.__name__}; choose with "
                f"data.{kind}_column=NAME among {', '.join(columns)}"
            )
        return found[0]

    def _labels(self, dataset: Any, column: str, split: str) -> Tensor:
        values = np.asarray(dataset.with_format(None)[column][:])
        if values.dtype.kind not in "iu":
            raise InputError(
                f"the labels in the column '{column}' of '{self.path}' are no integers but "
                f"{values.dtype}; cast it to datasets.ClassLabel and save it"
            )
        labels = torch.from_numpy(values.astype(np.int64))
        names = self.class_names or range(int(labels.max()) + 1)  # plain integers have no names
        check_labels(labels, names, f"the split '{split}' of '{self.path}'")
        return labels


class HuggingFaceImages(EncodedImages):
    """The images of one split.

    Args:
        dataset: whose images are not decoded.
        column: of the images.
        labels: int64 `(n,)`.
        name: of the split in messages.
        **options: of `EncodedImages`.
    """

    def __init__(
        self, dataset: Any, column: str, labels: Tensor, *, name: str, **options: Any
    ) -> None:
        super().__init__(labels, **options)
        self.dataset = dataset
        self.column = column
        self.split = name

    def contents(self, index: int) -> bytes:
        image = self.dataset[index][self.column]
        if image is None:
            raise ValueError("it is missing")
        if image["bytes"] is not None:
            return image["bytes"]
        return Path(image["path"]).read_bytes()

    def name(self, index: int) -> str:
        image = self.dataset[index][self.column]
        return f"{self.split}, {(image or {}).get('path') or f'image {index}'}"


def _datasets() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise InputError(
            'data=huggingface needs the package "datasets": pip install "repnet[datasets]"'
        ) from error


def _first(names: list[str], *wanted: str) -> str | None:
    return next((name for name in wanted if name in names), None)
