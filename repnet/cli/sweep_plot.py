"""`draw_sweep`: which values gave which accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from repnet.files import write_atomically

SCORE = "val_top1"
_GRAY, _RED, _BLUE = "#999999", "#cc3322", "#2266bb"


def draw_sweep(rows: Sequence[dict[str, Any]], keys: Sequence[str], path: str | Path) -> None:
    """Draw the best validation accuracy of each job over the values that vary.

    One value that varies: a dot for each job, with mean and standard deviation of those that share
    it (the seeds). Several: parallel coordinates, a line for each job, colored by its accuracy.

    Args:
        rows: of `sweep.csv`.
        keys: columns of the values that vary.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scales = [_Scale(key, [str(row.get(key, "")) for row in rows]) for key in keys or ["job"]]
    few = len(scales) < 2
    width = 7.5 if few else max(7.5, 2.4 * (len(scales) + 1))
    height = 4.2
    if few and not scales[0].numeric:
        height = max(2.6, 1.2 + 0.42 * len(scales[0].ticks))
    elif not few:
        height = max(4.6, 1.6 + 0.22 * max(len(scale.ticks) for scale in scales))
    figure = Figure(figsize=(width, min(height, 16)), layout="constrained")
    FigureCanvasAgg(figure)
    (_draw_dots if few else _draw_parallel)(figure, rows, scales)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


class _Scale:
    """Where the values of one column are on an axis from 0 to 1."""

    def __init__(self, key: str, values: Sequence[str]) -> None:
        self.key = key
        names = list(dict.fromkeys(value for value in values))
        numbers = {name: _number(name) for name in names}
        self.ticks: list[tuple[float, str]] = []
        self.numeric = all(number is not None for number in numbers.values())
        if self.numeric:
            known = sorted({float(number) for number in numbers.values() if number is not None})
            low, high = known[0], known[-1]
            self.log = _is_logarithmic(known)
            positive = [number for number in known if number > 0]

            def squeeze(number: float) -> float:
                if not self.log:
                    return number
                # Zero has no logarithm: it stands a little below the smallest of the others.
                return math.log10(number or positive[0] / 3)

            bottom, span = squeeze(low), (squeeze(high) - squeeze(low)) or 1.0
            self.place = lambda name: (squeeze(float(name)) - bottom) / span
            ticks = known if len(known) <= 8 else _round_numbers(low, high, self.log)
            marks = [((squeeze(tick) - bottom) / span, f"{tick:.4g}") for tick in ticks]
            for place, text in marks:  # none over another
                if not self.ticks or place - self.ticks[-1][0] >= 0.05:
                    self.ticks.append((place, text))
        else:
            self.log = False
            names = sorted(names)
            step = 1 / max(1, len(names) - 1)
            places = {name: 1 - i * step if len(names) > 1 else 0.5 for i, name in enumerate(names)}
            self.place = places.__getitem__
            self.ticks = [(places[name], _short(name) or "(default)") for name in names]


def _draw_dots(figure: Any, rows: Sequence[dict[str, Any]], scales: Sequence[_Scale]) -> None:
    from matplotlib.ticker import PercentFormatter

    scale = scales[0]
    axes = figure.subplots()
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.get(SCORE) is not None:
            groups.setdefault(str(row.get(scale.key, "")), []).append(row[SCORE])
    several = any(len(scores) > 1 for scores in groups.values())
    label = {"dot": "one job", "mean": "mean ± standard deviation"}
    if scale.numeric:
        ordered = sorted(groups, key=float)
        places = {name: scale.place(name) for name in ordered}
    else:  # the best on top
        ordered = sorted(groups, key=lambda name: mean(groups[name]))
        places = {name: float(i) for i, name in enumerate(ordered)}
    for name in ordered:
        scores, at = groups[name], places[name]
        spread = stdev(scores) if len(scores) > 1 else 0.0
        along = [at] * len(scores)
        dots, center = (along, scores), ([at], [mean(scores)])
        error = {"yerr": spread} if scale.numeric else {"xerr": spread}
        if not scale.numeric:
            dots, center = dots[::-1], center[::-1]
        axes.plot(*dots, "o", color=_GRAY, ms=5, alpha=0.7, label=label.pop("dot", None), zorder=2)
        if several:
            axes.errorbar(*center, **error, fmt="D", color=_BLUE, ms=6, capsize=4, zorder=3,
                          label=label.pop("mean", None))  # fmt: skip
    if scale.numeric:
        if scale.key != "seed":
            means = [mean(groups[name]) for name in ordered]
            axes.plot([places[n] for n in ordered], means, color=_BLUE, lw=1, alpha=0.5, zorder=1)
        axes.set_xticks([at for at, _ in scale.ticks], [text for _, text in scale.ticks])
        log = " (log)" if scale.log else ""
        axes.set(xlabel=f"{scale.key}{log}", ylabel="best validation top-1")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.set_yticks(range(len(ordered)), [_short(name) or "(default)" for name in ordered])
        axes.set(ylabel=scale.key, xlabel="best validation top-1")
        axes.set_ylim(-0.6, len(ordered) - 0.4)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    failed = sum(row.get(SCORE) is None for row in rows)
    missing = f"; not shown: {failed} without a result" if failed else ""
    axes.set_title(f"{len(rows)} jobs{missing}", loc="left", fontsize=10)
    if several:
        figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=2)


