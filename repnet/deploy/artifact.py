"""The deploy model as files: `model.safetensors` (weights) and `model.json` (all the rest)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repnet.deploy.description import (
    DESCRIPTION,
    EXPORT_KEYS,
    FORMAT,
    VERSION,
    WEIGHTS,
    check_hashes,
    class_names,
    read_description,
    total,
)
from repnet.deploy.device import usable_device
from repnet.deploy.exported import ExportedFile, is_exported
from repnet.deploy.folded_layers import changed_layers, with_layers
from repnet.errors import InputError, one_line
from repnet.files import sha256, write_atomically, write_json
from repnet.outline import outline
from repnet.spec import MODEL_PACKAGES, build, is_own, is_plain


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
        "exports": [{key: export[key] for key in EXPORT_KEYS} for export in exports],
        **{key: value for key, value in extras.items() if value is not None},
    }
    write_json(directory / DESCRIPTION, {**description, "sha256": total(description)})


def load_deployed(
    path: str | Path, *, trust: Sequence[str] = (), device: str | torch.device = "cpu"
) -> nn.Module:
    """Return the deploy model of a directory, or one of its exported files, ready to be called.

    Of a directory or its `model.safetensors` this is the network, in evaluation mode. It runs no
    code from the files: the network is built from repnet's own classes, or those of packages in
    `trust`, and its weights are plain tensors. Any other file runs in its own runtime, and gives
    float32 logits on the CPU. The hash of what is loaded is checked. `description` of the result is
    the contents of `model.json`, and `class_names` are the names of its outputs.

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
    device = usable_device(device)
    if is_exported(path):
        return ExportedModel(path, trust=trust, device=str(device))
    directory = path.parent if path.name in (WEIGHTS, DESCRIPTION) else path
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
    model.class_names = class_names(description)  # type: ignore[assignment]
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
    """An `ExportedFile` as a module: images to float32 logits `(batch, classes)` on the CPU.

    Args:
        path: of the file, beside `model.json`.
        trust: with "native", files that are code may be loaded.
        device: where it runs.

    Raises:
        InputError: as `ExportedFile`.
    """

    def __init__(self, path: str | Path, *, trust: Sequence[str] = (), device: str = "cpu") -> None:
        super().__init__()
        self.file = ExportedFile(path, trust=trust, device=device)
        self.description = self.file.description
        self.class_names = self.file.class_names
        self.precision = self.file.precision
        self.input_is_uint8 = self.file.input_is_uint8

    def forward(self, images: Tensor) -> Tensor:
        return self.file(images)
