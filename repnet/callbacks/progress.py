"""`ThroughputBar`: Lightning's progress bar with speed, data wait and memory."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from rich import get_console
from rich.table import Column
from torch import Tensor
from torch.utils._pytree import tree_leaves

from repnet.lightning import EitherLightning

WIDE = 160  # columns of a terminal that has room for a long bar beside the metrics


class StepTimer:
    """Times training steps, and how long they waited for data; never waits for the device.

    A step lasts from the end of the last one to its own end. What it waits for data is the time
    between the two, in which other callbacks may do a little too. On an accelerator the host's pace
    is the device's as soon as its queue is full.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.images = 0
        self.seconds = self.waited = 0.0
        self.resume()

    def resume(self) -> None:
        """Leave out what happened since the last step, such as a validation."""
        self.last = time.perf_counter()

    def batch_start(self) -> None:
        """Count the time since the last step as waiting."""
        self.waited += time.perf_counter() - self.last

    def batch_end(self, images: int) -> None:
        """Count a step of `images`."""
        now = time.perf_counter()
        self.seconds += now - self.last
        self.images += images
        self.last = now


class ThroughputBar(EitherLightning, RichProgressBar):
    """Also shows the loss of the step, images/s of all devices, data wait and memory.

    Takes one line; a terminal that is not wide gets the loss and images/s. Epochs count from 1.

    Lightning's own bar reads metrics at every step, which makes an accelerator wait; this one does
    so twice a second.

    Args:
        seconds: between two looks at the metrics.
        **options: of `RichProgressBar`.
    """

    def __init__(self, seconds: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.interval = seconds
        self.timer = StepTimer()
        self.loss: Any = None
        self.shown: dict[str, Any] = {}
        self.next_look = 0.0
        self.window: deque[tuple[int, float, float]] = deque(maxlen=10)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        description, bar, batches, times, _ = super().configure_columns(trainer)
        if get_console().width < WIDE:
            bar.bar_width = 10
        # The column of metrics is cut at the edge instead of wrapped.
        self._metric_component._table_column = Column(no_wrap=True)  # type: ignore[union-attr]
        return [description, bar, batches, times]  # not batches/s, beside images/s

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.timer.resume()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.timer.resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.next_look = 0.0
        super().on_validation_end(trainer, pl_module)
        self.timer.resume()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.timer.batch_start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.timer.batch_end(batch_size(batch) * trainer.world_size)
        self.loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.next_look = 0.0
        super().on_train_epoch_end(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        now = time.perf_counter()
        if now < self.next_look:
            return self.shown
        self.next_look = now + self.interval
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if isinstance(self.loss, Tensor):
            # Lightning has divided it by the batches of a step.
            items["loss"] = self.loss.item() * trainer.accumulate_grad_batches
        timer = self.timer
        self.window.append((timer.images, timer.seconds, timer.waited))
        images, seconds, waited = (
            new - old for new, old in zip(self.window[-1], self.window[0], strict=True)
        )
        if seconds:
            items["images/s"] = f"{images / seconds:,.0f}"
            items["data wait"] = f"{waited / seconds:.0%}"
        if memory := peak_memory(trainer.strategy.root_device):
            items["memory"] = f"{memory:,.0f} MiB"
        if get_console().width < WIDE:
            items = {key: items[key] for key in ("loss", "images/s") if key in items}
        self.shown = items
        return items

    def _get_train_description(self, current_epoch: int) -> str:
        # As long as the other description, so that the bars are aligned.
        return f"{epoch_of(self.trainer):{len(self.validation_description)}}"


def epoch_of(trainer: Trainer) -> str:
    """Return the current epoch, which counts from 1, as `Epoch 3/30`."""
    end = trainer.max_epochs
    return f"Epoch {trainer.current_epoch + 1}" + (f"/{end}" if end and end > 0 else "")


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor in a batch of any structure, 0 if it has none."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else None
    if not isinstance(first, Tensor):
        first = next((x for x in tree_leaves(batch) if isinstance(x, Tensor)), None)
    return len(first) if first is not None and first.ndim else 0


def peak_memory(device: torch.device) -> float:
    """Return the most MiB that this process has held so far.

    On a GPU, of tensors on the device; else of the process, without those that load data; 0 where
    the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss is inherited from the process that started this one
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM")), "")
        return int(line.split()[1]) / 2**10 if line else 0.0
    if sys.platform == "win32":
        return 0.0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)
