"""What a report claims, in the words that the page, the command and the model card share."""

from __future__ import annotations

import math
from typing import Any

from repnet.deploy.report.words import count, finite, form, number

Report = dict[str, Any]


def headline(report: Report) -> list[str]:
    """Return what was found unchanged: a sentence for the folded model, one for the files."""
    samples, agreement = finite(report.get("samples")), finite(report.get("agreement"))
    if not samples or samples < 1 or agreement is None:
        return []
    same = round(samples * min(1.0, max(0.0, agreement)))
    ties = sum(bool(sample.get("tie")) for sample in report.get("changed") or ())
    tied = f", {count(ties)} {'is a tie' if ties == 1 else 'are ties'}" * bool(ties)
    lines = [f"Folded model: {count(same)} of {count(samples)} unchanged{tied}."]
    files = [export for export in report.get("exports") or () if export.get("verified")]
    changed = [finite(export.get("changed")) for export in files]
    if files and None not in changed:
        most = max(value for value in changed if value is not None)
        many = len(files) > 1
        several = f"{'at most ' * many}{count(most)} changed" if most else "none changed"
        lines.append(f"{len(files)} {'files' if many else 'file'}: {several}.")
    return lines


def largest_error(report: Report) -> float | None:
    """Return the relative error of the worst block in float64, NaN if that is not finite."""
    blocks = report.get("blocks")
    if not blocks:
        return finite(report.get("max_relative_error"))  # nothing was folded
    errors = [finite(block.get("relative_error")) for block in blocks]
    return math.nan if None in errors else max(error for error in errors if error is not None)


def loosened(report: Report) -> list[str]:
    """Return the settings of the limits that let more pass than usual."""
    return [
        f"{limit['key']}=true"
        if limit["value"] is None
        else f"{limit['key']}={number(limit['value'])} instead of {number(limit['default'])}"
        for limit in report.get("limits") or ()
        if limit["loosened"]
    ]


def withheld(report: Report) -> list[str]:
    """Return why the speeds of some forms are not compared, each reason once."""
    forms = (report.get("latency") or {}).get("forms") or {}
    names: dict[str, list[str]] = {}
    for name, found in forms.items():
        if found.get("withheld"):
            names.setdefault(found["withheld"], []).append(form(name))
    if len(names) == 1 and len(forms) == 1 + sum(map(len, names.values())):
        return list(names)
    return [f"{', '.join(of)}: {reason}" for reason, of in names.items()]
