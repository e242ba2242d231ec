"""Objects described by plain data: `{"_target_": "repnet.models.RepVGG", "depths": [1, 2], ...}`.

The same description stands in a config, in a checkpoint and in a deploy file. Data that came out of
a file is built with `allowed` packages only: nothing else is imported or called.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from repnet.errors import InputError

_PACKAGE = Path(__file__).parent
# A wheel carries the configs inside the package; in a checkout they stand beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

MODEL_PACKAGES = ("repnet.models", "repnet.blocks", "repnet.layers")
# One by one: what packs or writes data is not built from a file.
DATA_PACKAGES = (
    "repnet.data.augment",
    "repnet.data.batch_augment",
    "repnet.data.digits",
    "repnet.data.fake",
    "repnet.data.folder",
    "repnet.data.huggingface",
    "repnet.data.shards",
    "repnet.data.torchvision",
)

# Trust in these would allow a file to run anything, so that no message proposes it.
_LIBRARIES = {*sys.stdlib_module_names, "torch", "torchvision"}


def choices(group: str) -> list[str]:
    """Return the names in a config group, `configs/GROUP/NAME.yaml`."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def load_choice(group: str, name: str) -> dict[str, Any]:
    """Return the plain data of `configs/GROUP/NAME.yaml`.

    Raises:
        InputError: there is no such file; the message lists those that exist.
    """
    names = choices(group)
    if name not in names:
        raise InputError(unknown_name(group, name, names))
    return yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8"))


def unknown_name(kind: str, name: str, names: Sequence[str]) -> str:
    """Return the message for a name that is not among `names`, with the nearest that is."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {kind} '{name}'{hint} Choose one of: {', '.join(names) or '(none)'}".replace(
        "' Choose", "'. Choose"
    )


def build(spec: Any, *, allowed: Iterable[str] | None = None) -> Any:
    """Return what `spec` describes; a dict with `_target_` becomes a call, all else stays data.

    `_partial_: true` binds the arguments without calling, `_args_` are positional. The returned
    object of a call at the top keeps `spec` as its attribute `architecture` if it is a module and
    `spec` is plain data, so that it can be saved.

    Args:
        spec: nested dicts, lists and scalars.
        allowed: packages that targets must be defined in; None for the user's own config, where
            anything importable is. All targets are checked before the first is called.

    Raises:
        InputError: a target does not exist, is not allowed, or does not take these arguments.
    """
    packages = None if allowed is None else tuple(allowed)
    found = resolve_targets(spec, None if packages is None else lambda part: packages)
    targets = {target.name: target.call for target in found}
    built = _build(spec, targets)
    if targets and hasattr(built, "register_buffer") and is_plain(spec):
        built.architecture = spec
    return built


def is_plain(data: Any) -> bool:
    """Return whether `data` holds only what a checkpoint may hold beside tensors."""
    if isinstance(data, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in data.items())
    if isinstance(data, list | tuple):
        return all(is_plain(v) for v in data)
    return data is None or isinstance(data, bool | int | float | str)


class Target(NamedTuple):
    """One description, and what it names."""

    path: str  # dotted, of the description
    name: str
    call: Callable[..., Any]
    arguments: dict[Any, Any]


def resolve_targets(
    spec: Any, allowed: Callable[[str], Sequence[str]] | None = None
) -> list[Target]:
    """Return all that `spec` describes, without a call.

    Args:
        spec: nested dicts, lists and scalars.
        allowed: returns the packages that targets under a key at the top of `spec` must be defined
            in; None for the user's own config.

    Raises:
        InputError: a target does not exist, or is not allowed; names all packages that are not.
    """
    described = list(described_in(spec))
    names = {
        (str(part["_target_"]), None if allowed is None else tuple(allowed(path.partition(".")[0])))
        for path, part in described
    }
    _check_names(sorted(names, key=str))  # all, before the first import, which runs code too
    calls = {(name, packages): _resolve(name, packages) for name, packages in names}
    targets = []
    for path, part in described:
        name = str(part["_target_"])
        packages = None if allowed is None else tuple(allowed(path.partition(".")[0]))
        arguments = {k: v for k, v in part.items() if not str(k).startswith("_")}
        targets.append(Target(path, name, calls[name, packages], arguments))
    return targets


def described_in(spec: Any, path: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every dict with a `_target_`, with the dotted path to it."""
    if isinstance(spec, dict):
        if "_target_" in spec:
            yield path, spec
        items: Iterable[tuple[Any, Any]] = spec.items()
    elif isinstance(spec, list | tuple):
        items = enumerate(spec)
    else:
        return
    for key, value in items:
        yield from described_in(value, f"{path}.{key}" if path else str(key))


