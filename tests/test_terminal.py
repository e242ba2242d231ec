"""Every table that a command prints fits 80 columns, and no name in it is broken over two lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from repnet.bench.environment import environment as machine
from repnet.bench.measure import Row
from repnet.bench.table import Result, print_tables
from repnet.cli import deploy, evaluate, explain, sweep, train
from repnet.data.__main__ import main as pack
from repnet.models import create_model
from repnet.predict.__main__ import NEXT, _table
from repnet.predict.predictor import Prediction, Score
from repnet.terminal import print_table
from repnet.training.announcement import ParameterTable
from repnet.weights.__main__ import main as weights
from tests.commands import ROOT
from tests.test_data import image_folder

SCORES = {
    "test": {"top1": 0.97222, "top5": 0.99, "f1": 0.969, "loss": 0.1},
    "recall": {"a_class_whose_name_is_as_long_as_the_names_of_classes_get": 0.5},
}
FILE = "a_network_that_was_trained_for_three_hundred_epochs_on_large_images.safetensors"  # 79


def train_summary(directory: Path) -> list[str]:
    result = {**SCORES, "val": {"top1": 0.98}, "epochs": 300, "images_per_second": 12_345.6,
              "wall_seconds": 123_456.7, "best_checkpoint": directory / "best.ckpt"}  # fmt: skip
    train._summarize(result, {})
    return list(SCORES["recall"])


def parameter_groups(directory: Path) -> list[str]:
    class Module:
        model = nn.Linear(3, 3)
        parameters = model.parameters

    names = ["the_deepest_layers_of_the_backbone,_without_norms", "head"]
    groups = [{"params": [p], "name": n} for p, n in zip(Module.parameters(), names, strict=True)]

    class Trainer:
        is_global_zero = True
        optimizers = [torch.optim.AdamW(groups, lr=0.000123456)]

    ParameterTable().on_train_start(Trainer(), Module())  # type: ignore[arg-type]
    return ["the_deepest_layers_of_the_backbone,_without_norms"]


def evaluation(directory: Path) -> list[str]:
    evaluate._summarize({**SCORES, "samples": 1_281_167, "parameters": 10**8}, Path("out"))
    return list(SCORES["recall"])


def sweep_of(*keys: str) -> Callable[[Path], list[str]]:
    values = {
        "block": "mobileone", "optimizer.lr": "0.1", "optimizer.weight_decay": "0.0001",
        "pretrained": "outputs/train/2026-11-29_10-15-00/checkpoints/best.ckpt",
        "callbacks": "[ema,kernel_decay]", "model.block.num_branches": "4", "data.augment": "none",
        "scheduler.warmup_epochs": "5",
    }  # fmt: skip

    def show(directory: Path) -> list[str]:
        row = {"job": "0", "status": "pruned", **{key: values[key] for key in keys},
               "val_top1": 0.97222, "test_top1": 0.97, "wall_seconds": 12_345.6}  # fmt: skip
        columns = ["job", *keys, "val_top1", "test_top1", "wall_seconds"]
        sweep._show("2 jobs, best first", [row, {**row, "status": "failed"}], columns)
        return ["97.22% pruned", *(values[key] for key in keys)]

    return show


def packing(directory: Path) -> list[str]:
    image_folder(directory / "images", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    called(pack, "pack", directory / "images", directory / "shards")
    return ["train", "images", "MB"]


def inspected(directory: Path) -> list[str]:
    save_file(create_model("repvgg_tiny", num_classes=3).state_dict(), directory / FILE)
    called(weights, "inspect", directory / FILE)
    return [str(directory / FILE), "repvgg"]


def explained(*keys: str) -> Callable[[Path], list[str]]:
    def show(directory: Path) -> list[str]:
        explain.main(["--explain", *keys])
        return []

    return show


def bench(directory: Path) -> list[str]:
    forms = [
        Row("a", form, "", 64, "3x224x224", status="timed", passes=30, median_ms=1234.5,
            p10_ms=1200.0, p90_ms=1300.0, p95_ms=1400.0, p99_ms=1500.0, images_per_second=12_345.0,
            times_deploy=1.23, times_train=2.34, memory_bytes=10**9, difference=1e-6, top1=0.931,
            cores=1.99, note="a note")
        for form in ("train", "torch_export_channels_last_bf16")
    ]  # fmt: skip
    print_tables([Result(machine("cpu", 1), forms)])
    return ["torch_export_channels_last_bf16", "1,200 - 1,300", "93.10%"]


def predicted(*names: str) -> Callable[[Path], list[str]]:
    def show(directory: Path) -> list[str]:
        scores = [Score("golden retriever", 0, 0.9), Score("tabby cat", 1, 0.1)]
        found = [Prediction(str(directory / name), scores) for name in names]
        print_table(_table(found, str(directory)), spare=[NEXT])
        return [*names, "90.00%"]

    return show


def exports(directory: Path) -> list[str]:
    name = "model_for_the_devices_of_the_second_generation.int8.onnx"
    export = {"file": name, "status": "verified", "verified": True, "top1": 0.97, "changed": 12_345,
              "latency_ms": 123.456, "bytes": 10**8}  # fmt: skip
    print_table(deploy._exports({"exports": [export, {**export, "file": "model.onnx"}]}))
    return [name, "123.456"]


def called(main: Callable[[], None], *arguments: object) -> None:
    before, sys.argv = sys.argv, ["command", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before


TABLES = {
    "train": train_summary,
    "parameter groups": parameter_groups,
    "evaluation": evaluation,
    "sweep, keys": sweep_of("block", "optimizer.lr", "optimizer.weight_decay"),
    "sweep, a path": sweep_of("pretrained", "optimizer.lr"),
    "sweep, many keys": sweep_of(
        "pretrained", "block", "optimizer.lr", "optimizer.weight_decay", "callbacks",
        "model.block.num_branches", "data.augment", "scheduler.warmup_epochs",
    ),
    "data": packing,
    "weights": inspected,
    "explain": explained(),
    **{f"explain {key}": explained(key) for key in ("data", "callbacks", "optimizer", "trainer")},
    "bench": bench,
    "predict, one": predicted("a photograph of my dog at the sea in the evening of a long day.jpg"),
    "predict, two": predicted("dog.jpg", "2026/a photograph of my dog at the sea.jpg"),
    "predict, long": predicted("dog.jpg", f"{'long_' * 15}.jpg"),
    "exports": exports,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_80_columns_and_breaks_no_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    whole = TABLES[name](tmp_path)
    printed = capsys.readouterr().out
    for text in whole:
        assert text in printed
    assert "…" not in printed  # nothing is cut either
    for line in printed.splitlines():
        # What is longer is left to the terminal: a path, a command to copy, a sentence.
        path = str(tmp_path) in line or line.removeprefix("image: ") in whole
        if path or line.startswith(("It also takes", machine("cpu", 1)["hardware"])):
            assert not set("│┃━─") & set(line)
        else:
            assert len(line) <= 80, line


def test_columns_that_can_be_spared_go_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    TABLES["sweep, keys"](Path())
    printed = capsys.readouterr().out
    assert "wall_seconds" not in printed
    assert "test_top1" in printed
    TABLES["sweep, many keys"](Path())
    printed = capsys.readouterr().out
    assert "job: 0\n" in printed  # a line for each cell of every column
    assert printed.count("2 jobs, best first") == 1
    assert "optimizer.weight_decay: 0.0001\n" in printed
    assert "wall_seconds: 1.235e+04\n" in printed or "wall_seconds: 12345.6\n" in printed


def test_a_file_receives_every_column_at_its_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    TABLES["sweep, many keys"](Path())
    printed = capsys.readouterr().out
    assert printed.count("2 jobs, best first") == 1
    assert "wall_seconds" in printed
    assert re.search(r"mobileone +│ 0.1 +│ 0.0001 +│ \[ema,kernel_decay\] +│", printed)


def test_the_widest_columns_give_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("short", "long", "longer")
    table.add_row("two words", "word " * 20, "word " * 40)
    print_table(table)
    printed = capsys.readouterr().out
    assert "│ two words │" in printed
    assert {len(line) for line in printed.splitlines()} <= {79, 80}
    assert re.search(r"│ (word ?){6} +│ (word ?){6} +│", printed)  # equally wide


@pytest.mark.parametrize(
    "command",
    [
        "data", "data pack", "weights", "weights convert", "weights inspect", "bench", "hub",
        "hub push", "hub pull", "hub card", "predict", "serve",
    ],
)  # fmt: skip
def test_the_help_of_a_command_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    module, *words = command.split()
    with pytest.raises(SystemExit):
        called(import_module(f"repnet.{module}.__main__").main, *words, "--help")
    printed = capsys.readouterr().out
    assert "usage" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_no_command_prints_a_table_on_its_own() -> None:
    makes = [
        path
        for path in sorted((ROOT / "repnet").rglob("*.py"))
        if re.search(r"\bTable(\.grid)?\($", path.read_text(), re.M)
        or "= Table(" in path.read_text()
    ]
    assert len(makes) >= 8
    for path in makes:
        assert "print_table(" in path.read_text(), f"{path} prints a table that may not fit"
