"""Where the marks of the page's charts lie, in percent of an axis, and the pictures in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

from repnet.deploy import png
from repnet.deploy.report import words
from repnet.deploy.report.tables import Report
from repnet.deploy.report.words import finite

FLOOR = 1e-18  # left end of the error chart; an exact zero is drawn there
SHOWN = 40  # layers that are shown at once
NUMBERED = 12  # classes whose confusion matrix has room for numbers
SHORT = 3  # letters of the name of a class that need not be turned
PAIRS = 12  # confusions in a list
CARDS, MOST_CARDS = 10, 24  # images that are shown at once, and in all
HIT, MISS = (0, 114, 178), (213, 94, 0)  # Okabe and Ito: told apart by color-blind people


def errors(report: Report) -> Report | None:
    """Return the errors of the blocks on a logarithmic axis."""
    blocks = report.get("blocks")
    if not blocks:
        return None
    tolerance = finite((report.get("tolerance") or {}).get("block"))
    known = [e for b in blocks if (e := finite(b.get("relative_error"))) is not None]
    top = max((10 * (tolerance or 0.0), 1e-9, *known))
    low, high = round(math.log10(FLOOR)), math.ceil(math.log10(top))
    span = high - low

    def position(error: float | None) -> float:
        if error is None:  # NaN and infinity
            return 100.0
        return 100 * (math.log10(max(error, FLOOR)) - low) / span

    step = 3 if span <= 18 else 6
    rows = []
    for block in blocks:
        error = finite(block.get("relative_error"))
        bad = error is None or (tolerance is not None and error > tolerance)
        rows.append(
            {
                "name": block.get("name"),
                "error": block.get("relative_error"),
                "width": position(error),
                "bad": bad,
            }
        )
    return {
        "tolerance": tolerance,
        "limit": None if tolerance is None else position(tolerance),
        "ticks": [
            (words.scientific(10.0**e, 0), position(10.0**e)) for e in range(low, high, step)
        ],
        "rows": rows,
        "bad": sum(row["bad"] for row in rows),
        "worst": max(known, default=None),
    }


def where(report: Report) -> Report | None:
    """Return each part's share of both forms, relative to the larger of the two."""
    rows = report.get("where") or []
    spread = png.ramp(numpy.linspace(0.12, 0.92, max(2, len(rows))))
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in spread.tolist()]
    parts = [
        {
            "name": row.get("name"),
            "color": color,
            **{kind: row.get(kind) or {} for kind in ("parameters", "macs")},
        }
        for row, color in zip(rows, colors, strict=False)
    ]
    bars = []
    for kind, title in (("parameters", "Parameters"), ("macs", "Multiply-adds")):
        totals = {}
        for form in ("train_form", "deploy_form"):
            whole = finite((report.get(kind) or {}).get(form))
            added = sum(finite(part[kind].get(form)) or 0.0 for part in parts)
            totals[form] = added if whole is None else whole
        largest = max(totals.values())
        if largest <= 0:
            continue
        forms = [
            {
                "name": form,
                "total": total,
                "width": _percent(total, largest),
                "parts": [{**p, "width": _percent(p[kind].get(form), largest)} for p in parts],
            }
            for form, total in totals.items()
        ]
        train, deploy = totals.values()
        bars.append({"title": title, "ratio": deploy / train if train else None, "forms": forms})
    return {"bars": bars, "rows": parts} if bars else None


def int8(report: Report) -> Report | None:
    """Return noise and ranges of each layer, and what was tried."""
    found = report.get("int8")
    if not found:
        return None
    layers = found.get("layers") or []
    noise = [finite(layer.get("sqnr_db")) for layer in layers]
    ticks = _ticks(max((value for value in noise if value is not None), default=0.0))
    ranges = [_range(layer, "weight") for layer in layers]
    reach = max((max(abs(low), abs(high)) for low, high in filter(None, ranges)), default=0.0)
    rows = []
    for layer, value, extent in zip(layers, noise, ranges, strict=True):
        low, high = extent or (0.0, 0.0)
        rows.append(
            {
                **{key: layer.get(key) for key in _LAYER},
                "width": None if value is None else _percent(value, ticks[-1]),
                "low": _percent(low + reach, 2 * reach),
                "extent": _percent(high - low, 2 * reach),
            }
        )
    attempts = [
        {
            "format": name,
            "tries": [
                {**tried, "kept": tried.get("kept") or [], "drop": finite(tried.get("drop"))}
                for tried in tries or ()
            ],
        }
        for name, tries in (found.get("attempts") or {}).items()
    ]
    return {
        "rows": rows[:SHOWN],
        "more": rows[SHOWN:],
        "kept": sum(bool(row["kept_float"]) for row in rows),
        "ticks": [(f"{tick:g}", 100 * tick / ticks[-1]) for tick in ticks],
        "reach": reach,
        "attempts": attempts,
        **{key: found.get(key) for key in ("samples", "seed", "split", "max_drop")},
    }


_LAYER = (
    "name",
    "sqnr_db",
    "kept_float",
    "weight_min",
    "weight_max",
    "weight_spread",
    "activation_min",
    "activation_max",
)


def _range(layer: Report, kind: str) -> tuple[float, float] | None:
    low, high = finite(layer.get(f"{kind}_min")), finite(layer.get(f"{kind}_max"))
    return None if low is None or high is None else (low, max(low, high))


