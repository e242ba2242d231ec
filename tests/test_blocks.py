"""Laws of every block in `configs/block/`: a new file there is tested by existing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.blocks import Block, PlainBlock, RepVGGBlock, ResidualBlock
from repnet.folding import reparameterize
from repnet.layers import Concat, PadBatchNorm, Scale, Sum, branch_norms, conv, conv_bn
from repnet.spec import CONFIGS, build, load_choice
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-12
BLOCKS = sorted(path.stem for path in (CONFIGS / "block").rglob("*.yaml"))
SHAPES = [  # in channels, out channels, stride, groups
    (4, 4, 1, 1),
    (4, 8, 1, 1),
    (4, 4, 2, 1),
    (4, 8, 2, 1),
    (3, 6, 2, 1),
    (8, 8, 1, 4),
    (4, 8, 1, 2),
    (8, 4, 2, 2),
    (6, 6, 1, 6),
]

every_block = pytest.mark.parametrize("name", BLOCKS)
every_shape = pytest.mark.parametrize(("in_channels", "out_channels", "stride", "groups"), SHAPES)


def make(name: str, in_channels: int, out_channels: int, stride: int, groups: int) -> Block:
    block = build(load_choice("block", name))(
        in_channels, out_channels, stride=stride, groups=groups
    )
    return randomize_batch_norm(block).double()


def image(channels: int, size: int = 9) -> Tensor:
    return torch.randn(2, channels, size, size - 1, dtype=torch.float64)


def test_there_are_blocks() -> None:
    assert {"composed", "plain", "repvgg", "residual"} <= set(BLOCKS)


@every_block
@every_shape
def test_the_affine_part_is_one_convolution(
    name: str, in_channels: int, out_channels: int, stride: int, groups: int
) -> None:
    block, x = make(name, in_channels, out_channels, stride, groups), image(in_channels)
    folded = reparameterize(block, x)
    assert type(folded) is type(block)
    assert type(folded.conv) is nn.Conv2d
    assert folded.conv.stride == (stride, stride)
    assert folded.conv.groups == groups
    assert not [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    assert relative_error(block(x), folded(x)) < TOLERANCE
    assert relative_error(block.conv(x), folded.conv(x)) < TOLERANCE


@every_block
@every_shape
def test_the_folded_weights_fit_the_plain_block(
    name: str, in_channels: int, out_channels: int, stride: int, groups: int
) -> None:
    x = image(in_channels)
    folded = reparameterize(make(name, in_channels, out_channels, stride, groups), x)
    if folded.conv.kernel_size != (3, 3):
        pytest.skip("not a 3x3 block")
    plain = reparameterize(make("plain", in_channels, out_channels, stride, groups), x)
    plain.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), folded(x), rtol=0, atol=0)


@every_block
def test_every_parameter_is_trained(name: str) -> None:
    block = make(name, 4, 4, 1, 2).train()
    block(image(4)).square().mean().backward()
    untouched = [
        name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert untouched == []


@every_block
def test_the_fold_is_differentiable(name: str) -> None:
    block = make(name, 4, 4, 1, 1)
    kernel_of(block.conv, 4).weight.square().sum().backward()
    weights = [p for p in block.conv.parameters() if p.ndim == 4]
    assert weights
    assert all(p.grad is not None for p in weights)


@every_block
def test_attention_and_activation_can_be_chosen(name: str) -> None:
    make_block = build(load_choice("block", name))
    block = make_block(4, 4, attention=Attention, activation=nn.Hardswish)
    randomize_batch_norm(block).double()
    folded, x = reparameterize(block, image(4)), image(4)
    assert type(folded.conv) is nn.Conv2d
    assert type(folded.attention) is Attention
    assert type(folded.activation) is nn.Hardswish
    assert relative_error(block(x), folded(x)) < TOLERANCE
    linear = randomize_batch_norm(make_block(4, 4, activation=None)).double()
    assert type(reparameterize(linear, x)) is nn.Conv2d


class Attention(nn.Module):
    """Weights each channel by its own mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight * x.mean((2, 3), keepdim=True)).sigmoid()


# Single blocks


