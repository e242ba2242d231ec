"""Folding any model: the public functions are in `api.py`."""

from repnet.fold.api import reparameterize, reparameterize_graph
from repnet.fold.report import Fold, FoldReport

__all__ = ["Fold", "FoldReport", "reparameterize", "reparameterize_graph"]
