"""`quantize_until`: as few layers in float as an accuracy gate demands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from repnet.deploy.int8.quantization import quantize
from repnet.deploy.int8.sensitivity import LayerSensitivity


@dataclass(frozen=True)
class Attempt:
    """An int8 file that was tried.

    Args:
        kept: names of the layers that stayed in float, worst first.
        accepted: by the gate.
        top1: of the int8 file, a fraction.
        drop: top-1 of the train form minus `top1`.
        agreement: fraction of samples with the prediction of the float form.
    """

    kept: list[str]
    accepted: bool
    top1: float
    drop: float
    agreement: float


def quantize_until(
    format_name: str,
    source: Path,
    target: Path,
    images: Tensor,
    layers: Sequence[LayerSensitivity],
    accept: Callable[[Path], Attempt],
) -> Iterator[Attempt]:
    """Quantize with the k worst layers in float, k = 0, 1, 2, 4, 8 ..., until the file is accepted.

    Args:
        format_name: as in `quantize`.
        source: as there.
        target: holds the last attempt, accepted or not.
        images: as in `quantize`.
        layers: of `sensitivity`; the lowest SQNR counts as worst.
        accept: evaluates a file; what it says of `kept` is replaced.

    Yields:
        The attempts in order; only the last can be accepted. None of them keeps all layers, which
        would be no int8 file.
    """
    names = [layer.name for layer in sorted(layers, key=lambda layer: layer.sqnr_db)]
    for count in _counts(len(names)):
        quantize(format_name, source, target, images, keep=names[:count])
        yield (attempt := replace(accept(target), kept=names[:count]))
        if attempt.accepted:
            break


def _counts(layers: int) -> Iterator[int]:
    yield 0
    count = 1
    while count < layers:
        yield count
        count *= 2
