"""Weights of others: their names, both ways; what does not fit is refused by name."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.blocks import ACBlock, Block, DiverseBranchBlock, PlainBlock, ResidualBlock
from repnet.errors import InputError
from repnet.fold import reparameterize
from repnet.models import MobileOne, RepVGG, create_model
from repnet.weights import convert_weights, load_weights, read_weights
from repnet.weights.__main__ import main
from repnet.weights.architecture import guess_name
from repnet.weights.layouts import LAYOUTS
from tests.commands import environment
from tests.models import randomize_batch_norm, relative_error

State = dict[str, Tensor]

DEPTHS, WIDTHS = [1, 3, 1, 1], [0.25, 0.25, 0.25, 0.25]
SMALL: dict[str, Callable[..., nn.Module]] = {
    "repvgg": lambda **options: RepVGG(DEPTHS, WIDTHS, squeeze_excitation=True, **options),
    "mobileone": lambda **options: MobileOne(
        DEPTHS, WIDTHS, num_branches=2, squeeze_excitation=[0, 1, 0, 1], **options
    ),
}
IMAGE = (2, 3, 32, 32)

# REFERENCE: names in other repositories, written out a second time and in another shape than the
# tables of the package. Order: stem, block, KxK, 1x1, identity, folded, attention, norm, head.
OTHERS = {
    ("official", "repvgg"): (
        *("stage0", "stage{s1}.{i}", "rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam"),
        *("se.down", "se.up", "bn", "linear"),
    ),
    ("timm", "repvgg"): (
        *("stem", "stages.{s}.{i}", "conv_kxk", "conv_1x1", "identity", "reparam_conv"),
        *("attn.fc1", "attn.fc2", "bn", "head.fc"),
    ),
    ("mmpretrain", "repvgg"): (
        *("backbone.stem", "backbone.stage_{s1}.{i}", "branch_3x3", "branch_1x1", "branch_norm"),
        *("branch_reparam", "se_layer.conv1.conv", "se_layer.conv2.conv", "norm", "head.fc"),
    ),
    ("super-gradients", "repvgg"): (
        *("stem", "stage{s1}.{i}", "branch_3x3", "branch_1x1", "no_conv_branch", "rbr_reparam"),
        *("se.down", "se.up", "bn", "linear"),
    ),
    ("official", "mobileone"): (
        *("stage0", "stage{s1}.{i}", "rbr_conv.{n}", "rbr_scale", "rbr_skip", "reparam_conv"),
        *("se.reduce", "se.expand", "bn", "linear"),
    ),
    ("timm", "mobileone"): (
        *("stem", "stages.{s}.{i}", "conv_kxk.{n}", "conv_scale", "identity", "reparam_conv"),
        *("attn.fc1", "attn.fc2", "bn", "head.fc"),
    ),
    ("mmpretrain", "mobileone"): (
        *("backbone.stage0", "backbone.stage{s1}.{i}", "branch_conv_list.{n}", "branch_scale"),
        *("branch_norm", "branch_reparam", "se.conv1.conv", "se.conv2.conv", "norm", "head.fc"),
    ),
}


def small(family: str, form: str = "train", **options: Any) -> nn.Module:
    """Return a small network in float64 whose weights and statistics are all random."""
    model = randomize_batch_norm(SMALL[family](**options)).double()
    if form == "deploy":
        model = reparameterize(model, torch.randn(IMAGE, dtype=torch.float64))
    return model


def modules(model: nn.Module, library: str, family: str) -> Iterator[tuple[str, str]]:
    """Yield each module with tensors of ours and what a library calls it."""
    stem, block, kxk, pointwise, identity, folded, first, second, norm, head = OTHERS[
        library, family
    ]
    places = [("stem", stem, model.stem)]
    for s, stage in enumerate(model.stages):
        for i, unit in enumerate(stage):
            places.append((f"stages.{s}.{i}", block.format(s=s, s1=s + 1, i=i), unit))
    for ours, theirs, unit in places:
        if isinstance(unit.conv, nn.Conv2d):
            yield f"{ours}.conv", f"{theirs}.{folded}"
        else:
            equal = [m for m in unit.conv if not isinstance(m, _BatchNorm)]
            large = max(m.conv.kernel_size[0] for m in equal)
            for j, branch in enumerate(unit.conv):
                if isinstance(branch, _BatchNorm):
                    yield f"{ours}.conv.{j}", f"{theirs}.{identity}"
                    continue
                is_pointwise = branch.conv.kernel_size[0] < large
                name = f"{theirs}.{pointwise if is_pointwise else kxk.format(n=j)}"
                yield f"{ours}.conv.{j}.conv", f"{name}.conv"
                yield f"{ours}.conv.{j}.bn", f"{name}.{norm}"
        if not isinstance(unit.attention, nn.Identity):
            yield f"{ours}.attention.fc1", f"{theirs}.{first}"
            yield f"{ours}.attention.fc2", f"{theirs}.{second}"
    yield "head", head


def foreign(model: nn.Module, library: str, family: str) -> State:
    """Return the weights of `model` as a library would have saved them."""
    names = dict(modules(model, library, family))
    state = {}
    for key, value in model.state_dict().items():
        module, _, tensor = key.rpartition(".")
        state[f"{names[module]}.{tensor}"] = value.clone()
    return state


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize(("library", "family"), OTHERS)
def test_conversion_renames_both_ways(library: str, family: str, form: str) -> None:
    model = small(family, form)
    ours, theirs = model.state_dict(), foreign(model, library, family)
    assert_same(convert_weights(ours, to=library), theirs)
    assert_same(convert_weights(theirs, to="repnet"), ours)
    weights = read_weights(theirs)
    assert (weights.format, weights.form, weights.family) == (library, form, family)
    assert read_weights(ours).form == form


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize(("library", "family"), OTHERS)
def test_loaded_weights_give_the_same_outputs(library: str, family: str, form: str) -> None:
    theirs, ours = small(family, form), small(family, form)
    image = torch.randn(IMAGE, dtype=torch.float64)
    expected = theirs(image)
    assert relative_error(expected, ours(image)) > 1e-3
    report = load_weights(ours, foreign(theirs, library, family))
    assert relative_error(expected, ours(image)) == 0
    assert (report.format, report.form, report.ema) == (library, form, False)
    assert report.tensors == len(ours.state_dict())
    assert f"format {library}, {form} form" in str(report)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a in OTHERS for b in OTHERS if a != b and a[1] == b[1]]
)
def test_every_library_converts_to_every_other(
    first: tuple[str, str], second: tuple[str, str], form: str
) -> None:
    model = small(first[1], form)
    assert_same(convert_weights(foreign(model, *first), to=second[0]), foreign(model, *second))


def test_names_are_those_of_the_repositories() -> None:
    repvgg = small("repvgg").state_dict()
    for library, names in {
        "official": "stage0.rbr_dense.conv.weight stage2.1.rbr_identity.running_mean "
        "stage4.0.rbr_1x1.bn.bias stage1.0.se.down.weight linear.weight",
        "timm": "stem.conv_kxk.conv.weight stages.1.1.identity.running_mean "
        "stages.3.0.conv_1x1.bn.bias stages.0.0.attn.fc1.weight head.fc.weight",
        "mmpretrain": "backbone.stem.branch_3x3.conv.weight backbone.stage_2.1.branch_norm.bias "
        "backbone.stage_4.0.branch_1x1.norm.bias backbone.stem.se_layer.conv1.conv.weight",
        "super-gradients": "stem.branch_3x3.conv.weight stage2.1.no_conv_branch.running_mean "
        "stage4.0.branch_1x1.bn.bias linear.bias",
    }.items():
        assert set(names.split()) <= convert_weights(repvgg, to=library).keys()
    mobileone = small("mobileone").state_dict()
    for library, names in {
        "official": "stage0.rbr_conv.0.conv.weight stage2.3.rbr_conv.1.bn.weight "
        "stage2.2.rbr_scale.conv.weight stage2.3.rbr_skip.weight stage2.5.se.reduce.weight",
        "timm": "stem.conv_kxk.0.conv.weight stages.1.3.conv_kxk.1.bn.weight "
        "stages.1.2.conv_scale.conv.weight stages.1.3.identity.weight stages.1.5.attn.fc1.weight",
    }.items():
        assert set(names.split()) <= convert_weights(mobileone, to=library).keys()


@pytest.mark.parametrize(
    ("library", "family"), [(name, family) for name in LAYOUTS for family in LAYOUTS[name]]
)
def test_both_directions_of_a_table_are_inverse(library: str, family: str) -> None:
    layout = LAYOUTS[library][family]
    fields = [{"i": i, "n": n, "path": "a.b", "tensor": "weight"} for i in (0, 13) for n in (0, 2)]
    neutral = {
        f"{place}/{part}.weight".format(**values)
        for place in layout.places
        for part in layout.parts
        for values in fields
    }
    neutral |= {key.format(**fields[0]) for key in layout.others}
    theirs = {key: layout.theirs(key) for key in neutral}
    assert len(set(theirs.values())) == len(neutral) >= 12
    assert all(name and layout.neutral(name) == key for key, name in theirs.items())


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "mobileone_s0", "mobileone_s4"])
def test_timm_agrees(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    theirs = randomize_batch_norm(timm.create_model(name)).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.device("meta"):
        meta = create_model(name)
        empty = reparameterize(meta, torch.empty(1, 3, 32, 32))
    for form, ours in (("train", create_model(name)), ("deploy", empty.to_empty(device="cpu"))):
        ours = ours.double().eval()
        if form == "deploy":
            theirs = reparameterize_model(theirs)
        report = load_weights(ours, theirs.state_dict())
        assert (report.format, report.form) == ("timm", form)
        expected = theirs(image)
        assert expected.std() > 1e-3
        assert relative_error(expected, ours(image)) < 1e-10
        assert_same(convert_weights(ours.state_dict(), to="timm"), theirs.state_dict())
        theirs.load_state_dict(convert_weights(ours.state_dict(), to="timm"), strict=True)


# ResNets of torchvision and timm, which have the same names.


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnets_agree(library: str, name: str, tmp_path: Path) -> None:
    if library == "timm":
        made = pytest.importorskip("timm").create_model(name)
    else:
        made = torchvision.models.get_model(name)
    theirs, ours = randomize_batch_norm(made).double(), create_model(name).double().eval()
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    report = load_weights(ours, tmp_path / "published.pth")
    assert (report.format, report.form) == ("torchvision", "train")
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(theirs(image), ours(image)) < 1e-10
    for form in ("torchvision", "timm"):
        assert_same(convert_weights(ours.state_dict(), to=form), theirs.state_dict())
    own, published = (read_weights(model.state_dict()) for model in (ours, theirs))
    assert (own.format, published.family, own.family) == ("repnet", "resnet", "resnet")
    assert guess_name(own.tensors) == guess_name(published.tensors) == name


def test_other_resnets_are_refused_by_name() -> None:
    model = create_model("resnet18")
    with torch.device("meta"):
        others = {name: torchvision.models.get_model(name).state_dict()
                  for name in ("resnet34", "resnet50")}  # fmt: skip
    assert "'layer1.0.conv3.weight' is the third convolution of a bottle" in refusal(
        model, others["resnet50"]
    )
    assert "weights of 'resnet34'" in refusal(model, others["resnet34"])
    # REFERENCE: names of timm's resnet18d, whose stem has three convolutions.
    deep = {"conv1.0.weight": torch.ones(32, 3, 3, 3), "layer1.0.conv1.weight": torch.ones(1)}
    assert "'conv1.0.weight'; it belongs to another network" in refusal(model, deep)
    with pytest.raises(InputError, match="has names for resnet only, this is repvgg"):
        convert_weights(small("repvgg").state_dict(), to="torchvision")


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("family", SMALL)
def test_the_stem_is_fitted_to_other_channels(family: str, channels: int) -> None:
    source, model = small(family), small(family, in_channels=channels)
    message = refusal(model, source.state_dict())
    assert "stem" in message
    report = load_weights(model, source.state_dict(), adapt_input=True)
    stems = [key for key in model.state_dict() if key.startswith("stem") and "conv.weight" in key]
    assert list(report.adapted) == stems
    assert f"fitted to the image's channels: {', '.join(stems)}" in str(report)
    gray = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    images = [gray.expand(-1, n, -1, -1) for n in (3, channels)]
    assert relative_error(source(images[0]), model(images[1])) < 1e-10
    if channels > 3:  # the file's channels are told apart as before
        for key in stems:
            torch.testing.assert_close(
                model.state_dict()[key][:, :3], source.state_dict()[key] * 3 / channels
            )


def test_an_inner_layer_is_not_fitted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with pytest.raises(InputError, match=r"'0\.weight' is \(8, 3, 3, 3\)"):
        load_weights(model, other.state_dict(), adapt_input=True)


@pytest.mark.parametrize("groups", [(1, 2), (2, 1)])
def test_a_layer_of_other_groups_is_not_fitted(groups: tuple[int, int]) -> None:
    file, model = (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3, groups=g)) for g in groups)
    with pytest.raises(InputError, match=r"'1\.weight' is \(4, "):
        load_weights(model, file.state_dict(), adapt_input=True)


def test_a_grouped_stem_is_not_fitted() -> None:
    file, model = (nn.Sequential(nn.Conv2d(4, 8, 3, groups=g)) for g in (1, 2))
    with pytest.raises(InputError, match=r"'0\.weight' is \(8, 4, "):
        load_weights(model, file.state_dict(), adapt_input=True)


# Blocks of ACNet and Diverse Branch Block, inside any network.


class Foreign(nn.Module):
    """A network of somebody's own, with one block that is not at a place of RepVGG's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return functional.batch_norm(x, *(state[f"{name}.{n}"] for n in names))


