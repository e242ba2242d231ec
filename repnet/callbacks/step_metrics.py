"""`StepMetrics`: what the trainer's loggers receive between the ends of epochs."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from repnet.callbacks.progress import StepTimer, batch_size
from repnet.lightning import Callback


class StepMetrics(Callback):
    """Send the loss of a step and the speed since the last report to every logger.

    `train/loss_step` is the mean over the processes and over the batches whose gradients are
    accumulated; `images_per_second` counts all devices and leaves validation out. Both are sent
    every `trainer.log_every_n_steps` optimizer steps, so that an accelerator is seldom waited for.
    """

    def __init__(self) -> None:
        self.timer = StepTimer()
        self.loss: Tensor | float = 0.0  # of the batches of this step
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self.timer.reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.timer.resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.timer.resume()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.timer.batch_end(batch_size(batch) * trainer.world_size)
        # Lightning has divided it by the batches of a step.
        self.loss = self.loss + (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        if trainer.global_step == self.step:  # gradients are accumulated
            return
        self.step, loss, self.loss = trainer.global_step, self.loss, 0.0
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.step % every == 0:
            metrics = {
                "train/loss_step": float(trainer.strategy.reduce(loss, reduce_op="mean")),
                "images_per_second": self.timer.images / self.timer.seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=self.step - 1)  # Lightning counts from 0
            self.timer.reset()
