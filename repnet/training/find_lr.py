"""`find_learning_rate`: the learning-rate range test (arXiv:1506.01186, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from repnet.callbacks.drawing import BLUE, GRAY, RED, new_figure, plain_ticks, save
from repnet.errors import InputError

DIVERGED = 4  # times the lowest loss, at which the test ends
LEAST = 10  # steps that tell something


@dataclass(frozen=True)
class RangeTest:
    """What a range test has found.

    Args:
        suggestion: the learning rate at which the smoothed loss falls the fastest: a safe choice.
        lowest: that of the lowest smoothed loss, from which on training gets worse; a run with a
            long warm-up may come near to it.
        rates: learning rate of each step.
        losses: of each step.
        smoothed: the same, averaged exponentially.
    """

    suggestion: float
    lowest: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]


def find_learning_rate(
    make_trainer: Callable[..., Trainer],
    module: LightningModule,
    data: Any,
    *,
    path: str | Path | None = None,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
) -> RangeTest:
    """Train for a few steps with a growing learning rate, and return where the loss falls fastest.

    Works on the groups of the optimizer, whose learning rates keep their ratios. The weights of
    `module` are spoilt by it: build it anew to train.

    Args:
        make_trainer: called with options of `Trainer`.
        module: with one optimizer.
        data: a data module or a loader of training batches.
        path: of a picture, PNG.
        low: first learning rate, of the group with the highest.
        high: last learning rate.
        steps: optimizer steps from one to the other.

    Raises:
        InputError: the loss is not a number from the first steps on.

    Example:
        >>> find_learning_rate(pytorch_lightning.Trainer, module, loader).suggestion
    """
    sweep = _Sweep(low, high, steps)
    trainer = make_trainer(
        callbacks=[sweep],
        max_epochs=-1,
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    if len(sweep.losses) < LEAST:
        raise InputError(
            f"the loss diverges within {len(sweep.losses) + 1} steps at learning rates from "
            f"{low:g} on; check the data and the model's initial weights"
        )
    lowest = sweep.rates[int(numpy.argmin(sweep.smoothed))]
    result = RangeTest(_steepest(sweep), lowest, sweep.rates, sweep.losses, sweep.smoothed)
    if path is not None and trainer.is_global_zero:
        _draw(result, path)
    return result


class _Sweep(Callback):
    """Sets the learning rate of each step, and ends the training when the loss diverges."""

    def __init__(self, low: float, high: float, steps: int) -> None:
        self.low, self.high, self.steps = low, high, steps
        self.ratios: list[float] = []
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.average = 0.0
        self.step = 0
        self.parts: list[float] = []  # losses of the batches of this step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.ratios = [rate / max(rates) if max(rates) else 1.0 for rate in rates]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        progress = trainer.global_step / max(1, self.steps - 1)
        self.rate = self.low * (self.high / self.low) ** progress
        groups = trainer.optimizers[0].param_groups  # a scheduler has changed them since
        for group, ratio in zip(groups, self.ratios, strict=True):
            group["lr"] = self.rate * ratio

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs
        # Of all processes, which must stop together; Lightning has divided it by the batches.
        loss = trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.parts.append(loss.item() * trainer.accumulate_grad_batches)
        if not math.isfinite(self.parts[-1]):
            trainer.should_stop = True
            return
        if trainer.global_step == self.step:
            return
        value = sum(self.parts) / len(self.parts)
        self.step, self.parts = trainer.global_step, []
        self.rates.append(self.rate)
        self.losses.append(value)
        self.average = 0.9 * self.average + 0.1 * value
        self.smoothed.append(self.average / (1 - 0.9 ** len(self.losses)))
        if len(self.losses) > LEAST and self.smoothed[-1] > DIVERGED * min(self.smoothed):
            trainer.should_stop = True


def _steepest(sweep: _Sweep) -> float:
    lowest = int(numpy.argmin(sweep.smoothed))
    end = max(lowest + 1, LEAST)
    slopes = numpy.gradient(sweep.smoothed[:end], numpy.log(sweep.rates[:end]))
    return sweep.rates[int(numpy.argmin(slopes[3:])) + 3]  # the average needs a few steps


def _draw(result: RangeTest, path: str | Path) -> None:
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(result.rates, result.losses, color=GRAY, alpha=0.5, lw=1, label="each step")
    axes.plot(result.rates, result.smoothed, color=BLUE, label="smoothed")
    label = f"falls the fastest: {result.suggestion:.2g}"
    axes.axvline(result.suggestion, color=RED, ls="--", label=label)
    axes.axvline(result.lowest, color=RED, ls=":", label=f"lowest: {result.lowest:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="range test")
    limit = DIVERGED * min(result.smoothed)
    axes.set_ylim(0.9 * min(result.losses), min(1.1 * max(result.losses), 1.2 * limit))
    if limit > 10 * min(result.losses):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)
