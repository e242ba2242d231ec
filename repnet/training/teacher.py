"""`load_teacher`: trained networks of any library, for distillation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from repnet.checkpoint import load_checkpoint
from repnet.deploy.artifact import load_deployed
from repnet.errors import InputError
from repnet.models import create_model
from repnet.weights import load_weights
from repnet.weights.reading import are_keys_of, read

SOURCES = ("torchvision", "timm", "repnet", "deployed")


def load_teacher(
    source: str,
    name: str | None = None,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """Return a trained network on the CPU, in evaluation mode, that takes no gradients.

    Args:
        source: `torchvision` or `timm`: the library whose `name` it is; `repnet`: `name` is one of
            `repnet.list_models()`, or None with a run directory or checkpoint as `weights`;
            `deployed`: `weights` is a directory of `deploy.py`.
        name: of the model.
        weights: path of a torch file (tensors and plain data only), safetensors file or directory;
            None to fetch the library's published weights, which needs a network.
        num_classes: of the model `name`; None for the library's own.
        in_channels: of the image; None for the library's own.

    Raises:
        InputError: unknown source or name, or weights that are not there or do not fit.

    Example:
        >>> load_teacher("torchvision", "resnet50", "resnet50-11ad3fa6.pth")
    """
    if source not in SOURCES:
        raise InputError(f"unknown source '{source}' of a teacher; choose {', '.join(SOURCES)}")
    given = {"num_classes": num_classes, "in_channels": in_channels}
    options = {key: value for key, value in given.items() if value is not None}
    if source in ("repnet", "deployed"):
        teacher = _own(source, name, weights, options)
    elif name is None:
        raise InputError(f"a teacher of {source} needs the name of a model (teacher.name=...)")
    else:
        make = _torchvision if source == "torchvision" else _timm
        teacher = make(name, weights is None, options)
        if weights is not None:
            _load(teacher, weights, f"{source}'s {name}")
    return teacher.requires_grad_(False).eval()


def _own(
    source: str, name: str | None, weights: str | Path | None, options: dict[str, Any]
) -> nn.Module:
    if weights is None:
        raise InputError(f"a teacher of the source '{source}' needs weights=PATH")
    if source == "repnet" and name is not None:
        model = create_model(name, **options)
        load_weights(model, weights)
        return model
    if superfluous := [*(["name"] if name else []), *options]:
        listed = ", ".join(superfluous)
        raise InputError(f"'{weights}' says itself how its network is built; remove {listed}")
    return load_deployed(weights) if source == "deployed" else load_checkpoint(weights)[0]


def _torchvision(name: str, published: bool, options: dict[str, Any]) -> nn.Module:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        raise InputError(f"torchvision has no model '{name}' (torchvision.models.list_models())")
    weights = "DEFAULT" if published else None
    return _made(lambda: get_model(name, weights=weights, **options), name)


def _timm(name: str, published: bool, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError('a teacher of timm needs it: pip install "repnet[timm]"') from error
    if not timm.is_model(name):  # also a name such as hf-hub:..., which would be fetched
        raise InputError(f"timm has no model '{name}' (timm.list_models())")
    if "in_channels" in options:
        options["in_chans"] = options.pop("in_channels")
    return _made(lambda: timm.create_model(name, pretrained=published, **options), name)


def _made(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        with warnings.catch_warnings(action="ignore"):  # GoogLeNet's about its initialization
            return make()
    except OSError as error:
        raise InputError(
            f"the weights of '{name}' cannot be fetched ({error}); pass a file that you have as "
            "teacher.weights=PATH"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot make the teacher '{name}': {error}") from error


def _load(model: nn.Module, weights: str | Path, what: str) -> None:
    target = model.state_dict()
    state = read(weights, like=target).state
    if not are_keys_of(state, target):
        odd = sorted(state.keys() ^ target.keys())
        raise InputError(f"'{weights}' does not hold the weights of {what}: see '{odd[0]}'")
    shapes = [key for key in state if key in target and state[key].shape != target[key].shape]
    if shapes:
        key = shapes[0]
        raise InputError(
            f"'{weights}' does not fit {what}: '{key}' is {tuple(state[key].shape)}, the model's "
            f"{tuple(target[key].shape)}; for another number of classes, set teacher.num_classes"
        )
    # Counters of batches that old files lack do not matter in evaluation.
    model.load_state_dict(state, strict=False)
