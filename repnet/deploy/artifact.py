"""The deploy model as files: `model.safetensors` (weights) and `model.json` (all the rest)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repnet.checkpoint import FORMAT as CHECKPOINT_FORMAT
from repnet.deploy.device import usable_device
from repnet.deploy.folded_layers import changed_layers, with_layers
from repnet.errors import InputError, one_line
from repnet.files import finite, read_json, sha256, write_atomically, write_json
from repnet.outline import outline
from repnet.spec import MODEL_PACKAGES, build, is_own, is_plain

FORMAT = "repnet-deploy"
VERSION = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
REPORT, PAGE = "report.json", "report.html"

_LARGEST_INPUT = 64_000_000  # values of an image: RGB of 4,600 x 4,600 pixels
_EXPORT_KEYS = ("format", "precision", "file", "files", "preprocess")


def save_deployed(
    model: nn.Module,
    directory: str | Path,
    *,
    architecture: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    equivalence: dict[str, Any] | None = None,
    exports: Sequence[dict[str, Any]] = (),
    reports: Sequence[str] = (),
) -> None:
    """Write a folded model so that `load_deployed` gives it back from these files alone.

    Args:
        model: as `reparameterize` returned it.
        directory: made if it is not there; an artefact in it is replaced.
        architecture: plain data that builds the train form (`repnet.spec`); None where the model
            was made by `create_model` or loaded from a checkpoint, and so knows it.
        data: plain data: input shape, normalization, class names.
        provenance: plain data: where the weights come from.
        equivalence: plain data: what was measured between the two forms.
        exports: of files that lie in `directory` already: `format`, `precision`, `file`, `files`,
            `preprocess` of each.
        reports: other files that lie in `directory` already, whose hashes are kept as well.

    Raises:
        InputError: the architecture is unknown, does not fit the model, or is not plain data; the
            weights cannot be written.
    """
    directory = Path(directory)
    architecture = architecture or getattr(model, "architecture", None)
    if architecture is None:
        raise InputError(
            "save_deployed needs architecture={'_target_': 'package.Model', ...}: this model was "
            "not made by repnet.create_model, so that its class alone does not say how to build it"
        )
    extras = {"data": data, "provenance": provenance, "equivalence": equivalence}
    for key, value in {"architecture": architecture, **extras}.items():
        if not is_plain(value):
            raise InputError(
                f"save_deployed: {key} must be plain data (dicts, lists, numbers, text)"
            )
    layers = changed_layers(architecture, model)
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    state = {key: value.contiguous() for key, value in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(directory / WEIGHTS, lambda path: save_file(state, path), load_file)
    except SafetensorError as error:  # a full disk
        raise InputError(f"cannot write '{directory / WEIGHTS}': {error}") from error
    files = [WEIGHTS, *(file for export in exports for file in export["files"]), *reports]
    description = {
        "format": FORMAT,
        "version": VERSION,
        "form": "partial" if getattr(model, "reparameterized", None) == "keep" else "deploy",
        "architecture": {"train_form": architecture, "layers": layers},
        "hashes": {file: sha256(directory / file) for file in files},
        "exports": [{key: export[key] for key in _EXPORT_KEYS} for export in exports],
        **{key: value for key, value in extras.items() if value is not None},
    }
    write_json(directory / DESCRIPTION, {**description, "sha256": _sum(description)})


def load_deployed(
    path: str | Path, *, trust: Sequence[str] = (), device: str | torch.device = "cpu"
) -> nn.Module:
    """Return the deploy model of a directory, or one of its exported files, ready to be called.

    Of a directory or its `model.safetensors` this is the network, in evaluation mode. It runs no
    code from the files: the network is built from repnet's own classes, or those of packages in
    `trust`, and its weights are plain tensors. Any other file runs in its own runtime, and gives
    float32 logits on the CPU. The hash of what is loaded is checked, and `description` of the
    result is the contents of `model.json`.

    Args:
        path: directory with `model.json`, or a file in it.
        trust: names of packages that may be imported to build the network; "native" for files that
            are code (torch.export, AOTInductor, TensorRT).
        device: where it runs.

    Raises:
        InputError: files are missing, changed, of another format or a newer version; the device or
            the runtime is not there.
    """
    path = Path(path)
    own = path.name in (WEIGHTS, DESCRIPTION)
    device = usable_device(device)
    inside = (path / DESCRIPTION).is_file()
    if not own and not inside and (path.parent / DESCRIPTION).is_file():
        return ExportedModel(path, trust=trust, device=str(device))
    directory = path.parent if own else path
    description = read_description(directory)
    check_hashes(directory, description, [WEIGHTS])
    architecture = description["architecture"]
    try:
        model = _without_weights(architecture, directory / WEIGHTS, trust)
        # Cloned, because safetensors returns unaligned views, whose results differ in the last bit.
        state = {key: value.clone() for key, value in load_file(directory / WEIGHTS).items()}
        model.load_state_dict(state, strict=True, assign=True)
    except InputError as error:
        raise InputError(f"'{directory}': {error}") from error
    except Exception as error:  # what the files describe may be anything
        raise InputError(
            f"'{directory}' does not describe its own weights: {one_line(error)}"
        ) from error
    model.architecture = architecture["train_form"]
    model.description = description  # type: ignore[assignment]
    model.input_is_uint8 = False  # type: ignore[assignment]
    return model.to(device).eval()


def _without_weights(
    architecture: dict[str, Any], weights: Path, trust: Sequence[str]
) -> nn.Module:
    """Return a network for weights to be assigned to; refuse one of quite another size."""
    spec, layers = architecture["train_form"], architecture["layers"]
    allowed = (*MODEL_PACKAGES, *trust)
    if not is_own(spec):  # trusted, and may hold tensors that are not among its weights
        return with_layers(build(spec, allowed=allowed), layers)
    tensors, elements = extent(weights)
    return outline(
        spec, allowed=allowed, tensors=tensors, elements=elements,
        change=lambda model: with_layers(model, layers),
    )  # fmt: skip


def extent(weights: Path) -> tuple[int, int]:
    """Return how many tensors a safetensors file holds, and how many elements, from its header."""
    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    return len(shapes), sum(math.prod(shape) for shape in shapes)


class ExportedModel(nn.Module):
    """An exported file of an artefact, run by its own runtime.

    It maps images `(batch, channels, height, width)`, normalized floats or, where `input_is_uint8`,
    the pixels themselves, to float32 logits `(batch, classes)` on the CPU.

    Args:
        path: of the file, beside `model.json`.
        trust: with "native", files that are code may be loaded.
        device: where it runs.

    Raises:
        InputError: the artefact does not have this file, it was changed, its runtime is missing, or
            it is code and not trusted.
    """

    def __init__(self, path: str | Path, *, trust: Sequence[str] = (), device: str = "cpu") -> None:
        from repnet.deploy.formats import ExportError, format_named

        super().__init__()
        path = Path(path)
        description = read_description(path.parent)
        listed = description.get("exports")
        entries = (
            [e for e in listed if path.name in files_of(e)] if isinstance(listed, list) else []
        )
        if not entries:
            raise InputError(
                f"'{path.parent / DESCRIPTION}' does not list '{path.name}', so that nobody "
                "verified it"
            )
        entry = entries[0]
        chosen = format_named(entry["format"])
        file = path.with_name(entry["file"])
        check_hashes(path.parent, description, entry["files"])
        used = {part.relative_to(path.parent).as_posix() for part in chosen.contents(file)}
        if unlisted := sorted(used - set(entry["files"])):
            raise InputError(
                f"'{path.parent / DESCRIPTION}' does not list '{unlisted[0]}', so that nobody "
                "verified it"
            )
        if chosen.native and "native" not in trust:
            raise InputError(
                f"'{path}' is code, which can do whatever you can; if you made it or know who "
                "did, pass trust=['native'] (commands: --trust native). model.safetensors and ONNX "
                "files hold no code"
            )
        chosen.require()
        self.description = description
        self.precision = str(entry["precision"])
        self.input_is_uint8 = bool(entry["preprocess"])
        try:
            self.runner = chosen.load(file, precision=self.precision, device=device)
        except ExportError as error:
            raise InputError(f"'{path}' cannot be run: {error}") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.runner(images)


def _sum(description: dict[str, Any]) -> str:
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
    if not isinstance(entry, dict) or not set(_EXPORT_KEYS) <= entry.keys():
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
            hint = f" (it is a {CHECKPOINT_FORMAT} in train form; deploy it first with deploy.py)"
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
    if expected is not None and expected != _sum(description):
        raise InputError(f"'{path}' was changed after it was written: its own sum does not fit")
    missing = [
        key for key in ("architecture", "hashes") if not isinstance(description.get(key), dict)
    ]
    if missing or {"train_form", "layers"} - description["architecture"].keys():
        raise InputError(f"'{path}' is incomplete")
    return description
