"""Branches, and the modules that combine them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repnet.layers import (
    Concat,
    PadBatchNorm,
    Scale,
    Sum,
    branch_norms,
    conv,
    conv_bn,
    conv_transpose_bn,
    identity,
    identity_bn,
    identity_conv,
    squeeze_excitation,
)
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-10
KERNEL_SIZES = [1, 3, 5, 7, (1, 3), (5, 1)]


def image() -> Tensor:
    return torch.randn(3, 4, 9, 10, dtype=torch.float64)


def test_sum_adds_its_branches():
    module = randomize_batch_norm(Sum(conv(4, 4), nn.BatchNorm2d(4), nn.Identity()).double())
    x = image()
    expected = module[0](x) + module[1](x) + x
    assert relative_error(expected, module(x)) < TOLERANCE


def test_sum_leaves_out_none():
    branch = conv(4, 4).double()
    module = Sum(None, branch, None)
    x = image()
    assert list(module) == [branch]
    torch.testing.assert_close(module(x), branch(x), rtol=0, atol=0)


def test_concat_stacks_channels():
    module = Concat(conv(4, 2), nn.Identity(), conv(4, 3, 1)).double()
    x = image()
    y = module(x)
    assert y.shape == (3, 9, 9, 10)
    torch.testing.assert_close(y[:, :2], module[0](x), rtol=0, atol=0)
    torch.testing.assert_close(y[:, 2:6], x, rtol=0, atol=0)
    torch.testing.assert_close(y[:, 6:], module[2](x), rtol=0, atol=0)


def test_a_fixed_scale_has_no_parameters():
    module = Scale(-0.3)
    x = image()
    assert list(module.parameters()) == []
    torch.testing.assert_close(module(x), -0.3 * x, rtol=0, atol=0)


def test_a_scale_per_channel_is_trained():
    module = Scale(0.1, 4).double()
    x = image()
    torch.testing.assert_close(module.weight.flatten(), torch.full((4,), 0.1).double())
    nn.init.normal_(module.weight)
    expected = torch.einsum("bchw,c->bchw", x, module.weight.flatten())
    assert relative_error(expected, module(x)) < TOLERANCE
    assert [p.requires_grad for p in module.parameters()] == [True]


def test_a_scale_per_channel_may_start_at_an_integer():
    x = image().float()
    torch.testing.assert_close(Scale(-1, 4)(x), -x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "text"), [(Scale(-1), "Scale(-1)"), (Scale(0.5, 4), "Scale(0.5, 4)")]
)
def test_a_scale_prints_its_value(module, text):
    assert repr(module) == text


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_pad_norm_in_evaluation_is_zero_padding_before_the_norm(padding):
    module = randomize_batch_norm(PadBatchNorm(4, padding).double())
    x = image()
    expected = module.norm(functional.pad(x, [padding] * 4))
    assert relative_error(expected, module(x)) < TOLERANCE


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_pad_norm_in_training_takes_the_statistics_of_the_unpadded_input(padding):
    module = randomize_batch_norm(PadBatchNorm(4, padding).double()).train()
    norm = deepcopy(module.norm)
    x = image()
    expected, y = norm(x), module(x)
    height, width = x.shape[2:]
    assert y.shape[2:] == (height + 2 * padding, width + 2 * padding)
    inside = y[:, :, padding : padding + height, padding : padding + width]
    assert relative_error(expected, inside) < TOLERANCE
    torch.testing.assert_close(module.norm.state_dict(), norm.state_dict(), rtol=0, atol=0)


def test_pad_norm_in_training_pads_with_what_evaluation_makes_of_zero():
    module = randomize_batch_norm(PadBatchNorm(4, 1).double()).train()
    y = module(image())
    zero = module.norm.eval()(torch.zeros(3, 4, 1, 1, dtype=torch.float64))
    for border in (y[:, :, :1], y[:, :, -1:], y[:, :, :, :1], y[:, :, :, -1:]):
        assert relative_error(zero.expand_as(border), border) < TOLERANCE


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_conv_keeps_the_size_for_odd_kernels(kernel_size, dilation):
    x = image()
    for layer in (
        conv(4, 6, kernel_size, dilation=dilation),
        conv_bn(4, 6, kernel_size, dilation=dilation),
    ):
        assert layer.double()(x).shape == (3, 6, 9, 10)


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_strided_branches_of_all_kernel_sizes_have_one_size(kernel_size):
    assert conv(4, 6, kernel_size, stride=2).double()(image()).shape == (3, 6, 5, 5)


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_conv_is_the_convolution_of_torch(kernel_size):
    layer = conv(4, 8, kernel_size, stride=2, dilation=3, groups=2).double()
    x = image()
    height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    padding = (3 * (height // 2), 3 * (width // 2))
    expected = functional.conv2d(x, layer.weight, layer.bias, 2, padding, 3, 2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_conv_bn_is_a_convolution_without_bias_then_a_norm():
    layers = randomize_batch_norm(conv_bn(4, 8, stride=2, groups=2).double())
    x = image()
    assert list(dict(layers.named_children())) == ["conv", "bn"]
    assert layers.conv.bias is None
    assert (layers.conv.stride, layers.conv.groups) == ((2, 2), 2)
    torch.testing.assert_close(layers(x), layers.bn(layers.conv(x)), rtol=0, atol=0)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_transposed_convolution_grows_the_image(stride, padding):
    layers = randomize_batch_norm(conv_transpose_bn(4, 6, padding, stride=stride, groups=2))
    x = image()
    y = layers.double()(x)
    assert list(dict(layers.named_children())) == ["conv", "bn"]
    assert y.shape == (3, 6, 9 * stride, 10 * stride)
    weight = layers.conv.weight
    assert weight.shape == (4, 3, stride + 2 * padding, stride + 2 * padding)
    expected = functional.conv_transpose2d(x, weight, None, stride, padding, groups=2)
    torch.testing.assert_close(y, layers.bn(expected), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_identity_convolution_starts_as_the_identity(groups):
    module = identity_conv(4, groups=groups).double()
    x = image()
    torch.testing.assert_close(module(x), x, rtol=0, atol=0)
    nn.init.normal_(module[1].weight)
    expected = x + functional.conv2d(x, module[1].weight, groups=groups)
    assert [name for name, _ in module.named_parameters()] == ["1.weight"]
    assert relative_error(expected, module(x)) < TOLERANCE


@pytest.mark.parametrize(
    ("channels", "reduction", "inside"), [(32, 16, 2), (32, 4, 8), (24, 16, 1), (8, 16, 1)]
)
def test_attention_has_a_share_of_the_channels_inside(channels, reduction, inside):
    module = squeeze_excitation(channels, reduction)
    assert module.fc1.out_channels == module.fc2.in_channels == inside
    x = torch.randn(2, channels, 5, 5)
    scale = module.fc2(module.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
    torch.testing.assert_close(module(x), x * scale)


@pytest.mark.parametrize("branch", [identity, identity_bn])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "exists"),
    [(4, 4, 1, True), (4, 6, 1, False), (4, 4, 2, False), (4, 6, 2, False)],
)
def test_the_identity_exists_where_the_shape_is_kept(
    branch, in_channels, out_channels, stride, exists
):
    module = branch(in_channels, out_channels, stride=stride, groups=2)
    assert (module is not None) == exists


def test_identity_branches_are_the_identity_and_a_norm():
    x = image()
    torch.testing.assert_close(identity(4, 4)(x), x, rtol=0, atol=0)
    norm = identity_bn(4, 4)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 4


def test_branch_norms_are_those_without_a_convolution():
    inner, outer = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    model = nn.Sequential(
        Sum(conv_bn(4, 4), outer, nn.Sequential(Sum(inner, nn.Identity()))), nn.BatchNorm2d(4)
    )
    assert list(branch_norms(model)) == [outer, inner]