def diverse_branch(state: State, x: Tensor, groups: int = 1) -> Tensor:
    """Evaluate the official block from the official names."""
    conv = functional.conv2d
    y = norm(
        state, "dbb_origin.bn", conv(x, state["dbb_origin.conv.weight"], padding=1, groups=groups)
    )
    if "dbb_1x1.conv.weight" in state:
        y = y + norm(state, "dbb_1x1.bn", conv(x, state["dbb_1x1.conv.weight"], groups=groups))
        z = conv(x, state["dbb_avg.conv.weight"], groups=groups)
        z = functional.avg_pool2d(norm(state, "dbb_avg.bn.bn", functional.pad(z, [1] * 4)), 3, 1)
    else:
        z = functional.avg_pool2d(x, 3, 1, 1)
    y = y + norm(state, "dbb_avg.avgbn", z)
    if "dbb_1x1_kxk.idconv1.weight" in state:  # kept as the difference from the identity
        z = x + conv(x, state["dbb_1x1_kxk.idconv1.weight"], groups=groups)
    else:
        z = conv(x, state["dbb_1x1_kxk.conv1.weight"], groups=groups)
    z = norm(state, "dbb_1x1_kxk.bn1.bn", functional.pad(z, [1] * 4))
    z = conv(z, state["dbb_1x1_kxk.conv2.weight"], groups=groups)
    return functional.relu(y + norm(state, "dbb_1x1_kxk.bn2", z))