def is_own(spec: Any) -> bool:
    """Return whether a description names nothing but networks of repnet, which need no trust."""
    return all(within(str(part["_target_"]), MODEL_PACKAGES) for _, part in described_in(spec))


def home_of(found: Any) -> str:
    """Return the module that defines a class or function."""
    return getattr(found, "__module__", None) or ""


def _build(spec: Any, targets: dict[str, Callable[..., Any]]) -> Any:
    if isinstance(spec, list | tuple):
        return [_build(value, targets) for value in spec]
    if not isinstance(spec, dict):
        return spec
    values = {k: _build(v, targets) for k, v in spec.items() if k not in ("_target_", "_partial_")}
    if "_target_" not in spec:
        return values
    name = str(spec["_target_"])
    args = values.pop("_args_", [])
    if special := [k for k in values if not isinstance(k, str) or k.startswith("_")]:
        raise InputError(f"{name}: unknown key '{special[0]}'; known are _partial_ and _args_")
    partial = bool(spec.get("_partial_"))
    try:
        signature = inspect.signature(targets[name])
        (signature.bind_partial if partial else signature.bind)(*args, **values)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from error
    except ValueError:
        pass  # a builtin without a signature
    if partial:
        return functools.partial(targets[name], *args, **values)
    try:
        return targets[name](*args, **values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise InputError(f"{name}: {error}") from error


def _check_names(names: Iterable[tuple[str, tuple[str, ...] | None]]) -> None:
    """Refuse names by their spelling alone, each with the packages that it may come from."""
    refused = []
    for target, allowed in names:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
            raise InputError(f"'{target}' is not the dotted name of a class or function")
        if allowed is not None and not within(_root(target), [_root(name) for name in allowed]):
            refused.append(target)
    if refused:
        foreign = sorted({_root(name) for name in refused} - _LIBRARIES)
        authors = "its author" if len(foreign) == 1 else "their authors"
        raise InputError(
            f"{', '.join(map(repr, refused))} may not be built from a file, which could run any "
            "code"
            + (f". If you trust {authors}, add trust=[{','.join(foreign)}]" if foreign else "")
        )


def _root(name: str) -> str:
    return name.partition(".")[0]


def _resolve(target: str, allowed: tuple[str, ...] | None) -> Callable[..., Any]:
    """Return the class or function that `target` names, checked as an object, not as a spelling."""
    found = _locate(target)
    if allowed is not None:
        plain = inspect.isclass(found) or inspect.isfunction(found)
        home = home_of(found)
        name = getattr(found, "__qualname__", "")
        if not plain or not within(home, allowed) or "." in name or name.startswith("_"):
            raise InputError(
                f"'{target}' may not be built from a file: it is {home}.{name}, which is not a "
                f"public class or function of {', '.join(allowed)}"
            )
    if not callable(found):
        raise InputError(f"'{target}' is not a class or function")
    return found


def _locate(target: str) -> Any:
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (
                module_name == error.name or module_name.startswith(error.name + ".")
            ):
                continue
            raise InputError(f"cannot import '{module_name}': {error}") from error
        for part in parts[end:]:
            if not hasattr(found, part):
                names = [n for n in dir(found) if not n.startswith("_")]
                nearest = difflib.get_close_matches(part, names, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
                raise InputError(f"'{target}': {module_name} has no '{part}'{hint}")
            found = getattr(found, part)
        return found
    raise InputError(f"'{target}': there is no module '{parts[0]}'")


def within(name: str, packages: Sequence[str]) -> bool:
    """Return whether a dotted name is one of `packages`, or inside one."""
    return any(name == p or name.startswith(f"{p}.") for p in packages)
