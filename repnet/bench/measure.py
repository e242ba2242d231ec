"""Measure the forms of a subject in turns; refuse to time one that computes something else."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from repnet.bench.forms import (
    FORMS,
    Form,
    Kitchen,
    Recipe,
    Skip,
    difference,
    forms_of,
    reference,
    tolerance,
)
from repnet.bench.subjects import Subject
from repnet.bench.worker import Worker, WorkerError
from repnet.complexity import count_macs, count_parameters
from repnet.deploy.latency import Turn, percentile, take_turns

ROUNDS = 10  # turns of each form
TIMED, SKIPPED, REFUSED = "timed", "skipped", "refused"
FEWEST = {"p95_ms": 20, "p99_ms": 100}  # passes, below which such a percentile says nothing


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        batches: images in a pass.
        device: `cpu` or `cuda`.
        threads: of every runtime on the CPU.
        runs: timed passes of each form, None to go by time.
        seconds: that the timed passes of each form take together, about.
    """

    batches: Sequence[int] = (1, 64)
    device: str = "cpu"
    threads: int = 1
    runs: int | None = None
    seconds: float = 5.0

    def passes(self, milliseconds: float) -> list[int]:
        """Return the passes of each turn of a form that takes so long."""
        if self.runs is not None:
            rounds = min(ROUNDS, self.runs)
            return [self.runs // rounds + (i < self.runs % rounds) for i in range(rounds)]
        return [max(1, math.ceil(self.seconds * 1e3 / ROUNDS / milliseconds))] * ROUNDS


@dataclass
class Row:
    """One form at one batch size. Times are of a whole batch; what is not known is None.

    Args:
        subject: its name.
        form: its name.
        description: of the form.
        batch: images.
        image: `(channels, height, width)` as text, such as `3x224x224`.
        status: `timed`, `skipped` or `refused`.
        reason: of a form that is not timed.
        note: what to know of its numbers.
        precision: of its arithmetic.
        threads: that it may use.
        cores: that it kept busy while it ran, on average.
        passes: timed.
        median_ms: milliseconds; so are the percentiles that follow.
        images_per_second: at the median.
        times_deploy: how many times as fast as the deploy form in eager float32 PyTorch.
        times_train: likewise, the train form.
        memory_bytes: at most, above that of a process without the network.
        difference: of its output to that of the deploy form in float64, relative to the largest.
        parameters: of the network.
        macs: multiply-adds for an image.
        top1: accuracy, a fraction.
        top1_is_own: whether that was measured on this form, and not on the deploy form, which does
            the same arithmetic.
    """

    subject: str
    form: str
    description: str
    batch: int
    image: str
    status: str = SKIPPED
    reason: str | None = None
    note: str | None = None
    precision: str = "fp32"
    threads: int | None = None
    cores: float | None = None
    passes: int | None = None
    median_ms: float | None = None
    p10_ms: float | None = None
    p25_ms: float | None = None
    p75_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    images_per_second: float | None = None
    times_deploy: float | None = None
    times_train: float | None = None
    memory_bytes: int | None = None
    difference: float | None = None
    parameters: int | None = None
    macs: int | None = None
    top1: float | None = None
    top1_is_own: bool = False


def benchmark(
    subject: Subject,
    names: Sequence[str],
    options: Options,
    progress: Callable[[str], None] = lambda text: None,
    *,
    timm: bool = False,
) -> list[Row]:
    """Return a row for each form and batch size.

    Args:
        subject: the network.
        names: of `repnet.bench.forms.check_names`.
        options: how to measure.
        progress: is told what happens.
        timm: add timm's model in eager PyTorch.
    """
    forms = forms_of(subject, names, options.device)
    if timm:
        forms["timm"] = FORMS["timm"]
    sizes = {name: _size(subject, name) for name in ("train", "deploy")}
    rows = {
        (name, batch): _row(subject, name, form, batch, options, sizes)
        for batch in options.batches
        for name, form in forms.items()
    }

    def drop(name: str, reason: str, status: str = SKIPPED) -> None:
        for (other, _), row in rows.items():
            if other == name and row.median_ms is None:
                row.status, row.reason = status, reason

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="repnet-bench-")))
        kitchen = Kitchen(subject, directory, options.device)
        recipes: dict[str, Recipe] = {}
        for name, form in forms.items():
            progress(f"{subject.name}: making {name}")
            try:
                recipes[name] = kitchen.make(form)
            except Skip as skip:
                drop(name, str(skip))
        workers: dict[str, Worker] = {}
        for name, recipe in recipes.items():
            workers[name] = Worker(recipe, options.threads)
            stack.callback(workers[name].close)
        for name in list(workers):
            progress(f"{subject.name}: loading {name}")
            try:
                workers[name].load()
            except WorkerError as error:
                drop(name, str(error))
                workers.pop(name).close()
        for batch in options.batches:
            _measure(subject, batch, workers, recipes, options, rows, drop, progress)
    found = list(rows.values())
    _compare(found)
    return found


