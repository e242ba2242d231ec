"""What a set of weights is: whose names it has, train or deploy form, which network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from repnet.errors import InputError
from repnet.weights.layouts import FORMATS, LAYOUTS, OWN, Layout
from repnet.weights.own import neutral_keys
from repnet.weights.reading import COUNTER, Chosen, Source, are_keys_of, describe, read

SHOWN = 5  # keys that a message names


@dataclass(frozen=True)
class Weights:
    """Weights of any origin under neutral names (`repnet.weights.layouts`).

    Args:
        name: what messages call them.
        tensors: by neutral name.
        origins: neutral name -> name in the file; a created tensor has none.
        format: one of `FORMATS`.
        chosen: which of the file's sets of weights they are.
    """

    name: str
    tensors: Mapping[str, Tensor]
    origins: Mapping[str, str]
    format: str
    chosen: Chosen

    @property
    def created(self) -> int:
        """Counters of batches that the file lacks."""
        return len(self.tensors) - len(self.origins)

    @property
    def form(self) -> str:
        """`train`, `deploy`, or `mixed` where only some blocks are folded."""
        return form_of(self.tensors)

    @property
    def family(self) -> str | None:
        """`repvgg`, `mobileone`, `resnet`, `blocks` (ACNet's or DBB's, anywhere), or None."""
        return family_of(self.tensors)


def read_weights(
    source: Source,
    *,
    ema: bool | None = None,
    source_format: str | None = None,
    prefix: str | None = None,
    like: Collection[str] = (),
) -> Weights:
    """Return weights of any origin, after finding out whose names they have.

    Args:
        source: path, or state dict.
        ema: as in `repnet.load_weights`.
        source_format: one of `FORMATS`; None to detect it from the keys.
        prefix: as in `repnet.load_weights`.
        like: keys of a model; weights that have them are in repnet's format.

    Raises:
        InputError: nothing to read, or its keys are of no known format, or of several.
    """
    chosen = read(source, ema=ema, prefix=prefix, like=like)
    name = describe(source)
    state = _with_counters(chosen.state)
    if source_format is None and are_keys_of(state, like):
        source_format = OWN
    found, names = _neutral_names(state, source_format, name)
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for key, neutral in names.items():
        if neutral in tensors:
            raise InputError(f"{name} holds '{neutral}' twice; the second time as '{key}'")
        tensors[neutral] = state[key]
        if key in chosen.state:
            origins[neutral] = key
    return Weights(name, tensors, origins, found, chosen)


def form_of(keys: Collection[str]) -> str:
    """Return the form that neutral keys say."""
    parts = {key.partition("/")[2].rpartition(".")[0] for key in keys if "/" in key}
    folded = {part for part in parts if part.rpartition(".")[2] == "folded"}
    branches = {p for p in parts - folded if not p.startswith("attention.")}
    if folded and branches:
        return "mixed"
    if folded or branches:
        return "deploy" if folded else "train"
    return "train" if any(key.endswith(".running_mean") for key in keys) else "deploy"


def family_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which family of networks neutral names and shapes belong to, None for another."""
    inside = [key for key in tensors if "/" in key]
    if not inside:
        return _plain_family(tensors)
    if any(part in key for key in inside for part in ("/dbb.", "/ac.")):
        return "blocks"
    if "stem/" not in {key[:5] for key in inside} or any("/" not in k for k in _network(tensors)):
        return None
    main = [tensors[key] for key in inside if key.endswith(MAIN)]
    # MobileOne alternates with pointwise blocks, RepVGG has none.
    return "mobileone" if any(weight.shape[2:] == (1, 1) for weight in main) else "repvgg"


def _plain_family(keys: Collection[str]) -> str | None:
    """Return the family without blocks that has all these neutral names."""
    plain = {
        family: layout
        for families in LAYOUTS.values()
        for family, layout in families.items()
        if layout.is_plain
    }
    return next((f for f, layout in plain.items() if all(map(layout.theirs, keys))), None)


MAIN = ("/kxk.0.conv.weight", "/folded.weight")  # the kernel that says a block's shape


def keys_text(keys: Collection[str]) -> str:
    """Return some keys for a message, and how many there are."""
    listed = ", ".join(f"'{key}'" for key in list(keys)[:SHOWN])
    return f"{listed} and {len(keys) - SHOWN} more" if len(keys) > SHOWN else listed


def _network(keys: Collection[str]) -> list[str]:
    return [key for key in keys if key.startswith(("stem", "stages"))]


