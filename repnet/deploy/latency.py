"""How long a forward pass takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median, quantiles

import torch
from torch import Tensor, nn


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, nn.Module], example: Tensor, *, runs: int = 50, warmup: int = 10
) -> dict[str, dict[str, float]]:
    """Return milliseconds of one forward pass by name: `median`, `p10` and `p90`.

    The models take turns, so that what else the machine does falls on all of them alike.

    Args:
        models: in evaluation mode, on the device of `example`.
        example: one batch.
        runs: timed passes of each model.
        warmup: passes of each model before.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for index in range(warmup + runs):
        for name, model in models.items():
            _synchronize(example.device)
            start = time.perf_counter()
            model(example)
            _synchronize(example.device)
            if index >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    results = {}
    for name, values in times.items():
        deciles = quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
        results[name] = {"median": median(values), "p10": deciles[0], "p90": deciles[8]}
    return results


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
