"""Training checkpoints: tensors and plain data, written atomically, loaded without running code.

A checkpoint is what Lightning saves (so that it resumes), with one more entry, `repnet`: format,
version, form, and the run's config, which describes the model (`repnet.spec`).
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repnet.errors import InputError, one_line
from repnet.files import refuse_compressed, write_atomically
from repnet.outline import outline
from repnet.spec import MODEL_PACKAGES, build, is_own

FORMAT = "repnet-checkpoint"
VERSION = 1
MODEL_PREFIX = "model."  # of the network's keys in the LightningModule's state dict


def describe(config: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return the `repnet` entry of a checkpoint.

    Args:
        config: the run's whole config as plain data; `config["model"]` describes the network.
        data: what the network was trained on: input shape, normalization, class names.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "form": "train",
        "config": config,
        "data": data,
    }


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write `checkpoint` atomically, and read it back as `load_checkpoint` would."""
    write_atomically(
        path,
        lambda temporary: torch.save(checkpoint, temporary),
        lambda temporary: torch.load(temporary, weights_only=True, mmap=True, map_location="cpu"),
    )


def load_checkpoint(
    path: str | Path, *, trust: Sequence[str] = ()
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a checkpoint in its train form, on the CPU, and the run's config.

    Runs no code from the file: it is unpickled as tensors and plain data only, and the network is
    built from classes of repnet's models, blocks and layers, or of packages in `trust`.

    Args:
        path: of a `.ckpt` file, or of a run directory, whose best checkpoint is taken.
        trust: names of packages that may be imported to build the network.

    Raises:
        InputError: no such file, damaged, of another format, or it asks for anything else.
    """
    contents = read_checkpoint(path)
    return model_from(contents, path, trust=trust), contents["repnet"]["config"]


def model_from(
    contents: dict[str, Any], path: str | Path, *, trust: Sequence[str] = ()
) -> nn.Module:
    """Return the network that the contents of a checkpoint describe.

    Args:
        contents: of `read_checkpoint`.
        path: for messages.
        trust: as in `load_checkpoint`.

    Raises:
        InputError: the description is not allowed, or the weights do not fit it.
    """
    spec = contents["repnet"]["config"].get("model")
    allowed = (*MODEL_PACKAGES, *trust)
    values = [value for value in contents["state_dict"].values() if isinstance(value, torch.Tensor)]
    elements = sum(value.numel() for value in values)
    try:
        if is_own(spec):  # the code of those is trusted
            outline(spec, allowed=allowed, tensors=len(values), elements=elements)
        model = build(spec, allowed=allowed)
    except RecursionError as error:
        raise InputError(f"{path}: the description of its network is nested too deeply") from error
    except Exception as error:  # the arguments came out of the file too, and may be anything
        raise InputError(f"{path}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{path}: its 'model' entry does not describe a network")
    load_network(model, contents, path)
    return model


def choose_weights(
    contents: dict[str, Any], path: str | Path, weights: str | None
) -> dict[str, Any]:
    """Return a checkpoint with the set of weights that is asked for as its state dict.

    Args:
        contents: of `read_checkpoint`.
        path: for messages.
        weights: "ema" for the average over training, "raw" for the weights that were trained; None
            for the set that was validated and saved.

    Raises:
        InputError: the checkpoint lacks it.
    """
    if weights not in (None, "ema", "raw"):
        raise InputError(f"weights={weights} is not one of ema, raw")
    saved = (contents.get("ema") or {}).get("saved", "raw")
    if weights in (None, saved):
        return contents
    if not isinstance(contents.get(f"state_dict_{weights}"), dict):
        raise InputError(
            f"'{path}' holds no {weights} weights, only {saved} ones; leave out weights={weights}"
        )
    return {**contents, "state_dict": contents[f"state_dict_{weights}"]}


def load_network(model: nn.Module, contents: dict[str, Any], path: str | Path) -> None:
    """Load the weights of a checkpoint into the network that it describes.

    Args:
        model: changed in place.
        contents: of `read_checkpoint`.
        path: for messages.

    Raises:
        InputError: the weights do not fit.
    """
    state = {
        str(key).removeprefix(MODEL_PREFIX): value
        for key, value in contents["state_dict"].items()
        if str(key).startswith(MODEL_PREFIX)
    }
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: its weights do not fit its network: {one_line(error)}"
        ) from error


def find_checkpoint(path: str | Path, name: str = "best") -> Path:
    """Return the checkpoint file that `path` is or, for a run directory, holds.

    Raises:
        InputError: there is none; says what there is instead.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "model.json").exists():
            raise InputError(
                f"'{path}' holds a deploy model, which is folded already; a checkpoint in train "
                "form is wanted (RUN/checkpoints/best.ckpt). To use it: repnet.load_deployed"
            )
        inside = path if path.name == "checkpoints" else path / "checkpoints"
        checkpoint = inside / f"{name}.ckpt"
        if not checkpoint.exists():
            raise InputError(f"'{path}' holds no checkpoint: there is no '{checkpoint}'")
        return checkpoint
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint '{path}'; pass a file such as "
            "RUN/checkpoints/best.ckpt, or the run's directory"
        )
    exported = path.suffix != ".ckpt" and (path.parent / "model.json").is_file()
    if exported or path.suffix in (".safetensors", ".json"):
        raise InputError(
            f"'{path}' belongs to a deploy model; a checkpoint in train form (.ckpt) is wanted"
        )
    return path