def _measure(
    subject: Subject,
    batch: int,
    workers: dict[str, Worker],
    recipes: dict[str, Recipe],
    options: Options,
    rows: dict[tuple[str, int], Row],
    drop: Callable[..., None],
    progress: Callable[[str], None],
) -> None:
    images = _images(subject)
    passes: dict[str, list[int]] = {}
    for name in list(workers):
        progress(f"{subject.name}, batch {batch}: warming up {name}")
        recipe, row = recipes[name], rows[name, batch]
        sent = images[recipe.preprocess]
        try:
            output, milliseconds = workers[name].warm_up(sent.numpy(), batch)
        except WorkerError as error:
            drop(name, str(error))
            workers.pop(name).close()
            continue
        expected = reference(subject, recipe.form, sent, recipe.preprocess)
        row.difference = difference(torch.from_numpy(output), expected)
        allowed = tolerance(subject, recipe.form, options.device, images[False])
        if not row.difference <= allowed:  # NaN is refused, too
            reason = (
                f"its output differs by {row.difference:.1e} of the largest, allowed "
                f"{allowed:.0e}: it was not timed"
            )
            drop(name, reason, REFUSED)
            workers.pop(name).close()
            continue
        passes[name] = options.passes(milliseconds)
    if not passes:
        return
    progress(f"{subject.name}, batch {batch}: timing {len(passes)} forms in turns")
    cpu = dict.fromkeys(passes, 0.0)

    def turn(name: str, count: int) -> list[float]:
        if name not in workers:
            return []
        try:
            times, seconds = workers[name].turn(count)
        except WorkerError as error:
            lose(name, error)
            return []
        cpu[name] += seconds
        return times

    def lose(name: str, error: WorkerError) -> None:
        drop(name, str(error))
        workers.pop(name).close()

    turns: dict[str, Turn] = {name: partial(turn, name) for name in passes}
    for name, times in take_turns(turns, passes, rotate=True).items():
        if name in workers:
            try:
                rows[name, batch].memory_bytes = workers[name].memory()
            except WorkerError as error:
                lose(name, error)
            else:
                _fill(rows[name, batch], times, cpu[name])


def _images(subject: Subject) -> dict[bool, Tensor]:
    """Return two random images: float, and uint8 (True) for what normalizes them itself."""
    generator = torch.Generator().manual_seed(2)
    side = subject.preprocessing.get("resize")
    channels, *size = subject.input_shape
    size = [side, side] if side else size
    return {
        False: torch.randn(2, *subject.input_shape, generator=generator),
        True: torch.randint(256, (2, channels, *size), generator=generator, dtype=torch.uint8),
    }


def _row(
    subject: Subject,
    name: str,
    form: Form,
    batch: int,
    options: Options,
    sizes: dict[str, tuple[int, int]],
) -> Row:
    parameters, macs = sizes["train" if form.network == "train" else "deploy"]
    export = subject.export_of(form.runtime, form.precision) if form.runtime else None
    note = subject.notes.get(name)
    if form.precision == "int8" and not subject.is_artifact:
        note = "timing only: calibrated on noise"
    row = Row(
        subject.name, name, form.description, batch, "x".join(map(str, subject.input_shape)),
        note=note, precision=form.precision, parameters=parameters, macs=macs,
        threads=options.threads if options.device == "cpu" else None,
    )  # fmt: skip
    if export is not None:
        row.top1, row.top1_is_own = export.top1, export.top1 is not None
    elif form.precision == "fp32" and form.network != "timm":
        row.top1 = subject.top1.get(f"{form.network}_form")
        row.top1_is_own = row.top1 is not None and name in ("train", "deploy")
    return row


def _size(subject: Subject, form: str) -> tuple[int, int]:
    model: nn.Module = subject.train_form if form == "train" else subject.deploy_form
    return count_parameters(model), count_macs(model, subject.input_shape)


def _fill(row: Row, times: Sequence[float], cpu_seconds: float) -> None:
    row.status, row.reason, row.passes = TIMED, None, len(times)
    row.median_ms = percentile(times, 50)
    for percent in (10, 25, 75, 90, 95, 99):
        key = f"p{percent}_ms"
        if len(times) >= FEWEST.get(key, 1):
            setattr(row, key, percentile(times, percent))
    row.images_per_second = row.batch / row.median_ms * 1e3
    row.cores = cpu_seconds / sum(times) * 1e3


def _compare(rows: Sequence[Row]) -> None:
    """Fill in how many times as fast each form is as the two eager ones."""
    medians = {(row.form, row.batch): row.median_ms for row in rows}
    for row in rows:
        if row.median_ms is not None:
            deploy, train = medians.get(("deploy", row.batch)), medians.get(("train", row.batch))
            row.times_deploy = deploy and deploy / row.median_ms
            row.times_train = train and train / row.median_ms
