"""Runs survive: killed, interrupted, on a full disk, with a damaged checkpoint."""

from __future__ import annotations

import csv
import errno
import functools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils._pytree import tree_flatten

from repnet.callbacks import (
    CheckpointWriteError,
    LastCheckpoint,
    SafeCheckpointIO,
    SaveOnInterrupt,
)
from repnet.checkpoint import FORMAT, find_valid_checkpoint, save_checkpoint
from repnet.data import FakeImages
from repnet.errors import InputError
from repnet.training import Classifier
from repnet.training.run import train
from tests.commands import ROOT, TINY, environment, run
from tests.kills import KILLED, killed

NOISY = """
from torch import nn

def noisy(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Dropout(0.2), nn.Flatten(), nn.Linear(288, num_classes))
"""

# Runs in processes of their own, forked from one that has imported everything.
DRIVER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
from hydra import compose, initialize_config_dir
import matplotlib.figure, matplotlib.backends.backend_agg
from omegaconf import OmegaConf
from repnet.callbacks import LastCheckpoint
from repnet.files import write_json, write_text
from repnet.spec import CONFIGS
from repnet.training.run import train
from tests.kills import KILLED, STAGES, kill_at, killed

def start(config, directory, resume=False, tell=None, stage=()):
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if tell:
            save = LastCheckpoint._save
            LastCheckpoint._save = lambda *args: (save(*args), os.write(tell, b"."))
        if stage:
            kill_at(*stage)
        result = train(config, directory, resume=resume, trust=["noisy"])
        write_json(directory / "result.json", result)  # as the command does
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def finish(config, directory, resume=False):
    _, status = os.waitpid(start(config, directory, resume), 0)
    assert status == 0, Path(f"{directory}.log").read_text()

