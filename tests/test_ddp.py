"""Several processes train as one does with the same global batch."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, environment, run

# Batch norm takes its statistics from the batch of one process, and CPUs have no SyncBatchNorm:
# what must agree to rounding is everything else, so the network has none.
NETWORK = """
from torch import nn


class Network(nn.Sequential):
    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, num_classes),
        )
"""
OPTIONS = ["--config-dir", "configs", "model=mine", "augment=none", "optimizer.lr=0.05",
           "trainer.max_epochs=2", "trainer.accelerator=cpu",
           "trainer.precision=64-true", "++trainer.val_check_interval=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ddp")
    (directory / "mine.py").write_text(NETWORK)
    (directory / "configs" / "model").mkdir(parents=True)
    (directory / "configs" / "model" / "mine.yaml").write_text(
        "_target_: mine.Network\nnum_classes: null\nin_channels: null\n"
    )
    run("train.py", *OPTIONS, "data.batch_size=64", "hydra.run.dir=one", cwd=directory,
        PYTHONPATH=f"{ROOT}:{directory}")  # fmt: skip
    return directory


def check_same(directory: Path, name: str) -> None:
    """Compare the curves and the weights of `name` with those of the single process."""
    tables = []
    for run_name in ("one", name):
        with (directory / run_name / "metrics.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == len(tables[1]) == 2
    for expected, row in zip(*tables, strict=True):
        assert expected["step"] == row["step"]
        for key in ("train/loss", "val/loss", "val/top1", "learning_rate"):
            assert float(row[key]) == pytest.approx(float(expected[key]), rel=1e-5), key
    assert float(tables[0][1]["train/loss"]) < 0.8 * float(tables[0][0]["train/loss"])
    expected_state, state = (
        torch.load(directory / n / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for n in ("one", name)
    )
    for key in expected_state:
        torch.testing.assert_close(state[key], expected_state[key], rtol=1e-9, atol=1e-10)
    results = [json.loads((directory / n / "result.json").read_text()) for n in ("one", name)]
    assert results[1]["test"] == pytest.approx(results[0]["test"], rel=1e-5)
    assert results[1]["device"] == "2 x cpu"


def test_two_processes_train_like_one(workplace: Path) -> None:
    run("train.py", *OPTIONS, "trainer=ddp", "trainer.devices=2", "data.batch_size=32",
        "hydra.run.dir=two", cwd=workplace, PYTHONPATH=f"{ROOT}:{workplace}")  # fmt: skip
    check_same(workplace, "two")


def test_the_documented_torchrun_command_trains_like_one(workplace: Path) -> None:
    """Two "machines" of one process each, as `docs/scale.md` starts them."""
    text = (ROOT / "docs" / "scale.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("torchrun "))
    words = [{"NODES": "2", "NODE": "RANK", "GPUS": "1"}.get(w, w) for w in
             shlex.split(command.replace("=", " = "))]  # fmt: skip
    words = shlex.split(" ".join(words).replace(" = ", "="))
    assert "hydra.run.dir=DIR" in words
    launch = words[1 : words.index("train.py")]
    run_on_two_nodes(workplace, launch, *OPTIONS, "data.batch_size=32", "hydra.run.dir=nodes",
                     "trainer.profiler=simple", "logger=csv")  # fmt: skip
    check_same(workplace, "nodes")
    written = {path.name for path in (workplace / "nodes").rglob("*") if path.is_file()}
    assert {"config.yaml", "result.json", "curves.png", "best.ckpt", "confusion.png"} <= written
    run_on_two_nodes(workplace, launch, "eval=nodes", "trust=[mine]", "trainer.accelerator=cpu",
                     "logger=csv")  # fmt: skip
    (directory,) = (workplace / "outputs" / "eval").iterdir()  # of the first process
    written = {path.name for path in directory.iterdir()}
    assert {"eval.json", "per_class.csv", "confusion.png", "csv"} <= written
    evaluated = json.loads((directory / "eval.json").read_text())
    expected = json.loads((workplace / "one" / "result.json").read_text())
    assert evaluated["test"] == pytest.approx(expected["test"], rel=1e-5)


# Runs the script that it is given, and keeps a list of the files that this writes or renames.
SPY = """
import os, runpy, sys

written = []

def listen(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(arguments[0])
    elif event in ("os.rename", "os.remove"):
        written.append(os.fsdecode(arguments[0]))

sys.addaudithook(listen)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.stdout.flush()
    here = [path for path in map(os.path.abspath, written) if path.startswith(os.getcwd())]
    with open(os.environ["LISTS"] + os.environ["RANK"], "w") as file:
        file.write("\\n".join(here))
"""


def run_on_two_nodes(workplace: Path, launch: list[str], *arguments: str) -> None:
    """Run `train.py` in a process on each of two "machines", and check that only one writes."""
    lists = workplace.parent / f"{workplace.name}_written_"
    spy = workplace.parent / "spy.py"
    spy.write_text(SPY)
    port = 20000 + os.getpid() % 20000
    processes = []
    for rank in (0, 1):
        started = [
            w.replace("RANK", str(rank)).replace("HOST:29500", f"127.0.0.1:{port}")
            .replace("HOST", "127.0.0.1")
            for w in launch
        ]  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *started, str(spy),
                 str(ROOT / "train.py"), *arguments, "trainer=ddp", "trainer.num_nodes=2",
                 "trainer.devices=1"],
                cwd=workplace,
                env=environment(PYTHONPATH=f"{ROOT}:{workplace}", LISTS=str(lists)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    assert "top-1" in outputs[0]
    assert "top-1" not in outputs[1]
    assert Path(f"{lists}0").read_text()
    assert Path(f"{lists}1").read_text() == ""


def test_fsdp_needs_gpus(tmp_path: Path) -> None:
    shown = run("train.py", "--cfg", "job", "trainer=fsdp", cwd=tmp_path)
    assert "strategy: fsdp" in shown.stdout
    refused = run("train.py", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2",
                  "hydra.run.dir=run", cwd=tmp_path, code=2)  # fmt: skip
    assert "fsdp" in refused.stderr.lower()
    assert "gpu" in refused.stderr.lower()
    assert not list(tmp_path.glob("run/*"))
