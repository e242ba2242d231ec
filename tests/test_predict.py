"""`repnet.predict` and `python -m repnet.predict`."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from repnet.data import Digits, ImageFolder
from repnet.errors import InputError
from repnet.predict import Predictor
from repnet.predict.__main__ import main
from repnet.predict.predictor import find_images
from tests.artefacts import COLORS, GRAY, write_artefact
from tests.commands import environment

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("predict") / "deploy"
    write_artefact(directory)
    return directory


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process: exit code, output, errors."""

    def command(*arguments: object, columns: int = 160) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return command


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return colors that change slowly, so that JPEG keeps them, and sizes matter."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four kinds and sizes, in folders that an ImageFolder reads."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        place = root / split / "a"
        (place / "deeper").mkdir(parents=True)
        noise(40, 30).save(place / "color.jpg")
        noise(25, 60, 1).convert("L").save(place / "gray.png")
        noise(20, 20, 2).convert("P").save(place / "palette.png")
        noise(17, 33, 3).convert("RGBA").save(place / "deeper" / "transparent.WEBP")
        (place / ".hidden.png").write_bytes(b"")
        (place / "notes.txt").write_text("no image")
    return root


def test_images_are_prepared_as_in_the_evaluation_of_a_folder(folder: Path, tmp_path: Path) -> None:
    data = ImageFolder(str(folder), image_size=16, resize=20)
    data.setup()
    write_artefact(tmp_path, data.describe() | {"class_names": ["a", "b"]})
    predictor = Predictor(tmp_path)
    assert data.splits is not None
    split = data.splits[1]
    paths = [split.folder + "/" + name for name in split.names]
    assert len(paths) == 4
    for index, path in enumerate(paths):
        assert_close(torch.from_numpy(predictor.prepare(path)), split[index][0])
    assert sorted(map(str, find_images([folder / "val"]))) == sorted(paths)
    predictor.takes_uint8 = True  # the file itself resizes
    assert np.array_equal(predictor.prepare(paths[0]), split.read(0))


