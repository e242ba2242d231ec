"""Seconds to fold a named model, proof included, beside one forward pass of it in the same run.

    python benchmarks/fold.py repvgg_b0 --repeats 5

Batch norm statistics are randomized, so that there is something to fold. With timm installed its
`reparameterize_model`, which proves nothing, is timed on the same architecture in turn.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import nn

from repnet import create_model, reparameterize


def randomize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def timm_fold(name: str) -> Callable[[], Any] | None:
    try:
        timm = import_module("timm")
        reparameterize_model = import_module("timm.utils.model").reparameterize_model
    except ImportError:
        return None
    if name not in timm.list_models("repvgg*"):
        return None
    twin = randomize(timm.create_model(name))
    return lambda: reparameterize_model(twin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["repvgg_b0"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="pixels of the example image")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{arguments.size} px, median of {arguments.repeats} (smallest - largest), taking turns"
    )
    for name in arguments.models:
        torch.manual_seed(0)
        model = randomize(create_model(name))
        example = torch.randn(1, 3, arguments.size, arguments.size)
        folded, report = reparameterize(model, example, return_report=True)
        assert report.proof is not None
        calls: dict[str, Callable[[], Any]] = {
            "fold and proof": partial(reparameterize, model, example),
            "forward, train form": partial(model, example),
            "forward, deploy form": partial(folded, example),
        }
        if (fold := timm_fold(name)) is not None:
            calls["timm's fold, no proof"] = fold
        times: dict[str, list[float]] = {key: [] for key in calls}
        for _ in range(arguments.repeats):
            for key, call in calls.items():
                start = time.perf_counter()
                with torch.no_grad():
                    call()
                times[key].append(time.perf_counter() - start)
        worst = max(block.relative_error for block in report.proof.blocks)
        print(
            f"{name}: {len(report.folded)} convolutions, relative error of the outputs "
            f"{report.proof.max_relative_error:.1e}, of the worst block {worst:.1e}"
        )
        for key, values in times.items():
            spread = f"({min(values):.3f} - {max(values):.3f})"
            ratio = median(values) / median(times["fold and proof"])
            print(f"  {key:22s} {median(values):8.3f} s {spread:18s} {ratio:6.2f} x fold")


if __name__ == "__main__":
    main()
