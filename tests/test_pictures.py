"""What a test gets wrong: gathered from any LightningModule, drawn, tabulated, sent to loggers."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repnet.callbacks import Pictures, drawing, pictures
from repnet.data import FakeImages
from repnet.training import Classifier

PICTURES = {"confusion.png", "classes.png", "worst.png"}


def images() -> FakeImages:
    return FakeImages(image_size=4, classes=5, train_size=120, batch_size=7)  # 24 to test


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_with(callback: Pictures, module: LightningModule, data: Any, **options: Any) -> None:
    Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        **options,
    ).test(module, data, verbose=False)  # fmt: skip


test_with.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What was asked to be drawn, by function."""
    calls: dict[str, tuple[Any, ...]] = {}
    for name in ("draw_confusions", "draw_classes", "draw_worst"):

        def record(*arguments: Any, name: str = name, **options: Any) -> None:
            calls[name] = arguments

        monkeypatch.setattr(pictures, name, record)
    return calls


def truth(model: nn.Module, data: FakeImages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data.setup()
    batches = list(data.test_dataloader())
    inputs = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    with torch.no_grad():
        logits = model(inputs)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return inputs, labels, logits, losses


def check(drawn: dict[str, tuple[Any, ...]], model: nn.Module, data: FakeImages) -> None:
    inputs, labels, logits, losses = truth(model, data)
    order = losses.argsort(descending=True)[:6]
    seen, predicted, names, _ = drawn["draw_confusions"]
    assert sorted(zip(seen, predicted, strict=True)) == sorted(
        zip(labels.tolist(), logits.argmax(1).tolist(), strict=True)
    )
    assert names == [str(n) for n in range(5)]
    correct, totals, _, _ = drawn["draw_classes"]
    assert totals.tolist() == labels.bincount(minlength=5).tolist()
    assert correct.sum() == (logits.argmax(1) == labels).sum()
    shown, true, wrong, confidences, values, _, _ = drawn["draw_worst"]
    torch.testing.assert_close(torch.tensor(values), losses[order])
    assert true == labels[order].tolist()
    assert wrong == logits.argmax(1)[order].tolist()
    torch.testing.assert_close(torch.tensor(confidences), logits.softmax(1).amax(1)[order])
    original = (inputs[order] * 0.25 + 0.5).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(shown), original)


def test_the_worst_images_are_listed_by_their_place_in_the_split(tmp_path: Path) -> None:
    model, data = network(), images()
    test_with(Pictures(tmp_path, worst=6), Classifier(model, 5), data)
    _, labels, logits, losses = truth(model, data)
    order = losses.argsort(descending=True)[:6].tolist()
    with (tmp_path / "worst.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"test {index}" for index in order]
    assert [row["class"] for row in rows] == [str(labels[index].item()) for index in order]
    assert [row["predicted"] for row in rows] == [str(logits[i].argmax().item()) for i in order]
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses[order].tolist(), abs=1e-5)


def test_every_prediction_is_seen_once(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    model, data = network(), images()
    test_with(Pictures(tmp_path, worst=6), Classifier(model, 5), data)
    check(drawn, model, data)
    with (tmp_path / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    _, labels, logits, _ = truth(model, data)
    right = logits.argmax(1) == labels
    for index, row in enumerate(rows):
        of_class = labels == index
        assert row["class"] == str(index)
        assert int(row["images"]) == of_class.sum()
        assert float(row["recall"]) == pytest.approx(
            right[of_class].float().mean().item(), abs=1e-6
        )
        taken = logits.argmax(1) == index
        if taken.any():
            precision = right[taken].float().mean().item()
            assert float(row["precision"]) == pytest.approx(precision, abs=1e-6)
        wrong = logits.argmax(1)[of_class & ~right].bincount(minlength=5)
        assert int(row["mistakes"]) == wrong.max()
        if wrong.max():
            assert wrong[int(row["mistaken_for"])] == wrong.max()


class Foreign(LightningModule):
    """Another project's module: other names, batches that are dicts, a network that returns two."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.net(batch["image"])


def test_another_projects_module(tmp_path: Path, drawn: dict[str, tuple[Any, ...]]) -> None:
    model, data = network(), images()
    inputs, labels, _, _ = truth(model, data)
    samples = [{"image": x, "label": y} for x, y in zip(inputs, labels, strict=True)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        test_with(
            Pictures(tmp_path, worst=6, mean=[0.5] * 3, std=[0.25] * 3),
            Foreign(model), DataLoader(samples, batch_size=5),
        )  # fmt: skip
    check(drawn, model, data)
    assert not model._forward_hooks


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    samples = [(torch.zeros(3, 4, 4), torch.zeros(2)) for _ in range(3)]  # labels of another kind

    class Regression(Foreign):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    with pytest.warns(UserWarning, match="wants test batches of"):
        test_with(Pictures(tmp_path), Regression(network()), DataLoader(samples))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_all_processes_predictions_are_gathered(tmp_path: Path) -> None:
    model = network()
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        callback = Pictures(tmp_path / name, worst=6)
        test_with(callback, Classifier(model, 5), images(), **options)
    for name in ("per_class.csv", "worst.png", "classes.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("classes", [1, 15, 300])
def test_any_number_of_classes_is_drawn(tmp_path: Path, classes: int) -> None:
    generator = numpy.random.default_rng(0)
    labels = generator.integers(0, classes, 600)
    wrong = generator.random(600) < 0.3
    predictions = numpy.where(wrong, generator.integers(0, classes, 600), labels)
    names = [f"a class with a long name, and ${index}" for index in range(classes)]
    drawing.draw_confusions(labels, predictions, names, tmp_path / "confusion.png")
    right = numpy.bincount(labels[labels == predictions], minlength=classes)
    totals = numpy.bincount(labels, minlength=classes)
    drawing.draw_classes(right, totals, names, tmp_path / "classes.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size[0] > 300
            assert max(image.size) < 2500
            assert image.convert("L").getextrema() == (0, 255)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_channels_are_shown(tmp_path: Path, channels: int) -> None:
    grid = numpy.random.default_rng(0).random((3, 8, 8, channels))
    path = tmp_path / "worst.png"
    drawing.draw_worst(grid, [0, 1, 1], [1, 1, 0], [0.9, 0.5, 0.7], [3, 2, 1], ["a", "b"], path)
    with Image.open(path) as image:
        assert image.size[0] > 300


def test_mistakes_are_counted_and_sorted() -> None:
    labels = numpy.array([0, 0, 0, 1, 2, 2, 2])
    predictions = numpy.array([0, 1, 1, 1, 0, 1, 0])
    assert drawing.most_confused(labels, predictions) == [(0, 1, 2), (2, 0, 2), (2, 1, 1)]


def test_the_confidence_interval_is_wilsons() -> None:
    low, high = drawing._interval(numpy.array([8.0, 10.0]), numpy.array([10.0, 10.0]))
    numpy.testing.assert_allclose(low, [0.4902, 0.7225], atol=1e-4)
    numpy.testing.assert_allclose(high, [0.9433, 1.0], atol=1e-4)


def test_unknown_normalization_still_shows_images() -> None:
    shown = pictures._as_pictures(torch.randn(2, 3, 4, 4) * 9, None, None)
    torch.testing.assert_close(shown.amax((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(shown.amin((1, 2, 3)), torch.zeros(2))