def kernels(report: Report) -> Report | None:
    """Return pictures of blocks whose images are images, with their shares."""
    blocks = []
    for block in report.get("kernels") or ():
        branches = block.get("branches") or []
        if not branches or any(
            png.size(b.get("image")) is None for b in (*branches, _folded(block))
        ):
            continue
        shares = [finite(branch.get("share")) for branch in branches]
        reach = max((abs(share) for share in shares if share is not None), default=0.0)
        rows = []
        for branch, share in zip(branches, shares, strict=True):
            rows.append(
                {
                    "name": branch.get("name"),
                    "layers": branch.get("layers") or branch.get("name"),
                    "share": branch.get("share"),
                    "norm": branch.get("norm"),
                    "image": branch["image"],
                    "width": _percent(abs(share or 0.0), reach),
                    "against": (share or 0.0) < 0,
                }
            )
        blocks.append(
            {
                "block": block.get("block"),
                "rows": rows,
                "folded": block["folded"],
                "difference": block.get("difference"),
                "kernel_size": words.TIMES.join(
                    str(side) for side in block.get("kernel_size") or ()
                ),
            }
        )
    return {"blocks": blocks} if blocks else None


def _folded(block: Report) -> Report:
    return {"image": block.get("folded")}


def confusion(report: Report) -> Report | None:
    """Return the confusion matrix as a table or a picture, and the most frequent mistakes."""
    found = report.get("confusion") or {}
    names = found.get("class_names") or []
    pairs = found.get("worst_pairs") or report.get("worst_pairs")
    matrix = _matrix(found.get("matrix"))
    if matrix is None and not pairs:
        return None
    picture, rows = None, None
    if matrix is not None:
        shares = matrix / numpy.maximum(1, matrix.sum(1, keepdims=True))
        if pairs is None:
            wrong = matrix.copy()
            numpy.fill_diagonal(wrong, 0)
            order = numpy.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
            places = [divmod(int(i), len(matrix)) for i in order]
            pairs = [
                {"true": i, "predicted": j, "count": int(wrong[i, j])}
                for i, j in places
                if wrong[i, j] > 0
            ]
        if len(matrix) <= NUMBERED:
            rows = [
                {
                    "name": _class(names, i),
                    "cells": [
                        # The square root shows mistakes of a few percent beside a full diagonal.
                        {"count": int(n), "depth": math.sqrt(share), "hit": i == j}
                        for j, (n, share) in enumerate(zip(line, shared, strict=True))
                    ],
                }
                for i, (line, shared) in enumerate(zip(matrix, shares, strict=True))
            ]
        else:
            picture = _confusion_picture(shares)
    columns = [_class(names, i) for i in range(len(rows))] if rows else []
    return {
        "columns": columns,
        "short": all(len(name) <= SHORT for name in columns),
        "rows": rows,
        "picture": picture,
        "classes": len(matrix) if matrix is not None else len(names) or None,
        "pairs": [
            {
                "true": _class(names, pair.get("true")),
                "predicted": _class(names, pair.get("predicted")),
                "count": pair.get("count"),
            }
            for pair in (pairs or [])[:PAIRS]
        ],
    }


def _matrix(matrix: Any) -> numpy.ndarray | None:
    """Return a square matrix of counts, None for anything else."""
    if not matrix:
        return None
    counts = numpy.array(matrix, dtype=numpy.float64)
    square = counts.ndim == 2 and counts.shape[0] == counts.shape[1]
    return counts if square and numpy.isfinite(counts).all() else None


def _confusion_picture(shares: numpy.ndarray) -> str:
    """Return the matrix as a picture whose empty cells let the page shine through."""
    pixels = numpy.zeros((*shares.shape, 4), numpy.uint8)
    pixels[..., :3] = MISS
    diagonal = numpy.arange(len(shares))
    pixels[diagonal, diagonal, :3] = HIT
    pixels[..., 3] = (255 * numpy.sqrt(shares.clip(0, 1))).round()
    return png.encode(pixels)


def closest(report: Report) -> Report | None:
    """Return cards of the images whose prediction is closest to another."""
    found = (report.get("closest") or [])[:MOST_CARDS]
    names = (report.get("confusion") or {}).get("class_names") or []
    margins = [finite(card.get("margin")) for card in found]
    top = max((margin for margin in margins if margin is not None), default=0.0)
    cards = []
    for card, margin in zip(found, margins, strict=True):
        pixels = png.size(card.get("image"))
        cards.append(
            {
                "index": card.get("index"),
                "label": _class(names, card.get("label")),
                "predicted": _class(names, card.get("predicted")),
                "runner_up": _class(names, card.get("runner_up")),
                "right": card.get("label") == card.get("predicted"),
                "margin": card.get("margin"),
                "width": _percent(margin, top),
                "image": card["image"] if pixels else None,
                "coarse": pixels is not None and max(pixels) < 100,
            }
        )
    return {"cards": cards[:CARDS], "more": cards[CARDS:]} if cards else None


def _class(names: Sequence[Any], index: Any) -> str:
    """Return the name of a class, which may be given by its index."""
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(names):
        return str(names[index])
    return words.MISSING if index is None else str(index)


def _ticks(top: float) -> list[float]:
    """Return round numbers from 0 to `top` or a little more, about five of them."""
    top = max(top, 1e-12)
    rough = top / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [step * index for index in range(math.ceil(top / step * 0.999) + 1)]


def _percent(value: Any, whole: float) -> float:
    """Return where a value lies on an axis from 0 to `whole`, within 0 ... 100."""
    known = finite(value)
    return 0.0 if known is None or whole <= 0 else 100 * min(1.0, max(0.0, known / whole))