def asymmetric(state: State, x: Tensor, groups: int = 1) -> Tensor:
    y = torch.zeros(())
    for name, padding in (("square", (1, 1)), ("ver", (1, 0)), ("hor", (0, 1))):
        z = functional.conv2d(x, state[f"{name}_conv.weight"], padding=padding, groups=groups)
        y = y + norm(state, f"{name}_bn", z)
    return functional.relu(y)


BLOCKS = {
    "ac": (ACBlock, asymmetric, {}, 4),
    "dbb": (DiverseBranchBlock, diverse_branch, {}, 4),
    "dbb wide": (DiverseBranchBlock, diverse_branch, {"internal_channels": 6}, 4),
    "dbb depthwise": (DiverseBranchBlock, diverse_branch, {"groups": 4}, 4),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_in_any_network_mean_the_same(case: str) -> None:
    block, evaluate, options, channels = BLOCKS[case]
    model = randomize_batch_norm(Foreign(block(4, channels, **options))).double()
    for parameter in model.parameters():  # also those that start at zero
        nn.init.normal_(parameter) if parameter.ndim > 1 else None
    theirs = convert_weights(model.state_dict(), to="official")
    inside = {
        key.removeprefix("features.2."): v for key, v in theirs.items() if "features.2." in key
    }
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = model.features[2](x)
    assert relative_error(expected, evaluate(inside, x, options.get("groups", 1))) < 1e-10
    assert {"fc.weight", "features.0.weight", "features.1.running_var"} <= theirs.keys()
    assert_same(convert_weights(theirs, to="repnet"), model.state_dict())
    twin = Foreign(block(4, channels, **options)).double().eval()
    assert load_weights(twin, theirs).format == "official"
    assert relative_error(expected, twin.features[2](x)) == 0


@pytest.mark.parametrize("name", ["dbb_reparam", "fused_conv"])
def test_folded_blocks_load_into_the_folded_network(name: str) -> None:
    model = Foreign(Block(nn.Conv2d(4, 4, 3, padding=1), 4))
    state = {k.replace("2.conv.", f"2.{name}."): torch.randn_like(v) if v.ndim else v
             for k, v in model.state_dict().items()}  # fmt: skip
    assert f"features.2.{name}.weight" in state
    report = load_weights(model, state)
    assert report.form == "deploy"
    torch.testing.assert_close(
        model.features[2].conv.weight, state[f"features.2.{name}.weight"], rtol=0, atol=0
    )


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_blocks_may_stand_where_the_convolution_stood(form: str) -> None:
    block = DiverseBranchBlock(4, 4).conv if form == "train" else nn.Conv2d(4, 4, 3, padding=1)
    model = Foreign(block)
    inside = convert_weights(Foreign(DiverseBranchBlock(4, 4)).state_dict(), to="official")
    if form == "deploy":
        inside = {k: v for k, v in inside.items() if "dbb" not in k}
        inside |= {f"features.2.dbb_reparam.{k}": torch.randn_like(v)
                   for k, v in block.state_dict().items()}  # fmt: skip
    load_weights(model, inside)
    ours, theirs = ("0.conv", "dbb_origin.conv") if form == "train" else ("", "dbb_reparam")
    key = ".".join(filter(None, ("features.2", ours, "weight")))
    torch.testing.assert_close(
        model.state_dict()[key], inside[f"features.2.{theirs}.weight"], rtol=0, atol=0
    )


def test_a_part_that_a_block_does_not_have_is_named() -> None:
    state = convert_weights(Foreign(ACBlock(4, 4)).state_dict(), to="official")
    with pytest.raises(InputError, match=r"'features\.2\.diagonal_conv\.weight'"):
        convert_weights(state | {"features.2.diagonal_conv.weight": torch.ones(1)}, to="repnet")


def test_a_conversion_done_only_in_part_is_recognized_beside_blocks() -> None:
    state = convert_weights(Foreign(ACBlock(4, 4)).state_dict(), to="official")
    with pytest.raises(
        InputError, match=r"mixes formats: .*'stem\.conv_kxk\.conv\.weight' of timm"
    ):
        convert_weights(state | {"stem.conv_kxk.conv.weight": torch.ones(1)}, to="repnet")


# Other blocks have no names elsewhere, but load as they are.


@pytest.mark.parametrize("block", [PlainBlock, ResidualBlock, ACBlock, DiverseBranchBlock])
def test_repnets_own_weights_load_whatever_the_block(block: type[nn.Module]) -> None:
    models = [RepVGG(DEPTHS, WIDTHS, block=block, num_classes=3).double() for _ in range(2)]
    for model in models:
        randomize_batch_norm(model)
    image = torch.randn(IMAGE, dtype=torch.float64)
    assert load_weights(models[0], models[1].state_dict()).format == "repnet"
    assert relative_error(models[1](image), models[0](image)) == 0
    folded = reparameterize(models[0], image)
    fits = RepVGG(DEPTHS, WIDTHS, num_classes=3).double().eval()
    official = convert_weights(folded.state_dict(), to="official")
    load_weights(reparameterize(fits, image), official)


@pytest.mark.parametrize("block", [PlainBlock, ResidualBlock])
def test_blocks_without_names_elsewhere_are_refused(block: type[nn.Module]) -> None:
    state = RepVGG(DEPTHS, WIDTHS, block=block).state_dict()
    with pytest.raises(InputError, match="cannot be converted|no keys of any known format"):
        convert_weights(state, to="timm")


def test_a_family_that_the_format_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="has names for repvgg only, this is mobileone"):
        convert_weights(small("mobileone").state_dict(), to="super-gradients")


