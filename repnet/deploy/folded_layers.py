"""The layers that folding changed, as plain data, and the network with them put in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from repnet.errors import InputError
from repnet.spec import build

_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_TRANSPOSED = (*_CONVOLUTION, "output_padding")

# What folding puts in the place of blocks and norms, and the settings that describe it.
_LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv1d": (nn.Conv1d, _CONVOLUTION),
    "Conv2d": (nn.Conv2d, _CONVOLUTION),
    "Conv3d": (nn.Conv3d, _CONVOLUTION),
    "ConvTranspose1d": (nn.ConvTranspose1d, _TRANSPOSED),
    "ConvTranspose2d": (nn.ConvTranspose2d, _TRANSPOSED),
    "ConvTranspose3d": (nn.ConvTranspose3d, _TRANSPOSED),
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "ZeroPad2d": (nn.ZeroPad2d, ("padding",)),
    "Identity": (nn.Identity, ()),
}


def changed_layers(architecture: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a description of each layer of `model` that its train form does not have.

    Raises:
        InputError: the architecture does not fit the model.
    """
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
        rebuilt = with_layers(original, layers).state_dict()
    state = model.state_dict()
    wrong = [
        key
        for key in (*state, *rebuilt)
        if key not in state or key not in rebuilt or state[key].shape != rebuilt[key].shape
    ]
    if wrong:
        raise InputError(f"the architecture does not fit the model at '{wrong[0]}'")
    return layers


def with_layers(model: nn.Module, layers: dict[str, Any]) -> nn.Module:
    """Return the network, changed in place, with the layers that `changed_layers` described."""
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
