"""One table of all forms: what each predicts, how fast it is, and the file that it is."""

from __future__ import annotations

import math
from typing import Any

from repnet.deploy.report import claims, words
from repnet.deploy.report.tables import Report, fastest, latencies, listed_exports
from repnet.deploy.report.words import finite

COLUMNS = {
    "top1": "top-1",
    "change": "change",
    "changed": "changed",
    "ties": "ties",
    "logits": "logits differ by",
    "size": "size",
    "plot": "",
    "median": "median",
    "speed": "speed",
}
_EMPTY: Report = dict.fromkeys((*COLUMNS, "status", "file", "uint8", "reason", "range"), "")
TICKS = 6  # of an axis, at most
_DECADES = range(-6, 9)  # milliseconds: from a nanosecond to days


def forms(report: Report) -> Report | None:
    """Return a row for each form, without the columns that say nothing, and the axis of times."""
    times = latencies(report)
    rows = _networks(report) + _files(report)
    if not rows and not times:
        return None
    known = {row["name"] for row in rows}
    rows += [_EMPTY | {"name": name} for name in times if name not in known]
    axis = _Axis([value[key] for value in times.values() for key in ("p10", "median", "p90")])
    best = fastest(report)
    for row in rows:
        row["kind"] = _kind(row["name"])
        row["best"] = best is not None and best[0] == row["name"]
        if value := times.get(row["name"]):
            low, middle, high = (axis.position(value[key]) for key in ("p10", "median", "p90"))
            row["median"] = words.milliseconds(value["median"])
            row["speed"] = "" if value["speed_up"] is None else words.times(value["speed_up"])
            row["plot"] = {"at": middle, "low": low, "spread": high - low}
            row["range"] = " to ".join(words.milliseconds(value[key]) for key in ("p10", "p90"))
    settings = report.get("latency") or {}
    return {
        "rows": rows,
        "columns": {key: title for key, title in COLUMNS.items() if any(map(_says(key), rows))},
        "statuses": any(row["status"] not in ("", "verified") for row in rows),
        "samples": report.get("samples"),
        "unreadable": len(report.get("unreadable") or ()),
        "others": _other_metrics(report),
        "ticks": axis.ticks,
        "batch": settings.get("batch"),
        "runs": settings.get("runs"),
        "device": settings.get("device"),
        "elsewhere": {
            name: device
            for name, device in (settings.get("devices") or {}).items()
            if device != settings.get("device")
        },
        "best": best,
        "withheld": claims.withheld(report),
        "kept": report.get("verified") is True,
    }


def _networks(report: Report) -> list[Report]:
    """Return the rows of the two forms in PyTorch."""
    metrics = report.get("metrics") or {}
    train = finite((metrics.get("train_form") or {}).get("top1"))
    samples, agreement = finite(report.get("samples")), finite(report.get("agreement"))
    changed = report.get("changed") or []
    rows = []
    for name in ("train_form", "deploy_form"):
        if not (values := metrics.get(name)):
            continue
        row = _EMPTY | {"name": name, "top1": words.percent(values.get("top1"))}
        top1 = finite(values.get("top1"))
        if name == "deploy_form":
            row["change"] = words.points(None if None in (top1, train) else top1 - train)  # type: ignore[operator]
            if samples and agreement is not None:
                row["changed"] = words.count(round(samples * (1 - min(1.0, max(0.0, agreement)))))
                row["ties"] = words.count(sum(bool(sample.get("tie")) for sample in changed))
            row["logits"] = words.scientific(report.get("logit_difference"))
        rows.append(row)
    return rows


def _files(report: Report) -> list[Report]:
    rows = []
    for export in listed_exports(report):
        drop = finite(export.get("drop"))
        rows.append(
            _EMPTY
            | {
                "name": export["name"],
                "status": export["status"],
                "file": export.get("file"),
                "uint8": export.get("preprocess"),
                "reason": export.get("reason"),
                "top1": words.percent(export.get("top1")),
                "change": words.points(None if drop is None else -drop),
                "changed": words.count(export.get("changed")),
                "ties": words.count(export.get("ties")),
                "logits": words.scientific(export.get("logit_difference")),
                "size": words.size(export.get("bytes")),
            }
        )
    return rows


def _says(key: str) -> Any:
    """Return whether a row has something to say in a column."""
    nothing = {"", words.MISSING}
    if key in ("change", "ties"):
        nothing |= {"0", "±0"}  # the same as in the other columns
    return lambda row: bool(row[key]) if key == "plot" else row[key] not in nothing


def _other_metrics(report: Report) -> str:
    """Return top-5 and loss of the forms in PyTorch, once where they are the same."""
    metrics = report.get("metrics") or {}
    texts = {}
    for name in ("train_form", "deploy_form"):
        values = metrics.get(name) or {}
        top5, loss = finite(values.get("top5")), finite(values.get("loss"))
        if top5 is not None and loss is not None:
            texts[name] = f"top-5 {words.percent(top5)}, loss {words.number(loss, '{:.4f}')}"
    if len(set(texts.values())) == 1:
        return f"Both PyTorch forms: {next(iter(texts.values()))}."
    return "".join(f"{words.form(name).capitalize()}: {text}. " for name, text in texts.items())


class _Axis:
    """A logarithmic axis of milliseconds that begins and ends with round numbers."""

    def __init__(self, values: list[float]) -> None:
        marks = [10.0**power * factor for power in _DECADES for factor in (1, 2, 5)]
        smallest, largest = min(values, default=1.0), max(values, default=1.0)
        first = max((i for i, mark in enumerate(marks[:-1]) if mark <= smallest), default=0)
        beyond = (i for i, mark in enumerate(marks) if i > first and mark >= largest)
        last = next(beyond, len(marks) - 1)
        self.low, self.span = math.log10(marks[first]), math.log10(marks[last] / marks[first])
        shown = range(first, last + 1)
        if len(shown) > TICKS:  # powers of ten, or some of them
            shown = range(-(-first // 3) * 3, last + 1, 3 * math.ceil(len(shown) / 3 / TICKS))
        self.ticks = [(f"{marks[i]:g}", self.position(marks[i])) for i in shown]

    def position(self, value: float) -> float:
        """Return where a value lies, in percent."""
        if value <= 0:
            return 0.0
        return 100 * min(1.0, max(0.0, (math.log10(value) - self.low) / self.span))


def _kind(name: str) -> str:
    """Return what colors a form: the form in PyTorch, or the precision of an export."""
    if name in ("train_form", "deploy_form"):
        return name.removesuffix("_form")
    precision = name.rpartition(" ")[2]
    return "int8" if precision == "int8" else "half" if precision.endswith("16") else "single"
