"""`draw`: accuracy over latency where accuracies are known, else bars of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repnet.bench.environment import sentence
from repnet.bench.measure import TIMED, Row
from repnet.bench.table import Result, groups, number
from repnet.files import write_atomically

# Okabe and Ito: told apart by color-blind people too.
_BLUE, _RED, _GRAY = "#0072B2", "#D55E00", "#888888"
_ORANGE, _GREEN, _PINK, _SKY = "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
_SUBJECTS = (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY)
_KINDS = {  # the first that a form's name begins with
    "train": ("train form", _RED), "timm": ("timm", _GRAY), "onnx": ("ONNX Runtime", _ORANGE),
    "openvino": ("OpenVINO", _GREEN), "aot": ("AOTInductor", _PINK),
    "tensorrt": ("TensorRT", _GREEN), "executorch": ("ExecuTorch", _PINK),
    "torch_export": ("torch.export", _SKY), "coreml": ("Core ML", _PINK),
    "": ("deploy form in PyTorch", _BLUE),
}  # fmt: skip

# Where a label may stand beside its point, in points: near before far, right before left.
_SIDES = ((1, 0), (0.8, 0.7), (0.8, -0.7), (0, 1), (0, -1), (-0.8, 0.7), (-0.8, -0.7), (-1, 0))
_PLACES = [(x * far, y * far) for far in (9, 16, 25, 36, 50, 66, 84) for x, y in _SIDES]


def draw(results: Sequence[Result], path: str | Path) -> None:
    """Draw what was timed.

    Accuracy over latency, with the forms that no other beats in both; for forms without a known
    accuracy, bars of the latencies.

    Args:
        results: at least one timed row.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row.status == TIMED]
    judged = [row for row in rows if row.top1 is not None]
    batches = sorted({row.batch for row in judged})
    if judged:
        figure = Figure(figsize=(8.5, 5.2 * len(batches)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(batches), squeeze=False)[:, 0]
        places = [
            _draw_accuracy(axes, [row for row in judged if row.batch == batch], batch)
            for axes, batch in zip(panels, batches, strict=True)
        ]
    else:
        bars = list(groups(rows))
        heights = [0.9 + 0.3 * len(members) for members in bars]
        figure = Figure(figsize=(8.5, sum(heights) + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(bars), squeeze=False, height_ratios=heights)[:, 0]
        for axes, members in zip(panels, bars, strict=True):
            _draw_bars(axes, members)
        panels[-1].set_xlabel("ms for a batch: median, 10th to 90th percentile", fontsize=8)
        places = []
    notes = [sentence(result.environment) for result in results]
    if judged and len(judged) < len(rows):
        unknown = dict.fromkeys(row.form for row in rows if row.top1 is None)
        notes.append(f"not drawn, since nobody measured their accuracy: {', '.join(unknown)}")
    note = "\n".join(dict.fromkeys(map(_short, notes)))
    figure.supxlabel(note, fontsize=7, color="#666666", x=0.01, ha="left")
    figure.draw_without_rendering()  # the labels need to know where all else is
    for axes, points in zip(panels, places, strict=False):
        _place_labels(axes, points)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which `(latency, accuracy)` no other point beats, the fastest first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _draw_accuracy(axes: Any, rows: Sequence[Row], batch: int) -> list[tuple[Row, str]]:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    subjects = list(dict.fromkeys(row.subject for row in rows))
    colors = {name: _SUBJECTS[i % len(_SUBJECTS)] for i, name in enumerate(subjects)}
    points = [(row.median_ms or 0.0, row.top1 or 0.0) for row in rows]
    front = [points[index] for index in pareto(points)]
    slowest = max(latency for latency, _ in points)
    axes.plot(
        [*(latency for latency, _ in front), slowest],
        [*(accuracy for _, accuracy in front), front[-1][1]],
        drawstyle="steps-post", color="#bbbbbb", lw=1.2, ls=(0, (4, 2)), zorder=1,
        label="best accuracy up to this latency",
    )  # fmt: skip
    for (latency, accuracy), row in zip(points, rows, strict=True):
        color = colors[row.subject]
        face = color if row.top1_is_own else "white"
        axes.plot(latency, accuracy, "o", ms=7, mfc=face, mec=color, mew=1.5, zorder=3)
    for name in subjects:
        axes.plot([], [], "o", ms=7, color=colors[name], label=name)
    if not all(row.top1_is_own for row in rows):
        axes.plot([], [], "o", ms=7, mfc="white", mec=_GRAY, mew=1.5,
                  label="accuracy of its deploy form, not of its own")  # fmt: skip
    low, high = (f(accuracy for _, accuracy in points) for f in (min, max))
    margin = max(0.15 * (high - low), 0.002)
    axes.set_xscale("log")
    fast, slow = (f(latency for latency, _ in points) for f in (min, max))
    spread = (slow / fast) ** 0.12
    axes.set(
        xlim=(fast / max(spread, 1.1), slow * max(spread, 1.1)),
        ylim=(low - margin, high + margin),
        xlabel=f"median latency of a batch of {batch}, ms (log)" if batch > 1
        else "median latency of one image, ms (log)",
        ylabel="top-1 accuracy",
    )  # fmt: skip
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if high - low > 0.004 else 2))
    axes.grid(alpha=0.25, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return [(row, colors[row.subject]) for row in rows]


def _place_labels(axes: Any, points: Sequence[tuple[Row, str]]) -> None:
    """Write the name of each form where it covers no point and no other name."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    scale = axes.figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    at = [axes.transData.transform((row.median_ms, row.top1)) for row, _ in points]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in at]
    for index in sorted(range(len(points)), key=lambda i: -at[i][0]):
        row, color = points[index]
        label = axes.annotate(
            row.form, (row.median_ms, row.top1), (0, 0), textcoords="offset points", fontsize=8,
            color=color, zorder=4, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": color, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        label.set_in_layout(False)
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        best, least = _PLACES[0], float("inf")
        for x, y in _PLACES:
            _move(label, x, y)
            text = _text_box(label, renderer)
            cost = sum(_overlap(text, other) for other in taken)
            cost += text.width * text.height - _overlap(text, inside)
            if cost < least:
                best, least = (x, y), cost
            if cost <= 0.5:
                break
        _move(label, *best)
        taken.append(_text_box(label, renderer))


def _text_box(label: Any, renderer: Any) -> Any:
    """Return where the letters are, without the line to the point."""
    from matplotlib.text import Text

    label.update_positions(renderer)
    return Text.get_window_extent(label, renderer).padded(2)


def _overlap(first: Any, second: Any) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return float(max(0.0, width) * max(0.0, height))


def _move(label: Any, x: float, y: float) -> None:
    label.set_position((x, y))
    label.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
    label.set_verticalalignment("bottom" if y > 0 else "top" if y < 0 else "center")


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    medians = [row.median_ms or 0.0 for row in rows]
    errors = [
        [median - (row.p10_ms or median) for median, row in zip(medians, rows, strict=True)],
        [(row.p90_ms or median) - median for median, row in zip(medians, rows, strict=True)],
    ]
    colors = [_kind(row.form)[1] for row in rows]
    axes.barh(places, medians, color=colors, height=0.72, xerr=errors,
              error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"})  # fmt: skip
    for place, row, end in zip(places, rows, errors[1], strict=True):
        speed = f"   {number(row.times_deploy)} x deploy" if row.times_deploy else ""
        axes.annotate(
            f"{number(row.median_ms)} ms{speed}", ((row.median_ms or 0) + end, place), (5, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(places, [row.form for row in rows], fontsize=8)
    axes.set(xlim=(0, 1.3 * max(row.p90_ms or 0.0 for row in rows)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_title(
        f"{rows[0].subject}, {rows[0].image}, batch {rows[0].batch}", loc="left", fontsize=10
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _kind(form: str) -> tuple[str, str]:
    return next(kind for start, kind in _KINDS.items() if form.startswith(start))


def _short(text: str, length: int = 170) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
