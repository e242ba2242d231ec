"""`python train.py`, as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from repnet.cli.command import quoted
from repnet.errors import InputError
from repnet.training.run import _only_one, train
from tests.commands import ROOT, TINY, environment, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("train") / "run"
    result = run(
        "train.py", f"hydra.run.dir={directory}", "trainer.max_epochs=2", "logger=tensorboard",
        cwd=directory.parent,
    )  # fmt: skip
    return directory, result.stdout


def test_a_run_leaves_everything_that_is_promised(finished: tuple[Path, str]) -> None:
    directory, output = finished
    result = json.loads((directory / "result.json").read_text())
    assert 0.5 < result["test"]["top1"] <= 1
    assert result["images_per_second"] > 0
    assert result["wall_seconds"] > 0
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert Path(result["best_checkpoint"]) == directory / "checkpoints" / "best.ckpt"
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert all(float(row["train/loss"]) > 0 and float(row["val/top1"]) > 0 for row in rows)
    with Image.open(directory / "curves.png") as image:
        assert image.size[0] > 400
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["model"]["num_classes"] == 10
    (events,) = (directory / "tensorboard").iterdir()  # one file for training and test
    logged = events.read_bytes()
    for tag in (b"train/loss_step", b"images_per_second", b"lr-SGD/", b"optimizer/lr"):
        assert tag in logged
    assert result["recall"].keys() == {str(n) for n in range(10)}
    name, lowest = min(result["recall"].items(), key=lambda item: item[1])
    assert re.search(rf"lowest of classes +│ +{lowest:.2%}, {name} │", output)
    assert re.search(rf"test F1, mean of classes +│ +{result['test']['f1']:.2%} │", output)
    last = output.strip().splitlines()[-1]
    assert last == f"python deploy.py ckpt={directory}/checkpoints/best.ckpt"


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoints_hold_only_tensors_and_plain_data(
    finished: tuple[Path, str], name: str
) -> None:
    path = finished[0] / "checkpoints" / f"{name}.ckpt"
    contents = torch.load(path, weights_only=True)
    assert contents["repnet"]["form"] == "train"
    assert contents["repnet"]["data"]["class_names"] == [str(n) for n in range(10)]


def test_a_directory_that_holds_a_run_is_not_overwritten(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    before = (directory / "checkpoints" / "best.ckpt").read_bytes()
    result = run("train.py", f"hydra.run.dir={directory}", cwd=directory.parent, code=2)
    assert f"resume={directory}" in result.stderr
    assert (directory / "checkpoints" / "best.ckpt").read_bytes() == before


def test_resume_keeps_the_config_but_for_values(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    refused = run("train.py", f"resume={directory}", "model=repvgg_a0", cwd=ROOT, code=2)
    assert "cannot be combined with resume" in refused.stderr


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    directory = tmp_path / "it's a run"  # a path that needs quotes
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={quoted(directory)}",
         "trainer.max_epochs=4"],
        cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("epoch 2/4"):
            process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130, "".join(seen) + errors
    command = shlex.split(seen[-1])
    assert command[:2] == ["python", "train.py"]
    run("train.py", *command[2:], cwd=tmp_path)
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in rows] == [39 * n for n in (1, 2, 3, 4)]
    assert all(float(row["images_per_second"]) > 1 for row in rows)
    assert (directory / "result.json").exists()


@pytest.mark.parametrize("key", ["model", "data", "optimizer", "trainer", "loss"])
def test_a_resumed_config_runs_only_what_it_may(
    finished: tuple[Path, str], tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config[key] = {"_target_": "evil.attack"}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'evil.attack' may not be built from a file"):
        train(config, directory, resume=True)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("key", ["callbacks", "objective"])
def test_a_resumed_config_sends_nothing_to_a_server(finished: tuple[Path, str], key: str) -> None:
    directory = finished[0]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    logger = {"_target_": "pytorch_lightning.loggers.MLFlowLogger", "tracking_uri": "http://evil"}
    crafted = {"_target_": "repnet.callbacks.pictures.send_picture", "loggers": [logger],
               "path": str(directory / "config.yaml")}  # fmt: skip
    config[key] = {"x": crafted} if key == "callbacks" else {**config[key], "base": crafted}
    with pytest.raises(InputError, match=r"MLFlowLogger' may not be built from a file"):
        train(config, directory, resume=True)


def test_an_override_that_would_do_nothing_is_refused(finished: tuple[Path, str]) -> None:
    refused = run("train.py", f"resume={finished[0]}", "optimizer.lr=0.001", cwd=ROOT, code=2)
    assert "optimizer cannot be changed in a resumed run" in refused.stderr


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("model=repvgg_a00", "repvgg_a0"), ("block=residul", "residual"), ("data=digit", "digits")],
)
def test_unknown_names_are_answered_with_the_nearest(
    tmp_path: Path, override: str, nearest: str
) -> None:
    result = run("train.py", override, cwd=tmp_path, code=2)
    assert f"did you mean '{nearest}'?" in result.stderr
    assert "Choose one of:" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data=mnist", "data.download=true"),
        ("data=imagefolder", "data.root is required"),
        ("+optimizer.learning_rate=1", "learning_rate"),
        ("trainer.precision=8", "Precision"),
        ("resume=nowhere", "is not a run"),
        (f"resume={__file__}", "is a file; pass the directory of the run"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    tmp_path: Path, override: str, reason: str
) -> None:
    result = run("train.py", override, "trainer.accelerator=cpu", "hydra.run.dir=run", cwd=tmp_path,
                 code=2)  # fmt: skip
    assert result.stderr.startswith("error: ")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the advice is for machines without a GPU")
@pytest.mark.parametrize("command", [[], ["eval={run}"]])
def test_only_a_missing_gpu_is_answered_with_the_cpu(
    tmp_path: Path, finished: tuple[Path, str], command: list[str]
) -> None:
    arguments = [word.format(run=finished[0]) for word in command]
    for override, advised in (("trainer=gpu", True), ("trainer.precision=8", False)):
        done = run("train.py", *arguments, override, "hydra.run.dir=run", cwd=tmp_path, code=2)
        assert done.stderr.startswith("error: the trainer cannot be set up: ")
        assert done.stderr.endswith(". Without a GPU, use trainer=cpu\n") == advised, done.stderr


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    result = run("train.py", "optimizer.lr=1e30", "hydra.run.dir=run", cwd=tmp_path, code=1)
    assert "the loss is nan at step 2" in result.stderr
    assert "learning rate 5.13e+28" in result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 30), (index * 60, 0, 90)).save(folder / f"{index}.png")
    bad = tmp_path / "images" / "train" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:50])
    result = run("train.py", "data=imagefolder", f"data.root={tmp_path / 'images'}",
                 "data.image_size=16", "data.batch_size=4", "data.num_workers=1",
                 "trainer.accelerator=cpu", cwd=tmp_path, code=2)  # fmt: skip
    assert f"cannot read the image '{bad}'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("block", ["residual", "composed"])
def test_a_network_is_assembled_from_config(tmp_path: Path, block: str) -> None:
    model = "repvgg_a0" if block == "residual" else "repvgg_tiny"
    run("train.py", f"model={model}", f"block={block}", *TINY, "hydra.run.dir=run", cwd=tmp_path)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["block"]["_target_"].lower() == f"repnet.blocks.{block}block"
    run("deploy.py", "ckpt=run", cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "deploy" / "report.json").read_text())
    assert report["verified"]
    assert report["fold"]["left"] == []


def test_a_network_of_ones_own_is_named_in_the_next_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from repnet.blocks import PlainBlock\n\nclass MyBlock(PlainBlock):\n    pass\n"
    )
    (tmp_path / "configs" / "block").mkdir(parents=True)
    (tmp_path / "configs" / "block" / "my.yaml").write_text(
        "_target_: mine.MyBlock\n_partial_: true\n"
    )
    path = f"{ROOT}:{tmp_path}"
    result = run("train.py", "--config-dir", "configs", "block=my", *TINY, cwd=tmp_path,
                 PYTHONPATH=path)  # fmt: skip
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[-1] == "trust=[mine]"
    refused = run("deploy.py", command[2], cwd=tmp_path, code=2, PYTHONPATH=path)
    assert "trust=[mine]" in refused.stderr
    run("deploy.py", *command[2:], cwd=tmp_path, PYTHONPATH=path)


def test_a_sweep_ends_with_a_table_and_survives_a_failing_job(tmp_path: Path) -> None:
    result = run("train.py", "-m", *TINY, "hydra.sweep.dir=sweep", "block=plain,residual",
                 "optimizer.lr=0.05,1e38", cwd=tmp_path, code=1)  # fmt: skip
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert [row["status"] for row in rows] == ["done", "done", "failed", "failed"]
    scores = [float(row["val_top1"]) for row in rows[:2]]
    assert scores == sorted(scores, reverse=True)
    assert {(row["block"], row["optimizer.lr"]) for row in rows} == {
        (block, rate) for block in ("plain", "residual") for rate in ("0.05", "1e+38")
    }
    assert all("the loss is" in row["error"] for row in rows[2:])
    assert all((Path(row["directory"]) / "result.json").exists() for row in rows)
    assert "2 of 4 jobs failed" in result.stderr
    assert "best first" in result.stdout


@pytest.mark.parametrize("script", ["train.py", "deploy.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_config_need_no_torch(tmp_path: Path, script: str, flags: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    paths = f"{tmp_path}:{ROOT}"
    result = run(script, *flags, cwd=tmp_path, PYTHONPATH=paths)
    assert "hydra" in result.stdout or "ckpt" in result.stdout or "trainer" in result.stdout


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    return directory


def last_checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_crafted_run_directory_deletes_and_writes_nothing_elsewhere(copied: Path) -> None:
    victim = copied.parent / "victim"
    (victim / "kept").mkdir(parents=True)
    contents = last_checkpoint(copied)
    path = f"{copied}/checkpoints/../../victim"
    for key, state in contents["callbacks"].items():
        if "val/top1" in key:
            low = torch.tensor(-1.0)
            state.update(best_k_models={path: low}, kth_best_model_path=path, kth_value=low,
                         best_model_path=path, best_model_score=low)  # fmt: skip
    torch.save(contents, copied / "checkpoints" / "last.ckpt")
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["logger"] = {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(victim),
                        "name": "../victim", "version": "x"}  # fmt: skip
    config["callbacks"] = {"x": {"_target_": "repnet.callbacks.Pictures", "_args_": [str(victim)]}}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    (copied / "curves.png").unlink()
    (copied / "curves.png").symlink_to(victim / "curves.png")
    run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=copied.parent)
    assert [path.name for path in victim.iterdir()] == ["kept"]


def test_a_moved_run_keeps_its_best_score(copied: Path) -> None:
    """The copy knows no path of the original, and overwrites its best only with a better one."""
    shutil.copy(copied / "checkpoints" / "best.ckpt", copied / "before.ckpt")
    contents = last_checkpoint(copied)
    for key, state in contents["callbacks"].items():
        if "val/top1" in key:
            high = torch.tensor(2.0)
            state.update(best_k_models=dict.fromkeys(state["best_k_models"], high), kth_value=high,
                         best_model_score=high)  # fmt: skip
    torch.save(contents, copied / "checkpoints" / "last.ckpt")
    run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=copied.parent)
    kept = (copied / "checkpoints" / "best.ckpt").read_bytes()
    assert kept == (copied / "before.ckpt").read_bytes()
    result = json.loads((copied / "result.json").read_text())
    assert result["best_checkpoint"] == str(copied / "checkpoints" / "best.ckpt")


def test_an_override_that_does_not_fit_leaves_the_run_as_it_was(copied: Path) -> None:
    config = (copied / "config.yaml").read_text()
    refused = run("train.py", f"resume={copied}", "model.widths=[1,1,1,1]", cwd=ROOT, code=2)
    assert "do not fit its network" in refused.stderr
    assert (copied / "config.yaml").read_text() == config
    for checkpoint in (copied / "checkpoints").glob("*.ckpt"):
        checkpoint.write_bytes(b"PK half a file")
    truncated = run("train.py", f"resume={copied}", cwd=ROOT, code=2)
    assert "damaged" in truncated.stderr


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.max_epochs=1", "trainer.max_epochs=1 lies behind the run, which has trained 2"),
        ("seed=7", "seed cannot be changed in a resumed run"),
        ("pretrained=x.pth", "pretrained cannot be changed in a resumed run"),
        ("trainer.gradient_clip_val=-1", "gradient_clip_val=-1 must be 0 or more"),
        ("trainer.precision=8", "Precision"),
        ("checkpoint.monitor=val/acc", "unknown metric 'val/acc'"),
    ],
)
def test_a_refused_resume_writes_nothing(copied: Path, override: str, reason: str) -> None:
    before = files(copied)
    refused = run("train.py", f"resume={copied}", override, cwd=copied.parent, code=2)
    assert reason in refused.stderr
    assert files(copied) == before


HEADER = "epoch,step,learning_rate,val/loss,images_per_second,seconds"


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("result.json", b"", "Expecting value"),
        ("result.json", b'{"overrides": ["model=', "Unterminated string"),
        ("result.json", b"\xff\xfe", "can't decode"),
        ("result.json", b"[]", "its overrides are no list of texts"),
        ("result.json", b'{"overrides": 3}', "its overrides are no list of texts"),
        ("result.json", b'{"overrides": [], "wall_seconds": "long"}', "wall_seconds='long' is no"),
        ("metrics.csv", b"", "it has no column epoch"),
        ("metrics.csv", b"epoch,step\n0,1\n", "it has no column learning_rate"),
        ("metrics.csv", f"{HEADER}\n0,40,0.1,".encode(), "line 2 has no number in 'images_per_s"),
        ("metrics.csv", f"{HEADER}\n0,40,0.1,,1,1,5\n".encode(), "line 2 has no number in 'None'"),
        ("metrics.csv", f"{HEADER}\n0.5,40,0.1,,1,1\n".encode(), "line 2 has no number in 'epoch'"),
        ("metrics.csv", f"{HEADER}\n0,40,0.1,x,1,1\n".encode(), "line 2 has no number in 'val/lo"),
        ("metrics.csv", b"\xff\xfe", "can't decode"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(
    copied: Path, name: str, contents: bytes, reason: str
) -> None:
    (copied / name).write_bytes(contents)
    before = files(copied)
    refused = run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=ROOT, code=2)
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: '{copied / name}' is damaged: ")
    assert reason in line
    assert line.endswith(". Move the file away to continue the run without it")
    assert files(copied) == before


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_without_its_best_checkpoint_a_run_looks_for_a_new_one(copied: Path, damage: str) -> None:
    best = copied / "checkpoints" / "best.ckpt"
    contents = bytearray(best.read_bytes())
    best.unlink()
    if damage == "cut off":
        best.write_bytes(contents[:5000])
    elif damage == "changed":
        contents[len(contents) // 2] ^= 1
        best.write_bytes(contents)
    for name in ("result.json", "metrics.csv"):  # nor is any of these needed
        (copied / name).unlink()
    done = run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=ROOT)
    assert "the best epoch is chosen among those that follow: " in done.stdout
    assert torch.load(best, weights_only=True)["epoch"] == 2
    result = json.loads((copied / "result.json").read_text())
    assert result["best_checkpoint"] == str(best)
    assert result["val"]["top1"] is not None


def test_of_two_resumes_the_second_is_refused(copied: Path) -> None:
    before = files(copied)
    with _only_one(copied):
        held = files(copied).keys() - before.keys()
        refused = run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=ROOT, code=2)
        assert f"another process trains in '{copied}'" in refused.stderr
        assert files(copied).keys() - before.keys() == held
    assert files(copied) == before
    run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=ROOT)
    assert files(copied).keys() >= before.keys()
    assert not list(copied.glob(".*"))


def test_the_lock_of_a_killed_run_does_not_stop_the_next(tmp_path: Path) -> None:
    def hold() -> None:
        with _only_one(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    if (pid := os.fork()) == 0:
        hold()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert list(tmp_path.iterdir())
    with _only_one(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_resuming_a_finished_run_keeps_its_record(copied: Path) -> None:
    before = json.loads((copied / "result.json").read_text())
    config = (copied / "config.yaml").read_text()
    run("train.py", f"resume={copied}", "trainer.gradient_clip_val=1.0", cwd=ROOT)
    after = json.loads((copied / "result.json").read_text())
    assert after["test"] == before["test"]
    assert after["images_per_second"] == pytest.approx(before["images_per_second"], rel=1e-2)
    assert after["wall_seconds"] == before["wall_seconds"]  # nothing was trained
    assert after["overrides"][: len(before["overrides"])] == before["overrides"]
    assert (copied / "config.yaml").read_text() == config


def test_a_resumed_run_records_what_it_trained_with(copied: Path) -> None:
    before = yaml.safe_load((copied / "config.yaml").read_text())
    wall_seconds = json.loads((copied / "result.json").read_text())["wall_seconds"]
    run("train.py", f"resume={copied}", "trainer.max_epochs=3", cwd=ROOT)
    trainer = {**before["trainer"], "max_epochs": 3}
    assert yaml.safe_load((copied / "config.yaml").read_text()) == {**before, "trainer": trainer}
    assert json.loads((copied / "result.json").read_text())["wall_seconds"] > wall_seconds


INTERRUPT = """
import os, signal, sys
from repnet.cli.train import main
from repnet.training import Classifier

original, count = Classifier.{method}, 0

def step(self, batch, batch_index):
    global count
    count += 1
    if count == {when}:
        os.kill(os.getpid(), signal.SIGINT)
    return original(self, batch, batch_index)

Classifier.{method} = step
sys.argv = ["train.py", *{arguments}]
main()
"""


@pytest.mark.parametrize(("method", "when"), [("validation_step", 1), ("training_step", 2)])
def test_an_epoch_interrupted_at_its_end_is_validated(
    tmp_path: Path, method: str, when: int
) -> None:
    arguments = [*TINY, "trainer.max_epochs=2", "hydra.run.dir=run"]
    script = INTERRUPT.format(method=method, when=when, arguments=arguments)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 130, result.stdout + result.stderr
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    run("train.py", "resume=run", cwd=tmp_path)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(0, 2), (1, 4)]
    assert all(row["val/top1"] and row["val/loss"] for row in rows)
