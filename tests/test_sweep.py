"""Sweeps with every launcher and sweeper, as a user runs them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repnet.callbacks import History, PruneTrial
from repnet.cli import sweep, trials
from repnet.cli.sweep_plot import _Scale, draw_sweep
from repnet.errors import InputError
from tests.commands import ROOT, environment, run

SMALL = ["data=digits", "augment=none", "model.widths=[0.125,0.125,0.125,0.125]", "block=plain",
         "trainer.max_epochs=1", "trainer.accelerator=cpu", "+trainer.limit_train_batches=4",
         "hydra.sweep.dir=sweep", "pictures=false"]  # fmt: skip


def table(directory: Path, name: str = "sweep.csv") -> list[dict[str, str]]:
    with (directory / "sweep" / name).open() as file:
        return list(csv.DictReader(file))


def test_joblib_runs_groups_seeds_and_continues_with_more(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    values = ["optimizer.lr=0.01,0.1"]
    result = run("train.py", "-m", *SMALL, *values, "seed=0", "sweep=joblib", cwd=tmp_path)
    first = {row["job"]: row for row in table(tmp_path)}
    assert len(first) == 2
    assert "best first" in result.stdout
    # The jobs of the second call have other numbers; what is there is found by its values.
    again = run("train.py", "-m", *SMALL, "seed=0,1", *values, cwd=tmp_path)
    assert again.stdout.count("is finished") == 2
    rows = table(tmp_path)
    assert len(rows) == 4
    assert {(row["optimizer.lr"], row["seed"]) for row in rows} == {
        (rate, seed) for rate in ("0.01", "0.1") for seed in ("0", "1")
    }
    for row in rows:
        if row["job"] in first:
            assert row == first[row["job"]]
    groups = table(tmp_path, "sweep_seeds.csv")
    assert [group["seeds"] for group in groups] == ["2", "2"]
    for group in groups:
        scores = [float(r["val_top1"]) for r in rows if r["optimizer.lr"] == group["optimizer.lr"]]
        assert float(group["val_top1"]) == pytest.approx(sum(scores) / 2)
        assert float(group["val_top1_std"]) == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    with Image.open(tmp_path / "sweep" / "sweep.png") as image:
        assert image.size[0] > 400


def test_submitit_runs_jobs_as_slurm_would(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run("train.py", "-m", *SMALL, "seed=0,1", "sweep=slurm_local", cwd=tmp_path)
    assert [row["status"] for row in table(tmp_path)] == ["done", "done"]
    shown = run("train.py", "--cfg", "hydra", "sweep=slurm", cwd=tmp_path)
    assert "SlurmLauncher" in shown.stdout
    assert "timeout_min: 1440" in shown.stdout


def test_ray_starts_its_own_cluster(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    pytest.importorskip("ray")
    run("train.py", "-m", *SMALL, "seed=0,1", "sweep=ray", cwd=tmp_path,
        RAY_USAGE_STATS_ENABLED="0")  # fmt: skip
    assert [row["status"] for row in table(tmp_path)] == ["done", "done"]


def test_optuna_prunes_survives_nan_and_continues(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    options = [*SMALL, "sweep=optuna", "optimizer.lr=0.1,1e-9,1e38", "trainer.max_epochs=3",
               "hydra/sweeper/sampler=grid",
               "callbacks=[prune]", "callbacks.prune.warmup_epochs=1",
               "callbacks.prune.min_trials=1"]  # fmt: skip
    run("train.py", "-m", *options, "hydra.sweeper.n_trials=3", cwd=tmp_path, code=1)
    status = {row["optimizer.lr"]: row["status"] for row in table(tmp_path)}
    assert status["1e+38"] == "failed"
    storage = f"sqlite:///{tmp_path}/sweep/optuna.db"
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [t.state.name for t in study.trials].count("COMPLETE") == 2
    assert [t.state.name for t in study.trials].count("FAIL") == 1

    study.ask()  # of a search that was killed
    result = run("train.py", "-m", *options, "hydra.sweeper.n_trials=3", cwd=tmp_path, code=1)
    assert "continuing a study of 2 trials, 1 to go" in result.stdout
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [t.state.name for t in study.trials].count("RUNNING") == 0
    assert {row["optimizer.lr"] for row in table(tmp_path)} == set(status)
    assert len(table(tmp_path)) == 3  # what failed was tried again where it was


def test_a_search_in_which_every_trial_fails_ends_with_the_table(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    options = [*SMALL, "sweep=optuna", "optimizer.lr=interval(0.1,0.2)", "hydra.sweeper.n_trials=2"]
    result = run("train.py", "-m", *options, "data.batch_size=9999", cwd=tmp_path, code=1)
    assert "Traceback" not in result.stderr
    assert "error: 2 of 2 jobs failed" in result.stderr
    assert "job 1 failed: data.batch_size=9999 does not fit" in result.stdout
    assert [row["status"] for row in table(tmp_path)] == ["failed", "failed"]


def test_a_learning_rate_is_not_looked_for_in_a_sweep(tmp_path: Path) -> None:
    result = run("train.py", "-m", *SMALL, "lr_find=true", "seed=0", cwd=tmp_path, code=1)
    assert "job 0 failed: lr_find=true" in result.stdout


def test_lists_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job, value in enumerate(("[ema]", "[/ema,prune]")):
        (tmp_path / str(job)).mkdir()
        record = json.dumps({"overrides": [f"callbacks={value}"]})
        (tmp_path / str(job) / trials.RECORD).write_text(record)
    sweep.summarize(tmp_path)
    shown = capsys.readouterr().out
    assert "[ema]" in shown
    assert "[/ema,prune]" in shown


@pytest.mark.parametrize(
    "contents", [b"", b"[]", b"\xff", b'{"val": {}, "test": {}}', b'{"overrides": ["seed=3"]}']
)
def test_a_trial_whose_files_are_damaged_counts_as_unfinished(
    tmp_path: Path, contents: bytes
) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / trials.RECORD).write_text('{"overrides": ["seed=3"]}')
    (tmp_path / "3" / "result.json").write_bytes(contents)
    (tmp_path / "3" / "metrics.csv").write_bytes(b"\xff")
    (row,) = sweep.collect(tmp_path)
    assert row["seed"] == "3"
    assert row["error"] == "was killed or cut off after 0 epochs"
    (tmp_path / "3" / trials.RECORD).write_bytes(contents)
    (row,) = sweep.collect(tmp_path)
    assert row["status"] == "unfinished"
    with trials.claim(tmp_path, tmp_path / "3", ["seed=4"]) as directory:
        assert directory != tmp_path / "3"


def test_a_killed_trial_is_in_the_table_and_resumes(tmp_path: Path) -> None:
    options = [*SMALL, "seed=0,1", "trainer.max_epochs=15"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *options],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = sweep.collect(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["unfinished"]
    assert "killed or cut off after" in rows[0]["error"]
    done = torch.load(checkpoint, weights_only=True)["epoch"]

    result = run("train.py", "-m", *options, cwd=tmp_path)
    assert [row["status"] for row in table(tmp_path)] == ["done", "done"]
    with (tmp_path / "sweep" / "0" / "metrics.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(15))
    if done:  # what was done before is not done again
        assert result.stdout.count("epoch 1/15") == 1
    assert result.stdout.count("epoch 15/15") == 2


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_worker_that_is_killed_leaves_the_table_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from pytorch_lightning import Callback\n"
        "class Deadly(Callback):\n"
        "    def on_train_epoch_start(self, trainer, pl_module):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = run("train.py", "-m", *SMALL, "seed=0", "optimizer.lr=0.1,0.2", "sweep=joblib",
                 "+callbacks.deadly._target_=deadly.Deadly", cwd=tmp_path, code=1,
                 PYTHONPATH=f"{ROOT}:{tmp_path}")  # fmt: skip
    assert {row["status"] for row in table(tmp_path)} == {"unfinished"}
    assert "Continue with:\npython train.py -m" in result.stdout


def test_a_missing_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_installed", lambda module: False)
    for choice, extra in [("sweep=[optuna,joblib]", "sweeps"), ("hydra/launcher=ray", "ray")]:
        with pytest.raises(InputError, match=rf"repnet\[{extra}\]"):
            sweep.require_plugins(["-m", choice])
    sweep.require_plugins(["-m", "sweep=mine", "block=ac"])


def test_a_job_is_known_by_its_overrides_and_held_by_one_process(tmp_path: Path) -> None:
    with trials.claim(tmp_path, tmp_path / "0", ["a=1", "b=2"]) as first:
        assert first == tmp_path / "0"
        with trials.claim(tmp_path, tmp_path / "1", ["b=2", "a=1"]) as busy:
            assert busy == tmp_path / "1"  # drawn twice at the same time
        with trials.claim(tmp_path, tmp_path / "0", ["a=3"]) as other:
            assert other == tmp_path / "2"
    with trials.claim(tmp_path, tmp_path / "7", ["b=2", "a=1", "sweep=joblib"]) as again:
        assert again == tmp_path / "0"
    with trials.claim(tmp_path, tmp_path / "7", ["a=3"], main=False) as follower:
        assert follower == tmp_path / "2"
    assert not (tmp_path / "7").exists()


@pytest.mark.parametrize("keys", [["block"], ["lr"], ["block", "lr"], ["block", "lr", "n"], []])
def test_pictures_take_what_sweeps_leave(tmp_path: Path, keys: list[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"job": "0", "block": "ac", "lr": "0.1", "n": "1", "val_top1": 0.9},
        {"job": "1", "block": "null", "lr": "1e-05", "n": "1", "val_top1": None},
        {"job": "2", "block": "a" * 60, "lr": "0.1", "val_top1": 0.9},
        {"job": "3", "block": r"$\q{$", "lr": "0.1", "val_top1": 0.8},
    ]
    draw_sweep(rows, keys, tmp_path / "sweep.png")
    draw_sweep(rows[:1], keys, tmp_path / "one.png")
    with Image.open(tmp_path / "sweep.png") as image:
        assert min(image.size) > 250


class Scripted(LightningModule):
    """Scores what it is told."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.scores = scores

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val/top1", self.scores[self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def epochs_of(directory: Path, name: str, scores: list[float], **options: Any) -> int:
    loader = DataLoader(torch.ones(2, 1))  # type: ignore[arg-type]
    run_directory = directory / name
    run_directory.mkdir()
    prune = PruneTrial(directory, **{"warmup_epochs": 2, "min_trials": 3, **options})
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, default_root_dir=run_directory,
        callbacks=[prune, History(run_directory, echo=False)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Scripted(scores), loader, loader)
    return trainer.current_epoch


