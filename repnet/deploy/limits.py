"""The limits that a deployment was held to, and what was measured against each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from repnet.deploy.gate import OTHER_BATCH_TOLERANCE, holds
from repnet.deploy.settings import Settings, is_least

FOLDED = "folded model"


@dataclass
class Limit:
    """One limit, and the value that is closest to it or beyond it.

    Args:
        limits: what is limited, for people.
        key: the setting that changes it; None for what is fixed.
        value: that must be held; None where the setting lets everything pass.
        default: that holds unless it is set.
        least: whether values must be at least `value`; else at most.
        measured: the worst value; None where nothing was measured.
        where: the block, form or file that it was measured on.
        passed: None where nothing was measured, or not on every image.
    """

    limits: str
    key: str | None
    value: float | None
    default: float
    least: bool = False
    measured: float | None = field(default=None, init=False)
    where: str | None = field(default=None, init=False)
    passed: bool | None = field(default=None, init=False)

    @property
    def loosened(self) -> bool:
        """Whether it lets more pass than usual."""
        if self.value is None:
            return True
        return self.value < self.default if self.least else self.value > self.default

    def hold(
        self,
        found: Iterable[tuple[str, float]],
        partial: Iterable[tuple[str, float]] = (),
    ) -> None:
        """Keep the worst of the values, each with where it was measured.

        Args:
            found: measured on every image.
            partial: measured on some of them, which can break the limit, but not keep it.
        """
        every = [*found, *(pair for pair in partial if not self._holds(pair[1]))]
        if not every:
            return
        sign = -1 if self.least else 1
        # What is no number is worse than every number.
        worst = max(every, key=lambda pair: (pair[1] != pair[1], sign * pair[1]))
        self.where, self.measured = worst
        self.passed = all(self._holds(value) for _, value in every)

    def _holds(self, value: float) -> bool:
        return self.value is None or holds(value, self.value, least=self.least)


def limits(report: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Return the entries of `report.json` for all limits in force.

    Args:
        report: as far as it got.
        settings: of the deployment.
    """
    found = [*_of_proof(report, settings), *_of_folded(report, settings)]
    asked = {precision for precisions in settings.exports.values() for precision in precisions}
    for group, kind, precisions in (
        ("export", "fp32", {"fp32"}),
        ("export", "fp16 and bf16", {"fp16", "bf16"}),
        ("int8", "int8", {"int8"}),
    ):
        if asked & precisions:
            files = [e for e in report["exports"] if e["precision"] in precisions and e["samples"]]
            found += _of_files(files, report, settings, group, kind)
    return [{**asdict(limit), "loosened": limit.loosened} for limit in found]


def _of_proof(report: dict[str, Any], settings: Settings) -> list[Limit]:
    found = []
    if "tolerance" in report:
        block, outputs = report["tolerance"]["block"], report["tolerance"]["output"]
        found = [
            Limit("error of a block, float64", None, block, block),
            Limit("error outside of the blocks, float64", None, outputs, outputs),
        ]
        found[0].hold((block["name"], block["relative_error"]) for block in report["blocks"])
        found[1].hold([("outputs", report["rest_error"])])
    norms = Limit("batch norms left", "deploy.allow_norms", None if settings.allow_norms else 0, 0)
    if "fold" in report:
        norms.hold([(FOLDED, len(report["fold"]["left"]))])
    return [*found, norms]


def _of_folded(report: dict[str, Any], settings: Settings) -> list[Limit]:
    changed = Limit("predictions changed, folded model", None, 0, 0)
    logits = _setting(settings, "deploy.tolerance", "difference of logits, folded model")
    if "logit_difference" in report:
        ties = sum(sample["tie"] for sample in report["changed"])
        changed.hold([(FOLDED, len(report["changed"]) - ties)])
        logits.hold([(FOLDED, report["logit_difference"])])
    return [changed, logits]


def _of_files(
    files: list[dict[str, Any]],
    report: dict[str, Any],
    settings: Settings,
    group: str,
    kind: str,
) -> list[Limit]:
    """Return the limits of one kind of files, those that ran."""
    whole = [file for file in files if file["samples"] == report["samples"]]

    def values(key: str, among: list[dict[str, Any]] = whole) -> list[tuple[str, float]]:
        return [(f"{file['format']} {file['precision']}", file[key]) for file in among]

    if kind == "fp32":
        changed = Limit("predictions changed, fp32 files", None, 0, 0)
        changed.hold((f"{file['format']} fp32", file["changed"] - file["ties"]) for file in whole)
        logits = _setting(settings, "export.tolerance", "difference of logits, fp32 files")
        logits.hold(
            [*values("logit_difference"), *values("batch_difference")],
            [*values("logit_difference", files), *values("batch_difference", files)],
        )
        return [changed, logits]
    drop = _setting(settings, f"{group}.max_drop", f"drop of top-1, {kind} files")
    drop.hold(values("drop"))
    same = _setting(settings, f"{group}.min_agreement", f"same prediction, {kind} files")
    same.hold(values("agreement"))
    batch = Limit(
        f"difference of logits in another batch, {kind} files",
        None,
        OTHER_BATCH_TOLERANCE,
        OTHER_BATCH_TOLERANCE,
    )
    batch.hold(values("batch_difference"), values("batch_difference", files))
    return [drop, same, batch]


def _setting(settings: Settings, key: str, what: str) -> Limit:
    return Limit(what, key, settings.limits[key], Settings().limits[key], least=is_least(key))
