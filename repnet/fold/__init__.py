"""Folding any model: the public functions are in `reparameterize.py`."""

from repnet.fold.report import Fold, FoldReport
from repnet.fold.reparameterize import reparameterize, reparameterize_graph

__all__ = ["Fold", "FoldReport", "reparameterize", "reparameterize_graph"]
