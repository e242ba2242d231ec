"""Training in channels_last on a CPU, without the convolution that corrupts memory there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from repnet.training import Classifier
from repnet.training.sliced import SlicedPointwise
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
    "options",
    [
        {"stride": 2},
        {"stride": (2, 3), "padding": (1, 0), "groups": 3},
        {"stride": 3, "padding": "valid", "bias": False},
        {"stride": 1, "padding": 1},
    ],
)
def test_values_and_gradients_stay(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 6, 1, **options).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for mode in (None, SlicedPointwise()):
        with mode or torch.enable_grad():
            y = conv(x)
        leaves = (x, *conv.parameters())
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)


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


def test_activations_that_are_computed_again_are_refused(tmp_path: Path) -> None:
    done = run("train.py", *TINY, "channels_last=true", "checkpoint_activations=[stages.*]",
               "hydra.run.dir=run", cwd=tmp_path, code=2)  # fmt: skip
    assert done.stderr.count("\n") == 1
    assert "leave out one" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("size", "batch"), [(16, 16), (128, 4)])
def test_a_cpu_trains_in_channels_last(
    precision: str, size: int, batch: int, tmp_path: Path
) -> None:
    run("train.py", *TINY, f"data.image_size={size}", f"data.batch_size={batch}",
        "model=repvgg_a0", "model.widths=[0.125,0.125,0.125,0.125]", "channels_last=true",
        f"trainer.precision={precision}", "hydra.run.dir=run", cwd=tmp_path)  # fmt: skip
    assert (tmp_path / "run" / "result.json").is_file()
