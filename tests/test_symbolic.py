"""`kernel_of(module)` is the module, or is refused where the merge would be wrong."""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from repnet.kernel import ConvKernel, NotAffineError, NotFoldableError, add, concat, select
from repnet.layers import Concat, PadBatchNorm, Scale, Sum, conv, conv_bn
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-10
CHANNELS = 4  # of the input of every module here
SIZES = [(11, 12), (12, 14), (13, 11)]  # odd and even, so that strides 2 and 3 leave samples over

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel:UserWarning"  # torch: such padding is slow
)


class Written(nn.Module):
    """A module whose forward is `function(self, x)`."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))
        self.factor = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def written(function: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    """Return a constructor of a module with a 3x3 and a 1x1 convolution of 4 channels each."""
    return lambda: Written(function, conv=conv(4, 4), pointwise=conv(4, 4, 1))


def pointwise(out_channels: int = 4) -> nn.Conv2d:
    return conv(4, out_channels, 1, bias=False)


def after_pointwise(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(pointwise(), *layers)


def mobileone(channels: int, groups: int) -> Sum:
    powers = [conv_bn(channels, channels, groups=groups) for _ in range(3)]
    return Sum(*powers, conv_bn(channels, channels, 1, groups=groups), nn.BatchNorm2d(channels))


def diverse_branch(kernel_size: int, stride: int = 1) -> Sum:
    padding = kernel_size // 2
    return Sum(
        conv_bn(4, 4, kernel_size, stride=stride),
        conv_bn(4, 4, 1, stride=stride),
        nn.Sequential(
            pointwise(),
            PadBatchNorm(4, padding),
            nn.Conv2d(4, 4, kernel_size, stride, bias=False),
            nn.BatchNorm2d(4),
        ),
        nn.Sequential(
            pointwise(),
            PadBatchNorm(4, padding),
            nn.AvgPool2d(kernel_size, stride),
            nn.BatchNorm2d(4),
        ),
    )


def repvgg(channels: int) -> Sum:
    return Sum(
        conv_bn(channels, channels), conv_bn(channels, channels, 1), nn.BatchNorm2d(channels)
    )


class NormAndPad(nn.Module):
    """`BNAndPadLayer` of the official code of DBB: pads with what the norm makes of a zero."""

    def __init__(self, channels: int, padding: int, *, affine: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=affine)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        output = self.bn(x)
        p, deviation = self.padding, torch.sqrt(self.bn.running_var + self.bn.eps)
        if self.bn.affine:
            pad_values = self.bn.bias - self.bn.running_mean * self.bn.weight / deviation
        else:
            pad_values = -self.bn.running_mean / deviation
        output = functional.pad(output, [p] * 4)
        pad_values = pad_values.view(1, -1, 1, 1)
        output[:, :, 0:p, :] = pad_values
        output[:, :, -p:, :] = pad_values
        output[:, :, :, 0:p] = pad_values
        output[:, :, :, -p:] = pad_values
        return output


class OfficialDiverseBranch(nn.Module):
    """The block of the official code of DBB, which adds in place."""

    def __init__(self, channels: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.register_buffer("identity", torch.eye(channels)[:, :, None, None])
        self.dbb_origin = conv_bn(channels, channels, 3, stride=stride, groups=groups)
        self.dbb_1x1 = conv_bn(channels, channels, 1, stride=stride, groups=groups)
        self.dbb_avg = nn.Sequential(
            nn.Conv2d(channels, channels, 1, groups=groups, bias=False),
            NormAndPad(channels, 1),
            nn.AvgPool2d(3, stride, padding=0),
            nn.BatchNorm2d(channels),
        )
        self.idconv1 = conv(channels, channels, 1, bias=False)
        self.dbb_1x1_kxk = nn.Sequential(
            NormAndPad(channels, 1, affine=False),
            nn.Conv2d(channels, channels, 3, stride, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.dbb_origin(inputs)
        out += self.dbb_1x1(inputs)
        out += self.dbb_avg(inputs)
        weight = self.idconv1.weight + self.identity
        out += self.dbb_1x1_kxk(functional.conv2d(inputs, weight, None, stride=1, padding=0))
        return out


def unpadded(channels: int, kernel_size: Any, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size, stride, bias=False), nn.BatchNorm2d(channels)
    )


class OfficialAsymmetric(nn.Module):
    """The block of the official code of ACNet without padding, which crops for 1x3 and 3x1."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.square = unpadded(channels, 3, stride=stride)
        self.vertical = unpadded(channels, (3, 1), stride=stride)
        self.horizontal = unpadded(channels, (1, 3), stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        result = self.square(x)
        result += self.vertical(x[:, :, :, 1:-1])
        result += self.horizontal(x[:, :, 1:-1])
        return result


# Every test of `kernel_of` runs over all of these: a new constructor gets them all.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv without bias": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), bias=False),
    "conv strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1)),
    "conv dilated, grouped": lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=(2, 3), groups=2),
    "conv depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "conv padding same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)),
    "conv padding same, even": lambda: nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3)),
    "conv padding valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2),
    "conv, norm": lambda: conv_bn(4, 6, (3, 1), groups=2),
    "conv with bias, norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "norm": lambda: nn.BatchNorm2d(4),
    "norm with another eps": lambda: nn.BatchNorm2d(4, eps=0.3),
    "norm, conv": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)),
    "norm not affine": lambda: after_pointwise(nn.BatchNorm2d(4, affine=False)),
    "norm synchronized": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)),
    "average pool": lambda: after_pointwise(nn.AvgPool2d((2, 3))),
    "average pool padded": lambda: after_pointwise(nn.AvgPool2d(3, stride=2, padding=1)),
    "average pool, own divisor": lambda: after_pointwise(
        nn.AvgPool2d((3, 2), 1, padding=1, count_include_pad=False, divisor_override=5)
    ),
    "average pool unpadded, count_include_pad=False": lambda: after_pointwise(
        nn.AvgPool2d(3, stride=1, count_include_pad=False)
    ),
    "zero pad": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 3)), nn.Conv2d(4, 6, (4, 2))),
    "zero pad after pointwise": lambda: after_pointwise(nn.ZeroPad2d((3, 1, 0, 2)), conv(4, 4)),
    "constant pad with zero": lambda: after_pointwise(nn.ConstantPad2d((0, 2, 1, 0), 0.0)),
    "crop": lambda: nn.Sequential(conv(4, 4), nn.ZeroPad2d((-1, 0, -2, -3)), conv_bn(4, 4, 1)),
    "transposed conv": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed conv strided": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, (3, 4), (2, 3), padding=(1, 0), output_padding=(1, 2), bias=False),
        nn.BatchNorm2d(6),
    ),
    "transposed conv dilated, grouped": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 8, (2, 3), 2, padding=1, dilation=(2, 3), groups=2),
        nn.BatchNorm2d(8),
    ),
    "transposed conv, then conv": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 6, 3, stride=3)
    ),
    "pointwise, then transposed conv": lambda: after_pointwise(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    ),
    "dropout": lambda: nn.Sequential(conv(4, 4), nn.Dropout(0.5), nn.Dropout2d(0.5)),
    "chain": lambda: nn.Sequential(
        pointwise(6),
        nn.Conv2d(6, 4, (3, 2), padding=(2, 1), dilation=(1, 2)),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.AvgPool2d(2, 1),
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
    ),
    "sum": lambda: Sum(conv(4, 4), conv(4, 4, (1, 5)), None, nn.Identity(), conv(4, 4, dilation=2)),
    "sum, strided": lambda: Sum(conv(4, 6, 5, stride=2), conv(4, 6, 1, stride=2)),
    "concat": lambda: Concat(conv(4, 2), conv(4, 4, 1, groups=2, bias=False), nn.Identity()),
    "scale": lambda: nn.Sequential(conv(4, 4), Scale(-0.1)),
    "scale per channel": lambda: nn.Sequential(conv(4, 6), Scale(0.1, 6)),
    "crop by padding and norm": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.ZeroPad2d((-1, 0, -2, -3))
    ),
    "norm and pad": lambda: NormAndPad(4, 1),
    "conv, norm and pad, conv": lambda: after_pointwise(
        NormAndPad(4, 2, affine=False), nn.Conv2d(4, 6, 3)
    ),
    "padded conv, norm and pad": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=2, bias=False), NormAndPad(4, 1)
    ),
    "pad, norm": lambda: after_pointwise(PadBatchNorm(4, 2), nn.Conv2d(4, 6, 3)),
}

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": lambda: repvgg(4),
    "RepVGG strided, grouped": lambda: Sum(
        conv_bn(4, 8, 3, stride=2, groups=2), conv_bn(4, 8, 1, stride=2, groups=2)
    ),
    "MobileOne": lambda: mobileone(4, groups=1),
    "MobileOne depthwise, then pointwise": lambda: nn.Sequential(
        mobileone(4, groups=4), Sum(conv_bn(4, 4, 1), conv_bn(4, 4, 1), nn.BatchNorm2d(4))
    ),
    "ACNet": lambda: Sum(*(conv_bn(4, 6, size, groups=2) for size in [(3, 3), (1, 3), (3, 1)])),
    "official DBB": lambda: OfficialDiverseBranch(4),
    "official DBB, strided, grouped": lambda: OfficialDiverseBranch(4, stride=2, groups=2),
    "official ACNet": lambda: OfficialAsymmetric(4, 1),
    "official ACNet, strided": lambda: OfficialAsymmetric(4, 2),
    "DBB": lambda: diverse_branch(3),
    "DBB 5x5, strided": lambda: diverse_branch(5, stride=2),
    "QARepVGG": lambda: nn.Sequential(
        Sum(conv_bn(4, 4), pointwise(), nn.Identity()), nn.BatchNorm2d(4)
    ),
    "UniRepLK": lambda: Sum(
        conv_bn(4, 4, 7, groups=4),
        *(conv_bn(4, 4, k, dilation=r, groups=4) for k, r in [(5, 1), (3, 2), (3, 3)]),
    ),
    "RepMixer": lambda: Sum(
        nn.Identity(),
        nn.Sequential(
            Sum(mobileone(4, groups=4), nn.Sequential(nn.BatchNorm2d(4), Scale(-1))),
            Scale(0.3, 4),
        ),
    ),
    "Residual": lambda: Sum(conv(4, 4), conv(4, 4, 1), nn.Identity()),
    "nested": lambda: nn.Sequential(
        pointwise(),
        Sum(
            Concat(repvgg(4), nn.Sequential(conv_bn(4, 2, 5), nn.BatchNorm2d(2))),
            nn.Sequential(Concat(nn.Identity(), conv(4, 2, 1)), Scale(0.7, 6)),
        ),
        nn.AvgPool2d(2),
    ),
}


