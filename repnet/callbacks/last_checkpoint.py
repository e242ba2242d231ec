"""`LastCheckpoint`: the state to continue from, saved within an epoch too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from repnet.files import sweep_leftovers
from repnet.lightning import Checkpoint


class LastCheckpoint(Checkpoint):
    """Overwrite one checkpoint after every epoch and, within it, every so often.

    It saves only where gradients are not half accumulated. After the last step of an epoch it waits
    for the validation, so that no resumed run misses that.

    Args:
        path: of the checkpoint, for instance `RUN/checkpoints/last.ckpt`.
        every_n_steps: optimizer steps; None: not by steps.
        every_minutes: None: not by time.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
    ) -> None:
        self.path = str(path)
        self.every_n_steps = every_n_steps
        self.seconds = None if every_minutes is None else 60 * every_minutes
        self.step = 0
        self.saved_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            sweep_leftovers(Path(self.path).parent)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if stepped and not trainer.is_last_batch and self._is_time(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_n_steps and self.step % self.every_n_steps == 0:
            return True
        if self.seconds is None:
            return False
        # All processes save together, or none; their clocks differ.
        return trainer.strategy.broadcast(time.monotonic() - self.saved_at >= self.seconds)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved_at = time.monotonic()
