"""`SaveOnInterrupt`: neither Ctrl-C nor the end of a machine's time loses anything."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer

from repnet.lightning import Checkpoint


class SaveOnInterrupt(Checkpoint):
    """At SIGINT (Ctrl-C), SIGTERM or SIGUSR1 finish the step, save, then raise KeyboardInterrupt.

    A second signal interrupts at once. After the last step of an epoch its validation is finished
    too, so that its score counts. It is enough that one process is signalled. Where SIGUSR1 has a
    handler already, as under SLURM, where Lightning saves and queues the job again, that one and
    SIGTERM stay as they are. Name it last among the callbacks: as a `Checkpoint` it then runs when
    all others have saved.

    Args:
        path: of the checkpoint, for instance `RUN/checkpoints/last.ckpt`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.requested = False
        self.step = 0
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.requested, self.step = False, trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGINT]
        if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signals += [signal.SIGTERM, signal.SIGUSR1]
        self.previous = {number: signal.signal(number, self._request) for number in signals}

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        # Not where gradients are half accumulated. After the last step the epoch is finished.
        if stepped and not trainer.is_last_batch:
            self._stop_if_requested(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_requested(trainer)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self.requested = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        if self.requested:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()  # before Lightning puts back what it found

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