def _neutral_names(
    state: Mapping[str, Tensor], source_format: str | None, name: str
) -> tuple[str, dict[str, str]]:
    """Return the format of a state dict, and the neutral name of each of its keys."""
    if source_format is not None and source_format not in FORMATS:
        raise InputError(f"unknown format '{source_format}'. Choose one of: {', '.join(FORMATS)}")
    if odd := [key for key in state if "/" in key]:
        raise InputError(f"{name} has names that no module has: {keys_text(odd)}")
    own = neutral_keys(state)
    if source_format == OWN:
        return OWN, own
    read_as: dict[tuple[str, str], dict[str, str | None]] = {}
    claims: dict[str, set[str]] = {}  # format -> keys that name parts of its network
    if source_format is None and _plain_family(own.values()):
        return OWN, own
    for plain in (False, True):  # blocks are recognized in any network, plain ones too
        for fmt, families in LAYOUTS.items():
            for family, layout in families.items() if source_format in (None, fmt) else ():
                names = _names(state, layout) if layout.is_plain == plain else {}
                if inside := {key for key, neutral in names.items() if _is_part(neutral, plain)}:
                    claims[fmt] = claims.get(fmt, set()) | inside
                    read_as[fmt, family] = names
        if claims:
            break
        if source_format is None and any("/" in neutral for neutral in own.values()):
            return OWN, own
    if not claims:
        raise InputError(_why_unknown(state, source_format, name))
    claimed = set().union(*claims.values())
    fitting = {
        (fmt, family): {key: neutral for key, neutral in names.items() if neutral}
        for (fmt, family), names in read_as.items()
        if None not in names.values() and claims[fmt] == claimed
    }
    if not fitting:
        own_inside = {key for key, neutral in own.items() if "/" in neutral}
        raise InputError(_why_none(name, read_as, {OWN: own_inside, **claims}))
    for (fmt, family), neutral in fitting.items():  # folded, two families may have the same names
        if len(fitting) == 1 or family_of({n: state[key] for key, n in neutral.items()}) == family:
            return fmt, neutral
    raise InputError(f"{name} may be any of {', '.join(map(str, fitting))}; pass source_format")


def _is_part(neutral: str | None, plain: bool) -> bool:
    """Return whether a neutral name is of a block, or of a stage in a plain network."""
    return neutral is not None and (neutral.startswith("stages.") if plain else "/" in neutral)


def _names(state: Collection[str], layout: Layout) -> dict[str, str | None]:
    """Return the neutral name of each key, None for those that the layout does not know."""
    names = {key: layout.neutral(key) for key in state}
    places = {n.partition("/")[0] for n in names.values() if n and "/" in n}
    for key, neutral in names.items():
        # Where other keys pass as they are, those inside a block must still be parts of it.
        if neutral == key and any(key.startswith(f"{place}.") for place in places):
            names[key] = None
    return names


def _why_unknown(state: Collection[str], source_format: str | None, name: str) -> str:
    wanted = f"the format '{source_format}'" if source_format else "any known format"
    for key in state:
        first, _, rest = key.partition(".")
        layouts = [layout for families in LAYOUTS.values() for layout in families.values()]
        if any(_is_part(layout.neutral(rest), layout.is_plain) for layout in layouts):
            return (
                f"{name} has no keys of {wanted} but, such as '{key}', inside '{first}'; "
                f"prefix='{first}.' takes only those"
            )
    return f"{name} has no keys of {wanted} ({', '.join(FORMATS)}); it has {keys_text(list(state))}"


def _why_none(
    name: str,
    read_as: Mapping[tuple[str, str], Mapping[str, str | None]],
    claims: Mapping[str, Collection[str]],
) -> str:
    (fmt, family), names = min(
        read_as.items(), key=lambda item: sum(neutral is None for neutral in item[1].values())
    )
    unknown = [key for key, neutral in names.items() if neutral is None] or list(names)
    for key in unknown:
        for part, what in LAYOUTS[fmt][family].refused.items():
            if part in key.split("."):
                return f"{name} does not fit: '{key}' is {what}, which repnet's {family} lacks"
    for other, keys in claims.items():
        if other != fmt and (theirs := [key for key in unknown if key in keys]):
            known = next(key for key in names if key in claims[fmt])
            return (
                f"{name} mixes formats: '{known}' is a name of {fmt}, '{theirs[0]}' of {other}; "
                "it was converted only in part, take the original"
            )
    return (
        f"{name} is in the format '{fmt}' but has keys that this format does not have: "
        f"{keys_text(unknown)}; it belongs to another network"
    )


def _with_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the counters of batches that old files lack."""
    norms = [k.removesuffix("running_mean") for k in state if k.endswith("running_mean")]
    counters = {f"{norm}{COUNTER}": torch.tensor(0) for norm in norms}
    return {**state, **{key: new for key, new in counters.items() if key not in state}}
