"""`convert_weights`: the same tensors under the names of another library."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from repnet.errors import InputError
from repnet.weights.architecture import WIDE_STEM, block_shapes
from repnet.weights.identify import Weights, keys_text, read_weights
from repnet.weights.layouts import FORMATS, LAYOUTS, OWN
from repnet.weights.own import own_keys
from repnet.weights.reading import Source


def convert_weights(
    source: Source,
    *,
    to: str,
    ema: bool | None = None,
    source_format: str | None = None,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """Return the weights of a file or a state dict under the names of another library.

    Tensors are renamed, never changed, and share their memory with a state dict that is passed.
    Counters of batches that the source lacks are added as 0, as all libraries want them.

    Args:
        source: as in `repnet.load_weights`.
        to: one of `repnet.weights.FORMATS`; `official` are the names of each paper's own
            repository.
        ema: as in `repnet.load_weights`.
        source_format: as in `repnet.load_weights`.
        prefix: as in `repnet.load_weights`.

    Raises:
        InputError: the source cannot be read, or `to` has no names for some of its tensors.

    Example:
        >>> state = convert_weights("RepVGG-A0-train.pth", to="timm")
        >>> timm.create_model("repvgg_a0").load_state_dict(state)
    """
    weights = read_weights(source, ema=ema, source_format=source_format, prefix=prefix)
    return renamed(weights, to)


def renamed(weights: Weights, to: str) -> dict[str, Tensor]:
    """Return weights under the names of the format `to`.

    Raises:
        InputError: there is no such format, or it has no names for some of the tensors.
    """
    if to not in FORMATS:
        raise InputError(f"unknown format '{to}'. Choose one of: {', '.join(FORMATS)}")
    names = own_keys(weights.tensors) if to == OWN else _their_keys(weights, to)
    return {names[key]: value for key, value in weights.tensors.items()}


def _their_keys(weights: Weights, to: str) -> Mapping[str, str]:
    family = weights.family
    start = f"{weights.name} cannot be converted to the format '{to}'"
    if family is None:
        raise InputError(
            f"{start}: it is no RepVGG, MobileOne, ResNet, ACNet or Diverse Branch Block network "
            "with blocks of that kind, or its folded convolutions do not say what blocks they were"
        )
    layout = LAYOUTS[to].get(family)
    if layout is None:
        raise InputError(
            f"{start}: that format has names for {', '.join(LAYOUTS[to])} only, this is {family}"
        )
    if to == "super-gradients":
        _check_super_gradients(weights, start)
    names = {key: layout.theirs(key) for key in weights.tensors}
    if nameless := [weights.origins.get(key, key) for key, name in names.items() if name is None]:
        raise InputError(f"{start}: it has no names for {keys_text(nameless)}")
    known = {key: name for key, name in names.items() if name is not None}
    if len(set(known.values())) < len(known):
        raise InputError(f"{start}: several tensors would have the same name")
    return known


def _check_super_gradients(weights: Weights, start: str) -> None:
    """Raise for shapes that its RepVGG cannot have."""
    stem, first, *others = block_shapes(weights.tensors)
    if stem.out_channels != first.out_channels:
        raise InputError(f"{start}: {stem.out_channels} channels in the stem. {WIDE_STEM}")
    if grouped := [shape.place for shape in others if shape.groups > 1]:
        raise InputError(f"{start}: its convolutions have no groups, '{grouped[0]}' has")
