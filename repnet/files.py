"""Writing files so that a reader finds the old one or the whole new one, never half of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # some writers make private files
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


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


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
