"""`InFloat64`: what runs in it is what a float64 copy of the model computes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from repnet import meta_device
from repnet.layers import conv
from repnet.precision import CHUNK, InFloat64
from tests.models import relative_error
from tests.test_folding import TOLERANCE, Wired

WIDE = CHUNK // (64 * 9) + 40  # output channels of a weight that is converted in two parts


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"stride": 2, "padding": (1, 0)},
        {"dilation": 2, "padding": 2, "bias": False},
        {"padding": "same"},
        {"padding": 1, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [3, 4, 40])  # the weight is larger, or smaller than what it reads
@pytest.mark.parametrize("batch", [1, 2])
def test_a_large_convolution_is_exact(settings: dict, size: int, batch: int) -> None:
    torch.manual_seed(0)
    if settings.get("dilation") == 2:
        size += 2
    conv = nn.Conv2d(64, WIDE, 3, **settings)
    x = torch.randn(batch, 64, size, size + 1, dtype=torch.float64)
    with torch.no_grad(), InFloat64():
        actual = conv(x)
    with torch.no_grad():
        expected = conv.double()(x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_weights_stay_as_they_are_and_keep_their_gradients() -> None:
    conv = nn.Conv2d(64, WIDE, 3)
    x = torch.randn(1, 64, 3, 3)
    with InFloat64():
        conv(x).sum().backward()
    assert conv.weight.dtype == torch.float32
    expected = x.expand(WIDE, -1, -1, -1)
    torch.testing.assert_close(conv.weight.grad, expected)


def packed(m: nn.Module, x: Tensor) -> Tensor:
    return m(pack_padded_sequence(x, [5, 3], batch_first=True))[0].data


MASK = torch.tensor([[False] * 4 + [True], [False] * 3 + [True] * 2])
ENCODER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
SEQUENCES: dict[str, tuple[nn.Module, Callable[[Any, Tensor], Tensor]]] = {
    "LSTM": (nn.LSTM(8, 6, 2, bidirectional=True), lambda m, x: m(x)[0]),
    "LSTM with projection": (nn.LSTM(8, 6, proj_size=3), lambda m, x: m(x)[1][1]),
    "LSTM, packed": (nn.LSTM(8, 6, batch_first=True), packed),
    "LSTM cell": (nn.LSTMCell(8, 6), lambda m, x: m(x[0])[0]),
    "GRU": (nn.GRU(8, 6, batch_first=True), lambda m, x: m(x)[0]),
    "RNN": (nn.RNN(8, 6, nonlinearity="relu"), lambda m, x: m(x)[0]),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "attention without weights": (
        nn.MultiheadAttention(8, 2),
        lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    "encoder layer": (ENCODER, lambda m, x: m(x)),
    "encoder, masked": (
        nn.TransformerEncoder(ENCODER, 2),
        lambda m, x: m(x, src_key_padding_mask=MASK)[~MASK],
    ),
    "decoder layer": (nn.TransformerDecoderLayer(8, 2, 16), lambda m, x: m(x, x)),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])  # fast paths need no grad
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_layers_that_compare_dtypes_are_exact(name: str, dtype: torch.dtype, grad: bool) -> None:
    layer, forward = deepcopy(SEQUENCES[name])
    layer.to(dtype).eval()
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad), InFloat64():
        actual = forward(layer, x)
    with torch.set_grad_enabled(grad):
        expected = forward(layer.double(), x.double())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.conv.weight.dtype == self.conv.bias.data.dtype == torch.float64
        assert self.steps.dtype == torch.int64
        assert (x > 0).dtype == torch.bool
        return self.conv(x) * self.steps


def test_every_floating_point_tensor_says_float64() -> None:
    module, x = Asserting(), torch.randn(1, 3, 5, 5)
    with InFloat64():
        actual = module(x)
    assert module.conv.weight.dtype == torch.float32
    torch.testing.assert_close(actual, module.double()(x.double()), rtol=1e-12, atol=1e-12)


# Models that name a dtype


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def always_float(m: Any, x: Tensor) -> Tensor:
    return m.conv(x.float()).float().to(torch.float16) * 1.5


def zeros_in_forward(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[0], 4, 9, 8)
    for _ in range(2):
        state = (state + m.conv(x)).type_as(torch.ones(1))
    return state + torch.full((4, 1, 1), 0.1) + torch.tensor(1 / 3)


def with_numbers(m: Any, x: Tensor) -> Tensor:
    return torch.where(x > 0, m.conv(x), torch.zeros_like(x)).clamp(-1.0, 0.7).half()


def norm_by_function(m: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(m.conv(x).float(), (8,)).to(x.dtype)


WIRINGS = [always_float, zeros_in_forward, with_numbers, norm_by_function]


@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_any_dtype_runs_in_float64(
    wiring: Callable, dtype: torch.dtype, x: Tensor
) -> None:
    model = Wired(wiring, conv=conv(4, 4)).to(dtype)
    exact = deepcopy(model).double()
    with torch.no_grad(), InFloat64():
        actual, expected = model(x.to(dtype)), exact(x.to(dtype).double())
    assert actual.dtype == torch.float64
    assert relative_error(expected, actual) < TOLERANCE
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_result_is_that_of_float64_and_not_of_float32(x: Tensor) -> None:
    model = Wired(always_float, conv=conv(4, 4))
    with torch.no_grad(), InFloat64():
        actual = model(x)
    expected = deepcopy(model.conv).double()(x) * 1.5
    assert relative_error(expected, actual) < TOLERANCE
    rounded = model.conv(x.float()).half() * 1.5
    assert relative_error(expected, rounded.double()) > 1e-5


class WithBuffers(nn.Module):
    """A float32 buffer, an integer buffer, a mask, and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(4, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.shift = torch.rand(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order] * self.scale * self.mask.reshape(4, 1, 1) + self.shift


def test_buffers_and_plain_tensors_are_exact_and_integers_stay(x: Tensor) -> None:
    model = WithBuffers()
    with InFloat64():
        actual = model(x)
        assert (model.order + 1).dtype == torch.int64
    masked = x[:, model.order] * model.scale.double() * model.mask.reshape(4, 1, 1)
    torch.testing.assert_close(actual, masked + model.shift.double(), rtol=0, atol=0)


def test_containers_of_tensors_are_exact() -> None:
    parts = [torch.rand(2, 3), torch.rand(2, 3)]
    with InFloat64():
        joined = torch.cat(parts)
        values, indices = torch.max(parts[0], 1)
        first, _ = torch.ones(4).split(2)
    assert joined.dtype == values.dtype == first.dtype == torch.float64
    assert indices.dtype == torch.int64


class OwnList(list):
    pass


class OwnTuple(tuple):
    pass


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize("kind", [OwnList, OwnTuple, lambda parts: Pair(*parts)])
def test_containers_of_other_classes_are_exact(kind: Callable[[list[Tensor]], Any]) -> None:
    parts = [torch.rand(2, 3), torch.rand(2, 3)]
    with InFloat64():
        joined = torch.cat(kind(parts))
    torch.testing.assert_close(joined, torch.cat(parts).double(), rtol=0, atol=0)


def test_nothing_is_changed_outside() -> None:
    with InFloat64():
        pass
    assert (torch.ones(2) * 0.5).dtype == torch.float32


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_without_values_shape_and_dtype_are_those_of_torch(
    dtype: torch.dtype, other: torch.dtype
) -> None:
    args = (torch.ones(2, 1, dtype=dtype, device="meta"), torch.ones(3, dtype=other, device="meta"))
    for function in (torch.add, torch.div):
        expected, actual = function(*args), meta_device.run(function, args, {})
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
