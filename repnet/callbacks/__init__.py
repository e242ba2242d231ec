"""Lightning callbacks; each also works in other people's projects."""

from repnet.callbacks.checkpoint_entry import CheckpointEntry
from repnet.callbacks.corrupt_images import CorruptImages
from repnet.callbacks.ema import EMAWeights
from repnet.callbacks.folded_validation import FoldedValidation
from repnet.callbacks.frozen_norms import FreezeBatchNorm
from repnet.callbacks.history import History
from repnet.callbacks.kernel_decay import EquivalentKernelDecay
from repnet.callbacks.last_checkpoint import LastCheckpoint
from repnet.callbacks.nonfinite import (
    NonFiniteLossError,
    SkipNonFiniteSteps,
    StopOnNonFiniteLoss,
)
from repnet.callbacks.norm_health import NormHealth
from repnet.callbacks.overparameterize import OverParameterize
from repnet.callbacks.pictures import Pictures, send_picture
from repnet.callbacks.progress import ThroughputBar
from repnet.callbacks.progressive import ProgressiveAugmentation, ProgressiveResizing
from repnet.callbacks.prune import PruneTrial
from repnet.callbacks.quantization_aware import QuantizationAware
from repnet.callbacks.random_state import RandomState
from repnet.callbacks.recalibration import BatchNormRecalibration, recalibrate_batch_norm
from repnet.callbacks.reparameterize import Reparameterize
from repnet.callbacks.safe_checkpoint import CheckpointWriteError, SafeCheckpointIO
from repnet.callbacks.save_on_interrupt import SaveOnInterrupt
from repnet.callbacks.step_metrics import StepMetrics
from repnet.callbacks.weight_decay import WeightDecaySchedule

__all__ = [
    "BatchNormRecalibration",
    "CheckpointEntry",
    "CheckpointWriteError",
    "CorruptImages",
    "EMAWeights",
    "EquivalentKernelDecay",
    "FoldedValidation",
    "FreezeBatchNorm",
    "History",
    "LastCheckpoint",
    "NonFiniteLossError",
    "NormHealth",
    "OverParameterize",
    "Pictures",
    "ProgressiveAugmentation",
    "ProgressiveResizing",
    "PruneTrial",
    "QuantizationAware",
    "RandomState",
    "Reparameterize",
    "SafeCheckpointIO",
    "SaveOnInterrupt",
    "SkipNonFiniteSteps",
    "StepMetrics",
    "StopOnNonFiniteLoss",
    "ThroughputBar",
    "WeightDecaySchedule",
    "recalibrate_batch_norm",
    "send_picture",
]
