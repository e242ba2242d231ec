"""`InFloat64`: what runs in it is what a float64 copy of the model computes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from repnet.precision import CHUNK, InFloat64

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
