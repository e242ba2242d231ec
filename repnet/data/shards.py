"""Images in tar files, as WebDataset has them, read in any order."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # torch needs it, as filelock
import numpy as np
import torch
from filelock import FileLock

from repnet.data.base import Splits
from repnet.data.encoded import EncodedDataModule, EncodedImages, check_labels
from repnet.errors import InputError
from repnet.files import sha256, write_atomically, write_json

FORMAT = "repnet shards 1"
INDEX = "index.json"
IMAGES = ("jpg", "jpeg", "png", "webp")  # also what packing may keep as it is

_OPEN_FILES = 64  # of each process; systems allow 256 at least


@dataclass(frozen=True)
class Shard:
    """A tar file, and where its images are.

    Args:
        file: name, beside the index.
        bytes: length.
        sha256: of the file; empty where it is not known.
        offsets: byte at which each image begins.
        sizes: bytes of each image.
        labels: of each image.
    """

    file: str
    bytes: int
    sha256: str
    offsets: list[int]
    sizes: list[int]
    labels: list[int]


class Shards(EncodedDataModule):
    """Tar files with `KEY.jpg` (png, webp) and `KEY.cls` (or `KEY.json`) for each image.

    `python -m repnet.data pack` writes them, with an index; of other WebDataset shards all headers
    are read once to make one, which is kept in `cache`. Images are read at random positions, so
    shuffling, resuming and sharing among processes are those of every other data set. Shards at a
    URL are copied to `cache`, whole, each when its first image is needed: in a shuffled epoch, all.

    Args:
        root: directory, or a URL that fsspec can open (`s3://...`, `https://...`).
        train: file names of the training shards, `*` and `{000000..000146}` allowed. As `val` and
            `test`, used only where there is no index.
        val: of the validation shards.
        test: of the test shards; where there are none, the validation images are the test images.
        class_names: of the labels 0, 1, ...; None for those of the index, or else the numbers.
        label_key: entry of `KEY.json` that holds the label.
        cache: directory for copies; None for `~/.cache/repnet/shards`.
        **options: of `EncodedDataModule`.
    """

    def __init__(
        self,
        root: str,
        *,
        train: str = "*train*.tar",
        val: str = "*val*.tar",
        test: str = "*test*.tar",
        class_names: Sequence[str] | None = None,
        label_key: str = "label",
        cache: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = root
        self.patterns = {"train": train, "val": val, "test": test}
        self.names = None if class_names is None else list(class_names)
        self.label_key = label_key
        self.cache = cache

    def load(self) -> Splits:
        storage = Storage(self.root, self.cache)
        index = storage.read_index()
        names, splits = self._own(storage, index) if index else self._foreign(storage)
        for split in ("train", "val"):
            if not splits.get(split):
                found = ", ".join(sorted(splits)) or "nothing"
                raise InputError(
                    f"data.root='{self.root}' has no shards to {split}, only {found}; pack them, "
                    f"or name them with data.{split}=PATTERN"
                )
        if names is None:
            highest = max(max(shard.labels, default=0) for shard in splits["train"])
            names = [str(label) for label in range(highest + 1)]
        self.class_names = names
        opened = {
            split: ShardImages(storage, shards, **self.reading(train=split == "train"))
            for split, shards in splits.items()
            if shards
        }
        for split, images in opened.items():
            check_labels(images.labels, names, f"the {split} split of '{self.root}'")
        return opened["train"], opened["val"], opened.get("test", opened["val"])

    def _own(
        self, storage: Storage, index: dict[str, Any]
    ) -> tuple[list[str], dict[str, list[Shard]]]:
        try:
            splits = {
                split: [_checked(Shard(**shard)) for shard in shards]
                for split, shards in index["splits"].items()
            }
            names = [str(name) for name in index["class_names"]]
            if storage.is_local:  # a copy that is not complete shows now, not in the first epoch
                for shard in (shard for shards in splits.values() for shard in shards):
                    storage.fetch(shard.file, shard.bytes)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"'{self.root}/{INDEX}' is damaged ({error}); pack again") from error
        if self.names is not None and self.names != names:
            raise InputError(
                f"data.class_names are not those of '{self.root}/{INDEX}'; leave them out"
            )
        return names, splits

    def _foreign(self, storage: Storage) -> tuple[list[str] | None, dict[str, list[Shard]]]:
        files = {split: storage.find(pattern) for split, pattern in self.patterns.items()}
        return self.names, {
            split: [storage.scan(name, self.label_key) for name in names]
            for split, names in files.items()
            if names
        }


class ShardImages(EncodedImages):
    """The images of some shards.

    Args:
        storage: where the shards are.
        shards: in order.
        **options: of `EncodedImages`.
    """

    def __init__(self, storage: Storage, shards: Sequence[Shard], **options: Any) -> None:
        def joined(lists: list[list[int]]) -> np.ndarray:
            return np.concatenate([np.asarray(values, dtype=np.int64) for values in lists])

        super().__init__(torch.from_numpy(joined([s.labels for s in shards])), **options)
        self.storage = storage
        self.files = [(shard.file, shard.bytes, shard.sha256) for shard in shards]
        self.offsets = joined([shard.offsets for shard in shards])
        self.sizes = joined([shard.sizes for shard in shards])
        self.shards = np.repeat(np.arange(len(shards)), [len(shard.labels) for shard in shards])

    def contents(self, index: int) -> bytes:
        descriptor = self.storage.open(*self.files[self.shards[index]])
        size = int(self.sizes[index])
        contents = os.pread(descriptor, size, int(self.offsets[index]))
        if len(contents) != size:
            raise OSError(f"the shard ends after {len(contents)} of {size} bytes")
        return contents

    def name(self, index: int) -> str:
        file = self.files[self.shards[index]][0]
        try:  # the tar header before the image
            descriptor = self.storage.open(*self.files[self.shards[index]])
            header = os.pread(descriptor, 512, int(self.offsets[index]) - 512)
            key = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except (OSError, tarfile.TarError):
            key = f"image {int(np.sum(self.shards[:index] == self.shards[index]))}"
        return f"{self.storage.root}/{file}: {key}"


class Storage:
    """The files of a directory or URL, as local files.

    Args:
        root: directory or URL.
        cache: directory for copies; None for `~/.cache/repnet/shards`.

    Raises:
        InputError: fsspec cannot open such a URL.
    """

    def __init__(self, root: str, cache: str | None) -> None:
        self.root = str(root).rstrip("/")
        self.is_local = "://" not in self.root and "::" not in self.root
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = Path(cache) if cache else Path(base).expanduser() / "repnet" / "shards"
        key = self.root if not self.is_local else str(Path(self.root).resolve())
        self.cache = place / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._open: OrderedDict[str, int] = OrderedDict()
        if not self.is_local:
            self._filesystem()

    def read_index(self) -> dict[str, Any] | None:
        """Return the index that packing wrote, None where there is none.

        Raises:
            InputError: it cannot be read, or is of another version.
        """
        if self.is_local:
            if not Path(self.root).is_dir():
                raise InputError(f"data.root='{self.root}' is no directory; shards lie in one")
            path = Path(self.root) / INDEX
            text = path.read_text(encoding="utf-8") if path.exists() else None
        else:
            filesystem, root = self._filesystem()
            try:
                text = filesystem.cat_file(f"{root}/{INDEX}").decode()
            except FileNotFoundError:
                text = None
            except Exception as error:  # each kind of storage has its own
                raise self._unreadable(INDEX, error) from error
        if text is None:
            return None
        try:
            index = json.loads(text)
        except ValueError as error:
            raise InputError(f"'{self.root}/{INDEX}' is damaged ({error}); pack again") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise InputError(
                f"'{self.root}/{INDEX}' is not of the format '{FORMAT}'; pack again, or remove it "
                "to have the shards themselves read"
            )
        return index

    def find(self, pattern: str) -> list[str]:
        """Return the sorted names that match a pattern with `*`, or `{000..146}`.

        Raises:
            InputError: the files cannot be listed.
        """
        if braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern):
            before, first, last, after = braces.groups()
            numbers = range(int(first), int(last) + 1)
            return [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
        try:
            if self.is_local:
                names = [path.name for path in Path(self.root).iterdir()]
            else:
                filesystem, root = self._filesystem()
                paths = filesystem.ls(root, detail=False)
                names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        except Exception as error:
            raise InputError(
                f"cannot list '{self.root}' ({error}); name the shards, as in "
                "data.train='train-{000000..000146}.tar'"
            ) from error
        return sorted(name for name in names if fnmatch(name, pattern))

    def scan(self, file: str, label_key: str) -> Shard:
        """Return what a shard holds, from `cache` if the same shard was scanned before.

        Raises:
            InputError: it cannot be read, or is not made of images with labels.
        """
        path = self.fetch(file)
        stat = path.stat()
        mark = f"{file} {stat.st_size} {stat.st_mtime_ns if self.is_local else ''} {label_key}"
        kept = self.cache / f"scan-{hashlib.sha256(mark.encode()).hexdigest()[:16]}.json"
        if kept.exists():
            return Shard(**json.loads(kept.read_text(encoding="utf-8")))
        shard = scan_tar(path, label_key)
        with suppress(OSError):  # the next run scans again
            write_json(kept, asdict(shard))
        return shard

    def fetch(self, file: str, size: int | None = None, digest: str = "") -> Path:
        """Return the local path of a shard, copied and checked if it lies at a URL.

        Raises:
            InputError: it cannot be had, or is not what the index says.
        """
        if self.is_local:
            path = Path(self.root) / file
            if not path.exists() or (size is not None and path.stat().st_size != size):
                state = "has another size than packed" if path.exists() else "is missing"
                raise InputError(f"the shard '{path}' {state}; pack again or copy it again")
            return path
        path = self.cache / f"{digest[:16]}-{file}"
        if path.exists():
            return path  # renamed when it was whole
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # other workers and processes wait for the same file
            if not path.exists():
                filesystem, root = self._filesystem()
                try:
                    write_atomically(
                        path,
                        lambda temporary: filesystem.get_file(f"{root}/{file}", str(temporary)),
                        lambda temporary: _check_copy(temporary, digest),
                    )
                except Exception as error:
                    raise self._unreadable(file, error) from error
        return path

    def open(self, file: str, size: int, digest: str) -> int:
        """Return a descriptor of a shard, one of this process's that stay open.

        Raises:
            InputError: as `fetch`.
        """
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self.fetch(file, size, digest), os.O_RDONLY)
        return self._open[file]

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors mean nothing elsewhere

    def _filesystem(self) -> tuple[Any, str]:
        """Return fsspec's file system and the path in it.

        Made anew each time: one that was made before a fork may wait for a thread that is gone.
        """
        try:
            return fsspec.core.url_to_fs(self.root, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise InputError(f"data.root='{self.root}' cannot be opened: {error}") from error

    def _unreadable(self, file: str, error: Exception) -> InputError:
        reason = str(error) or type(error).__name__
        return InputError(f"cannot copy '{self.root}/{file}' to '{self.cache}': {reason}")


def scan_tar(path: Path, label_key: str = "label") -> Shard:
    """Return what a tar of `KEY.jpg` and `KEY.cls` or `KEY.json` holds; reads the headers only.

    Raises:
        InputError: it is no tar, or an image has no label or a label no image.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        for key, suffix, member, tar in _members(path):
            if suffix in IMAGES:
                if key in images:
                    raise InputError(f"'{path}' has two images of the key '{key}'")
                images[key] = (member.offset_data, member.size)
            elif suffix in ("cls", "json"):
                file = tar.extractfile(member)
                assert file is not None
                labels.setdefault(key, _label(file.read(), suffix, label_key))
    except (tarfile.TarError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"cannot read the shard '{path}': {error}. It must be an uncompressed tar with an "
            f"integer in each KEY.cls, or in the entry '{label_key}' of each KEY.json"
        ) from error
    if unmatched := sorted(images.keys() ^ labels.keys()):
        key = unmatched[0]
        kind = "no label (cls, json)" if key in images else f"no image ({', '.join(IMAGES)})"
        raise InputError(f"'{path}': {len(unmatched)} keys are incomplete; '{key}' has {kind}")
    offsets, sizes = [start for start, _ in images.values()], [n for _, n in images.values()]
    values = [labels[key] for key in images]
    return Shard(path.name, path.stat().st_size, "", offsets, sizes, values)


