"""How the commands that test a network print what was measured."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from repnet.text import printable


def percent(value: float | None) -> str:
    """Return a fraction as a percentage."""
    return "-" if value is None else f"{value:.2%}"


def add_scores(table: Table, result: dict[str, Any], split: str = "") -> None:
    """Add rows of accuracy, and of the class that is recognized least.

    Args:
        table: of two columns.
        result: with the entries `test` and `recall`.
        split: in front of each name.
    """
    test = result["test"]
    table.add_row(f"{split}top-1", f"[bold]{percent(test['top1'])}[/bold]")
    if "top5" in test:
        table.add_row(f"{split}top-5", percent(test["top5"]))
    if "f1" in test:
        table.add_row(f"{split}F1, mean of classes", percent(test["f1"]))
    recall = {name: share for name, share in result["recall"].items() if share is not None}
    if recall:
        name = min(recall, key=recall.__getitem__)
        row = f"{percent(recall[name])}, {escape(printable(name))}"
        table.add_row(f"{split}recall, lowest of classes", row)