def test_large_photographs_are_decoded_as_in_evaluation(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        noise(400, 300).save(tmp_path / split / "a" / "large.jpg")
    data = ImageFolder(str(tmp_path), image_size=16, decode_at=32)
    data.setup()
    assert data.splits is not None
    write_artefact(tmp_path / "out", data.describe() | {"class_names": ["a", "b"]})
    predictor = Predictor(tmp_path / "out")
    path, expected = tmp_path / "val" / "a" / "large.jpg", data.splits[1][0][0]
    assert_close(torch.from_numpy(predictor.prepare(path)), expected)
    predictor.decode_at = None
    assert np.abs(predictor.prepare(path) - expected.numpy()).max() > 0.01


def test_images_in_memory_are_prepared_as_in_evaluation(tmp_path: Path) -> None:
    data = Digits()
    data.setup()
    assert data.splits is not None
    write_artefact(tmp_path, data.describe())
    predictor = Predictor(tmp_path)
    split = data.splits[2]
    Image.fromarray(split.read(3)[0].numpy()).save(tmp_path / "digit.png")
    assert np.array_equal(predictor.prepare(tmp_path / "digit.png"), split[3][0])


def test_other_sizes_are_resized_without_aliasing(tmp_path: Path) -> None:
    write_artefact(tmp_path, GRAY)
    predictor = Predictor(tmp_path)
    period = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    stripes = period.repeat(8).expand(1, 32, -1)
    pixels = predictor.prepare(stripes) * 0.4 + 0.3
    assert pixels.shape == (1, 8, 8)
    assert np.abs(pixels - 0.5).max() < 0.05
    predictor.takes_uint8 = True
    assert predictor.prepare(stripes).shape == (1, 8, 8)
    assert predictor.prepare(stripes).dtype == np.uint8


def test_probabilities_are_those_of_the_network(artefact: Path, folder: Path) -> None:
    predictor = Predictor(artefact)
    paths = find_images([folder / "train"])
    predictions = predictor.predict(paths, top=9)
    assert [p.image for p in predictions] == [str(path) for path in paths]
    for path, prediction in zip(paths, predictions, strict=True):
        images = torch.from_numpy(predictor.prepare(path)[None])
        probabilities = predictor.model(images).softmax(1)[0]
        order = probabilities.argsort(descending=True).tolist()
        assert [score.index for score in prediction.scores] == order
        assert [score.name for score in prediction.scores] == [
            COLORS["class_names"][index] for index in order
        ]
        found = torch.tensor([score.probability for score in prediction.scores])
        assert_close(found, probabilities[order])
    assert len({prediction.scores[0].probability for prediction in predictions}) == 4
    for one, many in zip(predictor.predict(paths, top=2, batch_size=1), predictions, strict=True):
        assert [s.index for s in one.scores] == [s.index for s in many.scores][:2]


def test_paths_bytes_pictures_and_tensors_are_the_same(artefact: Path, tmp_path: Path) -> None:
    predictor = Predictor(artefact)
    for image in (noise(30, 50), noise(30, 50).convert("L"), noise(30, 50).convert("P")):
        image.save(tmp_path / "image.png")
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        contents = (tmp_path / "image.png").read_bytes()
        given = [tmp_path / "image.png", str(tmp_path / "image.png"), contents, image, pixels]
        given.append(pixels.numpy())
        names = [p.image for p in predictor.predict(given)]
        assert names == [str(tmp_path / "image.png")] * 2 + [f"image {i}" for i in range(2, 6)]
        first, *others = [predictor.prepare(source) for source in given]
        assert all(np.array_equal(first, other) for other in others)


def test_gray_networks_see_the_gray_of_pil(tmp_path: Path) -> None:
    write_artefact(tmp_path, GRAY)
    predictor = Predictor(tmp_path)
    predictor.takes_uint8 = True
    levels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    for level in levels:
        assert np.array_equal(predictor.prepare(level.expand(3, -1, -1)), level)
    image = noise(8, 8)
    assert np.array_equal(predictor.prepare(image)[0], np.array(image.convert("L")))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("gone.png", "'gone.png'"),
        (b"", "empty"),
        (b"\xff\xd8 half a picture", "no image"),
        (torch.zeros(3, 8, 8), "uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), "channels, height, width"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "2 channels"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "not uint8"),
        (Image.new("F", (8, 8)), "8 bits"),
        (Image.new("I;16", (8, 8)), "8 bits"),
    ],
)
def test_what_is_no_image_is_refused(artefact: Path, source: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Predictor(artefact).predict([source])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("name", "preprocess"), [("torch_export", False), ("onnx", False), ("openvino", True)]
)
def test_every_format_predicts_the_same(
    tmp_path: Path, folder: Path, name: str, preprocess: bool
) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino" if name == "openvino" else "torch")
    write_artefact(tmp_path, formats=[name], preprocess=preprocess)
    file = next(path for path in tmp_path.iterdir() if path.suffix in (".pt2", ".onnx", ".xml"))
    exported, network = Predictor(file, trust=["native"]), Predictor(tmp_path)
    assert exported.takes_uint8 is preprocess
    paths = find_images([folder / "train"])
    for a, b in zip(exported.predict(paths), network.predict(paths), strict=True):
        assert [s.index for s in a.scores] == [s.index for s in b.scores]
        for x, y in zip(a.scores, b.scores, strict=True):
            assert x.probability == pytest.approx(y.probability, abs=1e-4)


