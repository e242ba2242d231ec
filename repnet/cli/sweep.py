"""`SweepSummary`: what a sweep leaves behind, one table of all jobs."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from repnet.files import write_text


class SweepSummary(Callback):
    """At the end of a multirun write `sweep.csv` and print it, best validation accuracy first.

    The exit code is 1 if a job failed; its reason is in the table.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        rows = collect(directory)
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(directory / "sweep.csv", table.getvalue())
        _show(rows, columns, directory)
        failed = sum(row["status"] == "failed" for row in rows)
        if failed:
            print(f"error: {failed} of {len(rows)} jobs failed", file=sys.stderr, flush=True)
            raise SystemExit(1)


def collect(directory: Path) -> list[dict[str, Any]]:
    """Return one row per job directory that holds a `result.json`, best first, failed ones last."""
    rows = []
    for path in directory.glob("*/result.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        failed = "error" in result
        row = {"job": path.parent.name, "status": "failed" if failed else "done"}
        row |= dict(override.split("=", 1) for override in result["overrides"] if "=" in override)
        if not failed:
            row |= {
                "val_top1": result["val"]["top1"],
                "test_top1": result["test"]["top1"],
                "images_per_second": round(result["images_per_second"], 1),
                "wall_seconds": round(result["wall_seconds"], 1),
            }
        rows.append({**row, "error": result.get("error", ""), "directory": str(path.parent)})
    return sorted(rows, key=lambda row: (row["status"] == "failed", -(row.get("val_top1") or 0)))


def _show(rows: list[dict[str, Any]], columns: list[str], directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} jobs, best first", title_justify="left")
    hidden = ("status", "error", "directory")  # in the file, and below
    varying = [c for c in columns if c not in hidden and len({r.get(c) for r in rows}) > 1]
    shown = dict.fromkeys(["job", *varying])
    for column in shown:
        table.add_column(column, overflow="fold")
    for row in rows:
        failed = row["status"] == "failed"
        cells = [_cell(column, row.get(column), failed) for column in shown]
        table.add_row(*cells, style="red" if failed else None)
    Console().print(table)
    for row in rows:
        if row["error"]:
            print(f"job {row['job']} failed: {row['error']}")
    print(f"all columns: {directory / 'sweep.csv'}", flush=True)


def _cell(column: str, value: Any, failed: bool) -> str:
    if column == "val_top1" and failed:
        return "failed"
    if isinstance(value, float) and column.endswith("top1"):
        return f"{value:.2%}"
    return "" if value is None else str(value)
