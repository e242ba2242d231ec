"""How often torch's convolutions crash in the backward pass on a CPU, and with ours in their place.

    python benchmarks/cpu_convolutions.py

Each case trains one strided 1x1 convolution in channels_last in a process of its own, of which the
exit code counts; `CpuConvolutions` says which convolutions it rewrites, and why.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from itertools import product

import torch
from torch import nn

from repnet.training.cpu_convolutions import CpuConvolutions

SIZES, BATCHES, THREADS = (16, 64, 128, 224), (1, 16), (1, 2)


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


if __name__ == "__main__":
    main()
