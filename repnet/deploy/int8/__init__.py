"""int8: post-training quantization of exported files, and what it does to each layer."""

from repnet.deploy.int8.mixed import Attempt, quantize_until
from repnet.deploy.int8.quantization import quantize
from repnet.deploy.int8.sensitivity import LayerSensitivity, require_folded, sensitivity

__all__ = [
    "Attempt",
    "LayerSensitivity",
    "quantize",
    "quantize_until",
    "require_folded",
    "sensitivity",
]
