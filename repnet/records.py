"""What a run has written about itself, read again when it is resumed or compared with others."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from repnet.errors import InputError, one_line
from repnet.files import read_json

RESULT, METRICS = "result.json", "metrics.csv"
_COUNTED = ("epoch", "step")  # whole numbers
_NEEDED = (*_COUNTED, "learning_rate", "images_per_second", "seconds")
_REMEDY = "Move the file away to continue the run without it"


def read_result(directory: Path) -> dict[str, Any] | None:
    """Return the `result.json` of a run or of a trial that failed; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = directory / RESULT
    if not path.is_file():
        return None
    try:
        result = read_json(path)
    except InputError as error:
        raise InputError(f"{error}. {_REMEDY}") from error
    if not isinstance(result, dict) or not _are_overrides(result.get("overrides", [])):
        raise _damaged(path, "its overrides are no list of texts")
    seconds = result.get("wall_seconds") or 0
    if not isinstance(seconds, int | float):
        raise _damaged(path, f"wall_seconds={seconds!r} is no number")
    return result


def read_metrics(directory: Path) -> list[dict[str, str]]:
    """Return the rows of the `metrics.csv` of a run; none where there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = directory / METRICS
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or ()
            rows = list(table)
    except (ValueError, csv.Error) as error:
        raise _damaged(path, one_line(error)) from error
    if missing := [name for name in _NEEDED if name not in columns]:
        raise _damaged(path, f"it has no column {missing[0]}")
    for number, row in enumerate(rows, 2):
        for key, value in row.items():
            if not _is_number(value, whole=key in _COUNTED, needed=key in _NEEDED):
                raise _damaged(path, f"line {number} has no number in '{key}'")
    return rows


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"'{path}' is damaged: {reason}. {_REMEDY}")


def _are_overrides(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_number(value: Any, *, whole: bool, needed: bool) -> bool:
    if value == "" and not needed:  # of an epoch without validation
        return True
    try:
        (int if whole else float)(value)
    except (TypeError, ValueError):  # a short row has None, a long one a list
        return False
    return True
