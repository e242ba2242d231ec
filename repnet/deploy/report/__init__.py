"""`report.html`: the facts of `report.json` as a page for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from repnet.deploy.report import charts, forms, tables, words
from repnet.deploy.report.verdict import limits, verdict
from repnet.files import write_text

Section = Callable[[dict[str, Any]], dict[str, Any] | None]

# In the order of the page: template, title, title in the list of contents, and the facts; without
# facts there is no such section.
SECTIONS: tuple[tuple[str, str, str, Section], ...] = (
    ("forms", "All forms side by side", "Forms", forms.forms),
    ("agreement", "What differs", "Differences", tables.agreement),
    ("limits", "Limits in force", "Limits", limits),
    ("errors", "Where an error would start", "Errors", charts.errors),
    ("where", "Where the parameters and multiplications went", "Size", charts.where),
    ("int8", "int8", "int8", charts.int8),
    ("kernels", "Branches becoming one kernel", "Kernels", charts.kernels),
    ("confusion", "Which classes are taken for which", "Confusions", charts.confusion),
    ("closest", "Closest to flipping", "Closest", charts.closest),
    ("warnings", "Worth a look", "Warnings", tables.warnings),
    ("fold", "What was folded", "Folded", tables.fold),
    ("provenance", "Provenance", "Provenance", tables.provenance),
)


def write_html(report: dict[str, Any], path: str | Path) -> None:
    """Write a self-contained page: the verdict, then what it rests on. It holds no script.

    Args:
        report: as in `report.json`, complete or cut short by a refusal; what it lacks is left out.
        path: of the file.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= words.FILTERS
    shown = [
        {"name": name, "title": title, "short": short, "facts": facts}
        for name, title, short, section in SECTIONS
        if (facts := section(report)) is not None
    ]
    page = environment.get_template("page.html.j2")
    write_text(path, page.render(verdict=verdict(report), sections=shown))
