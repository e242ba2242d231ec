"""What is measured while a network trains: speed, waiting, memory; how it is shown and kept."""

from __future__ import annotations

import csv
import functools
import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from repnet.callbacks import History, SafeCheckpointIO, ThroughputBar
from repnet.callbacks.history import COLUMNS, MOST_RATES, draw_curves
from repnet.callbacks.progress import StepTimer, batch_size, peak_memory
from repnet.data import FakeImages
from repnet.training import Classifier, layerwise_parameter_groups, warmup_cosine


def module(**options: Any) -> Classifier:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return Classifier(net, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.125), **options)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(**{
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 2,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "use_distributed_sampler": False, "plugins": [SafeCheckpointIO()], **options,
    }, callbacks=list(callbacks))  # fmt: skip


def images(train_size: int = 12) -> FakeImages:
    return FakeImages(image_size=2, classes=3, train_size=train_size, batch_size=4)


def rows_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Work(Callback):
    """One second of waiting before each step, three seconds of work in it, 50 of validation."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.clock.now += 1

    def on_before_backward(self, *arguments: Any) -> None:
        self.clock.now += 3

    def on_validation_start(self, *arguments: Any) -> None:
        self.clock.now += 50


def test_a_step_lasts_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = StepTimer()
    for waiting, working in ((1, 2), (3, 4)):
        clock.now += waiting
        timer.batch_start()
        clock.now += working
        timer.batch_end(8)
    clock.now += 1000
    timer.resume()
    assert (timer.images, timer.seconds, timer.waited) == (16, 10, 4)


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_waiting_is_a_share_of_training_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    history = History(tmp_path, echo=False)
    # 4 steps of 4 images an epoch; the second validation lies within it.
    run = trainer(Work(Clock(monkeypatch)), history, val_check_interval=interval)
    run.fit(module(), images(16))
    for row in rows_of(tmp_path):
        assert float(row["data_wait"]) == 0.25
        assert float(row["seconds"]) == 16
        assert float(row["images_per_second"]) == 1
        assert float(row["memory_mib"]) > 50
    assert history.images_per_second == 1


class Stop(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_resumed_run_tells_the_same_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Interrupted after any step, also within an epoch, whose row must count all of its steps."""
    tables, rates = [], []
    for directory in (tmp_path / "whole", tmp_path / "broken"):
        clock = Clock(monkeypatch)
        scheduled = functools.partial(module, scheduler=warmup_cosine)
        path = directory / "last.ckpt"
        history = History(directory, echo=False)
        broken = [Stop(step, path)] if directory.name == "broken" else []
        run = trainer(Work(clock), history, *broken, max_epochs=3)
        if broken:
            with pytest.raises(SystemExit):
                run.fit(scheduled(), images())
            clock.now += 1000
            history = History(directory, echo=False)
            run = trainer(Work(clock), history, max_epochs=3)
            run.fit(scheduled(), images(), ckpt_path=path, weights_only=True)
        else:
            run.fit(scheduled(), images())
        kept = ("epoch", "step", "learning_rate", "images_per_second", "data_wait", "seconds")
        tables.append([[row[key] for key in kept] for row in rows_of(directory)])
        rates.append(history.rates)
    assert len(tables[0]) == 3
    if step == 6:  # Lightning goes on with the next epoch, and does not end this one
        del tables[0][1]
    assert tables[0] == tables[1]
    assert [step for step, _ in rates[0]] == list(range(9))
    assert rates[0] == rates[1]


class Extra(Callback):
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("ema/top1", 0.5)


def test_what_callbacks_log_gets_a_column_and_no_value_is_repeated(tmp_path: Path) -> None:
    run = trainer(Extra(), History(tmp_path, echo=False), max_epochs=4, check_val_every_n_epoch=2)
    run.fit(module(), images())
    rows = rows_of(tmp_path)
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    assert [row["ema/top1"] for row in rows] == ["", "0.5", "", "0.5"]
    assert [bool(row["val/top1"]) for row in rows] == [False, True, False, True]
    assert all(row["train/loss"] for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_line_per_epoch_tells_speed_waiting_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(Work(Clock(monkeypatch)), History(tmp_path, echo=True)).fit(module(), images())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert "1 images/s  data wait 25%  " in lines[0]
    assert lines[0].endswith(" MiB")


@pytest.mark.parametrize(
    ("width", "end"), [(80, " 1 images/s"), (88, " data wait 25%"), (200, " MiB"), (None, " MiB")]
)
def test_the_line_of_an_epoch_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int | None, end: str
) -> None:
    monkeypatch.setattr("sys.stdout", screen := io.StringIO())
    monkeypatch.setattr(screen, "isatty", lambda: width is not None)
    monkeypatch.setenv("COLUMNS", str(width))
    trainer(Work(Clock(monkeypatch)), History(tmp_path), max_epochs=120, max_steps=2,
            limit_train_batches=1, limit_val_batches=1).fit(module(), images())  # fmt: skip
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/120  loss ")
    assert lines[-1].startswith("epoch 2/120  loss ")
    assert all(line.endswith(end) for line in lines), lines[-1]


