"""`History`: one row per epoch in `metrics.csv`, and the same as a picture."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from repnet.files import write_atomically, write_text

COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train/loss",
    "val/loss",
    "val/top1",
    "val/top5",
    "images_per_second",
    "seconds",
)


class History(Callback):
    """Write `metrics.csv` after every epoch and `curves.png` at the end; time the training.

    A resumed run continues the table that it finds.

    Args:
        directory: of the two files.
        echo: also print a line per epoch; None for where there is no terminal to draw a bar on.
    """

    def __init__(self, directory: str | Path, *, echo: bool | None = None) -> None:
        self.directory = Path(directory)
        self.echo = not sys.stdout.isatty() if echo is None else echo
        self.rows: list[dict[str, Any]] = []
        self.images = 0
        self.epoch_images = 0
        self.seconds = 0.0  # of training, without validation
        self.epoch_start = self.last_batch_end = 0.0

    @property
    def images_per_second(self) -> float:
        """Training images of all devices per second, validation not counted."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.directory / "metrics.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))
        self._sum_up()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now does a resumed trainer know its epoch; a row of an unfinished one is dropped.
        self.rows = [row for row in self.rows if int(row["epoch"]) < trainer.current_epoch]
        self._sum_up()

        self._start_clock()  # a run that is resumed within an epoch does not start that epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_clock()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.epoch_images += len(batch[0]) * trainer.world_size
        self.last_batch_end = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        seconds = self.last_batch_end - self.epoch_start
        self.seconds += seconds
        self.images += self.epoch_images
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            **metrics,
            "images_per_second": self.epoch_images / seconds if seconds else 0.0,
            "seconds": seconds,
        }
        self.rows.append({key: _short(row.get(key, "")) for key in COLUMNS})
        self._write()
        if self.echo:
            print(self._line(trainer, row), flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.rows:
            draw_curves(self.rows, self.directory / "curves.png")

    def _sum_up(self) -> None:
        """Count what earlier sessions of a resumed run have done."""
        self.seconds = sum(float(row["seconds"]) for row in self.rows)
        rates = ((float(row["seconds"]), float(row["images_per_second"])) for row in self.rows)
        self.images = round(sum(seconds * rate for seconds, rate in rates))

    def _start_clock(self) -> None:
        self.epoch_start = self.last_batch_end = time.perf_counter()
        self.epoch_images = 0

    def _write(self) -> None:
        lines = [",".join(COLUMNS), *(",".join(str(row[c]) for c in COLUMNS) for row in self.rows)]
        write_text(self.directory / "metrics.csv", "\n".join(lines) + "\n")

    @staticmethod
    def _line(trainer: Trainer, row: dict[str, Any]) -> str:
        parts = [f"epoch {row['epoch'] + 1}/{trainer.max_epochs}"]
        for key in ("train/loss", "val/loss", "val/top1"):
            if key in row:
                value = f"{row[key]:.2%}" if key == "val/top1" else f"{row[key]:.4f}"
                parts.append(f"{key} {value}")
        return "  ".join([*parts, f"{row['images_per_second']:,.0f} images/s"])


def draw_curves(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw loss, accuracy and learning rate over epochs.

    Args:
        rows: of `metrics.csv`.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def curve(key: str) -> tuple[list[int], list[float]]:
        points = [
            (int(r["epoch"]) + 1, float(r[key])) for r in rows if r.get(key) not in ("", None)
        ]
        return [x for x, _ in points], [y for _, y in points]

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    colors = {"train": "#888888", "val": "#2266bb"}
    for key, label in (("train/loss", "train/loss, as optimized"), ("val/loss", "val/loss")):
        loss.plot(*curve(key), ".-", label=label, color=colors[key.split("/")[0]])
    loss.set(title="loss", yscale="log")
    epochs, top1 = curve("val/top1")
    accuracy.plot(epochs, top1, ".-", label="val/top1", color=colors["val"])
    if top1:
        best = max(range(len(top1)), key=top1.__getitem__)
        accuracy.plot(
            epochs[best],
            top1[best],
            "o",
            ms=8,
            mfc="none",
            color="#cc3322",
            label=f"best {top1[best]:.2%}, epoch {epochs[best]}",
        )
    accuracy.set(title="validation accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    rate.plot(*curve("learning_rate"), ".-", color="#449944", label="learning rate")
    rate.set(title="learning rate at the end of the epoch")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
