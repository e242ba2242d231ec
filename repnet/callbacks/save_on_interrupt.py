"""`SaveOnInterrupt`: Ctrl-C loses nothing."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint


class SaveOnInterrupt(Checkpoint):
    """At the first Ctrl-C finish the step, save, then raise KeyboardInterrupt; the second is hard.

    After the last step of an epoch its validation is finished too, so that its score counts. Name
    it last among the callbacks: as a `Checkpoint` it then runs when all others have saved.

    Args:
        path: of the checkpoint, for instance `RUN/checkpoints/last.ckpt`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.requested = False
        self.previous: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._request)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.is_last_batch:  # after the last one the epoch is validated and finished
            self._stop_if_requested(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        if self.requested:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def _restore(self) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None
