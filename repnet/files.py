"""Writing files so that a reader finds the old one or the whole new one, never half of it.

A file is written in a directory `.NAME.RANDOM.tmp` beside its place, and moved there when it is
whole. It is a directory because safetensors makes a temporary file of its own beside the one that
it writes. For as long as the writer lives, it holds a lock on `.NAME.RANDOM.writer`, which the
operating system frees when the process dies. A process number in the name would say nothing about
writers in other containers or on other machines, and may be used again. `sweep_leftovers` removes
what has a free lock.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from repnet.errors import InputError, first_line

NEW, OLD = "new", "old"  # of `replace_directory`
_LARGEST_JSON = 16_000_000  # bytes; Python objects take up to twenty times as many


def write_atomically(
    path: str | Path, write: Callable[[Path], object], check: Callable[[Path], object] | None = None
) -> None:
    """Write a temporary file beside `path`, flush it to the disk, open it again, then rename it.

    Args:
        path: of the file; its directory is made.
        write: writes the file that it is given.
        check: opens the written file again and raises if it is not right.
    """
    path = Path(path)
    with reserve(path) as directory:
        temporary = directory / path.name
        write(temporary)
        temporary.chmod(0o644)  # some writers make private files
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.replace(path)
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def reserve(path: Path) -> Iterator[Path]:
    """Yield a new directory beside `path` for what is to take its place; remove it afterwards.

    What killed writers of the same `path` have left is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(path.parent, path.name)
    descriptor, lock = _new_lock(path)
    directory = lock.with_suffix(".tmp")
    try:
        directory.mkdir()
        yield directory
    finally:
        os.close(descriptor)
        _clean_up(directory)


def replace_directory(temporary: Path, target: Path) -> None:
    """Let the directory `NEW` in `temporary` take the place of `target`, which moves to `OLD`.

    If it fails, `target` is as it was; if the process dies halfway, `sweep_leftovers` puts it back.

    Args:
        temporary: from `reserve`.
        target: beside `temporary`.
    """
    (temporary / OLD).mkdir()
    try:
        if target.exists():
            target.rename(temporary / OLD / target.name)
        (temporary / NEW).rename(target)
    except OSError:
        _put_back(temporary)
        raise


def sweep_leftovers(directory: str | Path, name: str | None = None) -> None:
    """Remove what killed processes were writing to `directory`.

    What a live process writes stays, and so does everything on file systems without locks.

    Args:
        directory: need not exist.
        name: of the file or directory that they wrote; None for all.
    """
    what = "*" if name is None else glob.escape(name)
    for lock in Path(directory).glob(f".{what}.{'?' * 8}.writer"):
        with suppress(OSError), lock.open("rb+") as file:  # another process may have removed it
            if lock_file(file):
                _clean_up(lock.with_suffix(".tmp"))


def lock_file(file: IO[Any] | int, *, wait: bool = False) -> bool:
    """Return whether this process has the file now; the system frees it when the process dies."""
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _new_lock(path: Path) -> tuple[int, Path]:
    """Return a descriptor that holds a lock, and its file, beside `path`."""
    while True:
        descriptor, name = tempfile.mkstemp(".writer", f".{path.name}.", path.parent)
        lock_file(descriptor, wait=True)
        if Path(name).exists():
            return descriptor, Path(name)
        os.close(descriptor)  # a sweep found it before it was locked


def _clean_up(temporary: Path) -> None:
    _put_back(temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    if not temporary.exists():  # else the next sweep tries again
        temporary.with_suffix(".writer").unlink(missing_ok=True)


def _put_back(temporary: Path) -> None:
    """Undo `replace_directory` if it was broken off halfway."""
    if (temporary / NEW).exists():
        for old in (temporary / OLD).glob("*"):
            target = temporary.parent / old.name
            if target.is_dir() and not any(target.iterdir()):  # Hydra makes it before a job
                target.rmdir()
            if not target.exists():
                old.rename(target)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as JSON, atomically; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def finite(data: Any) -> Any:
    """Return plain data with None for NaN and infinity, and lists for tuples."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, list | tuple) else data


def read_json(path: str | Path) -> Any:
    """Return the contents of a JSON file of any origin.

    Raises:
        InputError: it is damaged, or so large that nobody wrote it for this purpose.
    """
    path = Path(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise InputError(f"'{path}' has more than {_LARGEST_JSON:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged: {first_line(error)}") from error


def refuse_compressed(path: str | Path) -> None:
    """Refuse a zip file whose contents are larger than itself, such as a file of torch never is.

    Raises:
        InputError: a record is compressed.
    """
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"'{path}' is compressed: its '{record.filename}' of {record.compress_size:,} "
                    f"bytes unfolds to {record.file_size:,}. Unpack it, and save it with torch.save"
                )


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
