"""Loggers by config, offline; pictures and metrics arrive there; a resumed run goes on in them."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import nn

from repnet.callbacks import History, Pictures, StepMetrics
from repnet.callbacks.history import COLUMNS
from repnet.data import FakeImages
from repnet.errors import InputError
from repnet.spec import CONFIGS
from repnet.training import Classifier, loggers
from repnet.training.announcement import RunConfig
from repnet.training.loggers import build_loggers, close_loggers, confined_loggers
from repnet.training.profiling import build_profiler

PICTURES = {"curves", "confusion", "classes", "worst"}


def config(name: str, directory: Path) -> Any:
    text = (CONFIGS / "logger" / f"{name}.yaml").read_text()
    return yaml.safe_load(text.replace("${hydra:runtime.output_dir}", str(directory)))


SETTINGS = {"seed": 5, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.125}}
RATE = "lr-SGD/weights and identity norms"
STEPS = {"train/loss_step", "images_per_second", RATE}


def run(logger_config: Any, directory: Path, settings: dict[str, Any] = SETTINGS) -> list[Any]:
    """Train and test with the loggers of a config, and return them."""
    made = build_loggers(logger_config)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=made, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        log_every_n_steps=2, accumulate_grad_batches=2, callbacks=[
            History(directory, echo=False), Pictures(directory), RunConfig(settings, directory),
            StepMetrics(), LearningRateMonitor("step")],
    )  # fmt: skip
    data = FakeImages(image_size=2, classes=3, train_size=32, batch_size=4)
    module = Classifier(net, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.125))
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    close_loggers(made)
    return made


def test_tensorboard_and_csv_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both = {name: config(name, tmp_path) for name in ("csv", "tensorboard")}
    run(both, tmp_path)
    assert "val/top1" in (tmp_path / "csv" / "metrics.csv").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == PICTURES
    tags = {tag.replace("_", " ") for tag in events.Tags()["scalars"]}  # blanks become underscores
    expected = {"train/loss", "val/top1", "test/top1", *STEPS}
    assert {tag.replace("_", " ") for tag in expected} <= tags
    assert len(list((tmp_path / "tensorboard").glob("events.out.*"))) == 1  # training and test
    hyperparameters = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"optimizer/lr" in hyperparameters
    assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text()) == SETTINGS


def test_steps_are_logged_every_n_steps(tmp_path: Path) -> None:
    """Eight batches are four steps of two batches each, of which every second one is logged."""
    torch.manual_seed(0)
    losses: list[float] = []
    plain = Classifier.training_step

    def record(self: Classifier, *arguments: Any) -> Any:
        loss = plain(self, *arguments)
        losses.append(loss.item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", record)
        run(config("csv", tmp_path), tmp_path)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {
        int(row["step"]): float(row["train/loss_step"]) for row in rows if row["train/loss_step"]
    }
    assert logged == {
        1: pytest.approx((losses[2] + losses[3]) / 2, rel=1e-4),
        3: pytest.approx((losses[6] + losses[7]) / 2, rel=1e-4),
    }
    assert {int(row["step"]) for row in rows if row[RATE]} == {1, 3}
    assert all(float(row["images_per_second"]) > 0 for row in rows if row["train/loss_step"])
    with (tmp_path / "metrics.csv").open() as file:  # is the same with and without a logger
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_a_resumed_run_keeps_the_table_of_lightning(tmp_path: Path) -> None:
    loggers = {"0": config("csv", tmp_path)}
    run(loggers, tmp_path)
    first = tmp_path / "csv" / "metrics.csv"
    before = {first: first.read_text()}
    for session in ("session_2", "session_3"):
        loggers = confined_loggers(loggers, tmp_path)
        run(loggers, tmp_path)
        assert {table: table.read_text() for table in before} == before
        table = tmp_path / "csv" / session / "metrics.csv"
        before[table] = table.read_text()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield
    import sys

    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.mark.usefixtures("offline")
def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    identity = run(config("wandb", tmp_path), tmp_path)[0].version
    saved = next(tmp_path.glob(f"wandb/offline-run-*-{identity}"))
    assert {path.name.split("_")[0] for path in saved.rglob("*.png")} == PICTURES
    assert SETTINGS["optimizer"]["_target_"].encode() in next(saved.glob("*.wandb")).read_bytes()
    resumed = confined_loggers(config("wandb", tmp_path), tmp_path)
    assert resumed["0"]["id"] == identity
    assert resumed["0"]["offline"] is True


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = run(config("mlflow", tmp_path), tmp_path)[0]
    client, identity = logger.experiment, logger.run_id
    stored = client.get_run(identity).data
    assert {"val/top1", "test/top1", *STEPS} <= set(stored.metrics)
    assert stored.params["seed"] == "5"
    assert stored.params["optimizer/lr"] == "0.125"
    found = client.list_artifacts(identity, "pictures")
    assert {Path(item.path).stem for item in found} == PICTURES
    folder = tmp_path / "mlflow"
    assert next(folder.glob(f"*/{identity}/artifacts/pictures/worst.png"))
    resumed = confined_loggers(config("mlflow", tmp_path), tmp_path)
    assert resumed["0"]["run_id"] == identity
    run(resumed, tmp_path, {**SETTINGS, "seed": 6})  # a parameter of MLflow cannot be changed
    again = build_loggers(resumed)[0].experiment.get_run(identity)
    assert again.info.run_id == identity
    assert again.data.params["seed"] == "5"


def test_no_logger_is_an_empty_list() -> None:
    assert build_loggers(None) == build_loggers({}) == build_loggers({"csv": None}) == []


def test_a_resumed_config_keeps_names_and_nothing_else(tmp_path: Path) -> None:
    crafted = {
        "a": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": "/elsewhere",
              "name": "../../evil", "version": "/tmp/x", "flush_logs_every_n_steps": 1},
        "b": {"_target_": "pytorch_lightning.loggers.MLFlowLogger", "tracking_uri": "http://evil",
              "artifact_location": "/elsewhere", "run_name": "mine"},
    }  # fmt: skip
    first, second = confined_loggers(crafted, tmp_path).values()
    assert first == {"_target_": crafted["a"]["_target_"], "save_dir": str(tmp_path),
                     "name": "evil", "version": "x"}  # fmt: skip
    assert second == {"_target_": crafted["b"]["_target_"], "save_dir": str(tmp_path / "mlflow"),
                      "run_name": "mine"}  # fmt: skip
    up = {**crafted["a"], "name": "..", "version": ".."}
    (confined,) = confined_loggers(up, tmp_path).values()
    assert confined["name"] == confined["version"] == ""


@pytest.mark.parametrize("extra", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf'pip install "repnet\[{extra}\]"'):
        build_loggers(config(extra, tmp_path))


def test_a_profile_is_written_into_the_run(tmp_path: Path) -> None:
    assert build_profiler(None, tmp_path) is None
    data = FakeImages(image_size=2, classes=3, train_size=12, batch_size=4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, profiler=build_profiler("simple", tmp_path),
    ).test(Classifier(net, 3), data, verbose=False)  # fmt: skip
    report = (tmp_path / "profile" / "test-profile.txt").read_text()
    print(report)
    assert "test_step" in report
