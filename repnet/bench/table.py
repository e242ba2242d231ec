"""What was measured, as a table for people, and as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repnet.bench.environment import sentence
from repnet.bench.measure import TIMED, Row
from repnet.deploy.latency import busy
from repnet.errors import InputError
from repnet.files import write_json, write_text
from repnet.terminal import print_table

FORMAT = "repnet-bench"
VERSION = 1
_SPARE = (
    "p95",
    "cores",
    "MB",
    "p99",
    "difference",
)  # columns, in the order of their dispensability


@dataclass
class Result:
    """Rows that were measured together.

    Args:
        environment: of `repnet.bench.environment.environment`.
        rows: of all subjects, batches and forms.
    """

    environment: dict[str, Any]
    rows: list[Row]


def print_tables(results: Sequence[Result], console: Console | None = None) -> None:
    """Print a table for each subject and batch size."""
    console = console or Console()
    for result in results:
        for rows in groups(result.rows):
            timed, others = _split(rows)
            console.print(_title(rows), style="bold", markup=False, highlight=False)
            if timed:
                _print_table(timed, console)
            for line in _sizes(rows), *_notes(timed), *others:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            console.print()
        console.print(sentence(result.environment), markup=False, highlight=False, soft_wrap=True)
        for line in _warnings(result):
            console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)


def _print_table(rows: Sequence[Row], console: Console) -> None:
    columns = _columns(rows)
    fastest = min(rows, key=lambda row: row.median_ms or 0)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        justify: Any = "left" if name == "form" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        style = "bold green" if row is fastest else None
        table.add_row(*(escape(cell(row)) for cell in columns.values()), style=style)
    print_table(table, spare=_SPARE, console=console)


def write_markdown(results: Sequence[Result], path: str | Path) -> None:
    """Write the same tables for a document."""
    lines = []
    for result in results:
        for rows in groups(result.rows):
            timed, others = _split(rows)
            columns = _columns(timed)
            lines += [f"**{_title(rows)}.** {_sizes(rows)}.", ""]
            lines += [_line(columns), _line("---" if c == "form" else "---:" for c in columns)]
            lines += [_line(cell(row) for cell in columns.values()) for row in timed]
            notes = [f"- {line}" for line in (*_notes(timed), *others)]
            lines += ["", *notes, *([""] if notes else [])]
        lines += [f"{sentence(result.environment)}.", ""]
    write_text(path, "\n".join(lines))


def write_csv(results: Sequence[Result], path: str | Path) -> None:
    """Write every row with every field, and what it was measured on."""
    file = io.StringIO()
    extra = ("device", "hardware", "created", "versions")
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(file, [*names, *extra], lineterminator="\n")
    writer.writeheader()
    for result in results:
        shared = {key: result.environment[key] for key in extra}
        shared["versions"] = " ".join(f"{k}={v}" for k, v in shared["versions"].items())
        writer.writerows({**asdict(row), **shared} for row in result.rows)
    write_text(path, file.getvalue())


def write_results(results: Sequence[Result], path: str | Path) -> None:
    """Write all as JSON, which `read_results` reads again."""
    data = {"format": FORMAT, "version": VERSION, "results": [asdict(result) for result in results]}
    write_json(path, data)


def read_results(path: str | Path) -> list[Result]:
    """Return what an earlier call wrote with `--json`.

    Raises:
        InputError: it is something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] > VERSION:
            raise InputError(f"'{path}' is no result that this version of repnet.bench wrote")
        return [
            Result(result["environment"], [Row(**row) for row in result["rows"]])
            for result in data["results"]
        ]
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{path}' is no result of repnet.bench: {error}") from error


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each subject and batch size."""
    for _, members in groupby(rows, key=lambda row: (row.subject, row.batch)):
        yield list(members)


def number(value: float | None) -> str:
    """Return a number with three digits, `-` for None."""
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the cells by column; a column without a value is left out."""
    columns: dict[str, tuple[str | None, Any]] = {
        "form": (None, lambda row: f"{row.form}{_mark(rows, row)}"),
        "ms": ("median_ms", lambda row: number(row.median_ms)),
        "p10 - p90": ("p10_ms", lambda row: f"{number(row.p10_ms)} - {number(row.p90_ms)}"),
        "p95": ("p95_ms", lambda row: number(row.p95_ms)),
        "p99": ("p99_ms", lambda row: number(row.p99_ms)),
        "images/s": ("images_per_second", lambda row: number(row.images_per_second)),
        "x deploy": ("times_deploy", lambda row: number(row.times_deploy)),
        "x train": ("times_train", lambda row: number(row.times_train)),
        "MB": ("memory_bytes", lambda row: _megabytes(row.memory_bytes)),
        "difference": ("difference", lambda row: f"{row.difference:.0e}"),
        "top-1": ("top1", _top1),
        "cores": ("cores", lambda row: number(row.cores)),
    }
    return {
        name: cell
        for name, (field, cell) in columns.items()
        if field is None or any(getattr(row, field) is not None for row in rows)
    }


def _top1(row: Row) -> str:
    if row.top1 is None:
        return "-"
    return f"{row.top1:.2%}" if row.top1_is_own else f"({row.top1:.2%})"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def _mark(rows: Sequence[Row], row: Row) -> str:
    """Return the number of a row's footnote."""
    texts = list(dict.fromkeys(row.note for row in rows if row.note))
    return f" [{texts.index(row.note) + 1}]" if row.note else ""


def _notes(rows: Sequence[Row]) -> list[str]:
    texts = dict.fromkeys(row.note for row in rows if row.note)
    return [f"[{index}] {text}" for index, text in enumerate(texts, 1)]


def _title(rows: Sequence[Row]) -> str:
    return f"{rows[0].subject}, {rows[0].image}, batch {rows[0].batch}"


def _sizes(rows: Sequence[Row]) -> str:
    """Return parameters and multiply-adds of the two forms."""
    sizes = {}
    for row in rows:
        form = "train form" if row.form.startswith("train") else "deploy form"
        if row.parameters is not None and row.macs is not None:
            size = f"{row.parameters / 1e6:.3f} M parameters, {row.macs / 1e6:,.1f} M multiply-adds"
            sizes[form] = f"{form}: {size}"
    return "; ".join(sizes.values())


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    timed = [row for row in rows if row.status == TIMED]
    return timed, [f"{row.status} {row.form}: {row.reason}" for row in rows if row not in timed]


def _warnings(result: Result) -> Iterator[str]:
    cores = [row.cores for row in result.rows if row.form in ("train", "deploy") and row.cores]
    if result.environment["threads"] and (reason := busy(cores)):
        yield f"{reason}, and the numbers are too high"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
