"""`SafeCheckpointIO`: how a Trainer writes and reads checkpoints."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from repnet.checkpoint import save_checkpoint
from repnet.lightning import EitherLightning


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the one before it is as it was."""


class SafeCheckpointIO(EitherLightning, TorchCheckpointIO):
    """Write atomically and read back; load tensors and plain data only.

    Example:
        >>> trainer = Trainer(plugins=[SafeCheckpointIO()])
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` so that `path` holds the old or the whole new one at any time.

        Raises:
            CheckpointWriteError: the disk is full, or does not take it for another reason.
        """
        try:
            save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError) as error:
            raise CheckpointWriteError(_message(Path(path), error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


def _message(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full"
    kept = "there is no earlier one"
    if path.exists():
        try:
            step = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["global_step"]
            kept = f"the earlier one, of step {step}, is whole"
        except Exception:  # whatever is wrong with it, this is not the time to fail on it
            kept = "the earlier one cannot be read"
    free = shutil.disk_usage(path.parent).free / 1e6
    return (
        f"cannot write the checkpoint '{path}': {reason} ({free:,.0f} MB are free there); {kept}. "
        "Make room, then resume the run"
    )
