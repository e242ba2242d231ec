"""`python train.py`, as a user runs it."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from repnet.cli.command import quoted
from repnet.errors import InputError
from repnet.training.run import train
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
    assert list((directory / "tensorboard").glob("events.*"))
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
        ("channels_last=true", "trainer.precision=bf16-mixed"),
        ("+optimizer.learning_rate=1", "learning_rate"),
        ("trainer.precision=8", "Precision"),
        ("resume=nowhere", "is not a run"),
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


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    result = run("train.py", "optimizer.lr=1e30", "hydra.run.dir=run", cwd=tmp_path, code=1)
    assert "the loss is nan at step 2" in result.stderr
    assert "learning rate 7.69e+28" in result.stderr
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
