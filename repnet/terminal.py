"""`print_table`: prints a table that fits the terminal and breaks no name over two lines.

Rich shrinks the columns of a table that is too wide in proportion, and breaks whatever is longer
than its column, such as the name of a file. Here, a column never gets narrower than its longest
word, or than its longest cell where it is declared `no_wrap`. If that does not fit, columns that
the reader can do without are left out; if it still does not fit, each cell is printed on a line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_UNLIMITED = 10_000  # columns


def print_table(table: Table, *, spare: Sequence[str] = (), console: Console | None = None) -> None:
    """Print a table and its title.

    Args:
        table: Rich's table; `min_width` and `no_wrap` of its columns are respected. It is changed.
        spare: headings of columns that may be left out, the most dispensable first.
        console: default: standard output. A file or a pipe has no width, unless the environment
            variable COLUMNS sets one.
    """
    console = console or Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    if table.title is not None:  # Rich breaks it at the width of the table
        title = console.render_str(table.title) if isinstance(table.title, str) else table.title
        console.print(title, style="table.title", soft_wrap=True, highlight=False)
        table.title = None
    columns = list(table.columns)
    dispensable = list(spare)
    while not (fits := _fit(table, console)) and dispensable:
        _remove(table, dispensable.pop(0))
    if fits:
        console.print(table)
    else:
        table.columns = columns
        _print_rows(table, console)


def _fit(table: Table, console: Console) -> bool:
    """Set the widths of all columns, and return whether they fit."""
    ranges = [_range(column, console) for column in table.columns]
    _set(table, [widest for _, widest in ranges])
    room = console.width - _width_of(table, console)
    if room >= 0:
        return True
    for column in table.columns:
        if isinstance(column.header, str):  # a key of a config, such as optimizer.weight_decay
            column.header = column.header.replace(".", ".\n").replace("\n\n", "\n")
    ranges = [_range(column, console) for column in table.columns]
    _set(table, [least for least, _ in ranges])
    if _width_of(table, console) > console.width:
        return False
    # The widest columns give way first: all that are wider than `level` become that narrow.
    for level in range(console.width):
        widths = [max(least, min(widest, level)) for least, widest in ranges]
        kept = [column.width or 0 for column in table.columns]
        _set(table, widths)
        if _width_of(table, console) > console.width:
            _set(table, kept)
            break
    return True


def _range(column: Column, console: Console) -> tuple[int, int]:
    """Return the width of the longest word, or of what is not wrapped, and that of all cells."""
    options = console.options.update(max_width=_UNLIMITED)
    sizes = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    widest = max(column.min_width or 0, *(size.maximum for size in sizes))
    least = max(column.min_width or 0, *(size.minimum for size in sizes))
    return (widest if column.no_wrap else least), widest


def _set(table: Table, widths: Sequence[int]) -> None:
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width


def _width_of(table: Table, console: Console) -> int:
    """Return the width of the table with its borders, from the widths that are set."""
    return Measurement.get(console, console.options.update(max_width=_UNLIMITED), table).maximum


def _remove(table: Table, heading: str) -> None:
    table.columns = [column for column in table.columns if _heading(column) != heading]


def _heading(column: Column) -> str:
    return str(column.header).replace(".\n", ".")


def _print_rows(table: Table, console: Console) -> None:
    """Print a line for each cell, or for each row of a table without headings."""
    for row in zip(*(column.cells for column in table.columns), strict=True):
        lines = []
        for column, cell in zip(table.columns, row, strict=True):
            text = console.render_str(cell) if isinstance(cell, str) else cell
            if isinstance(text, Text) and text.plain.strip():
                heading = _heading(column) if table.show_header else ""
                lines.append(Text.assemble(f"{heading}: " if heading else "", text))
        if not table.show_header:
            lines = [Text(": ").join(lines)]
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)
        if table.show_header:
            console.print()