def test_a_trial_below_the_median_is_stopped(tmp_path: Path) -> None:
    bad = [0.1, 0.1, 0.1, 0.1]
    assert epochs_of(tmp_path, "0", bad) == 4  # nothing to compare with
    assert epochs_of(tmp_path, "1", [0.5, 0.6, 0.7, 0.8]) == 4
    assert epochs_of(tmp_path, "2", [0.4, 0.5, 0.9, 0.9]) == 4  # two others are not enough
    # Medians of the best until then: 0.5 after two epochs, 0.7 after three.
    assert epochs_of(tmp_path, "3", [0.45, 0.2, 0.1, 0.1]) == 2
    assert json.loads((tmp_path / "3" / "pruned.json").read_text())["median"] == 0.5
    assert epochs_of(tmp_path, "4", [0.55, 0.1, 0.6, 0.99]) == 3  # its best counts after two
    assert epochs_of(tmp_path, "5", [0.0, 0.6, 0.8, 0.0]) == 4
    assert not (tmp_path / "5" / "pruned.json").exists()
    assert epochs_of(tmp_path, "6", bad, mode="min") == 4
    (tmp_path / "1" / "metrics.csv").write_text("epoch\n2")  # damaged: it does not count
    (tmp_path / "2" / "metrics.csv").unlink()
    assert epochs_of(tmp_path, "8", bad, min_trials=7) == 4
    with pytest.raises(InputError, match="nothing is logged as 'val/typo'"):
        epochs_of(tmp_path, "7", bad, monitor="val/typo")


@pytest.mark.parametrize(
    ("values", "log"),
    [
        (["0", "0.0001", "0.001", "0.01"], True),
        (["0.05", "0.1", "0.2", "0.4"], True),
        (["0.1", "0.11", "10"], True),
        (["10", "20", "30", "100"], True),
        (["10", "20", "30", "40", "50", "60", "70", "80", "90", "100"], False),
        (["1", "2", "3"], False),
        (["-1", "100"], False),
    ],
)
def test_values_of_several_decades_are_drawn_on_a_logarithmic_axis(
    values: list[str], log: bool
) -> None:
    scale = _Scale("optimizer.lr", values)
    places = [scale.place(value) for value in values]
    assert scale.log is log
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 1)
    ticks = [place for place, _ in scale.ticks]
    assert all(after - before >= 0.05 for before, after in pairwise(ticks))
