"""What the sections of the page say in words and tables, from a report that may lack any of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from repnet.deploy.report.words import (
    count,
    finite,
    form,
    milliseconds,
    number,
    percent,
    scientific,
    times,
)

Report = dict[str, Any]
STATUSES = ("verified", "refused", "failed", "skipped")
LISTED = 50  # changed samples


def verdict(report: Report) -> Report:
    """Return whether the model may be used, why not, and the figures that matter most."""
    verified = report.get("verified") is True
    provenance = report.get("provenance") or {}
    found = Counter(export["status"] for export in listed_exports(report))
    facts: list[tuple[str, str, str]] = []
    samples, agreement = finite(report.get("samples")), finite(report.get("agreement"))
    if samples and samples > 0 and agreement is not None:
        note = f"of {count(samples)} images"
        facts.append(("predictions unchanged", count(round(agreement * samples)), note))
    metrics = report.get("metrics") or {}
    top1 = {name: (metrics.get(name) or {}).get("top1") for name in ("train_form", "deploy_form")}
    if finite(top1["deploy_form"]) is not None:
        before, after = (percent(value) for value in top1.values())
        facts.append(("top-1 accuracy", after, f"was {before} before folding"))
    if finite(report.get("max_relative_error")) is not None:
        facts.append(
            ("largest error", scientific(report["max_relative_error"]), "relative, in float64")
        )
    if speed := fastest(report):
        name, ratio, median = speed
        facts.append(("speed", times(ratio), f"{form(name)}, {milliseconds(median)}"))
    changed = report.get("changed") or ()
    return {
        "verified": verified,
        "title": "Verified" if verified else "Not deployed",
        "line": "every prediction is unchanged" if not changed else "only ties changed",
        "samples": samples and count(samples),
        "split": provenance.get("split", "evaluation"),
        "reason": report.get("refusal") or "the report does not say why",
        "facts": facts,
        "exports": [(status, found[status]) for status in STATUSES if found[status]],
        "not_shipped": found["refused"] + found["failed"],
        "data": provenance.get("data"),
        "created": provenance.get("created"),
        "version": (provenance.get("versions") or {}).get("repnet"),
    }


def listed_exports(report: Report) -> list[Report]:
    """Return the exports, each with a known status."""
    exports = []
    for export in report.get("exports") or ():
        status = export.get("status") or ("verified" if export.get("verified") else "refused")
        name = f"{export.get('format', '?')} {export.get('precision') or ''}".strip()
        exports.append(
            {**export, "name": name, "status": status if status in STATUSES else "failed"}
        )
    return exports


def fastest(report: Report) -> tuple[str, float, float] | None:
    """Return the fastest form that may be used, its speed over the train form's, and its ms."""
    forms = latencies(report)
    train = forms.pop("train_form", None)
    usable = {e["name"] for e in listed_exports(report) if e["status"] == "verified"}
    medians = {
        name: value["median"] for name, value in forms.items() if name in usable | {"deploy_form"}
    }
    if not train or not medians:
        return None
    name = min(medians, key=lambda key: medians[key])
    return name, train["median"] / medians[name], medians[name]


def latencies(report: Report) -> dict[str, dict[str, float]]:
    """Return milliseconds by form: `median`, `p10` and `p90`, which are the median if unknown."""
    known: dict[str, Any] = dict((report.get("latency") or {}).get("forms") or {})
    for name, value in (report.get("latency_ms") or {}).items():
        known.setdefault(name, {"median": value})
    for export in listed_exports(report):
        value = export.get("latency") or {"median": export.get("latency_ms")}
        known.setdefault(export["name"], value)
    found = {}
    for name, value in known.items():
        median = finite((value or {}).get("median"))
        if median is not None and median > 0:
            low, high = (finite(value.get(key)) for key in ("p10", "p90"))
            found[name] = {
                "median": median,
                "p10": median if low is None else min(max(low, 0.0), median),
                "p90": median if high is None else max(high, median),
            }
    return found