def add_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    alias = y
    y += x
    y += m.shift
    return alias + y


def subtract_in_place(m: Any, x: Tensor) -> Tensor:
    y = functional.dropout(m.conv(x), training=False)
    y -= x
    return y.sub_(m.pointwise(x), alpha=2)


def multiply_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).add_(m.pointwise(x), alpha=0.3)
    y *= m.factor
    return y.mul_(3).add_(0.5)


def divide_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y /= m.factor
    return y.div_(0.7)


def add_to_copies(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    copies = [x.clone(), y.clone(), 0 + x, y + 0, functional.pad(y, (0, 0)), torch.cat([y], 1)]
    for n, copy in enumerate(copies):
        copy += n * m.pointwise(x)
    return sum(copies) + 7 * y + 3 * x


def view_afterwards(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += x
    first, second = y.chunk(2, 1)
    return torch.cat([second, first - second], 1)


def sum_in_a_loop(m: Any, x: Tensor) -> Tensor:
    out: Any = 0
    for layer in (m.conv, nn.Identity(), m.pointwise):
        out += layer(x)
    return out + 2 * x


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "+": written(lambda m, x: m.conv(x) + m.pointwise(x) + x),
    "-": written(lambda m, x: x - m.conv(x) - 0.1),
    "* number": written(lambda m, x: 0.1 * m.conv(x) * 3),
    "* parameter": written(lambda m, x: m.conv(x) * m.factor + m.shift * x),
    "/ number": written(lambda m, x: m.conv(x) / 0.3),
    "/ parameter": written(lambda m, x: (m.conv(x) / m.factor).div(7)),
    "+ parameter": written(lambda m, x: m.shift + (m.conv(x) + m.factor)),
    "- parameter": written(lambda m, x: m.shift - (m.conv(x) - m.factor)),
    "number - x": written(lambda m, x: 0.7 - m.conv(x)),
    "negative": written(lambda m, x: -m.conv(x) + torch.neg(x)),
    "0 + x": written(lambda m, x: 0 + m.conv(x)),
    "sum()": written(lambda m, x: sum([m.conv(x), m.pointwise(x), x])),
    "alpha": written(lambda m, x: torch.add(m.conv(x), x, alpha=0.3).sub(m.pointwise(x), alpha=2)),
    "functions": written(
        lambda m, x: torch.div(torch.sub(torch.mul(torch.add(m.conv(x), x), m.factor), m.shift), 3)
    ),
    "methods": written(lambda m, x: m.conv(x).add(x).mul(m.factor).sub(m.shift).div(3).neg()),
    "rsub": written(lambda m, x: torch.rsub(m.conv(x), x)),
    "clone, contiguous": written(lambda m, x: m.conv(x).clone().contiguous()),
    "detach": written(lambda m, x: m.conv(x).detach() + m.pointwise(x)),
    "cat": written(lambda m, x: torch.cat([m.conv(x), x, m.pointwise(x)], dim=1)),
    "cat of dim -3": written(lambda m, x: torch.cat((x, m.conv(x)), -3)),
    "chunk": written(lambda m, x: torch.cat(m.conv(x).chunk(2, dim=1)[::-1], dim=1)),
    "chunk, uneven": written(lambda m, x: torch.chunk(torch.cat([m.conv(x), x], 1), 3, 1)[2]),
    "split": written(lambda m, x: torch.split(m.conv(x), 3, dim=1)[1]),
    "split in sections": written(lambda m, x: m.conv(x).split([1, 2, 1], dim=1)[1] + x[:, 2:]),
    "narrow": written(lambda m, x: m.conv(x).narrow(1, 1, 3)),
    "narrow from the end": written(lambda m, x: torch.narrow(m.conv(x), 1, -2, 2)),
    "keywords of convolutions": written(
        lambda m, x: functional.conv_transpose2d(
            input=functional.conv2d(
                input=x, weight=m.conv.weight, bias=m.conv.bias, stride=2, padding=2
            ),
            weight=m.pointwise.weight,
            bias=m.factor.flatten(),
        )
    ),
    "keywords of layers": lambda: Written(
        lambda m, x: functional.avg_pool2d(
            input=functional.batch_norm(
                input=functional.pad(input=m.conv(input=x), pad=(-1, 0, 0, -2)),
                running_mean=m.norm.running_mean,
                running_var=m.norm.running_var,
                weight=m.norm.weight,
                bias=m.norm.bias,
            ),
            kernel_size=(2, 3),
            stride=1,
        ),
        conv=conv(4, 6),
        norm=nn.BatchNorm2d(6),
    ),
    "keywords of sums": written(
        lambda m, x: torch.add(
            input=torch.sub(input=m.conv(x), other=m.shift, alpha=2),
            other=torch.div(
                input=torch.mul(input=m.factor, other=x).add(other=m.pointwise(x)), other=3
            ),
            alpha=0.5,
            out=None,
        )
    ),
    "keywords of channels": written(
        lambda m, x: torch.cat(
            tensors=[
                torch.chunk(input=m.conv(x), chunks=2, dim=1)[0],
                torch.split(x, split_size_or_sections=3, dim=1)[1],
                torch.split(tensor=x, split_size_or_sections=[1, 3], dim=1)[1],
                m.pointwise(x).split(split_size=2, dim=1)[0],
                torch.narrow(input=x, dim=1, start=1, length=2),
                functional.dropout(input=x, p=0.5, training=m.training),
                torch.neg(input=x) / x.size(dim=1),
            ],
            dim=1,
        )
    ),
    "crop by slices": written(
        lambda m, x: m.conv(x)[:, :, 1:-1, 2:] - x[..., 1:, 1:][:, :, :-1, :-1]
    ),
    "crop of a sum with channels": written(
        lambda m, x: (m.conv(x) + m.shift)[:, 1:3, 2:, :-1] * 2 + x[:, :2, 2:, 0:-1]
    ),
    "crop, then padded": written(lambda m, x: m.conv(x[:, :, 1::2, ::3])),
    "steps": written(lambda m, x: m.pointwise(x)[:, :, ::2, ::3] + m.conv(x)[:, :, ::2, ::3]),
    "steps of a crop": written(lambda m, x: m.conv(x)[:, :, 1:-2:2, 2::2] + x[:, :, 1:-2:2, 2::2]),
    "steps behind upsampling": lambda: Written(
        lambda m, x: m.conv(x)[:, :, 1::2, :-1:3], conv=nn.ConvTranspose2d(4, 4, 3, 2)
    ),
    "+= in place": written(add_in_place),
    "-= in place": written(subtract_in_place),
    "*= in place": written(multiply_in_place),
    "/= in place": written(divide_in_place),
    "in place, of copies": written(add_to_copies),
    "in place, then views": written(view_afterwards),
    "in place, in a loop": written(sum_in_a_loop),
    "casts to the same": written(
        lambda m, x: m.pointwise(m.conv(x.to(x.device)).to(m.conv.weight).type_as(m.shift)).cpu()
    ),
    "cast to float64": written(
        lambda m, x: m.conv(x).double().to(torch.float64).type(torch.float64)
    ),
    "reduce": written(lambda m, x: reduce(torch.add, [m.conv(x), m.pointwise(x), x])),
    "identities": written(lambda m, x: (m.conv(x) * 1.0 + 0).sub(x + 0.0).add(x, alpha=2)),
    "rsub with alpha": written(lambda m, x: torch.rsub(m.conv(x), x, alpha=0.3)),
    "slices": written(lambda m, x: m.conv(x)[:, 1:3] + x[:, -2:, :, :] - x[..., :2, :, :]),
    "size(1)": written(lambda m, x: m.conv(x) / x.size(1) + x.dim()),
    "grouped conv by hand": lambda: Written(
        lambda m, x: torch.cat([m.first(x[:, :2]), m.second(x[:, 2:])], dim=1),
        first=conv(2, 3),
        second=conv(2, 3),
    ),
    "functional": lambda: Written(
        lambda m, x: functional.batch_norm(
            functional.avg_pool2d(
                functional.conv2d(functional.pad(x, (2, 1)), m.conv.weight, stride=2), 3, 1
            ),
            m.norm.running_mean,
            m.norm.running_var,
            m.norm.weight,
            m.norm.bias,
            eps=0.01,
        ),
        conv=conv(4, 6),
        norm=nn.BatchNorm2d(6),
    ),
    "functional pool of default stride": written(
        lambda m, x: functional.avg_pool2d(m.conv(x), (2, 3)) * m.factor
    ),
    "functional transposed": lambda: Written(
        lambda m, x: functional.conv_transpose2d(x, m.conv.weight, m.conv.bias, (2, 1), groups=2),
        conv=nn.ConvTranspose2d(4, 6, (3, 4), groups=2),
    ),
    "drop path": lambda: Written(
        lambda m, x: x + (m.conv(x) * torch.rand(()) if m.training else m.conv(x)),
        conv=conv(4, 4),
    ),
}

MODULES = {**LAYERS, **BLOCKS, **FORWARDS}


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a module in float64 and evaluation mode, with nothing at its default."""
    module = build()
    for layer in module.modules():
        if isinstance(layer, Scale) and layer.weight is not None:
            nn.init.normal_(layer.weight)
    return randomize_batch_norm(module.double())


def image(height: int = 11, width: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, CHANNELS, height, width, dtype=dtype)


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return prepared(request.param)


# The law


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_is_the_module(module, size):
    x = image(*size)
    assert relative_error(module(x), kernel_of(module, CHANNELS)(x)) < TOLERANCE


def test_a_module_in_training_mode_is_folded_as_in_evaluation(module):
    x = image()
    expected = module(x)
    module.train()
    state = deepcopy(module.state_dict())
    assert relative_error(expected, kernel_of(module, CHANNELS)(x)) < TOLERANCE
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_training_flags_are_as_before(module):
    module.train()
    for frozen in list(module.modules())[1::2]:  # every other one, a frozen norm for instance
        frozen.training = False
    before = [m.training for m in module.modules()]
    kernel_of(module, CHANNELS)
    assert [m.training for m in module.modules()] == before


def test_gradients_are_those_of_the_module(module):
    x = image()
    parameters = list(module.parameters())
    expected = module(x)
    weights = torch.randn_like(expected)
    outputs = [expected, kernel_of(module, CHANNELS)(x)]
    gradients = [
        torch.autograd.grad((y * weights).sum(), parameters, materialize_grads=True)
        for y in outputs
    ]
    for of_module, of_kernel in zip(*gradients, strict=True):
        assert relative_error(of_module, of_kernel) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_folded_in_float64(module, dtype):
    x = image()
    exact = deepcopy(module.to(dtype)).double()
    kernel = kernel_of(module, CHANNELS)
    assert kernel.dtype == torch.float64
    assert relative_error(exact(x), kernel(x)) < TOLERANCE


def test_a_float32_module_gives_a_float32_kernel(module):
    x = image(dtype=torch.float32)
    kernel = kernel_of(module.float(), CHANNELS)
    assert kernel.dtype == torch.float32
    assert relative_error(module(x), kernel(x)) < 1e-4


def test_a_chain_is_the_composition_of_its_kernels(module):
    first = prepared(lambda: nn.Conv2d(4, 4, 1, bias=False))
    expected = kernel_of(nn.Sequential(first, module), CHANNELS)
    x = image()
    composed = kernel_of(first, CHANNELS).then(kernel_of(module, CHANNELS))
    assert relative_error(expected(x), composed(x)) < TOLERANCE


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    """Draw a convolution or transposed convolution of any settings, with or without a norm."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel_size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    out_channels = draw(st.sampled_from([4, 6, 8]))
    divisors = [n for n in (1, 2, 4) if gcd(CHANNELS, out_channels) % n == 0]
    options: dict[str, Any] = {
        "stride": draw(pair),
        "dilation": draw(pair),
        "groups": draw(st.sampled_from(divisors)),
        "bias": draw(st.booleans()),
        "padding": (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
    }
    torch.manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        # torch's rule: smaller than the stride or the dilation
        options["output_padding"] = tuple(
            draw(st.integers(0, max(options["stride"][axis], options["dilation"][axis]) - 1))
            for axis in range(2)
        )
        layer: nn.Module = nn.ConvTranspose2d(CHANNELS, out_channels, kernel_size, **options)
    else:
        layer = nn.Conv2d(CHANNELS, out_channels, kernel_size, **options)
    norm = [nn.BatchNorm2d(out_channels, affine=draw(st.booleans()))] * draw(st.integers(0, 1))
    return prepared(lambda: nn.Sequential(layer, *norm))


@given(convolutions(), st.sampled_from(SIZES))
def test_convolutions_of_all_settings(layers, size):
    x = image(*size)
    assert relative_error(layers(x), kernel_of(layers, CHANNELS)(x)) < TOLERANCE


# Parts of the law that need modules of their own


def test_a_frozen_norm_stays_frozen():
    module = prepared(lambda: repvgg(4)).train()
    frozen = module[0].bn.eval()
    kernel_of(module, CHANNELS)
    assert not frozen.training
    assert all(m.training for m in module.modules() if m is not frozen)


def test_training_flags_are_as_before_when_refused():
    module = nn.Sequential(conv_bn(4, 4), nn.ReLU()).train()
    module[0].bn.eval()
    before = [m.training for m in module.modules()]
    with pytest.raises(NotFoldableError):
        kernel_of(module, CHANNELS)
    assert [m.training for m in module.modules()] == before


@pytest.mark.parametrize("build", [nn.Identity, lambda: nn.AvgPool2d(3), lambda: Scale(-0.1)])
def test_a_module_without_parameters_is_folded_in_the_default_dtype(build):
    x = image(dtype=torch.float32)
    kernel = kernel_of(build(), CHANNELS)
    assert kernel.dtype == torch.get_default_dtype()
    assert relative_error(build()(x), kernel(x)) < 1e-5


@pytest.mark.parametrize("half", ["conv", "bn"])
def test_layers_of_different_precision_are_folded_in_the_highest(half):
    module = prepared(lambda: conv_bn(4, 4)).float()
    module.get_submodule(half).half()
    x = image()
    kernel = kernel_of(module, CHANNELS)
    # The float32 layer's own arithmetic bounds the error.
    assert relative_error(deepcopy(module).double()(x), kernel(x.to(kernel.dtype)).double()) < 1e-5


CONSTANTS = {
    "integer": torch.tensor(3),
    "float32": torch.tensor(0.5),
    "integer per channel": torch.arange(1, 5).reshape(4, 1, 1),
    "float32 per channel": torch.arange(1, 5).reshape(4, 1, 1) / 2,
}


@pytest.mark.parametrize("constant", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize(
    "operation",
    [torch.add, torch.sub, torch.mul, torch.div, lambda x, y: y + x, lambda x, y: y - x],
    ids=["add", "sub", "mul", "div", "constant + x", "constant - x"],
)
def test_constant_tensors_keep_the_precision_of_the_kernel(operation, constant):
    module = Written(lambda m, x: operation(m.conv(x), constant), conv=pointwise()).double()
    x = image()
    assert relative_error(module(x), kernel_of(module, CHANNELS)(x)) < TOLERANCE


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (m.conv(x), x),
        lambda m, x: m.conv(x).dim(),
        lambda m, x: None,
    ],
    ids=["tuple", "number", "nothing"],
)
def test_forward_must_return_one_feature_map(forward):
    with pytest.raises(NotAffineError, match="not one feature map"):
        kernel_of(written(forward)(), CHANNELS)


def test_forward_must_take_one_input():
    with pytest.raises(NotAffineError, match="cannot be followed"):
        kernel_of(nn.Bilinear(4, 4, 4), CHANNELS)


def test_channels_must_fit():
    with pytest.raises(NotFoldableError, match="3 channels enter a layer that expects 4"):
        kernel_of(conv(4, 4), 3)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x.shape, "reads 'shape'"),
        (lambda m, x: x.size(), "reads the batch or image size"),
        (lambda m, x: x.size(2), "reads the batch or image size"),
        (lambda m, x: x.size(-1), "reads the batch or image size"),
        (lambda m, x: x.size(0), "reads the batch or image size"),
    ],
)
def test_reading_sizes_is_refused(forward, reason):
    with pytest.raises(NotFoldableError, match=reason):
        kernel_of(written(forward)(), CHANNELS)


