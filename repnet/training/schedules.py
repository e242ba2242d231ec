"""Learning-rate schedules, stepped after every optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    final_factor: float = 0,
) -> LambdaLR:
    """Return a linear warm-up, then half a cosine down to `final_factor` times the learning rate.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: of the whole training, warm-up included.
        steps_per_epoch: optimizer steps.
        warmup_epochs: epochs; at most the whole training.
        final_factor: of the peak, at the last step.
    """
    warmup = min(total_steps, round(warmup_epochs * steps_per_epoch))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