def find_valid_checkpoint(directory: str | Path) -> tuple[Path, str]:
    """Return the checkpoint to continue a run from, and why it is not the last one, or ''.

    It is `last.ckpt`; where that is missing or cannot be read, the newest one that can.

    Args:
        directory: that holds the checkpoints of one run.

    Raises:
        InputError: there is none, or none can be read; says what is wrong with each.
    """
    directory = Path(directory)
    last = directory / "last.ckpt"
    others = sorted(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    problems = []
    if last not in others:
        problems.append(f"'{last}' does not exist")
    for path in sorted(others, key=lambda path: path != last):
        if problem := problem_of(path):
            problems.append(problem)
        else:
            return path, "; ".join(problems)
    raise InputError(f"there is nothing to resume: {'; '.join(problems)}")


def problem_of(path: str | Path) -> str:
    """Return why a checkpoint cannot be read, or ''; every byte is read."""
    try:
        read_checkpoint(path)
        _check_sums(Path(path))
    except InputError as error:
        return str(error)
    return ""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the contents of a repnet checkpoint, tensors on the CPU.

    Raises:
        InputError: no such file, damaged, of another format or a newer version, or it holds
            anything but tensors and plain data.
    """
    path = find_checkpoint(path)
    refuse_compressed(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"'{found[1]}'" if found else "something else"
        if found is None and not _looks_pickled(path):
            raise InputError(f"'{path}' is not a checkpoint, or it is damaged") from error
        raise InputError(
            f"'{path}' was not loaded: it holds {what}, and loading it could run code. A repnet "
            "checkpoint holds only tensors and plain data"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = f": {str(error).splitlines()[0].split('. ')[0]}" if len(str(error)) > 9 else ""
        raise InputError(f"'{path}' is damaged, truncated or no checkpoint{reason}") from error
    entry = contents.get("repnet") if isinstance(contents, dict) else None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        kind = "holds no dict"
        if isinstance(contents, dict):
            kind = f"has the keys {', '.join(map(str, list(contents)[:6])) or '(none)'}"
        raise InputError(f"'{path}' is not a repnet checkpoint: it {kind}")
    version = entry.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(
            f"'{path}' has format version {version}, this repnet reads up to {VERSION}; upgrade"
        )
    if entry.get("form") != "train":
        raise InputError(f"'{path}' is in {entry.get('form')} form; the train form is wanted")
    if not isinstance(entry.get("config"), dict) or not isinstance(
        contents.get("state_dict"), dict
    ):
        raise InputError(f"'{path}' is incomplete: it lacks a config or weights")
    refuse_expanded(contents["state_dict"], path)
    return contents


def _check_sums(path: Path) -> None:
    """Raise where a byte of a tensor changed, which `torch.load` does not notice."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():
                raise InputError(f"'{path}' is damaged: the checksum of '{name}' is wrong")


def refuse_expanded(state: Mapping[str, Any], path: Path) -> None:
    """Refuse tensors that are views of far less memory, as all of them are copied.

    Raises:
        InputError: together they have ten times as many bytes as the file.
    """
    values = [value for value in state.values() if isinstance(value, torch.Tensor)]
    claimed, held = sum(v.numel() * v.element_size() for v in values), path.stat().st_size
    if claimed > 10 * held:
        raise InputError(
            f"'{path}' of {held:,} bytes describes weights of {claimed:,} bytes; it is damaged, or "
            "was made to fill the memory"
        )


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"  # the pickle protocol's first byte
