"""How long a forward pass takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

Turn = Callable[[int], list[float]]


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, Callable[[Tensor], object]],
    example: Tensor,
    *,
    runs: int = 50,
    warmup: int = 10,
) -> dict[str, dict[str, float]]:
    """Return milliseconds of one forward pass by name: `median`, `p10` and `p90`.

    The models take turns, so that what else the machine does falls on all of them alike.

    Args:
        models: take the batch; in evaluation mode, on the device of `example`.
        example: one batch.
        runs: timed passes of each model.
        warmup: passes of each model before.
    """
    calls = {name: partial(model, example) for name, model in models.items()}
    turns: dict[str, Turn] = {
        name: partial(time_passes, call, device=example.device) for name, call in calls.items()
    }
    take_turns(turns, dict.fromkeys(turns, [1] * warmup))
    times = take_turns(turns, dict.fromkeys(turns, [1] * runs))
    return {
        name: {
            "median": percentile(values, 50),
            "p10": percentile(values, 10),
            "p90": percentile(values, 90),
        }
        for name, values in times.items()
    }


def time_passes(call: Callable[[], object], passes: int, *, device: torch.device) -> list[float]:
    """Return the milliseconds of each of `passes` calls, whose work on `device` is waited for."""
    times = []
    for _ in range(passes):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def take_turns(
    turns: Mapping[str, Turn], passes: Mapping[str, Sequence[int]], *, rotate: bool = False
) -> dict[str, list[float]]:
    """Return the milliseconds of all passes, after rounds in which everyone has its turn.

    Args:
        turns: take a number of passes, return the milliseconds of each.
        passes: in each round.
        rotate: begin each round with another, so that the first is not always the same.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for index in range(max(map(len, passes.values()), default=0)):
        first = index % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            if index < len(passes[name]):
                times[name] += turns[name](passes[name][index])
    return times


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie, between two of them if need be.

    Args:
        values: at least one, in any order.
        percent: from 0, the smallest, to 100, the largest.
    """
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