def killed_at_random(config, directory, times):
    kills = 0
    for resume in [False, *[True] * (times - 1)]:
        saved, tell = os.pipe()
        pid = start(config, directory, resume, tell)
        os.close(tell)
        for _ in range(random.randint(1, 4)):  # checkpoints that it writes before it is killed
            os.read(saved, 1)
        time.sleep(random.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        os.close(saved)
    finish(config, directory, resume=True)
    return kills

def killed_at_every_stage(config, directory):
    resume = False
    for name in ("last.ckpt", "metrics.csv", "result.json"):
        for stage in STAGES:
            pid = start(config, directory, resume, stage=(stage, name))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == KILLED, Path(f"{directory}.log").read_text()
            assert any(directory.rglob(f".{name}.*")) == (stage != "before")
            resume = True
    # Of a file that the run does not write again.
    assert killed("half", directory / "other", lambda path: write_text(path, "some")) == KILLED
    finish(config, directory, resume)

cases, kills = json.loads(sys.argv[1]), {}
with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    for name, (times, drops, overrides) in cases.items():
        config = OmegaConf.to_container(compose("train", overrides), resolve=True)
        config = {k: v for k, v in config.items() if k not in ("resume", "trust")}
        if drops:
            config["model"] = {"_target_": "noisy.noisy"}
        finish(config, Path(name))
        if times == "every stage":
            killed_at_every_stage(config, Path(f"{name}_killed"))
        elif times:
            kills[name] = killed_at_random(config, Path(f"{name}_killed"), times)
print(json.dumps(kills))
"""
SHORT = ["trainer.max_epochs=2", "trainer.accelerator=cpu", "data.batch_size=64",
         "model.widths=[0.125,0.125,0.125,0.125]", "pictures=false"]  # fmt: skip
# How often it is killed at random, whether it is a small network with dropout, overrides.
CASES: dict[str, tuple[int | str, bool, list[str]]] = {
    "plain": (3, False, [*SHORT, "checkpoint.every_n_steps=3"]),
    "again": (0, False, SHORT),  # nor do the checkpoints change anything
    "accumulated": (2, True, [*SHORT, "checkpoint.every_n_steps=1",
                              "trainer.accumulate_grad_batches=4"]),
    "workers": (2, True, [*SHORT, "checkpoint.every_n_steps=4", "data.num_workers=2",
                          "optimizer=adamw"]),
    "staged": ("every stage", True, [*SHORT, "checkpoint.every_n_steps=1", "data=fake",
                                     "data.train_size=256", "data.image_size=8"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    directory = tmp_path_factory.mktemp("runs")
    (directory / "noisy.py").write_text(NOISY)
    (directory / "driver.py").write_text(DRIVER)
    result = subprocess.run(
        [sys.executable, "driver.py", json.dumps(CASES)],
        cwd=directory, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return directory, json.loads(result.stdout.splitlines()[-1])


def names(directory: Path) -> list[str]:
    """Return the names of all files and directories below `directory`."""
    return sorted(path.name for path in directory.rglob("*"))


def last(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_end(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    states = [
        {key: contents[key] for key in ("global_step", "epoch", "state_dict", "optimizer_states",
                                        "lr_schedulers")}
        | {"random": contents["callbacks"]["RandomState"]}
        for contents in (a, b)
    ]  # fmt: skip
    (leaves, structure), (others, other_structure) = map(tree_flatten, states)
    assert structure == other_structure
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) > 10
    for leaf, other_leaf in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            torch.testing.assert_close(leaf, other_leaf, rtol=0, atol=0)
        else:
            assert leaf == other_leaf


def test_two_unbroken_runs_end_with_the_same_bits(runs: tuple[Path, dict[str, int]]) -> None:
    assert_same_end(runs[0] / "plain", runs[0] / "again")


@pytest.mark.parametrize("name", ["plain", "accumulated", "workers"])
def test_a_killed_run_ends_with_the_same_bits(runs: tuple[Path, dict[str, int]], name: str) -> None:
    directory, kills = runs
    assert kills[name] > 0
    assert_same_end(directory / name, directory / f"{name}_killed")
    with (directory / f"{name}_killed" / "metrics.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [0, 1]
    assert names(directory / f"{name}_killed") == names(directory / name)


def test_a_run_that_is_killed_at_every_stage_of_a_write_ends_with_the_same_bits(
    runs: tuple[Path, dict[str, int]],
) -> None:
    directories = runs[0] / "staged", runs[0] / "staged_killed"
    assert_same_end(*directories)
    ends = []
    for directory in directories:
        with (directory / "metrics.csv").open() as file:
            rows = [(row["train/loss"], row["val/top1"]) for row in csv.DictReader(file)]
        result = json.loads((directory / "result.json").read_text())
        ends.append((names(directory), rows, result["test"], result["val"], result["steps"]))
    assert ends[0] == ends[1]


class Interrupted(Classifier):
    """Sends a signal to itself in the third batch of the first epoch."""

    number: int = signal.SIGINT

    def training_step(self, batch: Any, batch_index: int) -> Any:
        if batch_index == 2 and self.current_epoch == 0:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_index)


def fit(module: LightningModule, callbacks: list[Any], **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[SafeCheckpointIO()], callbacks=callbacks, use_distributed_sampler=False,
        **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module, FakeImages(image_size=2, classes=3, train_size=32, batch_size=4))
    return trainer


def linear(kind: type[Classifier] = Classifier) -> Any:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return kind(net, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_saves_after_the_step(tmp_path: Path, number: int, accumulate: int) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    path = tmp_path / "last.ckpt"
    module = linear(Interrupted)
    module.number = number
    with pytest.raises(SystemExit):  # Lightning's answer to KeyboardInterrupt
        fit(module, [LastCheckpoint(path), SaveOnInterrupt(path)],
            accumulate_grad_batches=accumulate)  # fmt: skip
    batches = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert batches["current"]["processed"] == (3 if accumulate == 1 else 4)
    signal.signal(signal.SIGINT, before[signal.SIGINT])  # Lightning ignores it from then on
    assert {n: signal.getsignal(n) for n in before} == before


def test_signals_that_queue_the_job_again_are_left_alone(tmp_path: Path) -> None:
    """Under SLURM, Lightning installs such a handler, and one for SIGTERM that does nothing."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    module = linear(Interrupted)
    module.number = signal.SIGUSR1
    try:
        trainer = fit(module, [SaveOnInterrupt(tmp_path / "last.ckpt")])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]
    assert trainer.global_step == 16


PREEMPTED = """
import os, signal, sys
from repnet.cli.train import main
from repnet.training import Classifier

original = Classifier.training_step

def step(self, batch, batch_index):
    if batch_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, batch, batch_index)

Classifier.training_step = step
sys.argv = ["train.py", *{arguments}]
main()
"""


LIGHTNING = [
    "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/loss}",
    "+callbacks.rate={_target_: pytorch_lightning.callbacks.LearningRateMonitor}",
    "logger=csv",
    "+trainer.strategy={_target_: pytorch_lightning.strategies.SingleDeviceStrategy, device: cpu}",
]
OWN = """
import pytorch_lightning as pl
import torch
from repnet.data import FakeImages

class Told(pl.Callback):
    pass

class Images(FakeImages):
    pass

class Loss(torch.nn.CrossEntropyLoss):
    pass
"""
FOREIGN = [
    "+callbacks.told={_target_: told.Told}",
    "+callbacks.saved={_target_: pytorch_lightning.callbacks.ModelCheckpoint, filename: mine}",
    "data._target_=images.Images",
    "+data.augment=[{_target_: torch.nn.Identity}]",
    "loss._target_=loss.Loss",
]


