"""`train.py eval=PATH` of both forms on any data, and the learning-rate range test."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repnet import reparameterize, save_deployed
from repnet.checkpoint import describe, save_checkpoint
from repnet.cli.command import FULL_ERROR
from repnet.cli.evaluate import prepare
from repnet.cli.train import main
from repnet.data import FakeImages
from repnet.errors import InputError
from repnet.spec import build
from repnet.training.find_lr import find_learning_rate
from tests.models import randomize_batch_norm

MODEL = {"_target_": "repnet.models.RepVGG", "depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8],
         "num_classes": 3}  # fmt: skip
DATA = {"_target_": "repnet.data.FakeImages", "image_size": 16, "classes": 3, "train_size": 60,
        "batch_size": 8}  # fmt: skip
FILES = {"eval.json", "per_class.csv", "confusion.png", "classes.png", "worst.png", "worst.csv"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run directory with a deploy model in it, and the accuracy of both."""
    directory = tmp_path_factory.mktemp("evaluate") / "run"
    torch.manual_seed(0)
    model = randomize_batch_norm(build(MODEL)).eval()
    data: FakeImages = build(DATA)
    data.setup()
    path = directory / "checkpoints" / "best.ckpt"
    save_checkpoint(
        {
            "repnet": describe({"model": MODEL, "data": DATA}, data.describe()),
            "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        },
        path,
    )
    images, labels = (torch.cat(x) for x in zip(*data.test_dataloader(), strict=True))
    folded = reparameterize(model, images[:2])
    save_deployed(folded, directory / "deploy", architecture=MODEL, data=data.describe(),
                  provenance={"checkpoint": str(path)})  # fmt: skip
    with torch.no_grad():
        return directory, (model(images).argmax(1) == labels).float().mean().item()


def call(monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str) -> int:
    """Run the command in this process, and return its exit code."""
    monkeypatch.chdir(directory)
    command = ["train.py", *arguments, "trainer=cpu"]
    monkeypatch.setattr(sys, "argv", command)
    before = os.environ.get(FULL_ERROR)
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:  # or later tests, and processes that they start, would print tracebacks
        assert os.environ.get(FULL_ERROR) == before, f"the command left {FULL_ERROR} behind"
    return 0


@pytest.mark.parametrize(
    ("path", "form"),
    [("checkpoints/best.ckpt", "train"), ("deploy", "deploy")],
)
def test_any_form_is_evaluated_on_its_own_data(
    trained: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str,
    form: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    directory, accuracy = trained
    assert call(monkeypatch, tmp_path, f"eval={directory / path}") == 0
    (output,) = tmp_path.glob("outputs/eval/*")
    assert {file.name for file in output.iterdir()} == FILES
    result = json.loads((output / "eval.json").read_text())
    assert result["form"] == form
    assert result["samples"] == 12
    assert result["test"]["top1"] == pytest.approx(accuracy, abs=1e-6)
    assert result["warnings"] == []
    assert f"{accuracy:.2%}" in capsys.readouterr().out


def folder(root: Path, names: list[str]) -> Path:
    generator = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 255, (20, 20, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def test_other_data_are_prepared_as_in_training(
    trained: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = folder(tmp_path / "images", ["cat", "dog", "owl"])
    seen: list[Any] = []
    monkeypatch.setattr(
        "repnet.training.evaluate.evaluate",
        lambda model, data, config, directory: seen.append(data) or {
            "test": {"top1": 0.5, "f1": 0.4, "loss": 1.0}, "recall": {}, "samples": 6,
            "parameters": 1,
        },
    )  # fmt: skip
    arguments = [
        f"eval={trained[0]}",
        "data=imagefolder",
        f"data.root={root}",
        "data.num_workers=0",
    ]
    assert call(monkeypatch, tmp_path, *arguments, "hydra.run.dir=out") == 0
    data = seen[0]
    assert data.input_shape == (3, 16, 16)
    assert (data.mean, data.std) == ([0.5] * 3, [0.25] * 3)  # not ImageNet's
    assert "the classes have other names than in training" in capsys.readouterr().err
    assert (tmp_path / "out" / "eval.json").exists()


def test_values_change_the_data_of_the_checkpoint(
    trained: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"eval={trained[0]}", "data.train_size=100", "hydra.run.dir=out"]
    assert call(monkeypatch, tmp_path, *arguments) == 0
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["samples"] == 20


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data=digits"], "tells 3 classes apart, the data set has 10"),
        (["data=fake", "data.classes=3", "data.channels=1"], "takes images of 3 channels, not 1"),
        (["data=imagefolder"], "data.root is required"),
        (["data.size=3"], "size"),
    ],
)
def test_what_does_not_fit_is_refused(
    trained: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], overrides: list[str], reason: str,
) -> None:  # fmt: skip
    assert call(monkeypatch, tmp_path, f"eval={trained[0]}", *overrides) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("outputs/eval/*"))


