"""State dicts out of files of any origin, without running code from them."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repnet.errors import InputError
from repnet.files import refuse_compressed

Source = str | Path | Mapping[str, Any]

# Under what names training scripts keep weights: Lightning, timm, Apple and mmengine; many; and
# super-gradients.
_RAW = ("state_dict", "model", "model_state_dict", "net")
_EMA = ("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema_net", "ema")
# The same inside one state dict, and what wrappers put in front.
_RAW_PREFIXES = ("model.", "module.", "net.")
_EMA_PREFIXES = ("model_ema.", "ema_model.", "ema_net.", "ema.")
COUNTER = "num_batches_tracked"  # the buffer of batch norm that files of old torch versions lack
_AVERAGES = {"n_averaged", "steps"}  # of torch's and mmengine's averaged models


@dataclass(frozen=True)
class Chosen:
    """One set of weights out of those that a file holds.

    Args:
        state: their tensors, without wrappers' prefixes.
        ema: whether they are an average over training.
        entry: where in the file they are, empty for the file itself.
        unused: the other set, if there are two.
    """

    state: dict[str, Tensor]
    ema: bool
    entry: str
    unused: str | None = None


def read(
    source: Source,
    *,
    ema: bool | None = None,
    prefix: str | None = None,
    like: Collection[str] = (),
) -> Chosen:
    """Return the weights that a file or a state dict holds, in whatever wrapper.

    Args:
        source: path of a torch or safetensors file, or its contents.
        ema: True for the average over training, False for the weights that were trained, None for
            the average where there is one.
        prefix: take only the keys that begin with it, and remove it.
        like: keys of a model; those that are exactly these have no wrapper.

    Raises:
        InputError: not such a file, nothing that looks like weights, or not those asked for.
    """
    name = describe(source)
    contents = source if isinstance(source, Mapping) else _load(source)
    if prefix is None and isinstance(contents, Mapping) and "repnet" in contents:
        prefix = "model."  # of the network in repnet's checkpoints; an objective may have weights
    if not isinstance(contents, Mapping):
        kind = type(contents).__name__
        raise InputError(
            f"{name} holds a {kind}, not a state dict; save model.state_dict() instead"
        )
    unwrapped = prefix is None and are_keys_of(contents, like)
    raw, average = (("", contents), None) if unwrapped else _sets(contents, name)
    if ema is True and average is None:
        raise InputError(f"{name} holds no EMA weights; leave ema out to take what it holds")
    if ema is False and raw is None:
        raise InputError(f"{name} holds EMA weights only; leave ema out to take them")
    takes_average = average is not None and ema is not False
    taken, other = (average, raw) if takes_average else (raw, average)
    assert taken is not None
    entry, state = taken
    return Chosen(
        state=_unwrapped(state, prefix, name, like),
        ema=takes_average,
        entry=entry,
        unused=other[0] if other else None,
    )


def describe(source: Source) -> str:
    """Return what messages call a source."""
    return "the state dict" if isinstance(source, Mapping) else f"'{source}'"


def without_counters(keys: Collection[str]) -> set[str]:
    """Return the keys that are not counters of batches."""
    return {key for key in keys if str(key).rpartition(".")[2] != COUNTER}


def are_keys_of(keys: Collection[str], like: Collection[str]) -> bool:
    """Return whether `keys` are those of the model `like`, counters of batches aside."""
    return bool(like) and without_counters(keys) == without_counters(like)


def _load(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        kind = "a directory, not a file" if path.is_dir() else "not there"
        if (path / "model.json").is_file():
            kind += "; it holds a deploy model, which is not trained: use RUN/checkpoints/best.ckpt"
        raise InputError(f"'{path}' is {kind}")
    with path.open("rb") as file:
        start = file.read(9)
    refuse_compressed(path)
    safetensors = start[8:] == b"{"  # after 8 bytes of length, a JSON header
    if not safetensors and start[:1] != b"\x80" and start[:2] != b"PK":  # a pickle, a zip file
        raise InputError(f"'{path}' is neither a torch nor a safetensors file")
    try:
        if safetensors:
            # Cloned: safetensors returns views that may be unaligned.
            return {key: value.clone() for key, value in load_file(path).items()}
        # Opened here, because torch.load reads a path that ends in .safetensors as such.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"'{path}' was not loaded: it holds {repr(found[1]) if found else 'something else'}, "
            "and loading it could run code. Save its tensors alone, where you trust it: "
            "torch.save(model.state_dict(), ...)"
        ) from error
    except (
        *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
        SafetensorError,
    ) as error:
        reason = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise InputError(f"'{path}' is damaged or truncated: {reason}") from error


Named = tuple[str, Mapping[str, Any]]  # where it stands in a file, and the set of weights


def _sets(contents: Mapping[str, Any], name: str) -> tuple[Named | None, Named | None]:
    """Return the trained and the averaged weights, each with the name of its entry."""
    if not contents:
        raise InputError(f"{name} is empty")
    entry = contents.get("ema")
    if isinstance(entry, Mapping) and entry.get("saved") in ("ema", "raw"):  # of EMAWeights
        keys = {"raw": "state_dict_raw", "ema": "state_dict_ema", entry["saved"]: "state_dict"}
        sets = [(keys[kind], contents[keys[kind]]) for kind in ("raw", "ema")]
        return sets[0], sets[1]
    raw = [(key, contents[key]) for key in _RAW if isinstance(contents.get(key), Mapping)]
    average = [(key, contents[key]) for key in _EMA if isinstance(contents.get(key), Mapping)]
    if not raw and not average:
        return _split(contents)
    for kind in (raw, average):
        if len(kind) > 1:
            entries = " and ".join(f"'{key}'" for key, _ in kind)
            raise InputError(
                f"{name} holds several sets of weights, {entries}; pass the one that you want, "
                "the state dict itself"
            )
    if raw and average and average[0][0] == "ema_state_dict" and "steps" in average[0][1]:
        raw, average = average, raw  # mmengine's EMAHook saves them exchanged
    if raw and not average:
        entry, state = raw[0]
        inside = _split(state)
        if inside[1] is not None:
            trained, averaged = ((f"{entry}.{n[0]}", n[1]) if n else None for n in inside)
            return trained, averaged
    return (raw[0] if raw else None), (average[0] if average else None)


def _split(state: Mapping[str, Any]) -> tuple[Named | None, Named | None]:
    """Divide a state dict that holds the network and its average side by side."""
    keys = [key for key in state if isinstance(key, str)]
    prefix = next((p for p in _EMA_PREFIXES if any(k.startswith(p) for k in keys)), None)
    if prefix is None:
        return ("", state), None
    average = {k.removeprefix(prefix): state[k] for k in keys if k.startswith(prefix)}
    raw = {k: v for k, v in state.items() if not (isinstance(k, str) and k.startswith(prefix))}
    return (("", raw) if raw else None), (prefix, average)


def _unwrapped(
    state: Mapping[str, Any], prefix: str | None, name: str, like: Collection[str]
) -> dict[str, Tensor]:
    """Return the tensors of a state dict under the names that the network itself gives them."""
    if prefix is not None:
        state = {k: v for k, v in state.items() if isinstance(k, str) and k.startswith(prefix)}
        if not state:
            raise InputError(f"{name} has no key that begins with '{prefix}'")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{name} is not a state dict: {key!r} is of type {type(value).__name__}, "
                "not a tensor"
            )
    names = {key: key.removeprefix(prefix or "") for key in state}
    if are_keys_of(names.values(), like):
        return {new: state[key].detach() for key, new in names.items()}
    names = {key: re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", new) for key, new in names.items()}
    while True:
        rest = {key for key, new in names.items() if new not in _AVERAGES}
        found = next((p for p in _RAW_PREFIXES if all(names[k].startswith(p) for k in rest)), None)
        if not rest or found is None:
            break
        names = {key: names[key].removeprefix(found) for key in rest}
    if not names:
        raise InputError(f"{name} is empty")
    wrapped = next(
        (p for p in _RAW_PREFIXES if any(new.startswith(p) for new in names.values())), None
    )
    if wrapped:
        outside = next(key for key, new in names.items() if not new.startswith(wrapped))
        raise InputError(
            f"{name} has keys under '{wrapped}' and others, such as '{outside}'; "
            f"prefix='{wrapped}' takes only the former"
        )
    tensors = {new: state[key].detach() for key, new in names.items()}
    if len(tensors) < len(names):
        seen: dict[str, str] = {}
        for key, new in names.items():
            if new in seen:
                raise InputError(f"{name} holds '{new}' twice, as '{seen[new]}' and as '{key}'")
            seen[new] = key
    return tensors
