"""How often torch's convolutions crash or compute wrong gradients on a CPU, and with ours instead.

    python benchmarks/cpu_convolutions.py

Each case of the first table trains one strided 1x1 convolution in channels_last in a process of its
own, of which the exit code counts. The second counts settings in which the weight gradient of a
padded bfloat16 convolution of a small map is not that of float64, up to a tenth of its norm.
`CpuConvolutions` says which convolutions it rewrites, and why.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from itertools import product

import torch
from torch import nn
from torch.nn.grad import conv2d_weight

from repnet.training.cpu_convolutions import CpuConvolutions

SIZES, BATCHES, THREADS = (16, 64, 128, 224), (1, 16), (1, 2)
MAPS = ((1, 1), (1, 4), (4, 1), (2, 2), (2, 1), (3, 3))


def train(channels: int, precision: str, rewritten: bool, size: int, batch: int) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    conv = nn.Conv2d(channels, 48, 1, stride=2).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, channels, size, size, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    for _ in range(4):
        with CpuConvolutions(channels_last=True) if rewritten else nullcontext(), autocast:
            loss = conv(x).float().square().mean()
        loss.backward()


def crashes(*case: object, threads: int) -> bool:
    """Return whether the process of a case ends with a signal."""
    if (process := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(threads)
        train(*case)  # type: ignore[arg-type]
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def is_wrong(
    kernel_size: int, stride: int, size: tuple[int, int], groups: int, *, rewritten: bool
) -> bool:
    """Return whether a weight gradient in bfloat16 is far from the one in float64."""
    conv = nn.Conv2d(64, 64, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    weight, x = conv.weight, torch.randn(8, 64, *size)
    # What torch would read, if it read memory that nobody wrote.
    [torch.full(weight.shape, 1e30) for _ in range(20)]
    rewriting = CpuConvolutions(channels_last=False) if rewritten else nullcontext()
    with rewriting, torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    gradient = torch.randn(y.shape)
    y.backward(gradient.to(y.dtype))
    exact = conv2d_weight(
        x.double(), weight.shape, gradient.double(), stride, kernel_size // 2, groups=groups
    )
    assert weight.grad is not None
    return not (weight.grad.double() - exact).norm() < 0.1 * exact.norm()


def main() -> None:
    print(f"torch {torch.__version__}, crashed processes of those that ran")
    for channels, precision in product(
        (1, 3, 4, 8, 16, 32), ("32-true", "bf16-mixed", "bf16-true")
    ):
        counts = []
        for rewritten in (False, True):
            cases = list(product(SIZES, BATCHES, THREADS))
            ended = [
                crashes(channels, precision, rewritten, size, batch, threads=threads)
                for size, batch, threads in cases
            ]
            counts.append(f"{sum(ended)} of {len(ended)}")
        print(f"{channels:2} channels, {precision:10}  torch {counts[0]}, rewritten {counts[1]}")
    for narrow in (True, False):
        settings = [
            setting
            for setting in product((3, 5, 7), (1, 2, 3, 4), MAPS, (1, 4, 64))
            if (setting[1] > setting[2][1]) == narrow
        ]
        counts = [
            f"{sum(is_wrong(*s, rewritten=rewritten) for s in settings)} of {len(settings)}"
            for rewritten in (False, True)
        ]
        name = "stride larger than the width" if narrow else "other strides"
        print(f"wrong gradients, {name}: torch {counts[0]}, rewritten {counts[1]}")


if __name__ == "__main__":
    main()
