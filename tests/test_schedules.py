"""Learning-rate schedules and the rule of the batch size, against their formulas."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from repnet.errors import InputError
from repnet.spec import build, choices, load_choice
from repnet.training import (
    constant,
    describe_scaling,
    one_cycle,
    scaled_learning_rate,
    warmup_exponential,
    warmup_linear,
    warmup_step,
)

TOTAL, EPOCH = 100, 10


def sgd(*rates: float, **options: Any) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, **{"momentum": 0.9, **options})


def run(optimizer: torch.optim.Optimizer, schedule: Any, steps: int = TOTAL) -> list[list[float]]:
    """Return the learning rates of each group at each step."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


AFTER: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[int], float]]] = {
    "linear": (warmup_linear, {"final_factor": 0.1}, lambda s: 1 - 0.9 * (s - 20) / 80),
    "exponential": (warmup_exponential, {"gamma": 0.5}, lambda s: 0.5 ** ((s - 20) / 10)),
    "constant": (constant, {}, lambda s: 1.0),
    "step": (
        warmup_step,
        {"milestones": [3, 6.5], "gamma": 0.2},
        lambda s: 1.0 if s < 30 else 0.2 if s < 65 else 0.04,
    ),
}


@pytest.mark.parametrize("name", AFTER)
def test_schedules_follow_their_formulas(name: str) -> None:
    schedule, options, after = AFTER[name]
    optimizer = sgd(2.0, 0.5)
    made = schedule(optimizer, total_steps=TOTAL, steps_per_epoch=EPOCH, warmup_epochs=2, **options)
    for step, rates in enumerate(run(optimizer, made)):
        factor = (step + 1) / 20 if step < 20 else after(step)
        assert rates == pytest.approx([2 * factor, 0.5 * factor], rel=1e-12)


def test_no_warm_up_starts_at_the_peak_and_a_long_one_takes_all_steps() -> None:
    for epochs, first, last in ((0, 1.0, 1.0), (1000, 0.01, 1.0)):
        optimizer = sgd(1.0)
        made = constant(optimizer, total_steps=100, steps_per_epoch=10, warmup_epochs=epochs)
        rates = run(optimizer, made)
        assert (rates[0][0], rates[-1][0]) == pytest.approx((first, last))


@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle_rises_to_the_peak_of_each_group_and_falls(anneal: Any) -> None:
    optimizer = sgd(2.0, 0.5)
    made = one_cycle(optimizer, total_steps=TOTAL, steps_per_epoch=EPOCH, warmup_epochs=4,
                     anneal=anneal, initial_factor=0.1, final_factor=0.001)  # fmt: skip
    assert optimizer.param_groups[0]["momentum"] == 0.95
    momenta, rates = [], []
    for _ in range(TOTAL):
        momenta.append(optimizer.param_groups[1]["momentum"])
        rates += run(optimizer, made, 1)
    top = 39  # torch's peak is one step before 4 epochs of 10 steps have passed
    for step, (first, second) in enumerate(rates):
        assert second == pytest.approx(first / 4)
        rising = step <= top
        progress = step / top if rising else (step - top) / (TOTAL - 1 - top)
        start, end = (0.1, 1.0) if rising else (1.0, 0.001)
        slope = (1 - math.cos(math.pi * progress)) / 2 if anneal == "cos" else progress
        assert first == pytest.approx(2 * (start + (end - start) * slope), rel=1e-9), step
    assert min(momenta) == momenta[top] == pytest.approx(0.85)


def test_a_cycle_without_momentum_is_refused_unless_it_is_left_out() -> None:
    steps = {"total_steps": TOTAL, "steps_per_epoch": EPOCH}
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match=r"Adagrad has no momentum; .*cycle_momentum=false"):
        one_cycle(optimizer, **steps)
    assert one_cycle(optimizer, **steps, cycle_momentum=False).total_steps == TOTAL
    with pytest.raises(InputError, match="leaves nothing of 10 epochs"):
        one_cycle(sgd(1.0), **steps, warmup_epochs=10)


def test_milestones_outside_of_the_training_are_refused() -> None:
    steps = {"total_steps": TOTAL, "steps_per_epoch": EPOCH}
    with pytest.raises(InputError, match="ends after 10 epochs, before 30"):
        warmup_step(sgd(1.0), **steps, milestones=[5, 30])
    with pytest.raises(InputError, match="within the warm-up"):
        warmup_step(sgd(1.0), **steps, milestones=[1, 5], warmup_epochs=2)


@pytest.mark.parametrize("name", choices("scheduler"))
def test_every_schedule_of_the_configs_resumes_where_it_was(name: str) -> None:
    """From its own config, through a file of tensors and plain data."""
    spec = {**load_choice("scheduler", name), "_partial_": True}
    if spec.get("milestones") == "???":
        spec["milestones"] = [3, 6]
    steps = {"total_steps": TOTAL, "steps_per_epoch": EPOCH}
    optimizer = sgd(1.0, 0.5)
    schedule = build(spec, allowed=("repnet.training.schedules",))(optimizer, **steps)
    run(optimizer, schedule, 37)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    resumed = sgd(1.0, 0.5)
    again = build(spec)(resumed, **steps)
    for target, state in zip((resumed, again), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(state)
    assert run(resumed, again, 63) == run(optimizer, schedule, 63)


def test_a_resumed_cycle_may_last_longer() -> None:
    first, second = sgd(1.0), sgd(1.0)
    short = one_cycle(first, total_steps=TOTAL, steps_per_epoch=EPOCH)
    run(first, short)
    longer = one_cycle(second, total_steps=2 * TOTAL, steps_per_epoch=EPOCH)
    second.load_state_dict(first.state_dict())
    longer.load_state_dict(short.state_dict())
    unbroken = sgd(1.0)
    rates = run(unbroken, one_cycle(unbroken, total_steps=200, steps_per_epoch=EPOCH), 200)
    assert run(second, longer)[1:] == rates[101:]  # the first one was set before


def test_the_learning_rate_scales_with_the_batch() -> None:
    assert scaled_learning_rate(0.1, 256, 1024) == pytest.approx(0.4)
    assert scaled_learning_rate(0.1, 256, 64) == pytest.approx(0.025)
    assert scaled_learning_rate(0.001, 256, 1024, "sqrt") == pytest.approx(0.002)
    assert describe_scaling(0.1, 256, 1024) == "lr 0.4 = 0.1 x 1024/256"
    assert describe_scaling(0.001, 256, 1024, "sqrt") == "lr 0.002 = 0.001 x sqrt(1024/256)"
    with pytest.raises(InputError, match="unknown rule 'square'"):
        scaled_learning_rate(0.1, 256, 512, "square")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be positive"):
        scaled_learning_rate(0.1, 0, 512)
