"""`Subject`: what is measured, from a model's name, a checkpoint or an artefact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.checkpoint import find_checkpoint, model_from, read_checkpoint
from repnet.deploy.artifact import extent, load_deployed
from repnet.deploy.description import (
    DESCRIPTION,
    WEIGHTS,
    check_hashes,
    files_of,
    image_shape,
    read_description,
    read_report,
)
from repnet.deploy.formats import format_named
from repnet.errors import InputError
from repnet.fold import reparameterize
from repnet.models import create_model, list_models
from repnet.outline import outline
from repnet.spec import MODEL_PACKAGES, build, is_own, unknown_name

_BRANCHES = 20  # times the weights of the deploy form that those of a train form may be


@dataclass(frozen=True)
class Exported:
    """A file of an artefact.

    Args:
        path: of the file.
        format: that runs it.
        precision: of its arithmetic.
        preprocess: whether it takes uint8 images.
        top1: accuracy that `report.json` has of it, a fraction.
    """

    path: Path
    format: str
    precision: str
    preprocess: bool = False
    top1: float | None = None


@dataclass
class Subject:
    """A network in both forms.

    Args:
        name: in tables.
        input_shape: `(channels, height, width)`.
        train_form: in evaluation mode; so are the others.
        deploy_form: folded.
        twin: what the train form must agree with, where it is not of the weights of the deploy
            form: those of an artefact are gone.
        exports: files of an artefact.
        top1: accuracies of the two forms that `report.json` has, fractions.
        preprocessing: mean, std and resize of the files that take uint8 images.
        notes: what to know of the numbers of a form.
        weights: `random` or `trained`.
    """

    name: str
    input_shape: tuple[int, ...]
    train_form: nn.Module
    deploy_form: nn.Module
    twin: nn.Module | None = None
    exports: list[Exported] = field(default_factory=list)
    top1: dict[str, float] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    weights: str = "trained"

    @property
    def is_artifact(self) -> bool:
        return self.twin is not None

    def export_of(self, format: str, precision: str) -> Exported | None:
        """Return the file of a format and a precision, None where there is none."""
        for export in self.exports:
            if (export.format, export.precision) == (format, precision):
                return export
        return None


def find_subject(text: str, *, size: int = 224, trust: Sequence[str] = ()) -> Subject:
    """Return what a command line names.

    Args:
        text: a name of `repnet.list_models()`, an artefact's directory, a checkpoint, or a run.
        size: height and width of the images of a named model, in pixels.
        trust: packages that may be imported to build a network of a file.

    Raises:
        InputError: there is no such model, file or directory, or it cannot be loaded.
    """
    path = Path(text)
    if text in list_models():
        return _from_name(text, size)
    if (path / DESCRIPTION).is_file():
        return _from_artifact(path, trust)
    if path.exists():
        if (path.parent / DESCRIPTION).is_file():
            raise InputError(f"'{path}' is a file of an artefact; pass its directory")
        return _from_checkpoint(path, trust)
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"there is no model, artefact or checkpoint '{text}'")
    raise InputError(unknown_name("model", text, list_models()))


def _from_name(name: str, size: int) -> Subject:
    torch.manual_seed(0)
    shape = (3, size, size)
    train_form = randomize(create_model(name))
    deploy_form = reparameterize(train_form, _example(shape))
    return Subject(name, shape, train_form, deploy_form, weights="random")


def _from_checkpoint(path: Path, trust: Sequence[str]) -> Subject:
    contents = read_checkpoint(path)
    found = find_checkpoint(path)
    train_form = model_from(contents, found, trust=trust).eval()
    shape = image_shape(contents["repnet"].get("data"), found)
    run = found.parent.parent if found.parent.name == "checkpoints" else found
    return Subject(run.name, shape, train_form, reparameterize(train_form, _example(shape)))


def _from_artifact(directory: Path, trust: Sequence[str]) -> Subject:
    description = read_description(directory)
    data = description.get("data") or {}
    shape = image_shape(data, directory)
    deploy_form = load_deployed(directory, trust=trust)
    report = read_report(directory, description) or {}
    measured = {
        (entry.get("format"), entry.get("precision")): entry.get("top1")
        for entry in report.get("exports") or []
    }
    try:
        exports = [
            Exported(
                directory / Path(entry["file"]).name, entry["format"], entry["precision"],
                entry["preprocess"], measured.get((entry["format"], entry["precision"])),
            )
            for entry in description.get("exports") or []
            if "native" in trust or not format_named(entry["format"]).native
        ]  # fmt: skip
        for entry in description.get("exports") or []:
            if not files_of(entry):
                raise InputError(f"'{directory / DESCRIPTION}' lists its exports wrongly")
            check_hashes(directory, description, entry["files"])
    except (KeyError, TypeError) as error:
        raise InputError(f"'{directory / DESCRIPTION}' lists its exports wrongly") from error
    # The artefact holds no weights of the train form, and its speed does not depend on them.
    spec = description["architecture"]["train_form"]
    allowed = (*MODEL_PACKAGES, *trust)
    if is_own(spec):
        tensors, elements = extent(directory / WEIGHTS)
        outline(spec, allowed=allowed, tensors=tensors, elements=elements, factor=_BRANCHES)
    torch.manual_seed(0)
    train_form = randomize(build(spec, allowed=allowed))
    top1 = {
        name: metrics["top1"]
        for name, metrics in (report.get("metrics") or {}).items()
        if metrics.get("top1") is not None
    }
    return Subject(
        _artifact_name(directory), shape, train_form, deploy_form,
        twin=reparameterize(train_form, _example(shape)),
        exports=exports, top1=top1,
        preprocessing={key: data.get(key) for key in ("mean", "std", "resize")},
        notes=dict.fromkeys(("train", "train_compiled"), "random weights"),
    )  # fmt: skip


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Return `model` in evaluation mode with random statistics and affine of its batch norms.

    At their defaults, a fold that ignored them would pass for right.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model.eval()


def _example(shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(2, *shape)


def _artifact_name(directory: Path) -> str:
    """Return `RUN` of `RUN/deploy`, which says more."""
    directory = directory.resolve()
    return directory.parent.name if directory.name == "deploy" else directory.name