# Wrappers and averages.


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "none": lambda s: s,
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v
                             for k, v in s.items()},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "x"},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "net": lambda s: {"net": prefixed("module.", s), "acc": 0.7},
    "module.": lambda s: prefixed("module.", s),
    "_orig_mod.": lambda s: prefixed("_orig_mod.", s),
    "module._orig_mod.": lambda s: prefixed("module._orig_mod.", s),
    "compiled stages": lambda s: {k.replace("stages.", "stages._orig_mod."): v
                                  for k, v in s.items()},
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "loops": {}, "callbacks": {}},
    "averaged model": lambda s: prefixed("module.", s) | {"n_averaged": torch.tensor(3)},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("library", ["repnet", "timm"])
def test_wrappers_are_removed(wrapper: str, library: str) -> None:
    source, model = small("repvgg"), small("repvgg")
    state = foreign(source, "timm", "repvgg") if library == "timm" else source.state_dict()
    report = load_weights(model, WRAPPERS[wrapper](state))
    assert_same(model.state_dict(), source.state_dict())
    assert report.format == library


def with_average(raw: State, average: State) -> dict[str, Any]:
    """Return files that hold both, by the name of where the average is."""
    counters = {"n_averaged": torch.tensor(3)}
    return {
        "state_dict_ema": {"state_dict": raw, "state_dict_ema": average},
        "model_ema": {"model": raw, "model_ema": average, "epoch": 1},
        "ema_net": {"net": raw, "ema_net": prefixed("module.", average)},
        "ema_state_dict": {"state_dict": raw, "ema_state_dict": average},
        "ema_model.": prefixed("model.", raw)
        | prefixed("ema_model.", prefixed("module.", average) | counters),
        "state_dict.model_ema.": {
            "state_dict": prefixed("model.", raw) | prefixed("model_ema.module.", average)
        },
        # mmengine exchanges the two when it saves, and counts its steps.
        "state_dict": {
            "state_dict": average,
            "ema_state_dict": prefixed("module.", raw) | {"steps": torch.tensor(5)},
        },
    }


