"""Lightning callbacks; each also works in other people's projects."""

from repnet.callbacks.checkpoint_entry import CheckpointEntry
from repnet.callbacks.folded_validation import FoldedValidation
from repnet.callbacks.history import History
from repnet.callbacks.nonfinite import NonFiniteLossError, StopOnNonFiniteLoss
from repnet.callbacks.overparameterize import OverParameterize
from repnet.callbacks.reparameterize import Reparameterize
from repnet.callbacks.safe_checkpoint import SafeCheckpointIO
from repnet.callbacks.save_on_interrupt import SaveOnInterrupt

__all__ = [
    "CheckpointEntry",
    "FoldedValidation",
    "History",
    "NonFiniteLossError",
    "OverParameterize",
    "Reparameterize",
    "SafeCheckpointIO",
    "SaveOnInterrupt",
    "StopOnNonFiniteLoss",
]
