"""Lightning callbacks; each also works in other people's projects."""

from repnet.callbacks.checkpoint_entry import CheckpointEntry
from repnet.callbacks.history import History
from repnet.callbacks.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from repnet.callbacks.safe_checkpoint import SafeCheckpointIO
from repnet.callbacks.save_on_interrupt import SaveOnInterrupt

__all__ = [
    "CheckpointEntry",
    "History",
    "NonFiniteLossError",
    "SafeCheckpointIO",
    "SaveOnInterrupt",
    "StopOnNonFiniteLoss",
]