# Refusals: the pair raises, and the naive merge is shown to be wrong


def naive_merge(first: ConvKernel, second: ConvKernel) -> ConvKernel:
    """Return `first.then(second)` with the zeros that `second` inserts moved in front of `first`.

    It is exact away from the border, where the first kernel is not strided.
    """
    padding, upsample, dilation = [], [], []
    for axis in range(2):
        up, hop = second.upsample[axis], first.stride[axis]
        sides = zip(first.padding[axis], second.padding[axis], strict=True)
        before, after = (up * own + hop * added for own, added in sides)
        padding.append((before, after))
        upsample.append(up * first.upsample[axis])
        dilation.append(up * first.dilation[axis])
    moved = replace(
        first, padding=tuple(padding), upsample=tuple(upsample), dilation=tuple(dilation)
    )
    return moved.then(replace(second, padding=((0, 0), (0, 0)), upsample=(1, 1)))


def merged_parts(module: nn.Module) -> ConvKernel:
    """Return the naive merge of a sequence of two."""
    return naive_merge(*(kernel_of(part, CHANNELS) for part in module))


def first_part(module: nn.Module) -> ConvKernel:
    """Return the kernel of a sequence as if nothing came after its first part."""
    return kernel_of(module[0], CHANNELS)


def written_conv(module: nn.Module) -> ConvKernel:
    return kernel_of(module.conv, CHANNELS)