def test_an_artefact_must_say_how_images_are_prepared(tmp_path: Path, folder: Path) -> None:
    write_artefact(tmp_path / "full")
    broken: dict[str, Callable[[dict], object]] = {
        "input_shape": lambda data: data.pop("input_shape"),
        "KeyError": lambda data: data.pop("mean"),
        "does not say": lambda data: data.update(class_names=None),
        "std": lambda data: data.update(std="abc"),
        "5 channels": lambda data: data.update(
            input_shape=[5, 8, 8], mean=[0.5] * 5, std=[0.5] * 5
        ),
        "names 1": lambda data: data.update(class_names=["cat"]),
        "mean": lambda data: data.update(mean=[0.5, 0.5]),
        "at least 1": lambda data: data.update(resize=0),
    }
    path = tmp_path / "full" / "model.json"
    whole = path.read_text()
    for reason, damage in broken.items():
        description = json.loads(whole)
        del description["sha256"]  # by one who knows of its sum
        damage(description["data"])
        path.write_text(json.dumps(description))
        with pytest.raises(InputError, match=reason):
            Predictor(tmp_path / "full").predict(find_images([folder]))


def test_not_a_number_is_no_prediction(artefact: Path) -> None:
    predictor = Predictor(artefact)
    nn.init.constant_(predictor.model.head.bias, float("nan"))
    with pytest.raises(InputError, match="NaN or infinity for 'image 0'"):
        predictor.predict([noise(8, 8)])


def test_the_command_shows_one_image_with_bars(artefact: Path, folder: Path, run: Run) -> None:
    image = folder / "val" / "a" / "color.jpg"
    code, output, errors = run(artefact, image, "--top", 3)
    assert code == 0, errors
    best = Predictor(artefact).predict([image], top=3)[0].scores
    for score in best:
        assert f"{score.name}" in output
        assert f"{score.probability:.2%}" in output
    assert "█" in output
    assert "shorter side resized to 20 pixels, center 16 x 16 cropped" in output


def test_the_command_shows_many_images_in_rows(artefact: Path, folder: Path, run: Run) -> None:
    code, output, errors = run(artefact, folder / "val", "--batch", 3)
    assert code == 0, errors
    names = ["color.jpg", "transparent.WEBP", "gray.png", "palette.png"]
    assert [output.index(name) for name in names] == sorted(output.index(name) for name in names)
    assert ".hidden" not in output


@pytest.mark.parametrize(
    "place", [["val"], ["val/a"], ["val", "train"], ["val/a/gray.png", "train"]]
)
def test_names_are_relative_to_the_folder(
    artefact: Path, folder: Path, run: Run, place: list[str]
) -> None:
    places = [folder / name for name in place]
    code, output, errors = run(artefact, *places, columns=80)
    assert code == 0, errors
    base = places[0] if len(places) == 1 else folder
    for path in find_images(places):
        assert f"│ {path.relative_to(base)} " in output
    assert str(folder) not in output
    assert max(map(len, output.splitlines()[:-1])) <= 80


def test_a_long_name_is_not_broken(artefact: Path, folder: Path, tmp_path: Path, run: Run) -> None:
    for name in ("one", "two"):
        shutil.copy(folder / "val" / "a" / "gray.png", tmp_path / f"{name}{'_long' * 9}.png")
    code, output, errors = run(artefact, tmp_path, columns=80)
    assert code == 0, errors
    assert f"one{'_long' * 9}.png" in output
    assert "next" not in output
    assert max(map(len, output.splitlines()[:-1])) <= 80


