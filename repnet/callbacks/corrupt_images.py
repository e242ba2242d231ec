"""`CorruptImages`: say which images were skipped."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl

from repnet.lightning import Callback


class CorruptImages(Callback):
    """Print, after each epoch, the images newly found to be corrupt under `data.skip_corrupt=true`.

    Asks the data module's `corrupt_images()`, if it has such a method, which returns all that were
    found so far. Each process tells of those that it read itself.
    """

    def __init__(self) -> None:
        self.known: set[str] = set()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: pl.Trainer) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "corrupt_images"):
            return
        found = data.corrupt_images()
        new = [name for name in found if name not in self.known]
        self.known.update(new)
        if new:
            shown = ", ".join(f"'{name}'" for name in new[:5])
            more = f" and {len(new) - 5:,} more" if len(new) > 5 else ""
            print(
                f"skipped {len(new):,} images that cannot be read, {len(found):,} in all: "
                f"{shown}{more}",
                file=sys.stderr,
                flush=True,
            )
