"""How long a forward pass takes, and when two such times may be compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Turn = Callable[[int], list[float]]

BUSY = 0.75  # of a core that PyTorch should have for itself
FEWEST = 10  # rounds, below which their spread says nothing
SPREAD = 2.0  # largest ratio of the 90th to the 10th percentile of a speed-up


@dataclass(frozen=True)
class Latency:
    """The times of one model, in milliseconds, and how they compare with those of the first.

    Args:
        median: of all passes.
        p10: 10th percentile.
        p90: 90th percentile.
        cores: that the process kept busy during the passes, on average; None on a GPU.
        speed_up: median of the first model over this one's; None for the first itself, and where
            the two cannot be compared.
        withheld: why they cannot.
    """

    median: float
    p10: float
    p90: float
    cores: float | None = None
    speed_up: float | None = None
    withheld: str | None = None


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, Callable[[Tensor], object]],
    example: Tensor,
    *,
    runs: int = 50,
    warmup: int = 10,
    watched: Sequence[str] = (),
) -> dict[str, Latency]:
    """Return how long a forward pass of each model takes.

    The models take turns, so that what else the machine does falls on all of them alike, and are
    compared round by round.

    Args:
        models: take the batch; in evaluation mode, on the device of `example`.
        example: one batch.
        runs: timed passes of each model.
        warmup: passes of each model before.
        watched: models in PyTorch, which have a core for themselves on a machine that is not busy.
    """
    calls = {name: partial(model, example) for name, model in models.items()}
    cpu = dict.fromkeys(calls, 0.0)

    def turn(name: str, passes: int) -> list[float]:
        before = time.process_time()
        times = time_passes(calls[name], passes, device=example.device)
        cpu[name] += time.process_time() - before
        return times

    turns: dict[str, Turn] = {name: partial(turn, name) for name in calls}
    take_turns(turns, dict.fromkeys(turns, [1] * warmup))
    cpu = dict.fromkeys(calls, 0.0)
    times = take_turns(turns, dict.fromkeys(turns, [1] * runs), rotate=True)
    on_cpu = example.device.type == "cpu"
    cores = {name: cpu[name] / sum(times[name]) * 1e3 for name in calls} if on_cpu else {}
    reason = busy([cores[name] for name in watched if name in cores])
    first = next(iter(times.values()))
    found = {}
    for name, values in times.items():
        compared = values is not first
        withheld = (compared and (reason or unlike(first, values))) or None
        ratio = percentile(first, 50) / percentile(values, 50)
        found[name] = Latency(
            median=percentile(values, 50),
            p10=percentile(values, 10),
            p90=percentile(values, 90),
            cores=cores.get(name),
            speed_up=ratio if compared and not withheld else None,
            withheld=withheld,
        )
    return found


def busy(cores: Iterable[float]) -> str | None:
    """Return what PyTorch lacked on a busy machine, None on one that was not.

    Args:
        cores: that PyTorch kept busy while it was timed on the CPU, of each model.
    """
    least = min(cores, default=BUSY)
    if least >= BUSY:
        return None
    return f"PyTorch had {least:.2f} of a core: something else keeps this machine busy"


def unlike(first: Sequence[float], other: Sequence[float]) -> str | None:
    """Return why the medians of two models that took turns must not be compared, if so.

    Args:
        first: milliseconds of one model, by round.
        other: of the other in the same rounds.
    """
    if len(other) < FEWEST:
        return f"{len(other)} timed passes are too few; at least {FEWEST} can be compared"
    ratios = [a / b for a, b in zip(first, other, strict=True)]
    low, high = percentile(ratios, 10), percentile(ratios, 90)
    if high <= SPREAD * low:
        return None
    return f"the times spread too much: {low:.2g} to {high:.2g} times as fast from round to round"


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
