"""`CheckpointEntry`: what makes a Lightning checkpoint describe itself."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer

from repnet.lightning import Callback


class CheckpointEntry(Callback):
    """Put plain data into every checkpoint under the key `repnet`.

    Args:
        entry: of `repnet.checkpoint.describe`.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["repnet"] = self.entry