@pytest.mark.parametrize("entry", with_average({}, {}))
def test_the_average_is_taken_unless_one_says_otherwise(entry: str) -> None:
    raw, average, model = (small("repvgg") for _ in range(3))
    contents = with_average(raw.state_dict(), average.state_dict())[entry]
    for ema, expected in ((None, average), (False, raw), (True, average)):
        report = load_weights(model, contents, ema=ema)
        assert_same(model.state_dict(), expected.state_dict())
        assert report.ema is (ema is not False)
        assert report.unused is not None
        assert f"ema={not report.ema} takes them" in str(report)
        assert (report.entry if report.ema else report.unused) == entry


def test_an_average_that_is_not_there_is_not_made_up() -> None:
    model = small("repvgg")
    state = model.state_dict()
    with pytest.raises(InputError, match="holds no EMA weights"):
        load_weights(model, {"state_dict": state}, ema=True)
    with pytest.raises(InputError, match="holds EMA weights only"):
        load_weights(model, {"state_dict_ema": state}, ema=False)
    assert load_weights(model, {"state_dict_ema": state}).ema
    with pytest.raises(InputError, match="several sets of weights, 'state_dict' and 'model'"):
        load_weights(model, {"state_dict": state, "model": state})


def test_a_backbone_is_taken_out_by_its_prefix() -> None:
    source, model = small("repvgg"), small("repvgg")
    detector = prefixed("backbone.body.", foreign(source, "official", "repvgg"))
    detector["neck.weight"] = torch.ones(2)
    with pytest.raises(InputError, match="no keys of any known format"):
        load_weights(model, detector)
    load_weights(model, detector, prefix="backbone.body.")
    assert_same(model.state_dict(), source.state_dict())
    with pytest.raises(InputError, match=r"inside 'encoder'; prefix='encoder\.' takes only those"):
        load_weights(model, prefixed("encoder.", foreign(source, "official", "repvgg")))
    with pytest.raises(InputError, match=r"no key that begins with 'rump\.'"):
        load_weights(model, detector, prefix="rump.")
    mixed = prefixed("model.", source.state_dict()) | {"loss.weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"'loss\.weight'; prefix='model\.' takes only"):
        load_weights(model, mixed)
    load_weights(model, mixed, prefix="model.")
    load_weights(model, {"state_dict": mixed, "repnet": {}})  # a checkpoint of repnet's
    assert_same(model.state_dict(), source.state_dict())


def test_a_model_of_ones_own_keeps_its_prefix() -> None:
    models = [nn.ModuleDict({"module": Foreign(ACBlock(4, 4))}) for _ in range(2)]
    load_weights(models[0], {"state_dict": models[1].state_dict()})
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_counters_of_batches_are_made_where_they_lack() -> None:
    source, model = small("repvgg"), small("repvgg")
    state = foreign(source, "official", "repvgg")
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for module in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        module.num_batches_tracked.fill_(7)
    report = load_weights(model, bare)
    assert report.created == len(state) - len(bare) > 10
    assert "counters of batches" in str(report)
    assert_same(model.state_dict(), source.state_dict())
    assert_same(convert_weights(bare, to="timm"), foreign(source, "timm", "repvgg"))
    for module in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        module.num_batches_tracked = None
    load_weights(model, state)


def test_a_change_of_dtype_is_reported() -> None:
    source, model = small("repvgg").half(), small("repvgg")
    report = load_weights(model, source.state_dict())
    assert report.casts == (("torch.float16", "torch.float64"),)
    assert "converted: torch.float16 to torch.float64" in str(report)
    assert_same(model.state_dict(), source.double().state_dict())


def test_a_tensor_that_does_not_arrive_is_noticed() -> None:
    class Forgetful(Foreign):
        def load_state_dict(self, state: Any, *arguments: Any, **options: Any) -> Any:
            state["fc.weight"] = state["fc.weight"] * 0
            return super().load_state_dict(state, *arguments, **options)

    with pytest.raises(RuntimeError, match=r"'fc\.weight' did not arrive"):
        load_weights(Forgetful(ACBlock(4, 4)), Foreign(ACBlock(4, 4)).state_dict())


# What does not fit.


def refusal(model: nn.Module, source: Any, **options: Any) -> str:
    """Return the message, after checking that nothing was loaded."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_weights(model, source, **options)
    assert_same(model.state_dict(), before)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_wrong_form_is_named_with_the_remedy() -> None:
    train, deploy = small("repvgg"), small("repvgg", "deploy")
    message = refusal(deploy, foreign(train, "official", "repvgg"))
    assert "it is in train form (format official; it has 'stage0.rbr_dense.conv.weight'" in message
    assert "the model is folded" in message
    assert "repnet.reparameterize(model, example_input)" in message
    message = refusal(train, foreign(deploy, "timm", "repvgg"))
    assert "it is in deploy form (format timm; it has 'stem.reparam_conv.weight'" in message
    assert "a fold cannot be undone" in message


def test_another_number_of_classes_is_named_and_can_be_left() -> None:
    source, model = small("repvgg"), small("repvgg", num_classes=10)
    state = foreign(source, "official", "repvgg")
    message = refusal(model, state)
    assert "its classifier has 1000 outputs, the model's 10 ('head.weight', 'head.bias')" in message
    assert "head=False" in message
    before = model.head.weight.clone()
    report = load_weights(model, state, head=False)
    assert report.left == ("head.weight", "head.bias")
    assert "new, not taken from the state dict: head.weight, head.bias" in str(report)
    torch.testing.assert_close(model.head.weight, before, rtol=0, atol=0)
    assert_same(model.stages.state_dict(), source.stages.state_dict())
    backbone = {key: value for key, value in state.items() if "linear" not in key}
    assert "the file has no classifier" in refusal(model, backbone)
    load_weights(model, backbone, head=False)
    del model.head
    assert "the model has no classifier" in refusal(model, state)
    load_weights(model, state, head=False)


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    source, model = small("repvgg"), small("repvgg")
    state = foreign(source, "official", "repvgg")
    lacking = {key: value for key, value in state.items() if "stage2.1.rbr_1x1.bn.b" not in key}
    assert "it lacks 'stages.1.1.conv.1.bn.bias'" in refusal(model, lacking)
    extra = state | {"stage3.1.rbr_dense.conv.weight": torch.ones(16, 16, 3, 3)}
    assert "the model lacks 'stage3.1.rbr_dense.conv.weight'" in refusal(model, extra)
    shape = state | {"stage1.0.rbr_dense.conv.weight": torch.ones(8, 16, 3, 3)}
    message = refusal(model, shape)
    assert "'stage1.0.rbr_dense.conv.weight' is (8, 16, 3, 3), the model's is (16, 16," in message
    unknown = state | {"stage5.0.rbr_dense.conv.weight": torch.ones(1)}
    assert "'stage5.0.rbr_dense.conv.weight'; it belongs to another network" in refusal(
        model, unknown
    )


def test_another_network_is_named() -> None:
    with torch.device("meta"):
        state = convert_weights(create_model("repvgg_a0").state_dict(), to="timm")
    message = refusal(small("repvgg"), state)
    assert "These are weights of 'repvgg_a0': repnet.create_model('repvgg_a0')" in message


def test_mixed_formats_and_collisions_are_named() -> None:
    model = small("repvgg")
    state = foreign(model, "official", "repvgg")
    timm = {k: v for k, v in foreign(model, "timm", "repvgg").items() if "stages.3" in k}
    kept = {key: value for key, value in state.items() if "stage4" not in key}
    message = refusal(model, kept | timm)
    assert "mixes formats: 'stage0.rbr_dense.conv.weight' is a name of official" in message
    assert "'stages.3.0.conv_kxk.conv.weight' of timm" in message
    own = {k: v for k, v in model.state_dict().items() if "stages.3" in k}
    assert "of repnet" in refusal(model, kept | own)
    twice = state | {"stage0._orig_mod.rbr_dense.conv.weight": torch.ones(16, 3, 3, 3)}
    message = refusal(model, twice)
    assert "holds 'stage0.rbr_dense.conv.weight' twice" in message
    assert "'stage0._orig_mod.rbr_dense.conv.weight'" in message


def test_parts_of_one_block_must_belong_together() -> None:
    state = foreign(small("mobileone"), "official", "mobileone")
    gap = {key: value for key, value in state.items() if "stage1.0.rbr_conv.0." not in key}
    with pytest.raises(InputError, match=r"'stages\.0\.0' has the convolution branches 1; some"):
        convert_weights(gap, to="repnet")
    both = state | {"stage1.0.reparam_conv.weight": torch.ones(16, 1, 3, 3)}
    with pytest.raises(InputError, match=r"'stages\.0\.0' has parts that do not belong"):
        convert_weights(both, to="repnet")


def test_what_super_gradients_adds_or_lacks_is_refused_by_name() -> None:
    model = small("repvgg")
    state = foreign(model, "super-gradients", "repvgg")
    message = refusal(model, state | {"stem.alpha": torch.ones(1)})
    assert "'stem.alpha' is a trained weight of the 1x1 branch, which repnet's repvgg" in message
    message = refusal(model, state | {"stage1.0.post_bn.weight": torch.ones(1)})
    assert "QARepVGG" in message
    with torch.device("meta"):
        wide, grouped = (
            RepVGG(DEPTHS, [width] * 4, groups=groups).state_dict()
            for width, groups in ((1.5, 1), (0.25, 2))
        )
    with pytest.raises(InputError, match="64 channels in the stem. The RepVGG of super-gradients"):
        convert_weights(wide, to="super-gradients")
    with pytest.raises(InputError, match=r"no groups, 'stages\.1\.0' has"):
        convert_weights(grouped, to="super-gradients")
    stem = {k: torch.ones(32, *v.shape[1:]) if k.startswith("stem.branch") and v.ndim else v
            for k, v in state.items()}  # fmt: skip
    assert "only up to that width" in refusal(model, stem)


def test_a_model_without_memory_is_refused() -> None:
    with torch.device("meta"):
        model = RepVGG(DEPTHS, WIDTHS)
    with pytest.raises(InputError, match="the model has no memory"):
        load_weights(model, RepVGG(DEPTHS, WIDTHS).state_dict())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "is empty"),
        ({"state_dict": {}}, "is empty"),
        ([1, 2], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({"epoch": 3}, "'epoch' is of type int, not a tensor"),
        ({"state_dict": {"stem": {"x": 1}}}, "'stem' is of type dict, not a tensor"),
        ({1: torch.ones(1)}, "1 is of type Tensor"),
        ({"fc.weight": torch.ones(1)}, "no keys of any known format"),
        ({"a/kxk.0.conv.weight": torch.ones(1)}, "names that no module has"),
    ],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(contents: Any, message: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "file.pth")
    with pytest.raises(InputError, match=re.escape(message)):
        load_weights(small("repvgg"), tmp_path / "file.pth")


def test_unknown_formats_are_named() -> None:
    state = small("repvgg").state_dict()
    for options in ({"to": "keras"}, {"to": "timm", "source_format": "keras"}):
        with pytest.raises(InputError, match=r"unknown format 'keras'. Choose one of: repnet"):
            convert_weights(state, **options)
    with pytest.raises(InputError, match="no keys of the format 'timm'"):
        convert_weights(state, to="official", source_format="timm")


@pytest.mark.parametrize("name", ["repvgg_b1g2", "mobileone_s0", "repvgg_d2se", "repvgg_tiny"])
def test_the_network_is_known_by_its_shapes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, in_channels=1, num_classes=7)
        folded = reparameterize(model, torch.empty(1, 1, 32, 32))
    for form in (model, folded):
        assert guess_name(read_weights(form.state_dict()).tensors) == name
    other = RepVGG([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5])
    assert guess_name(read_weights(other.state_dict()).tensors) is None


# Files and the command.


class Code:
    """What a pickle must not do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was_run"),))


def command(*arguments: str | Path, cwd: Path, code: int = 0) -> str:
    """Run the command, check its exit code, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "repnet.weights", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    if code == 2:
        assert done.stderr.startswith(("error: ", "usage: "))
    return done.stdout + done.stderr


def test_the_command_converts_and_inspects(tmp_path: Path) -> None:
    model = create_model("repvgg_tiny", num_classes=5)
    randomize_batch_norm(model)
    state = foreign(model, "official", "repvgg")
    torch.save({"state_dict": prefixed("module.", state), "epoch": 3}, tmp_path / "train.pth")
    printed = command("inspect", "train.pth", cwd=tmp_path)
    count = sum(p.numel() for p in model.parameters())
    for word in ("official", "train", "repvgg_tiny", "'state_dict'", f"{len(state)}", f"{count:,}"):
        assert word in printed
    printed = command("convert", "train.pth", "a/timm.safetensors", "--to", "timm", cwd=tmp_path)
    assert f"{len(state)} tensors written to 'a/timm.safetensors'" in printed
    assert_same(load_file(tmp_path / "a/timm.safetensors"), foreign(model, "timm", "repvgg"))
    command("convert", "a/timm.safetensors", "back.pth", "--to", "official", cwd=tmp_path)
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), state)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["timm.safetensors"]


def test_the_command_chooses_between_two_sets_of_weights(tmp_path: Path) -> None:
    raw, average = (
        small("repvgg").to(memory_format=torch.channels_last).state_dict() for _ in range(2)
    )
    torch.save({"model": raw, "model_ema": average}, tmp_path / "both.pt")
    printed = command("convert", "both.pt", "out.safetensors", "--to", "repnet", cwd=tmp_path)
    assert "'model_ema'; not used: 'model'" in printed
    assert_same(load_file(tmp_path / "out.safetensors"), average)
    command("convert", "both.pt", "out.pt", "--to", "repnet", "--no-ema", cwd=tmp_path)
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), raw)


def hostile(path: Path) -> dict[str, tuple[str, str]]:
    """Write files that cannot be loaded; return for each what must be said about it."""
    state = foreign(small("repvgg"), "official", "repvgg")
    torch.save({"state_dict": state, "x": Code()}, path / "code.pth")
    (path / "pickle.pth").write_bytes(pickle.dumps(Code()))
    torch.save(state, path / "whole.pth")
    whole = (path / "whole.pth").read_bytes()
    (path / "half.pth").write_bytes(whole[: len(whole) // 2])
    save_file(state, path / "whole.safetensors")
    whole = (path / "whole.safetensors").read_bytes()
    (path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (path / "nothing.pth").write_bytes(b"")
    (path / "text.pth").write_text("these are my weights, honestly")
    (path / "folder.pth").mkdir()
    torch.save({}, path / "empty.pth")
    torch.save([1], path / "list.pth")
    torch.save(state | {"stem.conv_kxk.conv.weight": torch.ones(1)}, path / "mixed.pth")
    torch.save(state | {"module.stage0.se.up.bias": torch.ones(1)}, path / "collision.pth")
    return {
        "code.pth": ("could run code", ""),
        "pickle.pth": ("could run code", ""),
        "half.pth": ("damaged or truncated", ""),
        "half.safetensors": ("damaged or truncated", ""),
        "nothing.pth": ("nothing.pth' is", ""),
        "text.pth": ("neither a torch nor a safetensors file", ""),
        "folder.pth": ("is a directory, not a file", ""),
        "absent.pth": ("is not there", ""),
        "empty.pth": ("is empty", ""),
        "list.pth": ("holds a list", ""),
        "mixed.pth": ("mixes formats", "conv_kxk"),
        "collision.pth": ("such as 'stage0", "prefix='module.' takes only"),
    }


def test_hostile_files_are_refused_without_running_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in hostile(tmp_path).items():
        with pytest.raises(InputError) as error:
            load_weights(small("repvgg"), tmp_path / name)
        assert all(word in str(error.value) for word in words), f"{name}: {error.value}"
    assert not Path("was_run").exists()


def test_the_command_refuses_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile(tmp_path)
    message = command("convert", "code.pth", "out.pth", "--to", "timm", cwd=tmp_path, code=2)
    assert "'code.pth' was not loaded: it holds" in message
    assert not (tmp_path / "was_run").exists()
    monkeypatch.chdir(tmp_path)
    for arguments, words in {
        "convert half.safetensors out.pth --to timm": "damaged or truncated",
        "convert mixed.pth out.pth --to timm": "mixes formats",
        "inspect empty.pth": "is empty",
        "convert whole.pth out.onnx --to timm": "must end in one of .safetensors",
        "convert whole.pth whole.pth --to timm": "is the input file",
        "convert whole.pth out.pth --to keras": "invalid choice: 'keras'",
        "convert whole.pth out.pth --to timm --ema": "holds no EMA weights",
        "convert whole.pth out.pth --to timm --from mmpretrain": "no keys of the format",
        "convert whole.pth whole.pth/out.pth --to timm": "cannot be written",
    }.items():
        monkeypatch.setattr(sys, "argv", ["weights", *arguments.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_files_name_says_nothing(tmp_path: Path) -> None:
    source, model = small("repvgg", "deploy"), small("repvgg", "deploy")
    save_file(foreign(source, "official", "repvgg"), tmp_path / "RepVGG-A0-train.pth")
    assert load_weights(model, tmp_path / "RepVGG-A0-train.pth").form == "deploy"
    torch.save(source.state_dict(), tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors")
    assert_same(model.state_dict(), source.state_dict())
