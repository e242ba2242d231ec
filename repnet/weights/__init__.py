"""Weights of other libraries: load them into repnet's models, or convert them either way.

From the command line: `python -m repnet.weights convert IN OUT --to FORMAT`, and `inspect IN`.
"""

from repnet.weights.conversion import convert_weights
from repnet.weights.identify import Weights, read_weights
from repnet.weights.layouts import FORMATS
from repnet.weights.loading import LoadReport, load_weights

__all__ = [
    "FORMATS",
    "LoadReport",
    "Weights",
    "convert_weights",
    "load_weights",
    "read_weights",
]