def test_the_learning_rate_is_that_of_the_group_that_learns_fastest(tmp_path: Path) -> None:
    slow = functools.partial(layerwise_parameter_groups, decay=0.5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 3))
    sgd = functools.partial(torch.optim.SGD, lr=0.125)
    layerwise = Classifier(net, 3, optimizer=sgd, parameter_groups=slow)
    history = History(tmp_path, echo=False)
    trainer(history).fit(layerwise, images())
    assert {row["learning_rate"] for row in rows_of(tmp_path)} == {"0.125"}
    assert {rate for _, rate in history.rates} == {0.125}


def test_long_runs_keep_few_learning_rates(tmp_path: Path) -> None:
    history = History(tmp_path)
    for step in range(10 * MOST_RATES):
        if step % history.stride == 0:
            history._keep_rate(step, step / 7)
    assert MOST_RATES / 2 <= len(history.rates) <= MOST_RATES
    assert all(rate == step / 7 and step % history.stride == 0 for step, rate in history.rates)
    assert history.rates[-1][0] > 9.9 * MOST_RATES


def test_curves_of_one_epoch_are_drawn(tmp_path: Path) -> None:
    draw_curves([{"epoch": 0, "step": 3, "train/loss": 1.5}], tmp_path / "curves.png", [(0, 0.1)])
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_bar_shows_speed_waiting_memory_and_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, screen = Clock(monkeypatch), io.StringIO()
    bar = ThroughputBar(seconds=2, console_kwargs={"file": screen, "force_terminal": True,
                                                   "width": 200})  # fmt: skip
    looks: list[dict[str, Any]] = []
    original = ThroughputBar.get_metrics

    def look(self: ThroughputBar, *arguments: Any) -> dict[str, Any]:
        before = self.next_look
        metrics = original(self, *arguments)
        if self.next_look != before:
            looks.append(dict(metrics))
        return metrics

    monkeypatch.setattr(ThroughputBar, "get_metrics", look)
    try:
        trainer(Work(clock), bar, enable_progress_bar=True).fit(module(), images(32))
    finally:
        import rich

        rich.reconfigure()
    shown = looks[5]
    assert shown["images/s"] == "1"
    assert shown["data wait"] == "25%"
    assert shown["memory"].endswith(" MiB")
    assert shown["loss"] > 0
    print(screen.getvalue())
    assert "images/s: 1 data wait: 25% memory:" in screen.getvalue()


def test_the_bar_takes_one_line_of_80_columns_and_counts_epochs_from_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    screen = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    console = {"file": screen, "force_terminal": True, "width": 80}
    bar = ThroughputBar(seconds=0, console_kwargs=console)
    run = trainer(
        bar, History(tmp_path), enable_progress_bar=True, max_epochs=120, max_steps=4,
        limit_train_batches=2, limit_val_batches=0,
    )  # fmt: skip
    try:
        run.fit(module(), images(8))
    finally:
        import rich

        rich.reconfigure()
    shown = screen.getvalue()
    print(shown)
    assert "\x1b[1A" not in shown  # the cursor would go up to overwrite a second line
    assert "Epoch 1/120 " in shown
    assert "Epoch 2/120 " in shown
    assert "Epoch 0" not in shown
    assert shown.count("epoch 2/120  loss ") == 1  # its line stays


def test_the_bar_shows_the_loss_of_a_batch_also_where_several_make_a_step() -> None:
    bar = ThroughputBar(seconds=0)
    run = trainer(bar, enable_progress_bar=True, accumulate_grad_batches=4, max_epochs=1)
    bar._trainer = run
    bar.loss = torch.tensor(0.5)  # what Lightning hands over of a loss of 2
    assert bar.get_metrics(run, module())["loss"] == 2


def test_the_bar_reads_no_metric_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = ThroughputBar(seconds=3600)
    reads = []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(tensor) or 0.0)
    run = trainer(bar, enable_progress_bar=True, limit_val_batches=0, max_epochs=1)
    bar._trainer = run
    bar.loss = torch.ones(())
    bar.get_metrics(run, module())
    first = len(reads)
    assert first
    for _ in range(10):
        bar.get_metrics(run, module())
    assert len(reads) == first


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ([torch.zeros(3, 2), torch.zeros(3)], 3),
        ({"image": torch.zeros(5, 2), "label": torch.zeros(5)}, 5),
        ([["a", "b"], torch.zeros(2)], 2),
        (torch.zeros(7, 1), 7),
        (["a"], 0),
    ],
)
def test_the_size_of_any_batch(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


def test_memory_is_that_of_the_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(100 * 2**18)  # 100 MiB more than the peak, if that is held now
    after = peak_memory(torch.device("cpu"))
    assert 100 < before <= after < before + 150
    assert len(held)


def test_a_checkpoint_holds_the_history_as_plain_data(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last")
    history = History(tmp_path, echo=False)
    trainer(history, saver, enable_checkpointing=True).fit(module(), images())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["History"]
    assert saved == history.state_dict()
    assert saved["timer"][0] == 12
