"""Learning-rate schedules, stepped after every optimizer step.

Each is called as `schedule(optimizer, total_steps=, steps_per_epoch=, ...)`: the optimizer's
learning rates are the peaks, `total_steps` are those of the whole training, warm-up included, and
`warmup_epochs` rise linearly, at most the whole training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from repnet.errors import InputError


def warmup_cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    final_factor: float = 0,
) -> LambdaLR:
    """Return a linear warm-up, then half a cosine down to `final_factor` times the learning rate.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: of the whole training, warm-up included.
        steps_per_epoch: optimizer steps.
        warmup_epochs: epochs; at most the whole training.
        final_factor: of the peak, at the last step.
    """
    warmup = _steps(warmup_epochs, steps_per_epoch, total_steps)

    def after(step: int) -> float:
        half = (1 + math.cos(math.pi * _progress(step, warmup, total_steps))) / 2
        return final_factor + (1 - final_factor) * half

    return _warmed(optimizer, warmup, after)


def warmup_linear(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    final_factor: float = 0,
) -> LambdaLR:
    """Return a linear warm-up, then a straight line down to `final_factor` times the peak.

    Args:
        optimizer: as in `warmup_cosine`, and so are the others.
        total_steps: steps.
        steps_per_epoch: steps.
        warmup_epochs: epochs.
        final_factor: of the peak.
    """
    warmup = _steps(warmup_epochs, steps_per_epoch, total_steps)

    def after(step: int) -> float:
        return 1 - (1 - final_factor) * _progress(step, warmup, total_steps)

    return _warmed(optimizer, warmup, after)


def warmup_exponential(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    gamma: float = 0.97,
) -> LambdaLR:
    """Return a linear warm-up, then `gamma` for each epoch since, without jumps between them.

    Args:
        optimizer: as in `warmup_cosine`, and so are the others.
        total_steps: steps.
        steps_per_epoch: steps.
        warmup_epochs: epochs.
        gamma: factor per epoch.
    """
    warmup = _steps(warmup_epochs, steps_per_epoch, total_steps)
    return _warmed(optimizer, warmup, lambda step: gamma ** ((step - warmup) / steps_per_epoch))


def warmup_step(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    milestones: Sequence[float],
    warmup_epochs: float = 0,
    gamma: float = 0.1,
) -> LambdaLR:
    """Return a linear warm-up to a learning rate that falls by `gamma` at each milestone.

    Args:
        optimizer: as in `warmup_cosine`, and so are the others.
        total_steps: steps.
        steps_per_epoch: steps.
        milestones: epochs from the start of the training, warm-up included.
        warmup_epochs: epochs.
        gamma: factor at each milestone.

    Raises:
        InputError: a milestone lies beyond the end of the training, or within the warm-up.
    """
    warmup = _steps(warmup_epochs, steps_per_epoch, total_steps)
    falls = [round(epoch * steps_per_epoch) for epoch in milestones]
    if wrong := [m for m, fall in zip(milestones, falls, strict=True) if fall >= total_steps]:
        raise InputError(
            f"milestones={list(milestones)}: the training ends after "
            f"{total_steps / steps_per_epoch:g} epochs, before {wrong[0]:g}"
        )
    if falls and min(falls) < warmup:
        raise InputError(f"milestones={list(milestones)} must not lie within the warm-up")
    return _warmed(optimizer, warmup, lambda step: gamma ** sum(step >= fall for fall in falls))


def constant(
    optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0
) -> LambdaLR:
    """Return a linear warm-up to a learning rate that stays.

    Args:
        optimizer: as in `warmup_cosine`, and so are the others.
        total_steps: steps.
        steps_per_epoch: steps.
        warmup_epochs: epochs.
    """
    return _warmed(optimizer, _steps(warmup_epochs, steps_per_epoch, total_steps), lambda _: 1.0)


def one_cycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float | None = None,
    anneal: Literal["cos", "linear"] = "cos",
    initial_factor: float = 0.04,
    final_factor: float = 4e-6,
    cycle_momentum: bool = True,
    momentum: tuple[float, float] = (0.85, 0.95),
) -> OneCycleLR:
    """Return torch's one-cycle schedule (arXiv:1708.07120): up to the peak, and far down.

    Args:
        optimizer: as in `warmup_cosine`, and so are the others.
        total_steps: steps.
        steps_per_epoch: steps.
        warmup_epochs: until the peak; None for 3 tenths of the training.
        anneal: shape of both slopes.
        initial_factor: of the peak, at the first step.
        final_factor: of the peak, at the last step.
        cycle_momentum: also take momentum, or the first beta, the other way.
        momentum: lowest and highest.

    Raises:
        InputError: the optimizer has no momentum to cycle, or the warm-up takes all steps.
    """
    fraction = 0.3 if warmup_epochs is None else warmup_epochs * steps_per_epoch / total_steps
    if not 0 <= fraction < 1:
        raise InputError(
            f"warmup_epochs={warmup_epochs} leaves nothing of "
            f"{total_steps / steps_per_epoch:g} epochs to come down from the peak"
        )
    if cycle_momentum and not {"momentum", "betas"} & optimizer.defaults.keys():
        raise InputError(
            f"{type(optimizer).__name__} has no momentum; set scheduler.cycle_momentum=false"
        )
    low, high = momentum
    return _OneCycle(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps,
        pct_start=fraction,
        anneal_strategy=anneal,
        cycle_momentum=cycle_momentum,
        base_momentum=low,
        max_momentum=high,
        div_factor=1 / initial_factor,
        final_div_factor=initial_factor / final_factor,
    )


class _OneCycle(OneCycleLR):
    """Keeps its own length in a resumed run, which may last longer than before."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {key: vars(self)[key] for key in ("total_steps", "_schedule_phases")}
        super().load_state_dict({**state_dict, **own})


def _warmed(optimizer: Optimizer, warmup: int, after: Callable[[int], float]) -> LambdaLR:
    """Return `warmup` steps of a straight line to 1, then `after(step)`."""
    return LambdaLR(optimizer, lambda s: (s + 1) / warmup if s < warmup else after(s))


def _steps(epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    return min(total_steps, round(epochs * steps_per_epoch))


def _progress(step: int, warmup: int, total_steps: int) -> float:
    return min(1.0, (step - warmup) / max(1, total_steps - warmup))
