"""`InFloat64`: what runs in it is what a float64 copy of the model computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
