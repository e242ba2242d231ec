"""The deploy model as files: `model.safetensors` (weights) and `model.json` (all the rest)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from repnet.checkpoint import FORMAT as CHECKPOINT_FORMAT
from repnet.errors import InputError
from repnet.files import sha256, write_atomically, write_json
from repnet.spec import MODEL_PACKAGES, build, is_plain

FORMAT = "repnet-deploy"
VERSION = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"

# What folding puts in the place of blocks and norms, and the settings that describe it.
_LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    ),
    "ConvTranspose2d": (
        nn.ConvTranspose2d,
        (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "output_padding",
            "dilation",
            "groups",
        ),
    ),
    "ZeroPad2d": (nn.ZeroPad2d, ("padding",)),
    "Identity": (nn.Identity, ()),
}


def save_deployed(
    model: nn.Module,
    directory: str | Path,
    *,
    architecture: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    equivalence: dict[str, Any] | None = None,
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

    Raises:
        InputError: the architecture is unknown, does not fit the model, or is not plain data.
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
    layers = _changed_layers(architecture, model)
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    state = {key: value.contiguous() for key, value in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS, lambda path: save_file(state, path), load_file)
    write_json(
        directory / DESCRIPTION,
        {
            "format": FORMAT,
            "version": VERSION,
            "form": "deploy",
            "architecture": {"train_form": architecture, "layers": layers},
            "hashes": {WEIGHTS: sha256(directory / WEIGHTS)},
            **{key: value for key, value in extras.items() if value is not None},
        },
    )


def load_deployed(directory: str | Path, *, trust: Sequence[str] = ()) -> nn.Module:
    """Return the deploy model of a directory, on the CPU, in evaluation mode.

    Runs no code from the files: the network is built from repnet's own classes, or those of
    packages in `trust`, and its weights are plain tensors whose hash is checked.

    Args:
        directory: with `model.safetensors` and `model.json`.
        trust: names of packages that may be imported to build the network.

    Raises:
        InputError: files are missing, changed, of another format or a newer version.
    """
    description = read_description(directory)
    weights = Path(directory) / WEIGHTS
    if not weights.exists():
        raise InputError(f"'{directory}' has no {WEIGHTS}")
    expected = description["hashes"].get(WEIGHTS)
    if sha256(weights) != expected:
        raise InputError(
            f"'{weights}' was changed after it was verified: its SHA-256 is not "
            f"that in {DESCRIPTION}"
        )
    architecture = description["architecture"]
    try:
        model = build(architecture["train_form"], allowed=(*MODEL_PACKAGES, *trust))
        model = _with_layers(model, architecture["layers"])
        # Cloned, because safetensors returns unaligned views, whose results differ in the last bit.
        state = {key: value.clone() for key, value in load_file(weights).items()}
        model.load_state_dict(state, strict=True, assign=True)
    except InputError as error:
        raise InputError(f"'{directory}': {error}") from error
    except Exception as error:  # what the files describe may be anything
        raise InputError(f"'{directory}' does not describe its own weights: {error}") from error
    model.architecture = architecture["train_form"]
    return model.eval()


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
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"'{path}' is not the description of a repnet deploy model")
    version = description.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise InputError(
            f"'{path}' has format version {version}, this repnet reads up to {VERSION}"
        )
    missing = [
        key for key in ("architecture", "hashes") if not isinstance(description.get(key), dict)
    ]
    if missing or {"train_form", "layers"} - description["architecture"].keys():
        raise InputError(f"'{path}' is incomplete")
    return description


def _changed_layers(architecture: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a description of each layer of `model` that its train form does not have."""
    with torch.device("meta"):
        original = build(architecture)
    modules = dict(original.named_modules(remove_duplicate=False))
    layers: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(not n or name.startswith(f"{n}.") for n in layers):
            continue
        twin = modules.get(name)
        if twin is None:
            raise InputError(f"the architecture has no '{name}', which the model has")
        if type(module) is not type(twin) or _settings(module) != _settings(twin):
            settings = _settings(module)
            if settings is None:
                raise InputError(
                    f"'{name}' is a {type(module).__name__}, which folding does not make"
                )
            layers[name] = settings
    with torch.device("meta"):
        rebuilt = _with_layers(original, layers).state_dict()
    state = model.state_dict()
    wrong = [
        key
        for key in (*state, *rebuilt)
        if key not in state or key not in rebuilt or state[key].shape != rebuilt[key].shape
    ]
    if wrong:
        raise InputError(f"the architecture does not fit the model at '{wrong[0]}'")
    return layers


def _with_layers(model: nn.Module, layers: dict[str, Any]) -> nn.Module:
    for name, settings in layers.items():
        layer = _build_layer(settings)
        if not name:
            return layer
        model.set_submodule(name, layer)
    return model


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """Return a layer as plain data, None for one that folding does not make."""
    name = type(module).__name__
    if type(module) is nn.Sequential and any(isinstance(m, nn.ZeroPad2d) for m in module):
        return {"type": "Sequential", "layers": [_settings(m) for m in module]}
    cls, keys = _LAYERS.get(name, (None, ()))
    if type(module) is not cls:
        return None
    settings: dict[str, Any] = {"type": name}
    for key in keys:
        value = getattr(module, key)
        settings[key] = list(value) if isinstance(value, tuple) else value
    if hasattr(module, "bias"):
        settings["bias"] = module.bias is not None
    return settings


def _build_layer(settings: dict[str, Any]) -> nn.Module:
    kind = settings["type"]
    if kind == "Sequential":
        return nn.Sequential(*(_build_layer(s) for s in settings["layers"]))
    if kind not in _LAYERS:
        raise InputError(f"unknown layer type '{kind}'")
    cls, keys = _LAYERS[kind]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "type"}
    if unknown := set(values) - {*keys, "bias"}:
        raise InputError(f"unknown setting of {kind}: {', '.join(sorted(unknown))}")
    return cls(**values)