@pytest.mark.parametrize("groups", [1, 2])
def test_a_dilated_residual_block(groups: int) -> None:
    block, x = ResidualBlock(4, 4, groups=groups, dilation=2).double().eval(), image(4)
    folded = reparameterize(block, x)
    assert type(folded.conv) is nn.Conv2d
    assert folded.conv.dilation == folded.conv.padding == (2, 2)
    assert folded.conv.groups == groups
    assert relative_error(block(x), folded(x)) < TOLERANCE


def test_the_residual_block_is_its_equation() -> None:
    block, x = ResidualBlock(4, 4, activation=None).double().eval(), image(4)
    square, pointwise, _ = block.conv
    assert relative_error(square(x) + pointwise(x) + x, block(x)) < TOLERANCE
    folded = reparameterize(block, x)
    center = square.weight[:, :, 1, 1] + pointwise.weight[:, :, 0, 0] + torch.eye(4)
    assert relative_error(center, folded.weight[:, :, 1, 1]) < TOLERANCE
    assert relative_error(square.weight[:, :, 0, 2], folded.weight[:, :, 0, 2]) < TOLERANCE
    assert relative_error(square.bias + pointwise.bias, folded.bias) < TOLERANCE


@pytest.mark.parametrize("block", [RepVGGBlock, ResidualBlock])
@pytest.mark.parametrize(
    ("out_channels", "stride", "branches"), [(4, 1, 3), (4, 2, 2), (8, 1, 2), (8, 2, 2)]
)
def test_the_identity_exists_only_where_the_shape_stays(
    block: Callable[..., Block], out_channels: int, stride: int, branches: int
) -> None:
    conv = block(4, out_channels, stride=stride).conv
    assert isinstance(conv, Sum)
    assert len(conv) == branches


def test_a_block_written_as_data_needs_no_python() -> None:
    branch = {"_target_": "repnet.layers.conv_bn", "_partial_": True}
    spec = {
        "_target_": "repnet.blocks.ComposedBlock",
        "_partial_": True,
        "branches": [
            {**branch, "kernel_size": 5},
            {**branch, "kernel_size": 3, "dilation": 2},
            {**branch, "kernel_size": [1, 3]},
            {"_target_": "repnet.layers.identity", "_partial_": True},
        ],
    }
    block, x = randomize_batch_norm(build(spec)(4, 4, groups=2)).double(), image(4)
    folded = reparameterize(block, x)
    assert type(folded.conv) is nn.Conv2d
    assert folded.conv.kernel_size == (5, 5)
    assert relative_error(block(x), folded(x)) < TOLERANCE


def test_a_plain_block_of_another_size() -> None:
    block = randomize_batch_norm(PlainBlock(4, 4, kernel_size=(5, 1))).double()
    folded = reparameterize(block, image(4))
    assert folded.conv.kernel_size == (5, 1)
    assert folded.conv.padding == (2, 0)


# Layers


@pytest.mark.parametrize(
    "build_layer",
    [
        lambda: Concat(conv_bn(4, 2), conv_bn(4, 3)),
        lambda: Sum(nn.Sequential(conv(4, 4), Scale(-0.5)), nn.Identity(), None, conv(4, 4, 1)),
        lambda: nn.Sequential(conv(4, 4), Scale(0.1, channels=4)),
        lambda: nn.Sequential(
            conv(4, 4, 1, bias=False), PadBatchNorm(4, 1), nn.Conv2d(4, 4, 3, bias=False)
        ),
    ],
    ids=["concat", "sum", "layer scale", "padded norm"],
)
def test_layers_fold(build_layer: Callable[[], nn.Module]) -> None:
    layer, x = randomize_batch_norm(build_layer()).double(), image(4)
    folded = reparameterize(layer, x)
    assert type(folded) is nn.Conv2d
    assert relative_error(layer(x), folded(x)) < TOLERANCE


def test_padding_before_and_after_the_norm_agree_on_fixed_statistics() -> None:
    layer, x = randomize_batch_norm(PadBatchNorm(4, 2)).double(), image(4)
    expected = layer(x)
    layer.train()
    layer.norm.eval()
    assert relative_error(expected, layer(x)) < TOLERANCE


def test_branch_norms_are_those_of_identity_branches() -> None:
    model = nn.Sequential(RepVGGBlock(4, 4), RepVGGBlock(4, 8), nn.BatchNorm2d(8))
    assert list(branch_norms(model)) == [model[0].conv[2]]
