"""`WeightDecaySchedule`: decay that fades as the learning rate does."""

from __future__ import annotations

import math
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer

from repnet.errors import InputError
from repnet.lightning import Callback

INITIAL = "initial_weight_decay"  # of a group, beside torch's `initial_lr`; checkpoints hold both


class WeightDecaySchedule(Callback):
    """Take the weight decay of every parameter group that has one to `final` over the training.

    MobileOne's recipe is a cosine from 1e-4 to 1e-5 (arXiv:2206.04040, section 4.1). The value
    changes before each step; a resumed run goes on where it was.

    Args:
        final: reached at the end of the training.
        shape: "cosine" for half a cosine, or "linear".

    Raises:
        InputError: `shape` is unknown, the training has no end, or the optimizer no weight decay.

    Example:
        >>> trainer = Trainer(max_epochs=300, callbacks=[WeightDecaySchedule(1e-5)])
    """

    def __init__(self, final: float, shape: Literal["cosine", "linear"] = "cosine") -> None:
        if shape not in ("cosine", "linear"):
            raise InputError(f"unknown shape '{shape}' of a weight decay; choose cosine or linear")
        self.final = final
        self.shape = shape

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if math.isinf(trainer.estimated_stepping_batches):
            raise InputError("WeightDecaySchedule needs an end: set max_epochs or max_steps")
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not any(group.get(INITIAL, group.get("weight_decay")) for group in groups):
            raise InputError(
                "WeightDecaySchedule changes the weight decay of the optimizer, which has none: "
                "set optimizer.weight_decay"
            )

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        total = trainer.estimated_stepping_batches * len(trainer.optimizers)
        progress = min(1.0, trainer.global_step / max(1, total))
        left = 1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                initial = group.setdefault(INITIAL, group.get("weight_decay", 0.0))
                if initial:
                    group["weight_decay"] = self.final + (initial - self.final) * left
