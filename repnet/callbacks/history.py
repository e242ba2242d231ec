"""`History`: one row per epoch in `metrics.csv`, and the same as a picture."""

from __future__ import annotations

import csv
import io
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from pytorch_lightning import LightningModule, Trainer

from repnet.callbacks.drawing import (
    BLUE,
    GRAY,
    OTHERS,
    RED,
    new_figure,
    percent_ticks,
    plain_ticks,
    save,
)
from repnet.callbacks.pictures import send_picture
from repnet.callbacks.progress import StepTimer, batch_size, epoch_of, peak_memory
from repnet.files import write_text
from repnet.lightning import Callback
from repnet.records import METRICS, read_metrics

COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train/loss",
    "val/loss",
    "val/top1",
    "val/f1",
    "images_per_second",
    "data_wait",
    "memory_mib",
    "seconds",
)
MOST_RATES = 1000  # learning rates that are kept to be drawn


class History(Callback):
    """Write `metrics.csv` after every epoch and `curves.png` at the end; time the training.

    A resumed run continues the table that it finds, also within an epoch. What other callbacks log
    of an epoch stands in further columns. `data_wait` is the share of the training time in which
    nothing was there to train on; `memory_mib` is `peak_memory`.

    Args:
        directory: of the two files.
        echo: also print a line per epoch, in a terminal as much of it as fits.
    """

    def __init__(self, directory: str | Path, *, echo: bool = True) -> None:
        self.directory = Path(directory)
        self.echo = echo
        self.rows: list[dict[str, Any]] = []
        self.images = 0
        self.seconds = 0.0  # of training, without validation
        self.timer = StepTimer()  # of this epoch
        self.epoch = -1
        self.rates: list[tuple[int, float]] = []  # step, learning rate
        self.stride = 1  # steps between two of them
        self.validated = False  # in this epoch

    @property
    def images_per_second(self) -> float:
        """Training images of all devices per second, validation not counted."""
        return self.images / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        timer = self.timer
        return {
            "epoch": self.epoch,
            "timer": [timer.images, timer.seconds, timer.waited],
            "rates": [list(pair) for pair in self.rates],
            "stride": self.stride,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = state_dict["epoch"]
        self.timer.images, self.timer.seconds, self.timer.waited = state_dict["timer"]
        self.rates = [(int(step), float(rate)) for step, rate in state_dict["rates"]]
        self.stride = state_dict["stride"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows = [*read_metrics(self.directory)]
        self._sum_up()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now does a resumed trainer know its epoch; a row of an unfinished one is dropped.
        self.rows = [row for row in self.rows if int(row["epoch"]) < trainer.current_epoch]
        self._sum_up()
        self.timer.resume()
        if trainer.current_epoch != self.epoch:
            self._start_epoch(trainer)  # a run that is resumed within an epoch does not start it

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_epoch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.timer.resume()
        self.validated = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.timer.batch_start()
        if trainer.global_step % self.stride == 0:
            self._keep_rate(trainer.global_step, highest_learning_rate(trainer))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.timer.batch_end(batch_size(batch) * trainer.world_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics  # all processes compute them together
        if not trainer.is_global_zero:
            return
        timer = self.timer
        self.seconds += timer.seconds
        self.images += timer.images
        metrics = {
            key: float(value)
            for key, value in logged.items()
            if self.validated or key.startswith("train")  # Lightning keeps those of earlier epochs
            if not key.startswith("lr-")  # of Lightning's LearningRateMonitor
        }
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "learning_rate": highest_learning_rate(trainer),
            **metrics,
            "images_per_second": timer.images / timer.seconds if timer.seconds else 0.0,
            "data_wait": timer.waited / timer.seconds if timer.seconds else 0.0,
            "memory_mib": round(peak_memory(trainer.strategy.root_device)),
            "seconds": timer.seconds,
        }
        self.rows.append({key: _short(value) for key, value in row.items()})
        self._write()
        if self.echo:
            print(self._line(trainer, row), flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.rows:
            path = self.directory / "curves.png"
            draw_curves(self.rows, path, self.rates)
            send_picture(trainer.loggers, path, trainer.global_step)

    def _start_epoch(self, trainer: Trainer) -> None:
        self.epoch = trainer.current_epoch
        self.timer.reset()
        self.validated = False

    def _sum_up(self) -> None:
        """Count what earlier sessions of a resumed run have done."""
        self.seconds = sum(float(row["seconds"]) for row in self.rows)
        rates = ((float(row["seconds"]), float(row["images_per_second"])) for row in self.rows)
        self.images = round(sum(seconds * rate for seconds, rate in rates))

    def _keep_rate(self, step: int, rate: float) -> None:
        if self.rates and self.rates[-1][0] == step:  # gradients are accumulated
            return
        self.rates.append((step, float(rate)))
        if len(self.rates) > MOST_RATES:
            self.rates = self.rates[::2]
            self.stride *= 2

    def _write(self) -> None:
        columns = list(dict.fromkeys([*COLUMNS, *(key for row in self.rows for key in row)]))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.directory / METRICS, table.getvalue())

    @staticmethod
    def _line(trainer: Trainer, row: dict[str, Any]) -> str:
        parts = [epoch_of(trainer).lower()]
        for key in ("train/loss", "val/loss", "val/top1"):
            if key in row:
                value = f"{row[key]:.2%}" if key == "val/top1" else f"{row[key]:.4f}"
                parts.append(f"{key.removeprefix('train/')} {value}")
        parts.append(f"{row['images_per_second']:,.0f} images/s")
        parts.append(f"data wait {row['data_wait']:.0%}")
        parts.append(f"{row['memory_mib']:,} MiB")
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
        while len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)


def draw_curves(
    rows: list[dict[str, Any]], path: str | Path, rates: Sequence[tuple[int, float]] = ()
) -> None:
    """Draw loss, accuracy and learning rate over epochs.

    Args:
        rows: of `metrics.csv`.
        path: of the PNG file.
        rates: steps and their learning rates; none for those at the end of each epoch.
    """
    figure = new_figure(12, 3.8)
    loss, accuracy, rate = figure.subplots(1, 3)
    train, validation = _curve(rows, "train/loss"), _curve(rows, "val/loss")
    # In training the loss is what is optimized, with label smoothing, mixing and dropout.
    loss.plot(*train, ".-", label="train, as optimized", color=GRAY)
    loss.plot(*validation, ".-", label="validation", color=BLUE)
    positive = [y for y in (*train[1], *validation[1]) if y > 0]
    if positive and max(positive) > 10 * min(positive):
        loss.set_yscale("log")
        plain_ticks(loss.yaxis)
    loss.set_title("loss")
    scores = sorted({k for row in rows for k in row if k.endswith("/top1")} - {"val/top1"})
    for key, color in zip(("val/top1", *scores), (BLUE, *OTHERS), strict=False):
        accuracy.plot(*_curve(rows, key), ".-", label=key, color=color)
    epochs, top1 = _curve(rows, "val/top1")
    if top1:
        best = max(range(len(top1)), key=top1.__getitem__)
        label = f"best {top1[best]:.2%}, epoch {epochs[best]:g}"
        accuracy.plot(epochs[best], top1[best], "o", ms=9, mfc="none", color=RED, label=label)
    accuracy.set_title("validation accuracy")
    percent_ticks(accuracy.yaxis)
    steps, values = _over_epochs(rows, rates) if rates else _curve(rows, "learning_rate")
    rate.plot(steps, values, "-" if rates else ".-", color=BLUE)
    rate.set(title="learning rate", ylim=(0, None))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes is not rate:
            axes.legend(frameon=False)
        if len(rows) > 1:
            axes.xaxis.get_major_locator().set_params(integer=True)
        elif axes is not rate:
            axes.set_xticks([_curve(rows, "step")[0][0]])
    save(figure, path)


def _curve(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(int(r["epoch"]) + 1, float(r[key])) for r in rows if r.get(key) not in ("", None)]
    return [x for x, _ in points], [y for _, y in points]


def _over_epochs(
    rows: list[dict[str, Any]], rates: Sequence[tuple[int, float]]
) -> tuple[Any, list[float]]:
    """Return rates with their steps as fractions of epochs, which may differ in length."""
    steps = [0, *(int(row["step"]) for row in rows)]
    epochs = [0, *(int(row["epoch"]) + 1 for row in rows)]
    return numpy.interp([step for step, _ in rates], steps, epochs), [rate for _, rate in rates]


def highest_learning_rate(trainer: Trainer) -> float:
    """Return the rate of the group that learns fastest: the one that the config sets."""
    return max(group["lr"] for group in trainer.optimizers[0].param_groups)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
