"""`PruneTrial`: what is worse than most need not be finished."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from repnet.errors import InputError
from repnet.files import write_json
from repnet.lightning import Callback
from repnet.records import METRICS, read_metrics


class PruneTrial(Callback):
    """Stop after an epoch in which the best value so far is worse than the median of other trials.

    The median stopping rule (Golovin et al. 2017, section 3.2): the other trials count with their
    best value up to the same epoch. They are known by the tables that `History` writes,
    `directory/*/metrics.csv`, so it needs no server, and works with every way to start trials.
    What stopped a trial is written to `pruned.json` in the trainer's `default_root_dir`, which is
    the trial's own directory.

    Args:
        directory: of all trials.
        monitor: a column of `metrics.csv`, and what the trainer knows it by.
        mode: `max` or `min`, what is better.
        warmup_epochs: a trial is never stopped before it has trained as many.
        min_trials: nor before so many others have come as far.

    Raises:
        InputError: `mode` is something else, or nothing is logged as `monitor`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        monitor: str = "val/top1",
        mode: str = "max",
        warmup_epochs: int = 5,
        min_trials: int = 4,
    ) -> None:
        if mode not in ("max", "min"):
            raise InputError(f"mode='{mode}' of PruneTrial must be max or min")
        self.directory = Path(directory)
        self.monitor = monitor
        self.better: Any = max if mode == "max" else min
        self.warmup_epochs = warmup_epochs
        self.min_trials = max(1, min_trials)
        self.best: float | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metric = trainer.callback_metrics.get(self.monitor)
        if metric is None:
            if not trainer.num_val_batches or trainer.check_val_every_n_epoch != 1:
                return  # not validated in this epoch
            known = ", ".join(sorted(trainer.callback_metrics))
            raise InputError(f"PruneTrial: nothing is logged as '{self.monitor}', but {known}")
        value = float(f"{float(metric):.6g}")  # as in the tables: a tie is not worse
        self.best = self.better([value] + ([] if self.best is None else [self.best]))
        epochs = trainer.current_epoch + 1
        if epochs < max(1, self.warmup_epochs) or epochs == trainer.max_epochs:
            return
        # One process decides: the tables grow while they are read.
        limit = trainer.strategy.broadcast(
            self._median(trainer) if trainer.is_global_zero else None
        )
        if limit is None or self.better([self.best, limit]) == self.best:
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            what = {"epochs": epochs, "monitor": self.monitor, "best": self.best, "median": limit}
            write_json(Path(trainer.default_root_dir) / "pruned.json", what)
            print(
                f"pruned after {epochs} epochs: best {self.monitor} {self.best:.4g}, median of the "
                f"other trials {limit:.4g}",
                flush=True,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _median(self, trainer: Trainer) -> float | None:
        """Return the median of the others' best values up to this epoch, if there are enough."""
        own = Path(trainer.default_root_dir).resolve()
        bests = []
        for path in self.directory.glob(f"*/{METRICS}"):
            if path.parent.resolve() == own:
                continue
            try:
                rows = read_metrics(path.parent)
            except InputError:  # damaged: the trial does not count
                continue
            if not rows or int(rows[-1]["epoch"]) < trainer.current_epoch:
                continue
            values = [
                float(row[self.monitor])
                for row in rows
                if int(row["epoch"]) <= trainer.current_epoch and row.get(self.monitor)
            ]
            if values:
                bests.append(self.better(values))
        return median(bests) if len(bests) >= self.min_trials else None
