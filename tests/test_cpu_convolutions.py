"""Training on a CPU, without the convolutions whose backward pass torch gets wrong there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from repnet.training import Classifier
from repnet.training.cpu_convolutions import CpuConvolutions
from tests.commands import TINY, run


class Pointwise(TorchDispatchMode):
    """Keeps the strides of the 1x1 convolutions that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "convolution" and args[1].shape[2:] == (1, 1):
            self.strides.append(list(args[3]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernel_size", "options"),
    [
        (1, {"stride": 2}),
        (1, {"stride": (2, 3), "padding": (1, 0), "groups": 3}),
        (1, {"stride": 3, "padding": "valid", "bias": False}),
        (1, {"stride": 1, "padding": 1}),
        (3, {"stride": 9, "padding": (1, 2), "groups": 3}),
        ((2, 5), {"stride": (2, 11), "padding": 3, "dilation": 2}),
        (3, {"stride": 9, "padding": "valid"}),
    ],
)
def test_values_and_gradients_stay(kernel_size: Any, options: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 6, kernel_size, **options).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for mode in (None, CpuConvolutions(channels_last=True)):
        with mode or torch.enable_grad():
            y = conv(x)
        leaves = (x, *conv.parameters())
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (2, 2)])
def test_bfloat16_gradients_of_small_maps_are_right(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(32, 32, 3, stride=3, padding=1, bias=False)
    x = torch.randn(8, 32, *size)
    torch.full((100, conv.weight.numel()), 1e30)  # what torch would read, if it read too much
    with CpuConvolutions(channels_last=False), torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    gradient = torch.randn(y.shape)
    y.backward(gradient.to(y.dtype))
    exact = torch.nn.grad.conv2d_weight(x, conv.weight.shape, gradient, stride=3, padding=1)
    torch.testing.assert_close(conv.weight.grad, exact, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(("channels_last", "strides"), [(True, [[1, 1]]), (False, [[2, 2]])])
def test_a_training_step_is_sliced_where_it_would_crash(
    channels_last: bool, strides: list[list[int]]
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = Classifier(net, 2, channels_last=channels_last)
    images, labels = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])
    with Pointwise() as asked:
        classifier.training_step((images, labels), 0)
    assert asked.strides == strides


def test_activations_are_computed_again_with_the_same_convolutions(tmp_path: Path) -> None:
    run("train.py", *TINY, "channels_last=true", "checkpoint_activations=[stem,stages.*]",
        "hydra.run.dir=run", cwd=tmp_path)  # fmt: skip
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("size", "batch"), [(16, 16), (128, 4)])
def test_a_cpu_trains_in_channels_last(
    precision: str, size: int, batch: int, tmp_path: Path
) -> None:
    run("train.py", *TINY, f"data.image_size={size}", f"data.batch_size={batch}",
        "model=repvgg_a0", "model.widths=[0.125,0.125,0.125,0.125]", "channels_last=true",
        f"trainer.precision={precision}", "hydra.run.dir=run", cwd=tmp_path)  # fmt: skip
    assert (tmp_path / "run" / "result.json").is_file()
