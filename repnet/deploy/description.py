"""`model.json`, the description of a deploy model, and the hashes in it; needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from repnet.errors import InputError
from repnet.files import finite, read_json, sha256
from repnet.text import printable

FORMAT = "repnet-deploy"
VERSION = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
REPORT, PAGE = "report.json", "report.html"

_LARGEST_INPUT = 64_000_000  # values of an image: RGB of 4,600 x 4,600 pixels
EXPORT_KEYS = ("format", "precision", "file", "files", "preprocess")


def total(description: dict[str, Any]) -> str:
    """Return the hash of all else in `model.json`, in whatever layout it is written."""
    plain = json.dumps(finite(description), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def check_hashes(directory: Path, description: dict[str, Any], files: Sequence[str]) -> None:
    """Compare files of an artefact with the hashes in its description.

    Raises:
        InputError: one is missing, or was changed.
    """
    for file in files:
        path = directory / file
        if not path.is_file():
            raise InputError(f"'{directory}' has no {file}")
        if sha256(path) != description["hashes"].get(file):
            raise InputError(
                f"'{path}' was changed after it was verified: its SHA-256 is not that in "
                f"{DESCRIPTION}"
            )


def read_report(directory: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """Return `report.json` of an artefact, None where there is none.

    Raises:
        InputError: it is damaged, or not the one that was written with the artefact.
    """
    if not (directory / REPORT).is_file():
        return None
    check_hashes(directory, description, [REPORT])
    report = read_json(directory / REPORT)
    if not isinstance(report, dict):
        raise InputError(f"'{directory / REPORT}' is damaged: it holds no object")
    return report


def class_names(description: dict[str, Any]) -> list[str] | None:
    """Return the names of a network's outputs as they can be shown, None where nobody gave them."""
    data = description.get("data")
    names = data.get("class_names") if isinstance(data, dict) else None
    return [printable(str(name)) for name in names] if isinstance(names, list | tuple) else None


def image_shape(data: Any, path: Path) -> tuple[int, int, int]:
    """Return `(channels, height, width)` of the images of a network.

    Args:
        data: of its description.
        path: for messages.

    Raises:
        InputError: it does not say, or no such image could be held in memory.
    """
    shape = data.get("input_shape") if isinstance(data, dict) else None
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 3
        or not all(isinstance(length, int) and length > 0 for length in shape)
    ):
        raise InputError(f"'{path}' does not say the shape of its images: input_shape is {shape!r}")
    channels, height, width = shape
    if channels * height * width > _LARGEST_INPUT:
        raise InputError(
            f"'{path}' says that its images have the shape {shape}; more than "
            f"{_LARGEST_INPUT:,} values are not taken"
        )
    return channels, height, width


def files_of(entry: Any) -> list[str]:
    """Return the files of an entry of `exports`, none where it is malformed or leads elsewhere."""
    if not isinstance(entry, dict) or not set(EXPORT_KEYS) <= entry.keys():
        return []
    file, files = entry["file"], entry["files"]
    if not isinstance(files, list):
        return []
    if not all(isinstance(text, str) for text in (file, entry["format"], *files)):
        return []
    if not any(name == file or name.startswith(f"{file}/") for name in files):
        return []
    paths = [PurePosixPath(name) for name in files]
    outside = any(path.is_absolute() or ".." in path.parts for path in paths)
    return [] if outside or PurePosixPath(file).name != file else [*files, file]


def read_description(directory: str | Path) -> dict[str, Any]:
    """Return `model.json` of a deploy directory.

    Raises:
        InputError: it is missing, damaged, of another format or a newer version.
    """
    path = Path(directory) / DESCRIPTION
    if not path.is_file():
        hint = ""
        if Path(directory).suffix == ".ckpt" or (Path(directory) / "checkpoints").is_dir():
            hint = " (it is a repnet-checkpoint in train form; deploy it first with deploy.py)"
        raise InputError(f"'{directory}' is not a deploy model: there is no '{path}'{hint}")
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"'{path}' is not the description of a repnet deploy model")
    version = description.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(
            f"'{path}' has format version {version}, this repnet reads up to {VERSION}"
        )
    expected = description.pop("sha256", None)  # those of older versions have none
    if expected is not None and expected != total(description):
        raise InputError(f"'{path}' was changed after it was written: its own sum does not fit")
    missing = [
        key for key in ("architecture", "hashes") if not isinstance(description.get(key), dict)
    ]
    if missing or {"train_form", "layers"} - description["architecture"].keys():
        raise InputError(f"'{path}' is incomplete")
    return description