def box(kernel_size: int, stride: int = 1, padding: Any = ((0, 0), (0, 0))) -> ConvKernel:
    return replace(
        kernel_of(nn.AvgPool2d(kernel_size, stride), CHANNELS),
        weight=torch.full((4, 1, kernel_size, kernel_size), kernel_size**-2, dtype=torch.float64),
        padding=padding,
    )


def equal_strides(module: nn.Module) -> ConvKernel:
    strided, plain = (kernel_of(branch, CHANNELS) for branch in module)
    return add([replace(strided, stride=(1, 1), padding=((-1, -1), (-1, -1))), plain])


def equal_sizes(module: nn.Module) -> ConvKernel:
    unpadded, plain = (kernel_of(branch, CHANNELS) for branch in module)
    return add([replace(unpadded, padding=((1, 1), (1, 1))), plain])


def cancelled_strides(module: nn.Module) -> ConvKernel:
    down, up = (kernel_of(part, CHANNELS) for part in module)
    return replace(down, stride=(1, 1)).then(replace(up, upsample=(1, 1)))


def default_statistics(module: nn.Module) -> ConvKernel:
    norm = randomize_batch_norm(nn.BatchNorm2d(4).double())
    norm.reset_running_stats()
    norm.load_state_dict(module[1].state_dict(), strict=False)
    return first_part(module).then(kernel_of(norm, CHANNELS))