@pytest.mark.parametrize(
    ("options", "trust", "missing"),
    [
        ([], [], []),
        (LIGHTNING, [], []),
        (FOREIGN, ["images", "loss", "pytorch_lightning", "told", "torch"],
         ["images", "loss", "told"]),
    ],
    ids=["plain", "lightning", "foreign"],
)  # fmt: skip
def test_a_preempted_command_says_how_to_go_on(
    tmp_path: Path, options: list[str], trust: list[str], missing: list[str]
) -> None:
    for name in ("told", "images", "loss"):
        (tmp_path / f"{name}.py").write_text(OWN)
    arguments = [*TINY, "data.train_size=64", "hydra.run.dir=run", *options]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    result = subprocess.run(
        [sys.executable, "-c", PREEMPTED.format(arguments=arguments)],
        cwd=tmp_path, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 130, result.stdout + result.stderr
    assert last(tmp_path / "run")["global_step"] == 2
    command = shlex.split(result.stdout.splitlines()[-1])
    told = [f"trust=[{','.join(trust)}]"] if trust else []
    assert command == ["python", "train.py", f"resume={tmp_path / 'run'}", *told]
    if missing:
        refused = run("train.py", command[2], cwd=tmp_path, code=2, PYTHONPATH=path)
        assert f"add trust=[{','.join(missing)}]" in refused.stderr
    run("train.py", *command[2:], cwd=tmp_path, PYTHONPATH=path)
    assert last(tmp_path / "run")["global_step"] == 4


def checkpoint(step: int) -> dict[str, Any]:
    entry = {"format": FORMAT, "version": 1, "form": "train", "config": {}}
    return {"repnet": entry, "state_dict": {"x": torch.randn(1000)}, "global_step": step}


def test_the_last_valid_checkpoint_is_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to resume: '.*last.ckpt' does not exist"):
        find_valid_checkpoint(tmp_path)
    for age, name in enumerate(["best", "older", "last"]):
        save_checkpoint(checkpoint(age), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (0, 1000 - age))
    assert find_valid_checkpoint(tmp_path) == (tmp_path / "last.ckpt", "")
    whole = (tmp_path / "last.ckpt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # among the numbers
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b""):
        (tmp_path / "last.ckpt").write_bytes(damaged)
        path, problem = find_valid_checkpoint(tmp_path)
        assert path == tmp_path / "best.ckpt"
        assert f"'{tmp_path / 'last.ckpt'}' is" in problem
    (tmp_path / "last.ckpt").unlink()
    assert find_valid_checkpoint(tmp_path)[1] == f"'{tmp_path / 'last.ckpt'}' does not exist"
    (tmp_path / "best.ckpt").write_bytes(b"")
    assert find_valid_checkpoint(tmp_path)[0] == tmp_path / "older.ckpt"
    (tmp_path / "older.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match=r"nothing to resume: .*older.ckpt' is .*best.ckpt' is "):
        find_valid_checkpoint(tmp_path)


def test_a_run_goes_on_from_the_best_checkpoint_where_the_last_is_damaged(
    runs: tuple[Path, dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(runs[0] / "plain", directory)
    (directory / "checkpoints" / "last.ckpt").write_bytes(b"PK half a file")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["trainer"]["max_epochs"] = 3
    result = train(config, directory, resume=True)
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith(f"continuing from '{directory / 'checkpoints' / 'best.ckpt'}': ")
    assert "last.ckpt' is" in told
    assert result["epochs"] == 3
    assert last(directory)["global_step"] == 3 * 19


def test_a_run_without_a_checkpoint_starts_again(
    runs: tuple[Path, dict[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((runs[0] / "plain" / "config.yaml").read_text())
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2}
    assert train(config, tmp_path / "run", resume=True)["steps"] == 2
    assert "holds no checkpoint yet" in capsys.readouterr().out


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "last.ckpt", SafeCheckpointIO()
    with file_size_limit(2000), pytest.raises(CheckpointWriteError, match="no earlier one"):
        writer.save_checkpoint(checkpoint(1), path)
    assert list(tmp_path.iterdir()) == []
    writer.save_checkpoint(checkpoint(1), path)
    whole = path.read_bytes()
    with (
        file_size_limit(2000),
        pytest.raises(
            CheckpointWriteError, match=r"MB are free there\); the earlier one, of step 1,"
        ),
    ):
        writer.save_checkpoint(checkpoint(2), path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointWriteError, match=r"the disk is full .*Make room, then resume"):
        writer.save_checkpoint(checkpoint(2), path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_checkpoints_are_written_by_time_and_what_a_killed_write_left_is_removed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "last.ckpt"
    assert killed("half", tmp_path / "best.ckpt", lambda best: save_checkpoint({}, best)) == KILLED
    assert len(list(tmp_path.iterdir())) == 2
    saved = []

    class Recorded(SafeCheckpointIO):
        def save_checkpoint(self, contents: dict[str, Any], *args: Any, **_: Any) -> None:
            saved.append(contents["global_step"])
            super().save_checkpoint(contents, path)

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[Recorded()], callbacks=[LastCheckpoint(path, every_minutes=0)], max_epochs=1,
        accumulate_grad_batches=3, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(linear(), FakeImages(image_size=2, classes=3, train_size=32, batch_size=4))
    assert saved == [1, 2, 3]  # 8 batches; the last step counts when the epoch is over
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
