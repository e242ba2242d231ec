"""How others name the tensors of the same networks: tables, read in both directions.

Every tensor has one neutral name, `PLACE/PART.TENSOR`, for instance `stages.0.1/kxk.0.bn.weight`:
block 1 of stage 0, norm of its first convolution branch. What lies outside blocks has no slash
(`head.weight`), and neither have plain convolutions with a norm, so that plain networks such as
ResNet are listed among `others`. A layout says how a library spells places and parts; both
directions come from the same rows. Names are facts of the named repositories, read in November
2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

# What a field of a template stands for.
_FIELDS = {"i": r"\d+", "n": r"\d+", "path": r"[^/]+", "tensor": r"\w+"}


@dataclass(frozen=True)
class Layout:
    """The names that one library gives to one family of networks.

    Args:
        places: neutral name of a block -> theirs.
        parts: neutral name of a module inside a block -> theirs.
        others: neutral name of a key outside blocks -> theirs.
        refused: names of their trained parts that the family's block has not -> what they are.
    """

    places: Mapping[str, str]
    parts: Mapping[str, str]
    others: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _rules(self) -> list[tuple[str, str]]:
        inside = [
            (f"{place}/{part}.{{tensor}}", f"{theirs}.{name}.{{tensor}}")
            for place, theirs in self.places.items()
            for part, name in self.parts.items()
        ]
        return [*inside, *self.others.items()]

    @cached_property
    def _to_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(neutral), theirs) for neutral, theirs in self._rules]

    @cached_property
    def _to_neutral(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), neutral) for neutral, theirs in self._rules]

    @property
    def is_plain(self) -> bool:
        """Whether the network has no multi-branch blocks, whose names would tell it apart."""
        return not self.places

    def theirs(self, key: str) -> str | None:
        """Return their name of a neutral key, None if they have none."""
        return _rename(key, self._to_theirs)

    def neutral(self, key: str) -> str | None:
        """Return the neutral name of their key, None if it is not theirs."""
        return _rename(key, self._to_neutral)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    text = "".join(
        f"(?P<{part}>{_FIELDS[part]})" if index % 2 else re.escape(part)
        for index, part in enumerate(parts)
    )
    return re.compile(text)


def _rename(key: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(key):
            return template.format(**match.groupdict())
    return None


def _places(stem: str, stage: str, first: int = 1) -> dict[str, str]:
    """Return the places of a network with a stem and four stages; `stage` holds `{s}`."""
    stages = {
        f"stages.{s}.{{i}}": f"{stage.replace('{s}', str(s + first))}.{{i}}" for s in range(4)
    }
    return {"stem": stem, **stages}


def _branches(names: Mapping[str, str], norm: str = "bn") -> dict[str, str]:
    """Return the parts of branches that are a convolution and a norm."""
    return {
        f"{part}.{leaf}": f"{name}.{theirs}"
        for part, name in names.items()
        for leaf, theirs in (("conv", "conv"), ("bn", norm))
    }


def _attention(first: str, second: str) -> dict[str, str]:
    return {"attention.fc1": first, "attention.fc2": second}


def _head(name: str) -> dict[str, str]:
    return {"head.{tensor}": f"{name}.{{tensor}}"}


# Diverse Branch Block and ACNet: blocks inside any network, whose other keys stay as they are.
_ANYWHERE = Layout(
    places={"{path}": "{path}"},
    parts={
        **_branches({"dbb.origin": "dbb_origin", "dbb.pointwise": "dbb_1x1"}),
        "dbb.deep.identity": "dbb_1x1_kxk.idconv1",
        "dbb.deep.first": "dbb_1x1_kxk.conv1",
        "dbb.deep.pad": "dbb_1x1_kxk.bn1.bn",
        "dbb.deep.second": "dbb_1x1_kxk.conv2",
        "dbb.deep.bn": "dbb_1x1_kxk.bn2",
        "dbb.average.conv": "dbb_avg.conv",
        "dbb.average.pad": "dbb_avg.bn.bn",
        "dbb.average.bn": "dbb_avg.avgbn",
        "dbb.folded": "dbb_reparam",
        "ac.square.conv": "square_conv",
        "ac.square.bn": "square_bn",
        "ac.vertical.conv": "ver_conv",
        "ac.vertical.bn": "ver_bn",
        "ac.horizontal.conv": "hor_conv",
        "ac.horizontal.bn": "hor_bn",
        "ac.folded": "fused_conv",
    },
    others={"{path}": "{path}"},
)

# ResNets of basic blocks. torchvision and timm use the same names.
_RESNET = Layout(
    places={},
    parts={},
    others={
        "stem.0.conv.{tensor}": "conv1.{tensor}",
        "stem.0.bn.{tensor}": "bn1.{tensor}",
        **{
            f"stages.{s}.{{i}}.{ours}.{{tensor}}": f"layer{s + 1}.{{i}}.{theirs}.{{tensor}}"
            for s in range(4)
            for ours, theirs in (
                ("first.conv.conv", "conv1"),
                ("first.conv.bn", "bn1"),
                ("second.conv.conv", "conv2"),
                ("second.conv.bn", "bn2"),
                ("shortcut.conv", "downsample.0"),
                ("shortcut.bn", "downsample.1"),
            )
        },
        **_head("fc"),
    },
    refused={"conv3": "the third convolution of a bottleneck (ResNet-50 and deeper)"},
)

# format -> family of networks -> layout
LAYOUTS: dict[str, dict[str, Layout]] = {
    # The repository of each paper: DingXiaoH/RepVGG, apple/ml-mobileone,
    # DingXiaoH/DiverseBranchBlock, DingXiaoH/ACNet.
    "official": {
        "repvgg": Layout(
            places=_places("stage0", "stage{s}"),
            parts={
                **_branches({"kxk.0": "rbr_dense", "pointwise": "rbr_1x1"}),
                "identity": "rbr_identity",
                "folded": "rbr_reparam",
                **_attention("se.down", "se.up"),
            },
            others=_head("linear"),
        ),
        "mobileone": Layout(
            places=_places("stage0", "stage{s}"),
            parts={
                **_branches({"kxk.{n}": "rbr_conv.{n}", "pointwise": "rbr_scale"}),
                "identity": "rbr_skip",
                "folded": "reparam_conv",
                **_attention("se.reduce", "se.expand"),
            },
            others=_head("linear"),
        ),
        "blocks": _ANYWHERE,
    },
    "torchvision": {"resnet": _RESNET},  # before timm: of equal names, the first is reported
    "timm": {
        "repvgg": Layout(
            places=_places("stem", "stages.{s}", first=0),
            parts={
                **_branches({"kxk.0": "conv_kxk", "pointwise": "conv_1x1"}),
                "identity": "identity",
                "folded": "reparam_conv",
                **_attention("attn.fc1", "attn.fc2"),
            },
            others=_head("head.fc"),
        ),
        "mobileone": Layout(
            places=_places("stem", "stages.{s}", first=0),
            parts={
                **_branches({"kxk.{n}": "conv_kxk.{n}", "pointwise": "conv_scale"}),
                "identity": "identity",
                "folded": "reparam_conv",
                **_attention("attn.fc1", "attn.fc2"),
            },
            others=_head("head.fc"),
        ),
        "resnet": _RESNET,
    },
    "mmpretrain": {
        "repvgg": Layout(
            places=_places("backbone.stem", "backbone.stage_{s}"),
            parts={
                **_branches({"kxk.0": "branch_3x3", "pointwise": "branch_1x1"}, norm="norm"),
                "identity": "branch_norm",
                "folded": "branch_reparam",
                **_attention("se_layer.conv1.conv", "se_layer.conv2.conv"),
            },
            others=_head("head.fc"),
        ),
        "mobileone": Layout(  # unlike its RepVGG: no underscore in the stages, `se`, `stage0`
            places=_places("backbone.stage0", "backbone.stage{s}"),
            parts={
                **_branches(
                    {"kxk.{n}": "branch_conv_list.{n}", "pointwise": "branch_scale"}, norm="norm"
                ),
                "identity": "branch_norm",
                "folded": "branch_reparam",
                **_attention("se.conv1.conv", "se.conv2.conv"),
            },
            others=_head("head.fc"),
        ),
    },
    "super-gradients": {
        "repvgg": Layout(
            places=_places("stem", "stage{s}"),
            parts={
                **_branches({"kxk.0": "branch_3x3", "pointwise": "branch_1x1"}),
                "identity": "no_conv_branch",
                "folded": "rbr_reparam",
                **_attention("se.down", "se.up"),
            },
            others=_head("linear"),
            refused={
                "alpha": "a trained weight of the 1x1 branch",
                "post_bn": "the norm after the sum of a QARepVGG block",
                "id_tensor": "the identity kernel of a QARepVGG block",
            },
        ),
    },
}

OWN = "repnet"
FORMATS = (OWN, *LAYOUTS)