def test_no_checkpoint_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, "eval=nowhere") == 2
    assert "there is no checkpoint 'nowhere'" in capsys.readouterr().err


def test_the_command_line_is_prepared_for_hydra() -> None:
    now = "hydra.run.dir=outputs/eval/${now:%Y-%m-%d_%H-%M-%S}"
    assert prepare(["eval=run", "data.root=d", "trainer=cpu"]) == [
        "++eval=run", "++data.root=d", "trainer=cpu", now]  # fmt: skip
    given = ["+eval=run", "data=mnist", "data.root=d", "hydra.run.dir=out"]
    assert prepare(given) == given


def test_other_processes_make_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert prepare(["eval=run"]) == ["++eval=run", "hydra.run.dir=."]
    assert call(monkeypatch, tmp_path, "eval=nothing") == 2
    assert not list(tmp_path.iterdir())  # and the working directory is still there


class Quadratic(LightningModule):
    """Loss `x^2`: gradient descent converges up to a learning rate of 1, and diverges above it."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2))
        self.rates: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        groups = self.trainer.optimizers[0].param_groups
        self.rates.append([group["lr"] for group in groups])
        return (self.x**2).sum()

    def configure_optimizers(self) -> Any:
        x = [nn.Parameter(torch.ones(1)) for _ in range(1)]
        optimizer = torch.optim.SGD([{"params": [self.x]}, {"params": x, "lr": 0.03}], lr=0.3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", **{**options, "default_root_dir": "."})


def test_the_range_test_finds_where_the_loss_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = Quadratic()
    loader = DataLoader(torch.zeros(7, 1))  # type: ignore[arg-type]
    path = tmp_path / "lr_find.png"
    found = find_learning_rate(make, module, loader, path=path, low=1e-4, high=100, steps=60)
    assert 0.005 < found.suggestion < found.lowest < 10  # averaged, so a few steps late
    assert len(found.losses) < 60  # it stops where the loss diverges
    highest = [max(rates) for rates in module.rates]
    assert highest[0] == 1e-4
    steps = numpy.diff(numpy.log(highest))  # whatever the scheduler says
    numpy.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    for first, second in module.rates:
        assert second == pytest.approx(first / 10)
    with Image.open(path) as image:
        assert image.size[0] > 400
    assert [file.name for file in tmp_path.iterdir()] == ["lr_find.png"]


def test_the_range_test_counts_steps_of_several_batches() -> None:
    loader = DataLoader(torch.zeros(7, 1))  # type: ignore[arg-type]
    found, expected = (
        find_learning_rate(
            functools.partial(make, accumulate_grad_batches=batches),
            Quadratic(), loader, low=1e-4, high=100, steps=60,
        )
        for batches in (7, 1)
    )  # fmt: skip
    assert found.rates == expected.rates
    numpy.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert found.suggestion == expected.suggestion


def test_a_loss_that_is_never_a_number_is_an_error() -> None:
    class Broken(Quadratic):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(InputError, match="the loss diverges within 1 steps"):
        find_learning_rate(functools.partial(make), Broken(), DataLoader(torch.zeros(7, 1)))
