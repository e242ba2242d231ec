"""Models: their published sizes, and that each trains and folds with every block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import SqueezeExcitation

from repnet.blocks import Block, PlainBlock, ResidualBlock
from repnet.complexity import count_macs, count_parameters
from repnet.errors import InputError
from repnet.folding import reparameterize
from repnet.layers import conv_bn
from repnet.models import create_model, list_models
from repnet.spec import CONFIGS, choices, load_choice
from tests.models import randomize_batch_norm, relative_error

# Parameters in millions and GMAC at 224 px, each in training and deployed: REFERENCE.md, section 1.
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
}
IMAGE = (3, 224, 224)


def small(name: str) -> dict[str, Any]:
    """Return overrides that make a model fast, those of its settings that it has."""
    sizes = {"depths": [1, 2, 1, 1], "widths": [0.25, 0.25, 0.25, 0.25]}
    return {key: value for key, value in sizes.items() if key in load_choice("model", name)}


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
    assert set(PUBLISHED) | {"repvgg_tiny"} <= set(files)


def test_there_are_blocks() -> None:
    assert len(choices("block")) >= 4


@pytest.mark.parametrize("block", choices("block"))
@pytest.mark.parametrize("name", list_models())
def test_every_model_trains_and_folds_with_every_block(name: str, block: str) -> None:
    model = create_model(name, num_classes=3, block=block, **small(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    image = torch.randn(2, 3, 32, 32)
    model.train()
    nn.functional.cross_entropy(model(image), torch.tensor([0, 2])).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # a ReLU may be dead

    randomize_batch_norm(model).double()
    folded = reparameterize(model, image.double())
    assert not [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    assert all(type(b.conv) is nn.Conv2d for b in folded.modules() if isinstance(b, Block))
    assert relative_error(model(image.double()), folded(image.double())) < 1e-11


@pytest.mark.parametrize("name", ["resnet", "repvgg_a9", "RepVGG-A0", "../model/repvgg_a0", ""])
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


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_tiny_model_takes_small_images(size: int, in_channels: int) -> None:
    model = create_model("repvgg_tiny", num_classes=7, in_channels=in_channels)
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