def _draw_parallel(figure: Any, rows: Sequence[dict[str, Any]], scales: Sequence[_Scale]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    axes = figure.subplots()
    scored = [row for row in rows if row.get(SCORE) is not None]
    low, high = min(r[SCORE] for r in scored), max(r[SCORE] for r in scored)
    if high == low:
        low, high = low - 0.005, high + 0.005
    # The tenth that is worst would take most of the colors: they end where the bulk begins.
    tenth = sorted(row[SCORE] for row in scored)[len(scored) // 10]
    tenth = tenth if tenth < high else low
    colors = Normalize(tenth, high, clip=True)
    palette = colormaps["viridis"]
    last = len(scales)
    offsets = _offsets(rows, scales)
    order = sorted(rows, key=lambda row: row.get(SCORE) or -1.0)  # the best are drawn on top
    for rank, row in enumerate(order):
        score = row.get(SCORE)
        places = [s.place(str(row.get(s.key, ""))) + offsets[id(row), s.key] for s in scales]
        if score is not None:
            places.append((score - low) / (high - low))
        points = [(0.0, places[0])]
        codes = [Curve.MOVETO]
        for x, (start, end) in enumerate(pairwise(places)):
            points += [(x + 0.45, start), (x + 0.55, end), (x + 1.0, end)]
            codes += [Curve.CURVE4] * 3
        best = rank == len(order) - 1
        style: dict[str, Any] = {"lw": 3.0 if best else 1.4, "alpha": 1.0 if best else 0.75}
        color = _RED if score is None else palette(colors(score))
        if score is None:
            style = {"lw": 1.0, "alpha": 0.8, "ls": (0, (4, 3))}
            axes.plot(last - 1, places[-1], "x", color=_RED, ms=7, zorder=6)
        axes.add_patch(PathPatch(Curve(points, codes), fc="none", ec=color, zorder=2, **style))
    halo = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.8}
    for x, scale in enumerate(scales):
        _draw_axis(axes, x, scale.ticks, halo)
    percents = _round_numbers(100 * low, 100 * high, log=False)
    ticks = [((tick / 100 - low) / (high - low), f"{tick:.4g}%") for tick in percents]
    _draw_axis(axes, last, ticks, halo)
    names = [f"{_label(s.key)}{' (log)' if s.log else ''}" for s in scales]
    axes.set_xticks(range(last + 1), [*names, "best validation\ntop-1"], fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set(xlim=(-0.25, last + 0.12), ylim=(-0.06, 1.06), yticks=[])
    axes.spines[:].set_visible(False)
    strip = [[tenth + (high - tenth) * i / 255] for i in range(256)]
    foot = (tenth - low) / (high - low)
    for bottom, values in ((foot, strip), (0.0, [[tenth]])):
        top = 1.0 if values is strip else foot
        box = (last, last + 0.05, bottom, top)
        axes.imshow(values, cmap=palette, norm=colors, extent=box, aspect="auto", origin="lower")
    failed = len(rows) - len(scored)
    notes = [f"{len(rows)} jobs", "the best is the thick line"]
    if failed:
        notes.append(f"dashed: {failed} without a result")
    axes.set_xlabel("; ".join(notes), fontsize=9, color="#555555")


def _draw_axis(axes: Any, x: float, ticks: Sequence[tuple[float, str]], box: Any) -> None:
    axes.plot([x, x], [0, 1], color="black", lw=1.0, zorder=4)
    for y, text in ticks:
        axes.plot([x - 0.012, x + 0.012], [y, y], color="black", lw=1.0, zorder=4)
        axes.text(x - 0.025, y, text, ha="right", va="center", fontsize=8, bbox=box, zorder=5)


def _offsets(
    rows: Sequence[dict[str, Any]], scales: Sequence[_Scale]
) -> dict[tuple[int, str], float]:
    """Return how far each line passes beside its value, so that lines of one value are seen."""
    offsets = {}
    for scale in scales:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(str(row.get(scale.key, "")), []).append(row)
        places = sorted(scale.place(name) for name in groups)
        gaps = [b - a for a, b in pairwise(places)] or [1.0]
        room = min(0.3 * min(gaps), 0.06)
        for members in groups.values():
            members.sort(key=lambda row: row.get(SCORE) or -1.0)
            for i, row in enumerate(members):
                share = (i / (len(members) - 1) - 0.5) if len(members) > 1 else 0.0
                offsets[id(row), scale.key] = share * room
    return offsets


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    """Return whether sorted numbers span a decade, or grow by the same factor each time."""
    positive = [number for number in numbers if number > 0]
    if numbers[0] < 0 or len(positive) < 2:
        return False
    factors = [after / before for before, after in pairwise(positive)]
    geometric = len(factors) > 1 and max(factors) < 1.01 * min(factors)
    even = len(factors) > 1 and max(steps := _steps(positive)) < 1.01 * min(steps)
    return (positive[-1] / positive[0] >= 10 and not even) or geometric


def _steps(numbers: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(numbers)]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _round_numbers(low: float, high: float, log: bool) -> list[float]:
    """Return about five numbers with few digits between two numbers, and these."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(subs=(1.0,)) if log else MaxNLocator(5)
    ticks = [float(tick) for tick in locator.tick_values(low, high)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def _label(key: str) -> str:
    """Return a dotted key in two lines if it is long."""
    head, _, tail = key.rpartition(".")
    return f"{head}.\n{tail}" if head and len(key) > 16 else key


def _short(text: str, length: int = 22) -> str:
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return text.replace("$", r"\$")  # matplotlib would read mathematics
