"""`StopOnNonFiniteLoss`: no training on NaN."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


class StopOnNonFiniteLoss(Callback):
    """Raise at the first step whose loss is NaN or infinite, before its weights are saved.

    Args:
        every_n_steps: on an accelerator the loss is kept there, and looked at only so often and
            before each evaluation, because each look waits for the device.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.pending: list[tuple[int, float, Tensor]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.pending.append((trainer.global_step, rate, loss.detach()))
        last = trainer.is_last_batch
        if last or loss.device.type == "cpu" or len(self.pending) >= self.every_n_steps:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        losses = torch.stack([loss for _, _, loss in self.pending])
        steps, self.pending = self.pending, []
        bad = (~losses.isfinite()).nonzero()
        if not len(bad):
            return
        step, rate, loss = steps[int(bad[0])]
        saved = [getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks]
        good = next((path for path in reversed(saved) if path), None)
        raise NonFiniteLossError(
            f"the loss is {loss.item()} at step {step} (epoch {trainer.current_epoch}, learning "
            f"rate {rate:.3g}); last good checkpoint: {good or 'none'}. Try a lower learning "
            "rate, a longer warm-up or gradient clipping"
        )
