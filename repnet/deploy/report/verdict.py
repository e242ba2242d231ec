"""The head of the page: whether the model may be used, by which limits, and if not, why."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any

from repnet.deploy.report import claims, words
from repnet.deploy.report.tables import STATUSES, Report, fastest, listed_exports
from repnet.deploy.report.words import finite

# What to try, by the first words of a limit.
ADVICE = {
    "error of a block": "If the block is a class of your own, check that its forward does the same "
    "in evaluation mode whenever it is called. If it comes with repnet, this is a bug: please "
    "report it with this page.",
    "error outside": "A layer that belongs to no block computes something else than before: look "
    "for modules that share weights, and for hooks.",
    "batch norms": "Pass deploy.allow_norms=true to ship the network with them, or move each of "
    "them directly behind a convolution.",
    "predictions changed, folded": "Rounding is larger than usual in this network. Look for norms "
    "with tiny variances, and compute their statistics anew with recalibrate=100.",
    "difference of logits, folded": "Rounding is larger than usual in this network. Look for norms "
    "with tiny variances, and compute their statistics anew with recalibrate=100; or accept the "
    "difference with a larger deploy.tolerance.",
    "predictions changed, fp32": "Leave this file out, or export to another format.",
    "difference of logits, fp32": "Leave this file out, export to another format, or accept the "
    "difference with a larger export.tolerance.",
    "difference of logits in another batch": "Leave this file out, or use another version of its "
    "runtime.",
    "drop of top-1, int8": "Calibrate with more images (int8.samples=1000), fine-tune for int8 "
    "(callbacks=[quantization_aware]), leave int8 out, or accept more with int8.max_drop.",
    "same prediction, int8": "Calibrate with more images (int8.samples=1000), fine-tune for int8 "
    "(callbacks=[quantization_aware]), leave int8 out, or accept less with int8.min_agreement.",
    "drop of top-1": "Leave this precision out, or accept more with export.max_drop.",
    "same prediction": "Leave this precision out, or accept less with export.min_agreement.",
}


def verdict(report: Report) -> Report:
    """Return whether the model may be used, and the figures or the cause that matter most."""
    verified = report.get("verified") is True
    provenance = report.get("provenance") or {}
    found = Counter(export["status"] for export in listed_exports(report))
    samples = finite(report.get("samples"))
    subject = _subject(provenance)
    stamp = "Verified" if verified else "Not deployed"
    return {
        "verified": verified,
        "stamp": stamp,
        "title": f"{stamp}: {subject}" if subject else stamp,
        "subject": subject,
        "claims": claims.headline(report),
        "samples": samples and words.count(samples),
        "split": provenance.get("split", "evaluation"),
        "reason": report.get("refusal") or "the report does not say why",
        "facts": _facts(report) if verified else [],
        "cause": None if verified else _cause(report),
        "loosened": claims.loosened(report),
        "exports": [(status, found[status]) for status in STATUSES if found[status]],
        "not_shipped": found["refused"] + found["failed"],
        "created": provenance.get("created"),
        "version": (provenance.get("versions") or {}).get("repnet"),
    }


def _subject(provenance: Report) -> str:
    """Return model, data, date and checkpoint in a line."""
    model = provenance.get("model")
    target = str((model if isinstance(model, dict) else {}).get("_target_") or "")
    names = [target.rpartition(".")[2], provenance.get("data")]
    checkpoint = str(provenance.get("checkpoint") or "").replace("\\", "/")
    parts = [
        " on ".join(str(name) for name in names if name),
        str(provenance.get("created") or "").partition("T")[0],
        "/".join(PurePath(checkpoint).parts[-3:]),
    ]
    return " · ".join(part for part in parts if part)


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Return label, value and note of the figures of a verified model."""
    facts: list[tuple[str, str, str]] = []
    metrics = report.get("metrics") or {}
    top1 = {name: (metrics.get(name) or {}).get("top1") for name in ("train_form", "deploy_form")}
    if finite(top1["deploy_form"]) is not None:
        before, after = (words.percent(value) for value in top1.values())
        facts.append(("top-1 accuracy", after, f"was {before} before folding"))
    error = claims.largest_error(report)
    if error is not None:
        facts.append(("largest error", words.scientific(error), "of a block, relative, in float64"))
    if speed := fastest(report):
        name, ratio, median = speed
        note = f"{words.form(name)}, {words.milliseconds(median)}"
        facts.append(("speed", words.times(ratio), note))
    elif reasons := claims.withheld(report):
        facts.append(("speed", "not compared", reasons[0]))
    if held := [limit for limit in report.get("limits") or () if limit["passed"] is not None]:
        loose = sum(bool(limit["loosened"]) for limit in report["limits"])
        passed = sum(bool(limit["passed"]) for limit in held)
        note = f"{loose} of them loosened" if loose else "none of them loosened"
        facts.append(("limits held", f"{passed} of {len(held)}", note))
    return facts


def _cause(report: Report) -> Report | None:
    """Return the first limit that was broken, by how much, where, and what to try."""
    rows = (limits(report) or {"rows": []})["rows"]
    broken = next((row for row in rows if row["passed"] is False), None)
    if broken is None:
        return None
    kind = str(broken["limits"])
    place = "block" if kind.startswith("error of a block") else "where"
    advice = next((a for begin, a in ADVICE.items() if kind.startswith(begin)), "")
    return {
        "facts": [
            ("value", broken["measured"], broken["limits"]),
            ("limit", broken["allowed"], broken["key"] or "fixed"),
            (place, words.form(broken["where"]), "the worst" if "files" in kind else ""),
        ],
        "advice": advice,
    }


def limits(report: Report) -> Report | None:
    """Return all limits in force, and what was measured against each."""
    rows = [
        {
            **limit,
            "allowed": f"{'at least' if limit['least'] else 'at most'} "
            f"{_amount(limit, limit['value'])}"
            if limit["value"] is not None
            else "any number",
            "usual": _amount(limit, limit["default"]),
            "measured": ""
            if limit["passed"] is None
            else _amount(limit, limit["measured"], missing="NaN"),
        }
        for limit in report.get("limits") or ()
    ]
    return {"rows": rows, "loosened": any(row["loosened"] for row in rows)} if rows else None


def _amount(limit: Report, value: Any, missing: str = words.MISSING) -> str:
    """Return a value in the unit of its limit: a share, a count, or an error."""
    if value is None:
        return missing
    if str(limit["limits"]).startswith(("drop", "same")):
        return words.percent(value)
    if limit["default"] == 0:
        return words.count(value)
    return words.scientific(value)