def tar_keys(path: Path) -> list[str]:
    """Return the keys of the images in a shard, in order."""
    return [key for key, suffix, _, _ in _members(path) if suffix in IMAGES]


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Yield key and suffix of each file in a tar; a key ends at the first dot of the name."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            if member.isfile() and key:
                yield folder + slash + key, suffix.lower(), member, tar
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all


def _label(contents: bytes, suffix: str, label_key: str) -> int:
    if suffix == "cls":
        return int(contents)
    label = json.loads(contents)[label_key]
    if not isinstance(label, int):
        raise ValueError(f"the label {label!r} is no integer")
    return label


def _checked(shard: Shard) -> Shard:
    """Return a shard of an index that came from elsewhere, if it makes sense."""
    arrays = [np.asarray(v) for v in (shard.offsets, shard.sizes, shard.labels)]
    if Path(shard.file).name != shard.file or len({array.shape for array in arrays}) != 1:
        raise ValueError(f"the entry of '{shard.file}' is inconsistent")
    for field, array in zip(fields(shard)[3:], arrays, strict=True):
        if array.size and (array.dtype.kind != "i" or array.min() < 0):
            raise ValueError(f"'{field.name}' of '{shard.file}' are no numbers of bytes")
    if arrays[0].size and int((arrays[0] + arrays[1]).max()) > shard.bytes:
        raise ValueError(f"an image of '{shard.file}' lies beyond its end")
    return shard


def _check_copy(path: Path, digest: str) -> None:
    if digest and sha256(path) != digest:
        raise OSError("the copy differs from what was packed (SHA-256)")
