"""repnet's own keys: branches are numbered in the order in which a block's `Sum` holds them.

A branch that a shape rules out has no number, so that what a number means depends on the block's
other branches. All other formats name the branches, as the neutral keys of `layouts` do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from repnet.errors import InputError

_BRANCH = re.compile(r"(?P<place>.+?)\.conv\.(?P<index>\d+)(\.(?P<leaf>.+))?\.(?P<tensor>\w+)")
_FOLDED = re.compile(r"(?P<place>.+?)\.conv\.(?P<tensor>weight|bias)")
_ATTENTION = re.compile(r"(?P<place>.+)\.(?P<part>attention\.fc[12])\.(?P<tensor>weight|bias)")

# Branches of Diverse Branch Block: neutral name of each module -> its place in the branch.
_DEEP = {
    "dbb.deep.identity": "0.1",  # beside the identity, in a sum
    "dbb.deep.first": "0",
    "dbb.deep.pad": "1.norm",
    "dbb.deep.second": "2",
    "dbb.deep.bn": "3",
}
_AVERAGE = {"dbb.average.conv": "0", "dbb.average.pad": "1.norm", "dbb.average.bn": "3"}
_DEPTHWISE_AVERAGE = {"dbb.average.bn": "1"}
_ORDER = (
    *("dbb.origin", "dbb.pointwise", "dbb.deep", "dbb.average"),
    *("ac.square", "ac.vertical", "ac.horizontal"),
)

Branch = Mapping[str, Tensor]  # module inside a branch -> its weight


def _conv_bn(branch: str) -> dict[str, str]:
    return {f"{branch}.conv": "conv", f"{branch}.bn": "bn"}


def neutral_keys(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the neutral name of each of repnet's own keys; blocks of other kinds stay as they are.

    Args:
        state: with repnet's keys; kernel sizes tell what the branches are.
    """
    blocks: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, value in state.items():
        if (match := _BRANCH.fullmatch(key)) and match["tensor"] == "weight":
            blocks[match["place"]][int(match["index"])][match["leaf"] or ""] = value
    parts = {
        place: _parts([branches[index] for index in sorted(branches)])
        for place, branches in blocks.items()
        if sorted(branches) == list(range(len(branches)))
    }
    names = {}
    for key in state:
        names[key] = key
        if match := _BRANCH.fullmatch(key):
            found = parts.get(match["place"], {}).get((int(match["index"]), match["leaf"] or ""))
            if found is not None:
                names[key] = f"{match['place']}/{found}.{match['tensor']}"
        elif match := _FOLDED.fullmatch(key):
            if f"{match['place']}.conv.bias" in state:  # a convolution before a norm has none
                names[key] = f"{match['place']}/folded.{match['tensor']}"
        elif match := _ATTENTION.fullmatch(key):
            names[key] = f"{match['place']}/{match['part']}.{match['tensor']}"
    return names


def own_keys(keys: Collection[str], like: Collection[str] = ()) -> dict[str, str]:
    """Return repnet's name of each neutral key.

    Args:
        keys: neutral, of the whole network.
        like: keys of the model to load; where it has the branches of a block under the block's own
            name, and not under `conv`, so does the result.

    Raises:
        InputError: the branches of a block do not fit together.
    """
    parts: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        if "/" in key:
            place, _, part = key.partition("/")
            parts[place].add(part.rpartition(".")[0])
    prefixes = {key[: match.start()] for key in like for match in re.finditer(r"\.", key)}
    modules: dict[str, dict[str, str]] = {}
    for place, found in parts.items():
        bare = place in prefixes and f"{place}.conv" not in prefixes
        conv = place if bare else f"{place}.conv"
        modules[place] = _modules(place, found, conv)
    names = {}
    for key in keys:
        place, slash, part = key.partition("/")
        module, _, tensor = part.rpartition(".")
        names[key] = f"{modules[place][module]}.{tensor}" if slash else key
    return names


def _parts(branches: Sequence[Branch]) -> dict[tuple[int, str], str]:
    """Return what each module of each branch is; empty for blocks that nobody else has."""
    if any("1.norm" in branch for branch in branches):
        return _diverse_parts(branches)
    norms = [set(branch) == {""} and branch[""].ndim == 1 for branch in branches]
    convolutions = branches[:-1] if norms[-1] else branches
    if not convolutions or any(set(branch) != {"conv", "bn"} for branch in convolutions):
        return {}
    sizes = [tuple(branch["conv"].shape[2:]) for branch in convolutions]
    size = sizes[0]
    if not norms[-1] and size[0] > 1 and sizes == [size, (size[0], 1), (1, size[0])]:
        roles = ["ac.square", "ac.vertical", "ac.horizontal"]
    else:
        equal = sizes.count(size)
        if sizes[equal:] not in ([], [(1, 1)]) or set(sizes[:equal]) != {size}:
            return {}
        roles = [f"kxk.{n}" for n in range(equal)] + ["pointwise"] * (len(sizes) - equal)
    found = {
        (index, leaf): part
        for index, role in enumerate(roles)
        for part, leaf in _conv_bn(role).items()
    }
    return found | ({(len(roles), ""): "identity"} if norms[-1] else {})


def _diverse_parts(branches: Sequence[Branch]) -> dict[tuple[int, str], str]:
    found: dict[tuple[int, str], str] = {}
    for index, branch in enumerate(branches):
        if set(branch) == {"conv", "bn"}:
            modules = _conv_bn("dbb.pointwise" if index else "dbb.origin")
        elif "2" in branch:
            modules = _DEEP
        else:
            modules = _AVERAGE if "0" in branch else _DEPTHWISE_AVERAGE
        found |= {(index, leaf): part for part, leaf in modules.items() if leaf in branch}
    return found


def _modules(place: str, found: set[str], conv: str) -> dict[str, str]:
    """Return the module of each part of one block."""
    branches = {part for part in found if not part.startswith("attention.")}
    folded = {part for part in branches if part.rpartition(".")[2] == "folded"}
    kinds = {part.partition(".")[0] for part in branches - folded}
    mixed = len(kinds & {"dbb", "ac"}) + bool(kinds - {"dbb", "ac"}) > 1
    if mixed or (folded and len(branches) > 1):
        raise InputError(
            f"the block '{place}' has parts that do not belong to one block: "
            f"{', '.join(sorted(branches))}"
        )
    names = dict.fromkeys(folded, conv)
    names |= {part: f"{place}.{part}" for part in found - branches}
    numbers = sorted({int(part.split(".")[1]) for part in branches if part.startswith("kxk.")})
    if numbers != list(range(len(numbers))):
        raise InputError(
            f"the block '{place}' has the convolution branches {', '.join(map(str, numbers))}; "
            "some are missing"
        )
    order = [*(f"kxk.{n}" for n in numbers), "pointwise", "identity", *_ORDER]
    present = [b for b in order if any(p == b or p.startswith(f"{b}.") for p in branches)]
    average = _AVERAGE if "dbb.average.conv" in branches else _DEPTHWISE_AVERAGE
    for index, branch in enumerate(present):
        leaves = {"identity": "", **_conv_bn(branch), **_DEEP, **average}
        for part in branches:
            if part == branch or part.startswith(f"{branch}."):
                names[part] = f"{conv}.{index}.{leaves[part]}".removesuffix(".")
    return names