def accuracy(report: Report) -> Report | None:
    """Return top-1, top-5, loss and the drop of every form and export."""
    metrics = report.get("metrics") or {}
    train = finite((metrics.get("train_form") or {}).get("top1"))
    rows = []
    for name in ("train_form", "deploy_form"):
        values = metrics.get(name) or {}
        if values:
            top1 = finite(values.get("top1"))
            change = None if top1 is None or train is None else top1 - train
            rows.append({"name": name, "status": None, "change": change, **values})
    for export in listed_exports(report):
        if finite(export.get("top1")) is not None:
            drop = finite(export.get("drop"))
            rows.append(
                {
                    "name": export["name"],
                    "status": export["status"],
                    "top1": export["top1"],
                    "change": None if drop is None else -drop,
                }
            )
    if not rows:
        return None
    return {
        "rows": rows,
        "samples": report.get("samples"),
        "unreadable": len(report.get("unreadable") or ()),
        "max_drop": (report.get("int8") or {}).get("max_drop"),
    }


def agreement(report: Report) -> Report | None:
    """Return how many predictions are the same in each form, and the samples that differ."""
    rows = []
    samples, share = finite(report.get("samples")), finite(report.get("agreement"))
    changed = report.get("changed") or []
    if samples and samples > 0 and share is not None:
        rows.append(
            _agreement(
                "deploy_form", samples, share, sum(bool(s.get("tie")) for s in changed), None
            )
        )
    for export in listed_exports(report):
        seen, share = finite(export.get("samples")), finite(export.get("agreement"))
        if seen and seen > 0 and share is not None:
            ties = int(finite(export.get("ties")) or 0)
            rows.append(_agreement(export["name"], seen, share, ties, export["status"]))
    if not rows:
        return None
    return {
        "rows": rows,
        "logit_difference": report.get("logit_difference"),
        "changed": changed[:LISTED],
        "more": max(0, len(changed) - LISTED),
    }


def _agreement(name: str, samples: float, share: float, ties: int, status: str | None) -> Report:
    changed = round(samples * (1 - min(1.0, max(0.0, share))))
    ties = min(max(0, ties), changed)
    return {
        "name": name,
        "status": status,
        "same": samples - changed,
        "ties": ties,
        "other": changed - ties,
        "share": share,
        "widths": [100 * part / samples for part in (samples - changed, ties, changed - ties)],
    }


def exports(report: Report) -> Report | None:
    """Return what was asked for and what became of it."""
    rows = listed_exports(report)
    if not rows:
        return None
    return {"rows": rows, "kept": report.get("verified") is True}


def warnings(report: Report) -> Report | None:
    """Return what looks wrong in norms and weights."""
    return {"lines": report["warnings"]} if report.get("warnings") else None


def fold(report: Report) -> Report | None:
    """Return which layers became which."""
    found = report.get("fold")
    if not found:
        return None
    folded = found.get("folded") or []
    return {
        "layers": sum(len(f["replaced"]) for f in folded),
        "folded": folded,
        "left": found.get("left") or [],
        "skipped": found.get("skipped") or {},
    }


def provenance(report: Report) -> Report | None:
    """Return where everything comes from, and the hashes of what was written."""
    found = report.get("provenance") or {}
    if not found:
        return None
    rows = [
        (key.replace("_", " ").replace("sha256", "SHA-256"), value)
        for key, value in found.items()
        if key not in ("versions", "model") and value is not None
    ]
    if versions := found.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    if seconds := finite(report.get("wall_seconds")):
        steps = (report.get("seconds") or {}).items()
        listing = ", ".join(f"{name} {number(value, '{:,.1f}')}" for name, value in steps)
        rows.append(("time taken", f"{seconds:,.1f} s{': ' * bool(listing)}{listing}"))
    calibration = (report.get("int8") or {}).get("indices_sha256")
    if calibration:
        rows.append(("calibration images, SHA-256", calibration))
    return {
        "rows": rows,
        "hashes": [(e.get("file"), e["sha256"]) for e in listed_exports(report) if e.get("sha256")],
        "model": json.dumps(found["model"], indent=2, ensure_ascii=False, default=str)
        if found.get("model")
        else None,
    }
