"""`load_pretrained`: trained weights to start from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from repnet.checkpoint import find_checkpoint
from repnet.deploy.int8.plain import load_folded
from repnet.weights import load_weights


def load_pretrained(
    model: nn.Module,
    source: str | Path,
    batches: Iterable[Any],
    *,
    head: bool = False,
    trust: Sequence[str] = (),
) -> str:
    """Load trained weights for other data, and return what was loaded and what is new.

    Convolutions that read the image are fitted to another number of channels; a checkpoint of
    several branches is folded for a model of plain blocks.

    Args:
        model: changed in place.
        source: a run directory, whose best checkpoint is taken, a checkpoint, or a file of any
            format that `load_weights` knows.
        batches: of the model's images, as in `load_folded`.
        head: False leaves the classifier as it is, for other classes.
        trust: packages that may be imported to build a checkpoint's network.

    Raises:
        InputError: there are no such weights, or they do not fit.
    """
    if Path(source).is_dir():
        source = find_checkpoint(source)
    said = load_folded(model, source, batches, head=head, trust=trust)
    return said or str(load_weights(model, source, head=head, adapt_input=True))
