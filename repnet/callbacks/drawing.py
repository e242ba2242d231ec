"""Pictures of predictions: confusions, accuracy by class, the worst of them. NumPy in, PNG out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from repnet.files import write_atomically

# Okabe and Ito: told apart by color-blind people too.
BLUE, RED, GRAY = "#0072B2", "#D55E00", "#888888"
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9")

NAMED = 40  # classes that still have room for their names
NUMBERED = 15  # classes that still have room for a number in each cell of a matrix
CELLS = 250  # of a matrix in each direction, so that each is at least two pixels wide
MATRIX = 4000  # classes; a larger matrix takes too much memory
LISTED = 20  # confusions, or classes, in a list


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure that needs no display, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def percent_ticks(axis: Any) -> None:
    """Write fractions as percentages along an axis."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1))


def plain_ticks(axis: Any) -> None:
    """Write a few plain numbers along a logarithmic axis: 0.2, 0.5, 1, 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_confusions(
    labels: numpy.ndarray, predictions: numpy.ndarray, names: Sequence[str], path: str | Path
) -> None:
    """Draw the confusion matrix, as shares of each true class, and its most frequent mistakes.

    Args:
        labels: `(n,)`.
        predictions: `(n,)`.
        names: of all classes.
        path: of the PNG file.
    """
    mistakes = most_confused(labels, predictions)[:LISTED]
    classes = len(names)
    side = min(9.0, max(5.0, 0.42 * classes))
    with_matrix = classes <= MATRIX
    rows_height = 0.24 * len(mistakes) + 1.4
    width = 6.2 if not with_matrix else side + 1.2 + 5.5 * bool(mistakes)
    figure = new_figure(width, max(side, rows_height) if with_matrix else rows_height)
    ratios = [side + 1.2, 5.5] if with_matrix and mistakes else [1]
    panels = list(figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0])
    if with_matrix:
        _matrix(figure, panels.pop(0), labels, predictions, names)
    if mistakes and panels:
        axes = panels[0]
        counts = [count for _, _, count in mistakes]
        texts = [f"{_short(names[true])} → {_short(names[wrong])}" for true, wrong, _ in mistakes]
        bars = axes.barh(range(len(mistakes)), counts, color=RED, height=0.7)
        axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=8)
        axes.set_yticks(range(len(mistakes)), texts, fontsize=8)
        axes.set(title="most frequent mistakes: true → predicted", xlabel="images")
        axes.set_ylim(max(len(mistakes), 8) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(counts))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _matrix(
    figure: Any,
    axes: Any,
    labels: numpy.ndarray,
    predictions: numpy.ndarray,
    names: Sequence[str],
) -> None:
    from matplotlib.colors import PowerNorm

    classes = len(names)
    counts = numpy.bincount(labels * classes + predictions, minlength=classes**2)
    counts = counts.reshape(classes, classes)
    shares = counts / numpy.maximum(1, counts.sum(1, keepdims=True))
    step = math.ceil(classes / CELLS)
    if step > 1:  # the largest of step x step cells, so that no mistake vanishes
        padded = numpy.pad(shares, [(0, -classes % step)] * 2)
        blocks = padded.reshape(len(padded) // step, step, len(padded) // step, step)
        shares = blocks.max((1, 3))
    # The square root shows mistakes of a few percent beside a full diagonal.
    extent = (-0.5, len(shares) * step - 0.5, len(shares) * step - 0.5, -0.5)
    image = axes.imshow(
        shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", extent=extent
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_title("share of\ntrue class", fontsize=8)
    percent_ticks(bar.ax.yaxis)
    bar.ax.tick_params(labelsize=8)
    note = f"\n(each cell the largest of {step} x {step} classes)" if step > 1 else ""
    axes.set(title=f"confusion matrix{note}", xlabel="predicted class", ylabel="true class")
    if classes <= NAMED:
        size = 9 if classes <= 20 else 7
        texts = [_short(name, 18) for name in names]
        upright = max(len(text) for text in texts) > 2
        axes.set_xticks(range(classes), texts, rotation=90 if upright else 0, fontsize=size)
        axes.set_yticks(range(classes), texts, fontsize=size)
    if classes <= NUMBERED:
        for row, column in zip(*counts.nonzero(), strict=True):
            count, dark = counts[row, column], shares[row, column] > 0.3
            axes.text(
                column,
                row,
                f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k",
                ha="center",
                va="center",
                fontsize=9 if count < 1000 else 7,
                color="white" if dark else "black",
            )


def most_confused(labels: numpy.ndarray, predictions: numpy.ndarray) -> list[tuple[int, int, int]]:
    """Return `(true class, predicted class, images)` of all mistakes, the most frequent first."""
    wrong = labels != predictions
    pairs, counts = numpy.unique(
        numpy.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True
    )
    order = numpy.argsort(-counts, kind="stable")
    return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]


def draw_classes(
    correct: numpy.ndarray, totals: numpy.ndarray, names: Sequence[str], path: str | Path
) -> None:
    """Draw the accuracy of each class, sorted, with 95 % confidence intervals.

    Of many classes the lowest and the highest are named, and all are drawn as a curve.

    Args:
        correct: images predicted right, by class.
        totals: images, by class; a class without images is left out.
        names: of all classes.
        path: of the PNG file.
    """
    present = numpy.flatnonzero(totals)
    shares = correct[present] / totals[present]
    order = numpy.argsort(shares, kind="stable")
    mean = correct.sum() / max(1, totals.sum())
    few = len(order) <= NAMED
    shown = order if few else numpy.concatenate([order[:LISTED], order[-LISTED // 2 :]])
    height = 0.24 * len(shown) + 1.3
    figure = new_figure(8 if few else 12.5, max(2.6, height))
    panels = figure.subplots(1, 1 if few else 2, squeeze=False)[0]
    dots = panels[0]
    # A gap between the lowest and the highest.
    places = numpy.arange(len(shown)) + (0 if few else (numpy.arange(len(shown)) >= LISTED))
    which = present[shown]
    low, high = _interval(correct[which], totals[which])
    value = shares[shown]
    dots.hlines(places, low, high, color=BLUE, lw=6, alpha=0.3)
    dots.plot(value, places, "o", color=BLUE, ms=6, clip_on=False)
    texts = [f"{_short(names[i], 28)}  ({totals[i]:,})" for i in which]
    dots.set_yticks(places, texts, fontsize=8)
    for place, share in zip(places, value, strict=True):
        text = f"{share:.1%}" if share < 1 else "100%"
        dots.text(1.015, place, text, va="center", fontsize=8, transform=dots.get_yaxis_transform())
    title = "" if few else f", {LISTED} lowest and {LISTED // 2} highest"
    dots.set_title(f"accuracy by class{title} (images)")
    dots.set_ylim(places.max() + 0.6, -0.6)
    dots.axvline(mean, color=RED, ls="--", lw=1)
    dots.set_xlabel(f"dashed: all images, {mean:.2%}; bands: 95% confidence", fontsize=9)
    # Dots, so that the axis may begin where the classes begin.
    dots.set_xlim(max(0.0, math.floor(float(low.min()) * 10 - 0.5) / 10), 1)
    dots.xaxis.get_major_locator().set_params(nbins=6)
    dots.xaxis.grid(alpha=0.3)
    dots.set_axisbelow(True)
    percent_ticks(dots.xaxis)
    dots.spines[["top", "right"]].set_visible(False)
    if not few:
        curve = panels[1]
        rank = numpy.arange(1, len(order) + 1)
        curve.fill_between(rank, shares[order], step="mid", color=BLUE, alpha=0.25)
        curve.step(rank, shares[order], where="mid", color=BLUE)
        curve.axhline(mean, color=RED, ls="--", lw=1)
        curve.set(title=f"all {len(order)} classes, sorted", xlabel="classes", xlim=(1, len(order)))
        curve.set_ylim(0, 1)
        percent_ticks(curve.yaxis)
        curve.grid(alpha=0.3)
    save(figure, path)


def draw_worst(
    images: numpy.ndarray,
    labels: Sequence[int],
    predictions: Sequence[int],
    confidences: Sequence[float],
    losses: Sequence[float],
    names: Sequence[str],
    path: str | Path,
    samples: Sequence[str] = (),
) -> None:
    """Draw images with what they are and what they were taken for.

    Args:
        images: `(n, height, width, channels)` in 0 ... 1; other than 3 channels are averaged.
        labels: true class of each.
        predictions: predicted class of each.
        confidences: probability of the predicted class.
        losses: cross-entropy of each.
        names: of all classes.
        path: of the PNG file.
        samples: file or number of each.
    """
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    figure = new_figure(2.1 * max(columns, 3), 2.8 * rows + 0.4)
    figure.suptitle(
        "test images with the highest loss (true class above; predicted class and its probability "
        "below)"
        if columns > 3
        else "test images with the highest loss"
    )
    small = max(images.shape[1:3]) < 100
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for index, axes in enumerate(figure.axes[: len(images)]):
        image = images[index] if images.shape[-1] == 3 else images[index].mean(-1)
        axes.imshow(
            image, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if small else "antialiased"
        )
        right = labels[index] == predictions[index]
        axes.set_title(_short(names[labels[index]], 22), fontsize=9, loc="left")
        axes.text(
            0,
            -0.03,
            f"{'✓' if right else '→'} {_short(names[predictions[index]], 16)}"
            f" {confidences[index]:.0%}\nloss {losses[index]:.2f}"
            + (f"\n{_end(samples[index])}" if samples else ""),
            transform=axes.transAxes,
            va="top",
            fontsize=9,
            color=BLUE if right else RED,
        )
    save(figure, path)


def _interval(correct: numpy.ndarray, totals: numpy.ndarray) -> tuple[Any, Any]:
    """Return Wilson's 95 % confidence interval of shares."""
    z = 1.96
    share = correct / totals
    center = (share + z**2 / (2 * totals)) / (1 + z**2 / totals)
    spread = share * (1 - share) / totals + z**2 / (4 * totals**2)
    half = z / (1 + z**2 / totals) * numpy.sqrt(spread)
    return numpy.maximum(0, center - half), numpy.minimum(1, center + half)


def _end(name: str, length: int = 24) -> str:
    """Return the end of a path, which tells files apart."""
    return _short(name if len(name) <= length else f"…{name[1 - length :]}", length)


def _short(name: str, length: int = 20) -> str:
    name = name.replace("$", r"\$")  # matplotlib would read mathematics
    return name if len(name) <= length else f"{name[: length - 1]}…"
