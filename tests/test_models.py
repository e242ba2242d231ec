"""Models: their published sizes, and that each trains and folds with every block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import SqueezeExcitation

from repnet.blocks import Block, MobileOneBlock, PlainBlock, ResidualBlock
from repnet.complexity import count_macs, count_parameters
from repnet.deploy.artifact import load_deployed, save_deployed
from repnet.errors import InputError
from repnet.fold import reparameterize
from repnet.layers import conv_bn
from repnet.models import create_model, list_models
from repnet.spec import CONFIGS, choices, load_choice
from tests.models import randomize_batch_norm, relative_error

# Parameters in millions and GMAC at 224 px, each in training and deployed: those of the authors'
# code, of ResNet those of torchvision's.
PUBLISHED = {
    "repvgg_a0": ("9.109", "8.309", "1.513", "1.361"),
    "repvgg_a1": ("14.092", "12.790", "2.626", "2.364"),
    "repvgg_a2": ("28.211", "25.500", "5.685", "5.117"),
    "repvgg_b0": ("15.818", "14.339", "3.397", "3.058"),
    "repvgg_b1": ("57.415", "51.829", "13.128", "11.815"),
    "repvgg_b1g2": ("45.782", "41.360", "9.788", "8.810"),
    "repvgg_b1g4": ("39.966", "36.125", "8.119", "7.307"),
    "repvgg_b2": ("89.022", "80.315", "20.418", "18.377"),
    "repvgg_b2g2": ("70.846", "63.957", "15.200", "13.680"),
    "repvgg_b2g4": ("61.758", "55.778", "12.591", "11.332"),
    "repvgg_b3": ("123.085", "110.961", "29.121", "26.209"),
    "repvgg_b3g2": ("96.912", "87.405", "21.606", "19.446"),
    "repvgg_b3g4": ("83.825", "75.627", "17.849", "16.064"),
    "repvgg_d2se": ("133.335", "120.388", "36.477", "32.830"),
    "mobileone_s0": ("5.293", "2.079", "1.052", "0.275"),
    "mobileone_s1": ("4.825", "4.765", "0.830", "0.825"),
    "mobileone_s2": ("7.885", "7.808", "1.304", "1.298"),
    "mobileone_s3": ("10.171", "10.078", "1.902", "1.896"),
    "mobileone_s4": ("14.951", "14.838", "2.987", "2.979"),
    "resnet18": ("11.690", "11.685", "1.814", "1.814"),
    "resnet34": ("21.798", "21.789", "3.664", "3.664"),
}
IMAGE = (3, 224, 224)


# Every block is tried in these; every other model with its own block and one more.
SMALL = ["mobileone_tiny", "repvgg_tiny", "resnet18"]
BLOCKS = [name for name in choices("block") if name != "transposed"]  # it makes images larger


def small(name: str) -> dict[str, Any]:
    """Return overrides that make a model fast, those of its settings that it has."""
    spec = load_choice("model", name)
    sizes = {"depths": [1, 2, 1, 1][: len(spec["depths"])], "widths": [0.25] * 4, "width": 8}
    return {key: value for key, value in sizes.items() if key in spec}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_size_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    folded = reparameterize(model, torch.empty(1, *IMAGE, device="meta"))
    parameters = [f"{count_parameters(m) / 1e6:.3f}" for m in (model, folded)]
    macs = [f"{count_macs(m, IMAGE) / 1e9:.3f}" for m in (model, folded)]
    assert (*parameters, *macs) == PUBLISHED[name]
    header = (CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    assert all(figure in header for figure in PUBLISHED[name])


def test_the_list_is_the_folder() -> None:
    files = sorted(path.stem for path in (CONFIGS / "model").rglob("*.yaml"))
    assert list_models() == files
    assert set(PUBLISHED) | {"mobileone_tiny", "repvgg_tiny", "resnet20"} <= set(files)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 12


@pytest.mark.parametrize(
    ("name", "block"),
    [
        *((name, block) for name in SMALL for block in BLOCKS),
        *((name, block) for name in list_models() for block in (None, "residual")),
    ],
)
def test_models_train_and_fold_with_every_block(name: str, block: str | None) -> None:
    # float64: the gradients of a branch with layer scale are 1e-5 of those of the others.
    model = create_model(name, num_classes=3, block=block, **small(name)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.train()
    nn.functional.cross_entropy(model(image), torch.tensor([0, 2])).backward()
    # Not the biases: a norm after a sum takes away what they add before it.
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    before = [w.detach().clone() for w in weights]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # a ReLU may be dead

    randomize_batch_norm(model)
    folded = reparameterize(model, image)
    assert not [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    assert all(type(b.conv) is nn.Conv2d for b in folded.modules() if isinstance(b, Block))
    assert relative_error(model(image), folded(image)) < 1e-11


@pytest.mark.parametrize("name", ["resnext", "repvgg_a9", "RepVGG-A0", "../model/repvgg_a0", ""])
def test_an_unknown_name_lists_those_that_exist(name: str) -> None:
    with pytest.raises(InputError, match=r"Choose one of: .*repvgg_a0.*repvgg_tiny"):
        create_model(name)


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("repvg_a0", "repvgg_a0"), ("repvgg-b1g4", "repvgg_b1g4")]
)
def test_an_unknown_name_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown model '{wrong}'; did you mean '{nearest}'"):
        create_model(wrong)


def test_an_unknown_block_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown block 'residul'; did you mean 'residual'"):
        create_model("repvgg_tiny", block="residul")


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(InputError, match=r"repnet\.models\.RepVGG.*'width'"):
        create_model("repvgg_tiny", width=[1, 1, 1, 1])


def test_the_block_is_chosen_by_name() -> None:
    model = create_model("repvgg_tiny", block="residual")
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    assert len(blocks) == 8
    assert all(type(block) is ResidualBlock for block in blocks)
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm)]


def linear_block(in_channels: int, out_channels: int, *, stride: int, groups: int) -> nn.Module:
    return conv_bn(in_channels, out_channels, 3, stride=stride, groups=groups)


@pytest.mark.parametrize("block", [PlainBlock, linear_block], ids=["class", "function"])
def test_the_block_may_be_any_callable(block: Callable[..., nn.Module]) -> None:
    model = create_model("repvgg_tiny", num_classes=3, block=block)
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == 8
    assert not hasattr(model, "architecture")  # a callable is not plain data
    assert model.eval()(torch.randn(1, 3, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith(("g2", "g4"))])
def test_every_second_block_up_to_the_26th_is_grouped(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, block="plain")
    groups = [block.conv.conv.groups for stage in model.stages for block in stage]
    expected = int(name[-1])
    assert model.stem.conv.conv.groups == 1
    assert groups == [expected if i in range(2, 27, 2) else 1 for i in range(1, len(groups) + 1)]
    assert groups.count(expected) == 13


def test_no_block_beyond_the_26th_is_grouped() -> None:
    with torch.device("meta"):
        model = create_model("repvgg_b1g4", block="plain", depths=[4, 6, 20, 1])
    groups = [block.conv.conv.groups for stage in model.stages for block in stage]
    assert [i for i, g in enumerate(groups, 1) if g == 4] == list(range(2, 27, 2))


def test_attention_reduces_to_a_sixteenth() -> None:
    with torch.device("meta"):
        model = create_model("repvgg_d2se")
    attention = [m for m in model.modules() if isinstance(m, SqueezeExcitation)]
    assert len(attention) == 48
    assert all(m.fc1.out_channels == m.fc1.in_channels // 16 for m in attention)


# MobileOne


def test_mobileone_alternates_depthwise_and_pointwise_blocks() -> None:
    with torch.device("meta"):
        model = create_model("mobileone_s0")
    assert [len(stage) for stage in model.stages] == [4, 16, 20, 2]
    assert len(model.stem.conv) == 2  # one 3x3 and the 1x1; k is 4 elsewhere
    for stage in model.stages:
        for depthwise, pointwise in zip(stage[::2], stage[1::2], strict=True):
            layers = [branch.conv for branch in depthwise.conv if hasattr(branch, "conv")]
            assert [layer.kernel_size[0] for layer in layers] == [3, 3, 3, 3, 1]
            assert all(layer.groups == layer.in_channels for layer in layers)
            layers = [branch.conv for branch in pointwise.conv if hasattr(branch, "conv")]
            assert [layer.kernel_size[0] for layer in layers] == [1, 1, 1, 1]
            assert all(layer.groups == 1 for layer in layers)


def test_a_block_replaces_the_stem_and_the_depthwise_blocks_of_mobileone() -> None:
    model = create_model("mobileone_tiny", block="plain")
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    kinds = [PlainBlock, *[PlainBlock, MobileOneBlock] * 6]
    assert [type(block) for block in blocks] == kinds


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([0, 0, 5, 1], {2: range(10, 20), 3: range(2)}),
        ([1, 0, 0, 0], {0: range(2, 4)}),
        (1, {0: range(2, 4), 1: range(14, 16), 2: range(18, 20), 3: range(2)}),
    ],
)
def test_attention_of_mobileone_is_on_the_last_units(
    counts: int | list[int], expected: dict[int, range]
) -> None:
    with torch.device("meta"):
        model = create_model("mobileone_s4", squeeze_excitation=counts)
    places = {
        index: [i for i, block in enumerate(stage) if type(block.attention) is SqueezeExcitation]
        for index, stage in enumerate(model.stages)
    }
    assert {k: v for k, v in places.items() if v} == {k: list(v) for k, v in expected.items()}


def test_attention_of_mobileone_s4_is_kept_by_the_fold() -> None:
    model = create_model("mobileone_s4", num_classes=3, depths=[1, 1, 6, 1], widths=[0.25] * 4)
    randomize_batch_norm(model).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = reparameterize(model, image)
    attention = [m for m in folded.modules() if isinstance(m, SqueezeExcitation)]
    assert len(attention) == 2 * (5 + 1)
    assert all(m.fc1.out_channels == m.fc1.in_channels // 16 for m in attention)
    assert relative_error(model(image), folded(image)) < 1e-11
    for block in folded.modules():
        if isinstance(block, Block):
            block.attention = nn.Identity()
    assert relative_error(model(image), folded(image)) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"depths": [1, 1, 1]},
        {"widths": [1.0] * 5},
        {"strides": [2, 2]},
        {"squeeze_excitation": [1, 1]},
    ],
)
def test_mobileone_with_another_number_of_stages_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"repnet\.models\.MobileOne: .*need 4 values"):
        create_model("mobileone_tiny", **wrong)


# ResNet


@pytest.mark.parametrize("block", ["ac", "dbb", "plain"])
def test_a_resnet_folds_to_the_plain_one(block: str) -> None:
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    models = [create_model("resnet18", width=8, block=b).double() for b in (block, "plain")]
    folded, plain = (reparameterize(randomize_batch_norm(m), image) for m in models)
    plain.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(plain(image), folded(image), rtol=0, atol=0)


def test_the_units_of_a_resnet_are_their_equation() -> None:
    model = create_model("resnet18", width=8, depths=[1, 1, 1, 1], block="mobileone")
    randomize_batch_norm(model).double()
    for unit, channels in ((model.stages[0][0], 8), (model.stages[1][0], 8)):
        x = torch.randn(2, channels, 9, 9, dtype=torch.float64)
        assert type(unit.first.activation) is nn.ReLU
        assert type(unit.second.activation) is nn.Identity
        y = unit.second.conv(unit.first.conv(x).relu())
        shortcut = x if channels == y.shape[1] else unit.shortcut(x)
        assert relative_error((y + shortcut).relu(), unit(x)) < 1e-12


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18", [(64, 56), (128, 28), (256, 14), (512, 7)]),
        ("resnet20", [(16, 224), (32, 112), (64, 56)]),
    ],
)
def test_the_stages_of_a_resnet_have_their_sizes(name: str, sizes: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        model = create_model(name)
        x, found = model.stem(torch.empty(1, *IMAGE)), []
        for stage in model.stages:
            x = stage(x)
            found.append((x.shape[1], x.shape[2]))
    assert found == sizes


@pytest.mark.parametrize("block", BLOCKS)
def test_a_resnet_trains_on_images_of_8_px_whose_last_maps_have_one(block: str) -> None:
    model = create_model("resnet18", width=8, num_classes=3, in_channels=1, block=block).double()
    image = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert model.stages(model.stem(image)).shape[2:] == (1, 1)
    nn.functional.cross_entropy(model(image), torch.tensor([0, 2, 1, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    folded = reparameterize(randomize_batch_norm(model), image)
    assert relative_error(model(image), folded(image)) < 1e-11


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": []}, "at least one stage"),
        ({"strides": [2, 2, 1, 2]}, "4 stages need 6 strides.*got 4"),
    ],
)
def test_a_resnet_that_is_not_consistent_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"repnet\.models\.ResNet: .*{message}"):
        create_model("resnet18", **wrong)


@pytest.mark.parametrize("block", [PlainBlock, linear_block], ids=["class", "function"])
def test_the_blocks_of_a_resnet_may_be_any_callable(block: Callable[..., nn.Module]) -> None:
    model = create_model("resnet18", num_classes=3, block=block, width=8)
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == 20
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


# Dropout and stochastic depth


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg_tiny", {"dropout": 0.5}),
        ("mobileone_tiny", {"dropout": 0.5}),
        ("resnet20", {"dropout": 0.5, "drop_path": 0.5}),
    ],
)
def test_dropping_changes_training_only(
    name: str, options: dict[str, float], tmp_path: Path
) -> None:
    options = {"num_classes": 3, **small(name), **options}
    model = randomize_batch_norm(create_model(name, **options)).double()
    off = {key: 0.0 for key in ("dropout", "drop_path") if key in options}
    plain = create_model(name, **{**options, **off}).double()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(model.state_dict())
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(plain.eval()(image), model(image))
    folded, plain_folded = reparameterize(model, image), reparameterize(plain, image)
    assert torch.equal(folded(image), plain_folded(image))
    save_deployed(folded, tmp_path)
    assert torch.equal(load_deployed(tmp_path)(image), folded(image))
    model.train()
    assert not torch.equal(model(image), model(image))
    plain.train()
    assert torch.equal(plain(image), plain(image))


def test_dropout_stands_before_the_head() -> None:
    model = create_model("repvgg_tiny", dropout=0.25).train()
    features: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    images = torch.randn(64, 3, 8, 8)
    model(images)
    model.pool[2].eval()
    model(images)
    dropped, plain = features
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    assert abs(float(kept[plain != 0].float().mean()) - 0.75) < 0.02


def test_stochastic_depth_drops_the_blocks_of_a_unit_for_single_images() -> None:
    model = create_model("resnet18", width=8, drop_path=0.5)
    units = [unit for stage in model.stages for unit in stage]
    assert [unit.drop_path.p for unit in units] == [0.5 * i / 8 for i in range(1, 9)]
    unit = randomize_batch_norm(units[7]).double()
    x = torch.randn(64, 64, 2, 2, dtype=torch.float64)
    blocks = unit.second(unit.first(x))
    unit.drop_path.train()
    torch.manual_seed(1)
    found = unit(x)
    torch.manual_seed(1)
    kept = torch.empty(64, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5)
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(found, (2 * kept * blocks + x).relu())


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "dropout", 1.5) for name in ("repvgg_tiny", "mobileone_tiny", "resnet18")),
        ("resnet18", "drop_path", 1.0),
        ("resnet18", "drop_path", -0.1),
    ],
)
def test_what_is_no_probability_is_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(InputError, match=option.replace("_", "_?")):
        create_model(name, **{option: value})


@pytest.mark.parametrize("name", list_models())
def test_dropping_can_be_set_in_every_config_and_is_off(name: str) -> None:
    spec = load_choice("model", name)
    assert spec["dropout"] == 0
    assert spec.get("drop_path") == (0 if spec["_target_"].endswith("ResNet") else None)


# Small images


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", ["mobileone_tiny", "repvgg_tiny", "resnet20"])
def test_small_models_take_small_images(name: str, size: int, in_channels: int) -> None:
    model = create_model(name, num_classes=7, in_channels=in_channels)
    randomize_batch_norm(model).double()
    image = torch.randn(2, in_channels, size, size, dtype=torch.float64)
    folded = reparameterize(model, image)
    assert folded(image).shape == (2, 7)
    assert relative_error(model(image), folded(image)) < 1e-12


def test_counting_does_not_change_the_model() -> None:
    model = create_model("repvgg_tiny", num_classes=3).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert count_macs(model, (3, 32, 32)) > 0
    assert model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_multiplications_are_those_of_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),  # 8 x 3 x 9 x 16 positions
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )
    assert count_macs(model, (3, 8, 8)) == 8 * 3 * 9 * 16 + 8 * 16 * 5
    assert count_parameters(model) == 8 * 27 + 8 + 16 + 8 * 16 * 5 + 5
