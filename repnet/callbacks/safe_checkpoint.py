"""`SafeCheckpointIO`: how a Trainer writes and reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from repnet.checkpoint import save_checkpoint


class SafeCheckpointIO(TorchCheckpointIO):
    """Write atomically and read back; load tensors and plain data only.

    Example:
        >>> trainer = Trainer(plugins=[SafeCheckpointIO()])
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)
