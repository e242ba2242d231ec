"""`pack`: an image folder as shards."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from repnet.data.folder import Listing, check_classes, scan
from repnet.data.shards import FORMAT, INDEX, Shard, scan_tar, tar_keys
from repnet.errors import InputError
from repnet.files import sha256, sweep_leftovers, write_atomically, write_text
from repnet.images import open_rgb
from repnet.text import printable

PLAN = "pack.json"

_SAMPLE = 32  # images that are encoded to learn how many fit in a shard
_HEADERS = 1536  # bytes of a sample beside its image: two headers and a label


@dataclass(frozen=True)
class Encoding:
    """How images are stored; what is small enough and JPEG, PNG or WebP is kept byte by byte.

    Args:
        shorter_side: pixels that the shorter side has at most; None for any.
        max_side: pixels that the longer side has at most; None for any.
        quality: of JPEG, 1 to 95.
    """

    shorter_side: int | None = 256
    max_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        for option, side in (("shorter-side", self.shorter_side), ("max-side", self.max_side)):
            if side is not None and side < 1:
                raise InputError(f"--{option}={side} must be at least 1 pixel")
        if not 1 <= self.quality <= 95:
            raise InputError(f"--quality={self.quality} must lie between 1 and 95")

    def encode(self, contents: bytes) -> tuple[str, bytes]:
        """Return suffix and contents of the file to store.

        Raises:
            ValueError: the image cannot be read.
        """
        image = open_rgb(contents)  # in full, also where it is kept: nothing corrupt is packed
        width, height = image.size
        bounds = [(self.shorter_side, min(width, height)), (self.max_side, max(width, height))]
        scale = min([1.0, *(bound / side for bound, side in bounds if bound is not None)])
        with Image.open(io.BytesIO(contents)) as original:
            suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(original.format or "")
        if scale == 1 and suffix:
            return suffix, contents
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=self.quality)
        return "jpg", packed.getvalue()


def pack(
    source: Path,
    target: Path,
    encoding: Encoding | None = None,
    *,
    shard_bytes: int = 256_000_000,
    workers: int | None = None,
    skip_corrupt: bool = False,
) -> dict[str, Any]:
    """Write the splits of an image folder to `target/SPLIT-NUMBER.tar`, with an index of them.

    Training images are in a fixed random order, others in that of the folder. A shard appears when
    it is whole; the same command again goes on where it was stopped. At the end every shard is
    read back and counted.

    Args:
        source: directory with `train/CLASS/IMAGE` and more splits.
        target: directory; made if it is not there.
        encoding: of the images; None for the defaults.
        shard_bytes: about the length of a shard.
        workers: threads; None for all cores.
        skip_corrupt: leave out images that cannot be read.

    Returns:
        The index.

    Raises:
        InputError: there are no images, one cannot be read, or `target` holds something else.
    """
    encoding = encoding or Encoding()
    if shard_bytes < 1 or (workers is not None and workers < 1):
        raise InputError("--shard-size and --workers must be at least 1")
    splits = [split for split in ("train", "val", "test") if (source / split).is_dir()]
    if not splits:
        raise InputError(f"'{source}' must hold train/CLASS/IMAGE, val/CLASS/IMAGE")
    listings = {split: scan(source, split) for split in splits}
    first = listings[splits[0]]
    for listing in listings.values():
        check_classes(listing, first.class_names, source)
        if listing.empty_files and not skip_corrupt:
            more = len(listing.empty_files) - 1
            raise InputError(
                f"'{listing.folder / listing.empty_files[0]}' has no contents"
                + (f", nor have {more} more images" if more else "")
                + "; replace them, or pass --skip-corrupt"
            )
    sweep_leftovers(target)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        packer = _Packer(target, encoding, pool, skip_corrupt)
        lengths = packer.plan(listings, shard_bytes)
        index: dict[str, Any] = {
            "format": FORMAT,
            "class_names": first.class_names,
            "encoding": asdict(encoding),
            "sources": {},
            "splits": {},
        }
        columns = (*Progress.get_default_columns()[:-1], TextColumn("{task.fields[speed]}"))
        with Progress(
            SpinnerColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True)
        ) as bar:
            for split, listing in listings.items():
                shards, skipped = packer.write(split, listing, lengths[split], bar)
                skipped += [str(listing.folder / name) for name in listing.empty_files]
                _count(split, listing, shards, skipped)
                index["splits"][split] = [asdict(shard) for shard in shards]
                index["sources"][split] = {
                    "images": len(listing.names) + len(listing.empty_files),
                    "skipped": [printable(name) for name in skipped],
                }
    write_text(target / INDEX, json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n")
    return index


class _Packer:
    def __init__(
        self, target: Path, encoding: Encoding, pool: ThreadPoolExecutor, skip_corrupt: bool
    ) -> None:
        self.target, self.encoding = target, encoding
        self.pool, self.skip_corrupt = pool, skip_corrupt

    def plan(self, listings: dict[str, Listing], shard_bytes: int) -> dict[str, int]:
        """Return how many images a shard of each split has, from the plan of a stopped run."""
        digest = hashlib.sha256()
        for split, listing in listings.items():
            for name, size in zip(listing.names, listing.sizes, strict=True):
                digest.update(os.fsencode(f"{split}/{name}\0{size}\0"))
        wanted = {
            **asdict(self.encoding),
            "shard_bytes": shard_bytes,
            "source": digest.hexdigest(),
        }
        path = self.target / PLAN
        if path.exists():
            plan = json.loads(path.read_text(encoding="utf-8"))
            lengths = plan.pop("lengths")
            if different := sorted(key for key in wanted if plan.get(key) != wanted[key]):
                raise InputError(
                    f"'{self.target}' holds shards that were packed with another "
                    f"{', '.join(different)}; choose another directory, or remove it"
                )
            return lengths
        if self.target.exists() and any(self.target.iterdir()):
            raise InputError(f"'{self.target}' is not empty; choose another directory")
        lengths = {
            split: max(1, round(shard_bytes / self._mean_bytes(listing)))
            for split, listing in listings.items()
        }
        write_text(path, json.dumps({**wanted, "lengths": lengths}, indent=2) + "\n")
        return lengths

    def _mean_bytes(self, listing: Listing) -> float:
        step = max(1, math.ceil(len(listing.names) / _SAMPLE))
        chosen = range(0, len(listing.names), step)
        paths = [listing.folder / listing.names[index] for index in chosen]
        encoded = [item for item in self.pool.map(self._encode, paths) if item]
        return _HEADERS + sum(len(contents) for _, contents in encoded) / max(1, len(encoded))

    def write(
        self, split: str, listing: Listing, length: int, bar: Progress
    ) -> tuple[list[Shard], list[str]]:
        """Write the shards of a split that are not there; return all, and what was left out."""
        order = torch.arange(len(listing.names))
        if split == "train":
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        keys = _keys(listing)
        task = bar.add_task(split, total=len(order), speed="")
        shards, skipped = [], []
        for number, indices in enumerate(order.split(length)):
            path = self.target / f"{split}-{number:06d}.tar"
            chosen = indices.tolist()
            if not path.exists():
                self._write(path, listing, keys, chosen, lambda: self._advance(bar, task))
            else:
                bar.advance(task, len(chosen))
            left_out = _left_out(path, [keys[index] for index in chosen])
            skipped += [
                str(listing.folder / listing.names[index])
                for index in chosen
                if keys[index] in left_out
            ]
            shards.append(replace(scan_tar(path), sha256=sha256(path)))
        return shards, skipped

    def _write(
        self, path: Path, listing: Listing, keys: list[str], chosen: list[int], done: Any
    ) -> None:
        sources = [listing.folder / listing.names[index] for index in chosen]

        def write(temporary: Path) -> None:
            with tarfile.open(temporary, "w") as tar:
                encoded = self.pool.map(self._encode, sources)
                for index, item in zip(chosen, encoded, strict=True):
                    if item is not None:
                        suffix, contents = item
                        _add(tar, f"{keys[index]}.{suffix}", contents)
                        _add(tar, f"{keys[index]}.cls", str(int(listing.labels[index])).encode())
                    done()

        write_atomically(path, write)

    def _encode(self, path: Path) -> tuple[str, bytes] | None:
        try:
            return self.encoding.encode(path.read_bytes())
        except (OSError, ValueError) as error:
            if self.skip_corrupt and not isinstance(error, InputError):
                return None
            raise InputError(
                f"cannot read the image '{printable(str(path))}' ({error}); pass --skip-corrupt to "
                "go on without such images, or replace it and start with an empty directory"
            ) from error

    @staticmethod
    def _advance(bar: Progress, task: Any) -> None:
        bar.advance(task)
        speed = bar.tasks[task].speed
        bar.update(task, speed=f"{speed:,.0f} images/s" if speed else "")


def _keys(listing: Listing) -> list[str]:
    """Return the key of each image: its path, without suffix and without dots in the name."""
    keys: list[str] = []
    taken: set[str] = set()
    for path in listing.names:
        folder, _, name = path.rpartition("/")
        stem = f"{folder}/{os.path.splitext(name)[0].replace('.', '_')}"  # noqa: PTH122
        key, number = stem, 1
        while key in taken:  # of cat.jpg and cat.png
            number += 1
            key = f"{stem}-{number}"
        taken.add(key)
        keys.append(key)
    return keys


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time and no owner: the same images make the same file
    info.size = len(contents)
    tar.addfile(info, io.BytesIO(contents))


def _left_out(path: Path, keys: list[str]) -> set[str]:
    """Return the keys that a shard does not hold.

    Raises:
        InputError: it holds others.
    """
    try:
        found = tar_keys(path)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"'{path}' cannot be read back: {error}; remove it") from error
    held = set(found)
    if found != [key for key in keys if key in held]:
        raise InputError(f"'{path}' holds other images than were packed there; remove it")
    return set(keys) - held


def _count(split: str, listing: Listing, shards: list[Shard], skipped: list[str]) -> None:
    """Compare what was read back from the shards with the folder.

    Raises:
        RuntimeError: an image is missing, or under another label.
    """
    empty = len(listing.empty_files)
    packed = torch.tensor([label for shard in shards for label in shard.labels], dtype=torch.int64)
    classes = len(listing.class_names)
    missing = listing.labels.bincount(minlength=classes) - packed.bincount(minlength=classes)
    if len(packed) + len(skipped) != len(listing.labels) + empty or (
        bool((missing < 0).any()) or int(missing.sum()) != len(skipped) - empty
    ):
        raise RuntimeError(
            f"{split}: {len(packed)} images packed and {len(skipped)} skipped do not make the "
            f"{len(listing.labels) + empty} of '{listing.folder}'"
        )
