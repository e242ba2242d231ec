"""`Settings`: how to deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repnet.deploy.formats import format_named
from repnet.errors import InputError


@dataclass(frozen=True)
class Int8:
    """How int8 files are made and judged.

    Args:
        max_drop: of top-1 accuracy below that of the train form, a fraction below 1.
        min_agreement: fraction of samples with the prediction of the deploy form, above 0.
        samples: training images that calibrate the ranges of activations.
        seed: of their choice.
    """

    max_drop: float = 0.01
    min_agreement: float = 0.9
    samples: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """How to deploy.

    Args:
        trust: packages that may be imported to build the network.
        split: `test` or `val`.
        device: torch device; `auto` for a GPU where there is one.
        data: values of the checkpoint's data config to change, for instance `root`.
        tolerance: largest difference of the two forms' logits in the stored dtype, relative to the
            largest logit.
        latency_runs: timed forward passes of each form; fewer where they are slow.
        latency_batch: images of each.
        overwrite: replace what the directory holds.
        weights: "ema" or "raw" of a checkpoint that holds both; None for those that it validated.
        recalibrate: batches of training images on which the statistics of batch norms are computed
            anew before anything else; 0 for those of training.
        allow_norms: ship a network of which not every batch norm could be folded.
        exports: precisions by format.
        preprocess: put resizing, cropping and normalization into the exported files, which then
            take uint8 images.
        export_tolerance: as `tolerance`, of float32 files to the deploy form.
        export_max_drop: of top-1 accuracy, of fp16 and bf16 files.
        export_min_agreement: fraction of predictions, of the same.
        int8: of int8 files.
    """

    trust: Sequence[str] = ()
    split: str = "test"
    device: str = "auto"
    data: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    latency_runs: int = 50
    latency_batch: int = 1
    overwrite: bool = False
    weights: str | None = None
    recalibrate: int = 0
    allow_norms: bool = False
    exports: Mapping[str, Sequence[str]] = field(default_factory=dict)
    preprocess: bool = False
    export_tolerance: float = 1e-4
    export_max_drop: float = 0.005
    export_min_agreement: float = 0.98
    int8: Int8 = field(default_factory=Int8)

    @property
    def split_index(self) -> int:
        """Its place among the splits of a data module."""
        return {"val": 1, "test": 2}[self.split]

    @property
    def limits(self) -> dict[str, float]:
        """Every limit that a form is held to, by the key that sets it."""
        return {
            "deploy.tolerance": self.tolerance,
            "export.tolerance": self.export_tolerance,
            "export.max_drop": self.export_max_drop,
            "export.min_agreement": self.export_min_agreement,
            "int8.max_drop": self.int8.max_drop,
            "int8.min_agreement": self.int8.min_agreement,
        }

    def check(self) -> None:
        """Raise an `InputError` for a value that makes no sense or a package that is missing."""
        if self.split not in ("test", "val"):
            raise InputError(f"split='{self.split}' is unknown; choose test or val")
        switches = {
            "deploy.overwrite": self.overwrite,
            "deploy.allow_norms": self.allow_norms,
            "export.preprocess": self.preprocess,
        }
        for key, switch in switches.items():
            if not isinstance(switch, bool):
                raise InputError(f"{key}={switch} must be true or false")
        counts = {
            "latency.runs": (self.latency_runs, 1),
            "latency.batch": (self.latency_batch, 1),
            "int8.samples": (self.int8.samples, 1),
            "int8.seed": (self.int8.seed, 0),
            "recalibrate": (self.recalibrate, 0),
        }
        for key, (count, least) in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise InputError(f"{key}={count} must be a whole number, at least {least}")
        for key, limit in self.limits.items():
            _check_limit(key, limit)
        for name, precisions in self.exports.items():
            _check_export(name, precisions)


def is_least(key: str) -> bool:
    """Whether a value must be at least this limit; else it must be at most the limit."""
    return key.endswith("min_agreement")


def _check_limit(key: str, limit: object) -> None:
    """Refuse what is no fraction, and a limit that every form would pass."""
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if is_least(key):
        if not (number and 0 < limit <= 1):  # type: ignore[operator]
            raise InputError(
                f"{key}={limit} must be a fraction above 0 and at most 1, such as 0.98 for 98 %"
            )
    elif not (number and 0 <= limit < 1):  # type: ignore[operator]
        raise InputError(
            f"{key}={limit} must be a fraction, at least 0 and below 1, such as 0.01 for 1 %"
        )


def _check_export(name: str, precisions: Sequence[str]) -> None:
    chosen = format_named(name)
    if isinstance(precisions, str) or not precisions or len({*precisions}) < len(precisions):
        raise InputError(
            f"export.{name}.precisions={precisions} must be a list of different precisions"
        )
    quantizable = chosen.int8_packages is not None
    known = (*chosen.precisions, "int8") if quantizable else chosen.precisions
    for precision in precisions:
        if precision not in known:
            raise InputError(
                f"export.{name}.precisions: '{precision}' is not one of {', '.join(known)}"
            )
    if chosen.skip_reason() is None:  # else there is nothing to install that would help
        chosen.require(int8="int8" in precisions)
