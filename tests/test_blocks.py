"""Laws of every block in `configs/block/`: a new file there is tested by existing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.blocks import (
    ACBlock,
    Block,
    DilatedReparamBlock,
    DiverseBranchBlock,
    LargeKernelBlock,
    MobileOneBlock,
    PlainBlock,
    QARepVGGBlock,
    RepMixerBlock,
    RepVGGBlock,
    RepViTBlock,
    ResidualBlock,
    TransposedBlock,
)
from repnet.blocks.unireplk import BRANCHES
from repnet.fold import reparameterize
from repnet.kernel import NotFoldableError
from repnet.layers import (
    Concat,
    PadBatchNorm,
    Scale,
    Sum,
    branch_norms,
    conv,
    conv_bn,
    conv_transpose_bn,
    identity_conv,
)
from repnet.spec import CONFIGS, build, load_choice
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm, relative_error

Module = TypeVar("Module", bound=nn.Module)

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
    return randomize(block)


@torch.no_grad()
def randomize(module: Module) -> Module:
    """Return `module` in float64, with nothing that starts at zero or at a small number there."""
    for part in module.modules():
        scales = isinstance(part, Scale) and part.weight is not None
        if scales or (isinstance(part, nn.Conv2d) and not part.weight.any()):
            part.weight.normal_()
    return randomize_batch_norm(module).double()


def convolution(name: str, stride: int) -> type[nn.Module]:
    """Return the class that the affine part of a block becomes."""
    return nn.ConvTranspose2d if name == "transposed" and stride > 1 else nn.Conv2d


def image(channels: int, size: int = 9) -> Tensor:
    return torch.randn(2, channels, size, size - 1, dtype=torch.float64)


def test_there_are_blocks() -> None:
    assert {"ac", "composed", "dbb", "mobileone", "plain", "repvgg", "residual"} <= set(BLOCKS)


@every_block
@every_shape
def test_the_affine_part_is_one_convolution(
    name: str, in_channels: int, out_channels: int, stride: int, groups: int
) -> None:
    block, x = make(name, in_channels, out_channels, stride, groups), image(in_channels)
    folded = reparameterize(block, x)
    assert type(folded) is type(block)
    assert type(folded.conv) is convolution(name, stride)
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
    if (type(folded.conv), folded.conv.kernel_size) != (nn.Conv2d, (3, 3)):
        pytest.skip("not a 3x3 block")
    plain = reparameterize(make("plain", in_channels, out_channels, stride, groups), x)
    plain.load_state_dict(folded.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), folded(x), rtol=0, atol=0)


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_is_trained(name: str, training: bool) -> None:
    block = make(name, 4, 4, 1, 2).train(training)
    block(image(4)).square().mean().backward()
    # In training, a norm after a sum takes away what biases before it add.
    parameters = [n for n, _ in block.named_parameters() if not (training and n.endswith("bias"))]
    gradients = {n: block.get_parameter(n).grad for n in parameters}
    assert parameters
    assert [n for n, g in gradients.items() if g is None or not g.abs().max() > 1e-6] == []


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
    block = randomize(make_block(4, 4, attention=Attention, activation=nn.Hardswish))
    folded, x = reparameterize(block, image(4)), image(4)
    assert type(folded.conv) is nn.Conv2d
    assert type(folded.attention) is Attention
    assert type(folded.activation) is nn.Hardswish
    assert relative_error(block(x), folded(x)) < TOLERANCE
    linear = randomize(make_block(4, 4, activation=None))
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


@pytest.mark.parametrize(
    "block",
    [MobileOneBlock, QARepVGGBlock, RepMixerBlock, RepVGGBlock, RepViTBlock, ResidualBlock],
)
@pytest.mark.parametrize(
    ("out_channels", "stride", "exists"),
    [(4, 1, True), (4, 2, False), (8, 1, False), (8, 2, False)],
)
def test_the_identity_exists_only_where_the_shape_stays(
    block: Callable[..., Block], out_channels: int, stride: int, exists: bool
) -> None:
    branches = [
        b for m in block(4, out_channels, stride=stride).modules() if isinstance(m, Sum) for b in m
    ]
    assert any(isinstance(b, nn.Identity | nn.BatchNorm2d) for b in branches) == exists


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("num_branches", [1, 3])
def test_the_branches_of_mobileone_stand_in_the_order_of_the_paper(
    kernel_size: int, num_branches: int
) -> None:
    block = MobileOneBlock(4, 4, kernel_size=kernel_size, num_branches=num_branches)
    *convolutions, identity = block.conv
    sizes = [branch.conv.kernel_size[0] for branch in convolutions]
    assert sizes == [kernel_size] * num_branches + ([1] if kernel_size > 1 else [])
    assert type(identity) is nn.BatchNorm2d


def test_a_mobileone_block_without_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="num_branches must be at least 1, got 0"):
        MobileOneBlock(4, 4, num_branches=0)


def test_the_branches_of_acnet_are_square_vertical_horizontal() -> None:
    assert [b.conv.kernel_size for b in ACBlock(4, 4, kernel_size=5).conv] == [
        (5, 5), (5, 1), (1, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("channels", "groups", "stride"), [(4, 1, 1), (8, 2, 2), (4, 4, 2)])
def test_the_diverse_branch_block_is_its_equation(
    kernel_size: int, channels: int, groups: int, stride: int
) -> None:
    block = DiverseBranchBlock(
        4, channels, groups=groups, stride=stride, kernel_size=kernel_size, activation=None
    )
    x, padding = image(4), kernel_size // 2
    branches = list(randomize(block).conv)
    (first, norm, second, last_norm), pool = branches[-2], branches[-1]
    # Both sequences with their norms on an image that is padded beforehand, without any padding.
    padded = functional.pad(x, [padding] * 4)
    expected = branches[0](x) + last_norm(second(norm.norm(first(padded))))
    if groups == channels:
        assert len(branches) == 3
        assert (first.out_channels, first.in_channels) == (8, 4)
        pooled = functional.avg_pool2d(padded, kernel_size, stride)
    else:
        assert len(branches) == 4
        torch.testing.assert_close(first(x), x + first[1](x), rtol=0, atol=0)
        pooled = functional.avg_pool2d(pool[1].norm(pool[0](padded)), kernel_size, stride)
        expected = expected + branches[1](x)
    assert relative_error(expected + pool[-1](pooled), block(x)) < TOLERANCE


def test_the_1x1_of_a_diverse_branch_block_starts_as_the_identity() -> None:
    x = image(4)
    first = DiverseBranchBlock(4, 8, groups=2).double().conv[2][0]
    torch.testing.assert_close(first(x), x, rtol=0, atol=0)
    block = randomize(DiverseBranchBlock(4, 8, groups=2, internal_channels=6))
    assert block.conv[2][0].out_channels == 6
    folded = reparameterize(block, x)
    assert type(folded.conv) is nn.Conv2d
    assert relative_error(block(x), folded(x)) < TOLERANCE


def test_a_sequence_that_does_not_pad_before_its_norm_is_another_map_and_refused() -> None:
    block, x = randomize(DiverseBranchBlock(4, 4)), image(4)
    first, norm, second, last_norm = block.conv[2]
    padded = nn.Conv2d(4, 4, 3, padding=1, bias=False).double()
    padded.load_state_dict(second.state_dict())
    naive = nn.Sequential(first, norm.norm, padded, last_norm)
    expected, wrong = block.conv[2](x), naive(x)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert relative_error(expected[inside], wrong[inside]) < TOLERANCE
    assert relative_error(expected, wrong) > 0.01
    with pytest.raises(NotFoldableError, match="pads its input with zeros.*has a bias"):
        kernel_of(naive, 4)


def test_a_quantization_aware_block_is_its_equation() -> None:
    block, x = randomize(QARepVGGBlock(4, 4, groups=2, activation=None)), image(4)
    (square, pointwise, _), norm = block.conv
    assert pointwise.bias is None
    assert relative_error(norm(square(x) + pointwise(x) + x), block(x)) < TOLERANCE


def test_a_repvit_block_is_its_equation() -> None:
    block, x = randomize(RepViTBlock(4, 4, groups=4, activation=None)), image(4)
    (square, pointwise, _), norm = block.conv
    assert pointwise.bias is not None
    assert relative_error(norm(square(x) + pointwise(x) + x), block(x)) < TOLERANCE


def test_a_repmixer_block_is_its_equation() -> None:
    block, x = randomize(RepMixerBlock(4, 4, groups=4, kernel_size=5, activation=None)), image(4)
    (mixer, (norm, _)), scale = block.conv[1]
    square, pointwise, identity = mixer
    mixed = square(x) + pointwise(x) + identity(x)
    expected = x + scale.weight * (mixed - norm(x))
    assert relative_error(expected, block(x)) < TOLERANCE
    folded = reparameterize(block, x)
    assert relative_error(expected, folded(x)) < TOLERANCE
    assert folded.kernel_size == (5, 5)


def test_the_scale_of_a_repmixer_block_starts_small() -> None:
    scale = RepMixerBlock(4, 4).conv[1][1]
    torch.testing.assert_close(scale.weight.flatten(), torch.full((4,), 1e-5))


@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_a_dilated_block_of_every_size(kernel_size: int) -> None:
    block = randomize(DilatedReparamBlock(4, 4, groups=4, kernel_size=kernel_size))
    x = image(4, size=20)
    folded = reparameterize(block, x)
    assert folded.conv.kernel_size == (kernel_size, kernel_size)
    assert folded.conv.padding == (kernel_size // 2, kernel_size // 2)
    assert folded.conv.groups == 4
    assert relative_error(block(x), folded(x)) < TOLERANCE


def test_the_dilated_branches_are_those_of_the_paper() -> None:
    layers = [branch.conv for branch in DilatedReparamBlock(4, 4, kernel_size=13).conv]
    assert [layer.kernel_size[0] for layer in layers] == [13, 5, 7, 3, 3, 3]
    assert [layer.dilation[0] for layer in layers] == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("kernel_size", [3, 6, 19])
def test_a_dilated_block_of_another_size_is_refused(kernel_size: int) -> None:
    message = f"one of 5, 7, 9, 11, 13, 15, 17, got {kernel_size}"
    with pytest.raises(ValueError, match=message):
        DilatedReparamBlock(4, 4, kernel_size=kernel_size)


@pytest.mark.parametrize("kernel_size", [13, 31])
def test_a_large_depthwise_block(kernel_size: int) -> None:
    block = randomize(LargeKernelBlock(4, 4, groups=4, stride=2, kernel_size=kernel_size))
    x = image(4, size=20)
    folded = reparameterize(block, x)
    assert folded.conv.kernel_size == (kernel_size, kernel_size)
    assert folded.conv.weight.shape[1] == 1
    assert relative_error(block(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize(
    "block",
    [ACBlock, DiverseBranchBlock, MobileOneBlock, QARepVGGBlock, RepMixerBlock, RepViTBlock],
)
@pytest.mark.parametrize(("kernel_size", "out_channels", "stride"), [(5, 4, 1), (7, 8, 2)])
def test_other_kernel_sizes(
    block: Callable[..., Block], kernel_size: int, out_channels: int, stride: int
) -> None:
    module = randomize(block(4, out_channels, stride=stride, groups=4, kernel_size=kernel_size))
    x = image(4)
    folded = reparameterize(module, x)
    assert type(folded.conv) is nn.Conv2d
    assert (folded.conv.kernel_size, folded.conv.groups) == ((kernel_size, kernel_size), 4)
    assert relative_error(module(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize(
    "block",
    [ACBlock, DiverseBranchBlock, MobileOneBlock, QARepVGGBlock, RepVGGBlock, RepViTBlock],
)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding"), [(2, 2, 0), (4, 4, 0), (4, 1, 1), (3, 1, 2), (5, 1, 0)]
)
def test_other_paddings_and_even_kernels(
    block: Callable[..., Block], kernel_size: int, stride: int, padding: int, groups: int
) -> None:
    sizes = {"kernel_size": kernel_size, "padding": padding}
    module = randomize(block(4, 4, stride=stride, groups=groups, **sizes))
    x = image(4)
    folded = reparameterize(module, x)
    assert type(folded.conv) is nn.Conv2d
    assert folded.conv.kernel_size == (kernel_size, kernel_size)
    assert folded.conv.padding == (padding, padding)
    assert relative_error(module(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize(("stride", "kernel_size"), [(1, 3), (2, 4), (3, 7), (4, 8)])
@pytest.mark.parametrize(("out_channels", "groups"), [(6, 1), (8, 4), (4, 4), (2, 2)])
def test_a_transposed_block_makes_the_image_larger(
    out_channels: int, groups: int, stride: int, kernel_size: int
) -> None:
    block = randomize(TransposedBlock(4, out_channels, stride=stride, groups=groups))
    x = image(4)
    folded = reparameterize(block, x)
    assert block(x).shape == (2, out_channels, 9 * stride, 8 * stride)
    assert type(folded.conv) is convolution("transposed", stride)
    assert folded.conv.kernel_size == (kernel_size, kernel_size)
    assert relative_error(block(x), folded(x)) < TOLERANCE


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
    layer, x = randomize(build_layer()), image(4)
    folded = reparameterize(layer, x)
    assert type(folded) is nn.Conv2d
    assert relative_error(layer(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize(
    "build_layer",
    [
        lambda: nn.Sequential(conv(4, 4), identity_conv(4, groups=2)),
        lambda: Sum(conv_bn(4, 6, (1, 7)), conv_bn(4, 6, (5, 3)), conv(4, 6, (3, 1))),
        lambda: Sum(conv_bn(4, 6, 4), conv(4, 6, 2)),
        lambda: Sum(conv_bn(4, 6, (2, 3)), conv_bn(4, 6, (4, 1))),
        lambda: Sum(conv_bn(4, 4), nn.Sequential(nn.AvgPool2d(5, 1, 2), conv(4, 4, 1))),
        lambda: nn.Sequential(conv(4, 6, 1), nn.AvgPool2d((3, 2), 2)),
        lambda: nn.Sequential(conv(4, 4), Scale(1e-5, channels=4), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(conv(4, 6, groups=2), nn.BatchNorm2d(6)),
        lambda: nn.Sequential(conv(4, 6), nn.BatchNorm2d(6, affine=False)),
    ],
    ids=[
        "identity convolution",
        "asymmetric kernels",
        "even kernels",
        "even and odd sides",
        "pooling in a branch",
        "pooling of a biased layer",
        "layer scale and norm",
        "bias and norm",
        "norm without affine",
    ],
)
def test_compositions_are_one_kernel(build_layer: Callable[[], nn.Module]) -> None:
    layer, x = randomize(build_layer()), image(4)
    assert relative_error(layer(x), kernel_of(layer, 4)(x)) < TOLERANCE


@pytest.mark.parametrize(("padding", "stride"), [(0, 2), (1, 2), (2, 3)])
def test_a_transposed_convolution_folds_with_its_norm(padding: int, stride: int) -> None:
    layer, x = randomize(conv_transpose_bn(4, 6, padding, stride=stride, groups=2)), image(4)
    folded = reparameterize(layer, x)
    assert type(folded) is nn.ConvTranspose2d
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