def mean_position(module: nn.Module) -> ConvKernel:
    kernel = written_conv(module)
    return replace(kernel, bias=kernel.bias + module.position.mean((0, 2, 3)))


def product_of_weights(module: nn.Module) -> ConvKernel:
    first, second = kernel_of(module.conv, CHANNELS), kernel_of(module.other, CHANNELS)
    return replace(first, weight=first.weight * second.weight, bias=first.bias * second.bias)


def fixed_divisor(module: nn.Module) -> ConvKernel:
    kernel = written_conv(module)
    return replace(kernel, weight=kernel.weight / 9, bias=kernel.bias / 9)


class SecretReLU(nn.BatchNorm2d):
    """What dispatch on the type of a module would take for a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


class ClampedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


class SizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[-1] <= 8 else functional.relu(y)


def conv_by_type(module: nn.Module) -> ConvKernel:
    plain = nn.Conv2d(4, 4, 3).double()
    plain.load_state_dict(module[0].state_dict())
    return kernel_of(nn.Sequential(plain, module[1]), CHANNELS)


def norm_by_type(module: nn.Module) -> ConvKernel:
    norm = nn.BatchNorm2d(4).double()
    norm.load_state_dict(module[1].state_dict())
    return first_part(module).then(kernel_of(norm, CHANNELS))


class Filled(nn.Module):
    """A norm of which the zero padding is overwritten, not quite as it should be."""

    def __init__(self, fill: Callable[[Tensor, Tensor], object], *before: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(*before)
        self.norm = nn.BatchNorm2d(4)
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        output = functional.pad(self.norm(self.before(x)), (2, 2, 2, 2))
        zero = self.norm(torch.zeros(1, 4, 1, 1, dtype=self.norm.weight.dtype))
        self.fill(output, zero)
        return output + 1


def fill_sides(output: Tensor, *values: Any, p: int = 2) -> None:
    """Assign to the top, bottom, left and right."""
    borders = [
        (..., slice(p), slice(None)),
        (..., slice(-p, None), slice(None)),
        (..., slice(0, p)),
        (..., slice(-p, None)),
    ]
    for border, value in zip(borders, values, strict=False):
        output[border] = value


def padded_before(module: nn.Module) -> ConvKernel:
    layers = nn.Sequential(nn.ZeroPad2d(2), module.before, module.norm)
    kernel = kernel_of(layers, CHANNELS)
    return replace(kernel, bias=kernel.bias + 1)


def with_position() -> nn.Module:
    module = written(lambda m, x: m.conv(x) + m.position)()
    module.position = nn.Parameter(torch.randn(1, 4, 11, 12))
    return module


@dataclass
class Refusal:
    """A module that is not one convolution, why, and the convolution that one might write."""

    build: Callable[[], nn.Module]
    reason: str
    naive: Callable[[nn.Module], ConvKernel]
    size: tuple[int, int] = (11, 12)


REFUSALS = {
    "pointwise with bias, then padded": Refusal(
        lambda: nn.Sequential(conv(4, 4, 1), conv(4, 4)),
        "pads its input with zeros, but the first has a bias",
        merged_parts,
    ),
    "pointwise and norm, then padded": Refusal(
        lambda: nn.Sequential(conv_bn(4, 4, 1), conv_bn(4, 4)),
        "pads its input with zeros, but the first has a bias",
        merged_parts,
    ),
    "norm, then padded": Refusal(
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(4, 4)),
        "pads its input with zeros, but the first has a bias",
        merged_parts,
    ),
    "3x3, then padded": Refusal(
        lambda: nn.Sequential(conv(4, 4, bias=False), conv(4, 4)),
        "pads its input with zeros, but the first, a 3x3 kernel, is not zero",
        merged_parts,
    ),
    "3x3 strided, then padded on one side": Refusal(
        lambda: nn.Sequential(conv(4, 4, stride=2, bias=False), nn.ZeroPad2d((0, 1, 0, 0))),
        "pads its input with zeros, but the first, a 3x3 kernel, is not zero",
        merged_parts,
    ),
    "3x3, then padded average pool": Refusal(
        lambda: nn.Sequential(conv(4, 4, bias=False), nn.AvgPool2d(3, 1, padding=1)),
        "pads its input with zeros, but the first, a 3x3 kernel, is not zero",
        merged_parts,
    ),
    "norm, then padded average pool": Refusal(
        lambda: nn.Sequential(conv_bn(4, 4, 1), nn.AvgPool2d(3, 2, padding=1)),
        "pads its input with zeros, but the first has a bias",
        merged_parts,
    ),
    "norm, zero pad": Refusal(
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ZeroPad2d((1, 0, 0, 2))),
        "pads its input with zeros, but the first has a bias",
        merged_parts,
    ),
    "norm, zero pad on a side, conv": Refusal(
        lambda: nn.Sequential(
            nn.Sequential(nn.BatchNorm2d(4), nn.Identity()),
            nn.Sequential(nn.ZeroPad2d((0, 0, -1, 2)), nn.Conv2d(4, 4, 3)),
        ),
        "pads its input with zeros, but the first has a bias",
        merged_parts,
    ),
    **{
        f"norm, pad filled {name}": Refusal(lambda fill=fill: Filled(fill), reason, padded_before)
        for name, fill, reason in [
            ("not at all", lambda y, v: None, "but the first has a bias"),
            ("on three sides", lambda y, v: fill_sides(y, v, v, v), "but the first has a bias"),
            (
                "with zeros, and clamped",
                lambda y, v: y.clamp_(-9, 9),
                "but the first has a bias",
            ),
            ("with a little more", lambda y, v: fill_sides(y, v, v, 1.01 * v, v), "other values"),
            ("with the map", lambda y, v: fill_sides(y, y[..., 2:3, 2:3]), "has a bias"),
            ("by half", lambda y, v: fill_sides(y, v, v, v, v, p=1), "other parts"),
            ("and more", lambda y, v: fill_sides(y, v, v, v, v, p=3), "other parts"),
            (
                "inside",
                lambda y, v: operator.setitem(y, (..., slice(2, -2), slice(2, -2)), v),
                "other parts",
            ),
            (
                "in a corner",
                lambda y, v: operator.setitem(y, (..., slice(2), slice(2)), v),
                "other parts",
            ),
            ("at one place", lambda y, v: operator.setitem(y, (..., 0), v[..., 0]), "no slice"),
            (
                "for one channel",
                lambda y, v: operator.setitem(y[:, :1], ..., v[:, :1]),
                "has a bias",
            ),
        ]
    },
    "unpadded conv, norm, pad filled": Refusal(
        lambda: Filled(lambda y, v: fill_sides(y, v, v, v, v), nn.Conv2d(4, 4, 3, bias=False)),
        "but the first, a 3x3 kernel, is not zero beyond its output",
        padded_before,
    ),
    "conv with bias, norm, pad filled": Refusal(
        lambda: Filled(lambda y, v: fill_sides(y, v, v, v, v), nn.Conv2d(4, 4, 1)),
        "other values",
        padded_before,
    ),
    "assignment": Refusal(
        lambda: Written(
            lambda m, x: [y := m.conv(x), operator.setitem(y, (..., slice(1)), 0.0)][0],
            conv=conv(4, 4),
        ),
        "assigns to a part of a tensor",
        written_conv,
    ),
    "strided crop, then padded": Refusal(
        lambda: nn.Sequential(
            written(lambda m, x: m.pointwise(x)[:, :, :-1:2] - 0 * m.pointwise(x)[:, :, :-1:2])(),
            conv(4, 4),
        ),
        "pads its input",
        merged_parts,
    ),
    "crop, then padded": Refusal(
        lambda: nn.Sequential(nn.Sequential(nn.ZeroPad2d(-1), pointwise()), conv(4, 4)),
        "pads its input with zeros, but the first, a 1x1 kernel, is not zero",
        merged_parts,
    ),
    "crop on one side, then padded": Refusal(
        lambda: nn.Sequential(nn.Sequential(nn.ZeroPad2d((0, -2, 0, 0)), pointwise()), conv(4, 4)),
        "pads its input with zeros, but the first, a 1x1 kernel, is not zero",
        merged_parts,
    ),
    "norm, then transposed conv": Refusal(
        lambda: nn.Sequential(conv_bn(4, 4, 1), nn.ConvTranspose2d(4, 4, 3, 2, padding=2)),
        "inserts zeros between its samples, but the first has a bias",
        merged_parts,
    ),
    "3x3, then transposed conv": Refusal(
        lambda: nn.Sequential(conv(4, 4, bias=False), nn.ConvTranspose2d(4, 4, 3, 2)),
        "pads its input with zeros, but the first, a 3x3 kernel, is not zero",
        merged_parts,
    ),
    "strided, then transposed conv": Refusal(
        lambda: nn.Sequential(
            conv(4, 4, 1, stride=2, bias=False), nn.ConvTranspose2d(4, 4, 3, 2, padding=1)
        ),
        "upsamples what the first has strided",
        cancelled_strides,
        size=(11, 13),
    ),
    "strided, then transposed conv, merged by formula": Refusal(
        lambda: nn.Sequential(
            conv(4, 4, 1, stride=2, bias=False), nn.ConvTranspose2d(4, 4, 3, 2, padding=1)
        ),
        "upsamples what the first has strided",
        merged_parts,
        size=(11, 13),
    ),
    "average pool with ceil_mode": Refusal(
        lambda: nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.BatchNorm2d(4)),
        "ceil_mode=True averages over fewer samples",
        lambda m: box(2, 2, ((0, 1), (0, 1))).then(kernel_of(m[1], CHANNELS)),
        size=(11, 13),
    ),
    "average pool with count_include_pad=False": Refusal(
        lambda: nn.Sequential(
            nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), nn.BatchNorm2d(4)
        ),
        "count_include_pad=False weights the border differently",
        lambda m: box(3, 1, ((1, 1), (1, 1))).then(kernel_of(m[1], CHANNELS)),
    ),
    "sum of different strides": Refusal(
        lambda: Sum(conv(4, 4, 1, stride=2), nn.Conv2d(4, 4, 3)),
        "different lattices",
        equal_strides,
        size=(5, 5),
    ),
    "sum of different sizes": Refusal(
        lambda: Sum(nn.Conv2d(4, 4, 3), conv(4, 4, 1)),
        "differ in size: by 2 samples",
        equal_sizes,
        size=(3, 3),
    ),
    "constant that varies in space": Refusal(with_position, "varies in space", mean_position),
    "product": Refusal(
        lambda: Written(lambda m, x: m.conv(x) * m.other(x), conv=conv(4, 4), other=conv(4, 4)),
        "product of two maps of the input is not affine",
        product_of_weights,
    ),
    "quotient": Refusal(
        written(lambda m, x: m.conv(x) / (2 + x - x + 0 * m.conv(x) + m.pointwise(x))),
        "division by a map of the input",
        written_conv,
    ),
    "number over map": Refusal(
        written(lambda m, x: 2 / m.conv(x)), "cannot be followed", written_conv
    ),
    "norm without running statistics": Refusal(
        lambda: nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)),
        "without running statistics divides by those of its batch",
        default_statistics,
    ),
    "group norm": Refusal(
        lambda: nn.Sequential(conv(4, 4), nn.GroupNorm(2, 4)), "statistics of its own", first_part
    ),
    "reflect padding": Refusal(
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "pad with mode 'reflect' is not the zero padding",
        lambda m: ConvKernel(m.weight, m.bias, padding=((1, 1), (1, 1))),
    ),
    "constant padding": Refusal(
        lambda: nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3)),
        "pad with the constant 0.5 is not the zero padding",
        lambda m: replace(kernel_of(m[1], CHANNELS), padding=((1, 1), (1, 1))),
    ),
    "relu": Refusal(lambda: nn.Sequential(conv(4, 4), nn.ReLU()), "relu is not affine", first_part),
    "relu in place": Refusal(
        lambda: nn.Sequential(conv(4, 4), nn.ReLU(inplace=True)), "relu_? is not affine", first_part
    ),
    "norm that hides a relu": Refusal(
        lambda: nn.Sequential(conv(4, 4), SecretReLU(4)), "relu is not affine", norm_by_type
    ),
    "max pool": Refusal(
        lambda: nn.Sequential(conv(4, 4), nn.MaxPool2d(2)),
        "max_pool2d is not affine",
        lambda m: first_part(m).then(box(2, 2)),
    ),
    "spatial slice": Refusal(
        written(lambda m, x: m.conv(x) + x[:, :, :1]),
        "slicing by size is not shift-invariant",
        lambda m: add([written_conv(m), ConvKernel.identity(CHANNELS, dtype=torch.float64)]),
    ),
    "spatial slice from the end": Refusal(
        written(lambda m, x: m.conv(x) + x[:, :, -1:]),
        "slicing by size is not shift-invariant",
        lambda m: add([written_conv(m), ConvKernel.identity(CHANNELS, dtype=torch.float64)]),
    ),
    "batch slice": Refusal(
        written(lambda m, x: m.conv(x) + x[:1]),
        "slicing samples of the batch is not shift-invariant",
        lambda m: add([written_conv(m), ConvKernel.identity(CHANNELS, dtype=torch.float64)]),
    ),
    "cast to integers": Refusal(
        written(lambda m, x: m.conv(x).to(torch.int32).double()), "is not affine", written_conv
    ),
    "cast as integers": Refusal(
        written(lambda m, x: m.conv(x).type_as(torch.ones(1, dtype=torch.int64)).double()),
        "is not affine",
        written_conv,
    ),
    "conv that clamps": Refusal(
        lambda: nn.Sequential(ClampedConv(4, 4, 3), nn.BatchNorm2d(4)),
        "clamp is not known to be affine",
        conv_by_type,
    ),
    "conv that branches on a size": Refusal(
        lambda: nn.Sequential(SizedConv(4, 4, 3), nn.BatchNorm2d(4)),
        "reads 'shape' of its input",
        conv_by_type,
    ),
    "image size": Refusal(
        written(lambda m, x: m.conv(x) / x.size(2)), "reads the batch or image size", fixed_divisor
    ),
    "shape": Refusal(written(lambda m, x: m.conv(x) / x.shape[2]), "reads 'shape'", fixed_divisor),
    "mean over the image": Refusal(
        written(lambda m, x: m.conv(x) - x.mean((2, 3), keepdim=True)),
        "mean depends on the size",
        written_conv,
    ),
    "dropout that is always on": Refusal(
        written(lambda m, x: functional.dropout(m.conv(x))), "dropout in training", written_conv
    ),
    "flip": Refusal(
        written(lambda m, x: m.conv(x).flip(3)), "flip is not known to be affine", written_conv
    ),
}


@pytest.fixture(params=REFUSALS.values(), ids=REFUSALS)
def refusal(request: pytest.FixtureRequest) -> Refusal:
    return request.param


def test_what_is_not_one_convolution_is_refused(refusal):
    with pytest.raises(NotFoldableError, match=refusal.reason):
        kernel_of(prepared(refusal.build), CHANNELS)


def test_the_naive_merge_is_wrong(refusal):
    module, x = prepared(refusal.build), image(*refusal.size)
    assert relative_error(module(x), refusal.naive(module)(x)) > 1e-3


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: x == 0,
        lambda x: x != 0,
        lambda x: x > 0,
        lambda x: x <= 0,
        lambda x: x >= 1,
        lambda x: x < 0.5,
    ],
    ids=["==", "!=", ">", "<=", ">=", "<"],
)
def test_a_mask_is_refused(mask):
    module = prepared(written(lambda m, x: m.conv(x) + mask(x)))
    x = image().relu()  # with zeros
    naive = kernel_of(module.conv, CHANNELS)
    assert relative_error(module(x), naive(x)) > 1e-3
    with pytest.raises(NotFoldableError, match="compares values of its input"):
        kernel_of(module, CHANNELS)


def concat_with_input(kernel: ConvKernel) -> ConvKernel:
    return concat([kernel, ConvKernel.identity(CHANNELS, dtype=torch.float64)])


def first_half(kernel: ConvKernel) -> ConvKernel:
    return select(kernel, 0, 2)


@pytest.mark.parametrize(
    ("forward", "naive"),
    [
        (lambda m, x: torch.cat([m.conv(x), x]), concat_with_input),
        (lambda m, x: torch.cat([m.conv(x), x], dim=2), concat_with_input),
        (lambda m, x: torch.cat([m.conv(x), x], dim=-1), concat_with_input),
        (lambda m, x: m.conv(x).split(2, dim=2)[0], first_half),
        (lambda m, x: m.conv(x).chunk(2, dim=-1)[0], first_half),
        (lambda m, x: m.conv(x).chunk(2)[0], first_half),
        (lambda m, x: m.conv(x).narrow(3, 0, 2), first_half),
    ],
    ids=["cat 0", "cat 2", "cat -1", "split 2", "chunk -1", "chunk 0", "narrow 3"],
)
def test_other_dimensions_than_channels_are_refused(forward, naive):
    module, x = prepared(written(forward)), image()
    assert naive(kernel_of(module.conv, CHANNELS))(x).shape != module(x).shape
    with pytest.raises(NotFoldableError, match="along dim"):
        kernel_of(module, CHANNELS)


Change = Callable[[Any, Any], Any]


def change_the_input(m: Any, x: Tensor, change: Change) -> Tensor:
    y = m.conv(x)
    change(x, y)
    return x + y


def changed(
    alias: Callable[[Tensor], Tensor], *, of_input: bool = False, base: bool = False
) -> Any:
    """Return a forward that changes a tensor, or with `base` what it is taken from."""

    def forward(m: Any, x: Tensor, change: Change) -> Tensor:
        y = x if of_input else m.conv(x)
        view = alias(y)
        change(y if base else view, 0.5)
        return torch.cat([view, y], 1) if view.dim() else y

    return forward


ALIASES: dict[str, Callable[[Any], Any]] = {
    "channels": lambda y: y[:, 1:3],
    "all": lambda y: y[:],
    "split": lambda y: y.split([1, 3], 1)[0],
    "chunk": lambda y: y.chunk(2, 1)[1],
    "narrow": lambda y: y.narrow(1, 0, 2),
    "detach": lambda y: y.detach(),
    "contiguous": lambda y: y.contiguous(),
    "cast": lambda y: y.double(),
}
IN_PLACE = {
    "the input": change_the_input,
    "identity of the input": changed(nn.Identity(), of_input=True),
    "dropout of the input": changed(nn.Dropout(0.5).eval(), of_input=True),
    **{f"{n} of the input": changed(f, of_input=True) for n, f in ALIASES.items()},
    **{n: changed(f) for n, f in ALIASES.items()},
    **{f"{n}, before its base": changed(f, base=True) for n, f in ALIASES.items()},
}


@pytest.mark.parametrize("forward", IN_PLACE.values(), ids=IN_PLACE)
def test_changing_shared_memory_in_place_is_refused(forward):
    in_place = written(lambda m, x: forward(m, x, operator.iadd))()
    module = prepared(lambda: in_place)
    with pytest.raises(NotFoldableError, match=r"in place that is its input, .*`x = x \+ y`"):
        kernel_of(module, CHANNELS)
    x = image()
    with torch.no_grad():  # which knows of some of these views itself
        expected = module(x.clone())
    module.function = lambda m, x: forward(m, x, operator.add)
    assert relative_error(expected, kernel_of(module, CHANNELS)(x)) > 1e-3


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: torch.add(m.conv(x), x, out=m.conv(x)), "out= writes"),
        (lambda m, x: torch.ones(4, 1, 1).double().add_(m.conv(x)), "to a constant in place"),
        (lambda m, x: m.conv(x).mul_(m.pointwise(x)), "product of two maps"),
        (lambda m, x: m.conv(x).relu_(), "relu_ is not affine"),
        (lambda m, x: operator.setitem(m.conv(x), (..., 0), 0.0), "an index that is no slice|part"),
    ],
    ids=["out=", "of a constant", "product", "relu", "assignment"],
)
def test_other_changes_in_place_are_refused(forward, reason):
    with pytest.raises(NotFoldableError, match=reason):
        kernel_of(prepared(written(forward)), CHANNELS)


def test_a_sum_that_starts_at_zero_may_use_in_place_syntax_once():
    def forward(m: Any, x: Tensor) -> Tensor:
        total: Any = 0
        total += m.conv(x)
        return total

    module = prepared(written(forward))
    x = image()
    assert relative_error(module(x), kernel_of(module, CHANNELS)(x)) < TOLERANCE


# Casts and borders that only kernels can tell apart


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.half().float(),
        lambda x: x.bfloat16(),
        lambda x: x.to(dtype=torch.float16),
        lambda x: x.to(torch.ones(1)).to("cpu", torch.float32),
        lambda x: x.type(torch.float32),
    ],
)
def test_a_cast_changes_no_kernel(cast):
    module = prepared(written(lambda m, x: m.pointwise(cast(m.conv(x)))))
    x = image()
    expected = module.pointwise(module.conv(x))
    assert relative_error(expected, kernel_of(module, CHANNELS)(x)) < TOLERANCE


def test_a_border_without_values_is_taken_to_be_filled():
    module = prepared(lambda: NormAndPad(4, 1))
    sketch = kernel_of(deepcopy(module).to("meta"), CHANNELS)
    kernel = kernel_of(module, CHANNELS)
    assert sketch.weight.is_meta
    assert (sketch.padding, sketch.weight.shape) == (kernel.padding, kernel.weight.shape)


def test_a_kernel_with_an_unfilled_border_is_none_until_it_is_filled():
    kernel = ConvKernel(torch.ones(4, 1, 1, 1), torch.arange(4.0), groups=4)
    padded = functional.pad(kernel, (0, 0, 1, 0))
    for use in (lambda k: k.weight, lambda k: k + 1, lambda k: k.clone(), lambda k: k.then(kernel)):
        with pytest.raises(NotFoldableError, match="the first has a bias"):
            use(padded)
    padded[:, :, :1] = torch.arange(4.0).reshape(4, 1, 1)
    assert type(padded) is ConvKernel
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(padded(x), kernel(functional.pad(x, (0, 0, 1, 0))))