def test_what_a_runtime_prints_stays_out(
    artefact: Path, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify = Predictor.classify

    def talkative(*arguments: Any, **options: Any) -> Any:
        os.write(2, b"[runtime.cpp:1] running\n")
        return classify(*arguments, **options)

    monkeypatch.setattr(Predictor, "classify", talkative)
    code, output, errors = run(artefact, folder)
    assert code == 0
    assert "runtime.cpp" not in output + errors


def test_json_and_csv_hold_the_same(artefact: Path, folder: Path, tmp_path: Path, run: Run) -> None:
    code, output, errors = run(artefact, folder, "--json", "-", "--csv", tmp_path / "out.csv")
    assert code == 0, errors
    found = json.loads(output)
    assert found["artefact"] == str(artefact)
    assert found["unreadable"] == []
    predictions = Predictor(artefact).predict(find_images([folder]))
    assert len(found["predictions"]) == 8
    for entry, expected in zip(found["predictions"], predictions, strict=True):
        assert entry["image"] == expected.image
        assert [s["name"] for s in entry["scores"]] == [s.name for s in expected.scores]
        assert entry["scores"][0]["probability"] == pytest.approx(expected.scores[0].probability)
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(rows) == 8 * 4
    for row, (entry, rank) in zip(
        rows, ((e, r) for e in found["predictions"] for r in range(4)), strict=True
    ):
        score = entry["scores"][rank]
        assert row == {
            "image": entry["image"], "rank": str(rank + 1), "class": score["name"],
            "index": str(score["index"]), "probability": str(score["probability"]),
        }  # fmt: skip


def test_an_image_that_is_named_twice_is_answered_twice(
    artefact: Path, folder: Path, run: Run
) -> None:
    path = folder / "val" / "a" / "color.jpg"
    code, output, _ = run(artefact, path, path, "--json", "-")
    first, second = json.loads(output)["predictions"]
    assert (code, first) == (0, second)


def test_what_cannot_be_used_is_one_line(artefact: Path, tmp_path: Path, run: Run) -> None:
    noise(20, 20).save(tmp_path / "1.png")
    code, _, errors = run(artefact, tmp_path, "--device", "meta")
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "device=meta cannot be used" in errors
    code, _, errors = run(artefact, "/dev/zero")
    assert (code, errors) == (2, "error: '/dev/zero' is neither a file nor a folder\n")


def test_unreadable_images_are_named_and_the_rest_goes_on(
    artefact: Path, tmp_path: Path, run: Run
) -> None:
    for index in range(5):
        noise(20, 20, index).save(tmp_path / f"{index}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_bytes(b"")
    code, output, errors = run(artefact, tmp_path, "--json", "-", "--batch", 2)
    assert code == 2
    found = json.loads(output)
    kept = [Path(entry["image"]).name for entry in found["predictions"]]
    assert kept == ["0.png", "2.png", "4.png"]
    bad = [str(tmp_path / name) for name in ("1.png", "3.png")]
    assert [entry["image"] for entry in found["unreadable"]] == bad
    assert "3.png': it is empty" in errors
    assert "images that cannot be read: 2" in errors
    code, output, errors = run(artefact, tmp_path, "--skip-corrupt")
    assert code == 0
    assert "images that cannot be read: 2" in errors
    code, output, errors = run(artefact, tmp_path / "1.png", "--skip-corrupt")
    assert (code, output) == (2, "")
    assert errors.startswith("error: not one image can be read")


def test_bad_input_is_one_line_and_exit_code_2(
    artefact: Path, folder: Path, tmp_path: Path, run: Run
) -> None:
    image = folder / "val" / "a" / "color.jpg"
    (tmp_path / "empty").mkdir()
    for arguments, reason in (
        ((artefact, tmp_path / "gone.png"), "there is no image or folder"),
        ((artefact, tmp_path / "empty"), "holds no images"),
        ((tmp_path, image), "is not a deploy model"),
        ((artefact, image, "--device", "cuda:99"), "cuda:99"),
    ):
        code, output, errors = run(*arguments)
        assert (code, output) == (2, "")
        assert errors.startswith("error: ")
        assert reason in errors
        assert len(errors.strip().splitlines()) == 1
    for wrong in (("--top", "0"), ("--batch", "x"), ("--json", "-", "--csv", "-")):
        code, output, errors = run(artefact, image, *wrong)
        assert code == 2
        assert "error:" in errors


def test_the_command_runs_from_anywhere(artefact: Path, folder: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "repnet.predict", artefact, folder, "--csv", "-"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1 + 8 * 4
