"""What the sections of the page say in words and tables, from a report that may lack any of it."""

from __future__ import annotations

import json
from typing import Any

from repnet.deploy.report.words import finite, number

Report = dict[str, Any]
STATUSES = ("verified", "refused", "failed", "skipped")
LISTED = 50  # changed samples


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
    usable = {e["name"] for e in listed_exports(report) if e["status"] == "verified"}
    compared = {
        name: value
        for name, value in latencies(report).items()
        if name in usable | {"deploy_form"} and value["speed_up"] is not None
    }
    if not compared:
        return None
    name = max(compared, key=lambda key: compared[key]["speed_up"])
    return name, compared[name]["speed_up"], compared[name]["median"]


def latencies(report: Report) -> dict[str, Report]:
    """Return `median`, `p10` and `p90` in milliseconds by form, and `speed_up` where it is known.

    A percentile that is not known is the median.
    """
    found = {}
    for name, value in ((report.get("latency") or {}).get("forms") or {}).items():
        median = finite((value or {}).get("median"))
        if median is not None and median > 0:
            low, high, ratio = (finite(value.get(key)) for key in ("p10", "p90", "speed_up"))
            found[name] = {
                "median": median,
                "p10": median if low is None else min(max(low, 0.0), median),
                "p90": median if high is None else max(high, median),
                "speed_up": ratio if ratio is not None and ratio > 0 else None,
            }
    return found


def agreement(report: Report) -> Report | None:
    """Return which forms predict the same for every image, and how much the others differ."""
    rows = []
    samples, share = finite(report.get("samples")), finite(report.get("agreement"))
    changed = report.get("changed") or []
    if samples and samples > 0 and share is not None:
        ties = sum(bool(s.get("tie")) for s in changed)
        rows.append(_agreement("deploy_form", samples, share, ties))
    for export in listed_exports(report):
        seen, share = finite(export.get("samples")), finite(export.get("agreement"))
        if seen and seen > 0 and share is not None:
            ties = int(finite(export.get("ties")) or 0)
            rows.append(_agreement(export["name"], seen, share, ties))
    if not rows:
        return None
    differ = [row for row in rows if row["ties"] + row["other"]]
    most = max((row["ties"] + row["other"] for row in differ), default=0)
    for row in differ:
        row["widths"] = [100 * row[kind] / most for kind in ("ties", "other")]
    return {
        "same": [row["name"] for row in rows if row not in differ],
        "rows": differ,
        "ties": any(row["ties"] for row in differ),
        "samples": report.get("samples"),
        "logit_difference": report.get("logit_difference"),
        "changed": changed[:LISTED],
        "more": max(0, len(changed) - LISTED),
    }


def _agreement(name: str, samples: float, share: float, ties: int) -> Report:
    changed = round(samples * (1 - min(1.0, max(0.0, share))))
    ties = min(max(0, ties), changed)
    return {"name": name, "samples": samples, "ties": ties, "other": changed - ties}


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
