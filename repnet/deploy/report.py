"""`report.html`: the facts of `report.json` as a page for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from repnet.files import write_text

FLOOR = 1e-18  # left end of the error chart; an exact zero is drawn there


def write_html(report: dict[str, Any], path: str | Path) -> None:
    """Write a self-contained page: verdict first, then errors, speed, size and provenance.

    Args:
        report: as in `report.json`, complete or cut short by a refusal.
        path: of the file.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    write_text(path, template.render(report=report, chart=_chart(report), bars=_bars(report)))


def _chart(report: dict[str, Any]) -> dict[str, Any] | None:
    """Return the block errors as positions on a logarithmic axis, in percent of its width."""
    if not report.get("blocks"):
        return None
    tolerance = report["tolerance"]["block"]
    top = max(tolerance * 10, *(b["relative_error"] for b in report["blocks"]))
    top = 10 ** math.ceil(math.log10(top)) if math.isfinite(top) else 1e3
    span = math.log10(top) - math.log10(FLOOR)

    def position(error: float) -> float:
        if not math.isfinite(error):
            return 100.0
        return 100 * (math.log10(max(error, FLOOR)) - math.log10(FLOOR)) / span

    ticks = range(round(math.log10(FLOOR)), round(math.log10(top)) + 1, 3)
    return {
        "tolerance": position(tolerance),
        "ticks": [{"exponent": e, "position": position(10.0**e)} for e in ticks],
        "blocks": [
            {
                "name": block["name"],
                "error": block["relative_error"],
                "position": position(block["relative_error"]),
                "bad": not block["relative_error"] <= tolerance,
            }
            for block in report["blocks"]
        ],
    }


def _bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what changed in size and speed, and the deploy form's share of the train form."""
    kinds = (
        ("latency_ms", "Latency", "{:.2f} ms", 1),
        ("parameters", "Parameters", "{:.3f} M", 1e-6),
        ("macs", "Multiply-adds", "{:.3f} M", 1e-6),
    )
    bars = []
    for key, title, style, scale in kinds:
        if key in report:
            train, deploy = report[key]["train_form"], report[key]["deploy_form"]
            bars.append(
                {
                    "title": title,
                    "train": style.format(train * scale),
                    "deploy": style.format(deploy * scale),
                    "ratio": deploy / train if train else 1.0,
                }
            )
    return bars
