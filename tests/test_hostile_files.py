"""Files of strangers: none runs code, fills the memory, or ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import repnet
from repnet.bench.forms import FORMS, Kitchen, Skip
from repnet.bench.subjects import find_subject
from repnet.checkpoint import describe, load_checkpoint, save_checkpoint
from repnet.cli.saved_config import read_config
from repnet.data.decoding import decode
from repnet.errors import InputError
from repnet.files import sha256
from repnet.hub import LICENSES, from_hub, pull, push_to_hub, write_model_card
from repnet.images import MAX_PIXELS
from repnet.outline import outline
from repnet.predict import Predictor
from repnet.predict import predictor as predictor_module
from repnet.predict.__main__ import main as predict
from repnet.spec import MODEL_PACKAGES
from repnet.text import printable
from repnet.weights import load_weights
from tests.artefacts import COLORS, GRAY, rewrite, write_artefact

Edit = Callable[[dict[str, Any]], Any]
REPORT = {
    "verified": True,
    "samples": 9,
    "metrics": {"train_form": {"top1": 0.9}, "deploy_form": {"top1": 0.9}},
    "exports": [{"format": "torch_export", "precision": "fp32", "file": "model.pt2",
                 "verified": True, "top1": 0.9}],
}  # fmt: skip
MOST = 5_000_000  # elements of any tensor that a refusal may make


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("hostile") / "deploy"
    write_artefact(directory, GRAY)
    return directory


@pytest.fixture
def artefact(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "deploy")
    return tmp_path / "deploy"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `python -m repnet.predict` in this process."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        code = 0
        try:
            predict()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return command


# Code


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def with_payload(path: Path) -> None:
    """Give an exported program sample inputs whose pickle makes a file."""
    buffer = io.BytesIO()
    torch.save(((Payload(),), {}), buffer)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in records if name.endswith("sample_inputs/model.pt"))
    records[name] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(name, contents)


def test_an_exported_program_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "deploy"
    write_artefact(directory, formats=["torch_export"], report=REPORT)
    file = directory / "model.pt2"
    with_payload(file)
    rewrite(directory, "model.json", lambda m: m["hashes"].update({"model.pt2": sha256(file)}))
    push_to_hub(directory, tmp_path / "hub")
    pull(tmp_path / "hub", tmp_path / "pulled")
    refusal = r"is code, which can do whatever you can.*trust=\['native'\].*safetensors and ONNX"
    for load in (
        lambda: repnet.load_deployed(file),
        lambda: repnet.load_deployed(file, trust=["repnet"]),
        lambda: from_hub(tmp_path / "hub", file="model.pt2"),
        lambda: Predictor(tmp_path / "pulled" / "model.pt2"),
    ):
        with pytest.raises(InputError, match=refusal):
            load()
    subject = find_subject(str(directory))
    assert subject.exports == []
    with pytest.raises(Skip, match="needs --trust native"):
        Kitchen(subject, tmp_path, "cpu").make(FORMS["torch_export"])
    assert not Path("executed").exists()
    with suppress(InputError):
        repnet.load_deployed(file, trust=["native"])
    assert Path("executed").exists()  # what would have happened


# Hashes


def test_every_file_of_a_deployment_has_a_hash(tmp_path: Path) -> None:
    from repnet.data import Digits
    from repnet.deploy.pipeline import Settings, deploy

    data = Digits()
    data.setup()
    model = repnet.create_model("repvgg_tiny", num_classes=10, in_channels=1)
    config = {"model": model.architecture, "data": {"_target_": "repnet.data.Digits"}}
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    contents = {"state_dict": state, "repnet": describe(config, data.describe())}
    save_checkpoint(contents, tmp_path / "best.ckpt")
    deploy(tmp_path / "best.ckpt", tmp_path / "deploy", Settings(latency_runs=1))
    hashes = json.loads((tmp_path / "deploy" / "model.json").read_text())["hashes"]
    files = {path.name for path in (tmp_path / "deploy").iterdir()} - {"model.json"}
    assert files == {"model.safetensors", "report.json", "report.html"}
    assert hashes == {name: sha256(tmp_path / "deploy" / name) for name in files}


def test_a_changed_report_is_refused_by_the_bench(tmp_path: Path) -> None:
    write_artefact(tmp_path, report=REPORT)
    assert find_subject(str(tmp_path)).top1["deploy_form"] == 0.9
    text = (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").write_text(text.replace("0.9", "1.0"))
    with pytest.raises(InputError, match=r"report\.json' was changed after it was verified"):
        find_subject(str(tmp_path))


def test_what_is_not_listed_is_not_pulled(tmp_path: Path) -> None:
    write_artefact(tmp_path / "deploy", report=REPORT | {"exports": []})
    push_to_hub(tmp_path / "deploy", tmp_path / "hub")
    assert (tmp_path / "hub" / "README.md").exists()
    (tmp_path / "hub" / "page.html").write_text("<script>")
    rewrite(tmp_path / "hub", "model.json", lambda m: m["hashes"].pop("report.html"))
    pull(tmp_path / "hub", tmp_path / "pulled")
    names = {path.name for path in (tmp_path / "pulled").iterdir()}
    assert names == {"model.safetensors", "model.json", "report.json"}


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "report.html"])
def test_links_out_of_an_artefact_are_not_followed(tmp_path: Path, name: str) -> None:
    write_artefact(tmp_path / "hub", report=REPORT | {"exports": []})
    (tmp_path / "hub" / name).rename(tmp_path / "secret")
    (tmp_path / "hub" / name).symlink_to(tmp_path / "secret")
    for use in (
        lambda: push_to_hub(tmp_path / "hub", tmp_path / "out"),
        lambda: pull(tmp_path / "hub", tmp_path / "out"),
        lambda: from_hub(tmp_path / "hub"),
    ):
        with pytest.raises(InputError, match=f"{name}' is a link out of the artefact"):
            use()
    assert not (tmp_path / "out").exists()


def onnx_file(
    *, dtype: str = "FLOAT", external: str = "", scalar: bool = False, constant: int = 0
) -> bytes:
    """Return a network for gray images of 8 x 8 and three classes, or something like it."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, getattr(onnx.TensorProto, dtype)
    weight = onnx.numpy_helper.from_array(np.ones((1, 3), np.dtype(
        {"FLOAT": "float32", "DOUBLE": "float64"}[dtype])), "weight")  # fmt: skip
    if external:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", external
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["out"]),
    ]
    initializers = [weight]
    shape: list[Any] = ["batch", 3]
    if scalar:
        nodes.append(helper.make_node("ReduceMean", ["out"], ["logits"], keepdims=0))
        shape = []
    elif constant:
        size = onnx.numpy_helper.from_array(np.array([constant, constant]), "size")
        initializers.append(size)
        nodes.append(helper.make_node("ConstantOfShape", ["size"], ["giant"]))
        nodes.append(helper.make_node("ReduceMax", ["giant"], ["zero"], keepdims=0))
        nodes.append(helper.make_node("Add", ["out", "zero"], ["logits"]))
    else:
        nodes.append(helper.make_node("Identity", ["out"], ["logits"]))
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("images", kind, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", kind, shape)],
        initializers,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    contents: bytes = model.SerializeToString()
    return contents


def add_export(directory: Path, contents: bytes) -> Path:
    """Add an ONNX file to an artefact, with its hash."""
    path = directory / "model.onnx"
    path.write_bytes(contents)
    entry = {"format": "onnx", "precision": "fp32", "file": path.name, "files": [path.name],
             "preprocess": False}  # fmt: skip

    def change(description: dict[str, Any]) -> None:
        description["exports"] = [entry]
        description["hashes"][path.name] = sha256(path)

    rewrite(directory, "model.json", change)
    return path


def test_weights_in_files_that_are_not_listed_are_refused(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    np.ones((1, 3), np.float32).tofile(artefact / "weights.bin")
    monkeypatch.chdir(artefact)  # where a model from memory would look
    path = add_export(artefact, onnx_file(external="weights.bin"))
    with pytest.raises(InputError, match="keeps weights in another file, which nobody verified"):
        repnet.load_deployed(path)
    path = add_export(artefact, onnx_file())
    assert repnet.load_deployed(path)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_the_other_file_of_an_export_must_be_listed(artefact: Path) -> None:
    (artefact / "model.xml").write_text("<net/>")
    (artefact / "model.bin").write_bytes(b"weights")
    entry = {"format": "openvino", "precision": "fp32", "file": "model.xml", "files": ["model.xml"],
             "preprocess": False}  # fmt: skip

    def change(description: dict[str, Any]) -> None:
        description["exports"] = [entry]
        description["hashes"]["model.xml"] = sha256(artefact / "model.xml")

    rewrite(artefact, "model.json", change)
    with pytest.raises(InputError, match=r"does not list 'model\.bin', so that nobody verified it"):
        repnet.load_deployed(artefact / "model.xml")


# Exhaustion

RepVGG = {"_target_": "repnet.models.RepVGG", "widths": [0.125] * 4}
GIANTS: dict[str, dict[str, Any]] = {
    "blocks": {**RepVGG, "depths": [200_000, 1, 1, 1]},
    "widths": {**RepVGG, "depths": [1, 1, 1, 1], "widths": [4000.0] * 4},
    "classes": {**RepVGG, "depths": [1, 1, 1, 1], "num_classes": 10**10},
    "branches": {
        "_target_": "repnet.models.MobileOne", "depths": [1] * 4, "widths": [0.125] * 4,
        "num_branches": 10**9,
    },
}  # fmt: skip


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a network of this size would be made."""

    def initialize(weight: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        assert weight.is_meta or weight.numel() < MOST, f"{tuple(weight.shape)} was allocated"
        return weight

    monkeypatch.setattr(nn.init, "kaiming_uniform_", initialize)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("name", GIANTS)
def test_a_description_of_a_giant_is_refused(artefact: Path, name: str) -> None:
    def change(description: dict[str, Any]) -> None:
        description["architecture"] = {"train_form": GIANTS[name], "layers": {}}

    rewrite(artefact, "model.json", change)
    for load in (repnet.load_deployed, Predictor, find_subject):
        with pytest.raises(InputError, match="describes a network of") as refusal:
            load(str(artefact))
        assert len(str(refusal.value).splitlines()) == 1
    contents = {
        "state_dict": {"model.head.weight": torch.zeros(2, 2)},
        "repnet": describe({"model": GIANTS[name]}, GRAY),
    }
    save_checkpoint(contents, artefact.parent / "best.ckpt")
    with pytest.raises(InputError, match="describes a network of"):
        load_checkpoint(artefact.parent / "best.ckpt")


@pytest.mark.usefixtures("no_memory")
def test_a_train_form_that_its_layers_hide_is_not_built(artefact: Path) -> None:
    """The deploy form fits its weights, but the train form that the bench would time does not."""

    def change(description: dict[str, Any]) -> None:
        description["architecture"]["train_form"] |= {"num_classes": 10**7}
        layer = {"type": "Linear", "in_features": 64, "out_features": 3, "bias": True}
        description["architecture"]["layers"]["head"] = layer

    rewrite(artefact, "model.json", change)
    assert repnet.load_deployed(artefact)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    with pytest.raises(InputError, match="describes a network of"):
        find_subject(str(artefact))


def test_an_outline_counts_the_modules_of_its_own_thread() -> None:
    spec = {**RepVGG, "depths": [1, 1, 1, 1]}

    def build_others(model: nn.Module) -> nn.Module:
        """Build a giant in another thread while the outline of `model` is not finished."""
        many = lambda: nn.Sequential(*(nn.Identity() for _ in range(20_000)))
        other = threading.Thread(target=many)
        other.start()
        other.join()
        return model

    outline(spec, allowed=MODEL_PACKAGES, tensors=10, elements=10**6, change=build_others)
    assert not any(p.is_meta for p in repnet.create_model("repvgg_tiny").parameters())


def test_a_description_of_many_bytes_is_not_read(artefact: Path) -> None:
    with (artefact / "model.json").open("r+b") as file:
        file.truncate(17_000_000)
    with pytest.raises(InputError, match="has more than 16,000,000 bytes"):
        repnet.load_deployed(artefact)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    model = repnet.create_model("repvgg_tiny", num_classes=3)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    contents = {"state_dict": state, "repnet": describe({"model": model.architecture}, GRAY)}
    save_checkpoint(contents, path)
    load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    for load in (load_checkpoint, lambda path: load_weights(model, path)):
        with pytest.raises(InputError, match="is compressed: its '.*' of .* bytes unfolds to"):
            load(path)


def test_weights_that_are_views_of_one_number_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    state = {"model.head.weight": torch.zeros(1).expand(1_000_000, 1_000_000)}
    save_checkpoint({"state_dict": state, "repnet": describe({"model": RepVGG}, GRAY)}, path)
    with pytest.raises(InputError, match=r"describes weights of 4,000,000,000,000 bytes"):
        load_checkpoint(path)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        sum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def jpeg_header(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    contents = bytearray(buffer.getvalue())
    start = contents.index(b"\xff\xc0") + 5
    contents[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(contents)


def bmp_header(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "BMP")
    contents = bytearray(buffer.getvalue())
    contents[18:26] = struct.pack("<ii", width, height)
    return bytes(contents)


def gif_header(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (2, 2)).save(buffer, "GIF")
    contents = bytearray(buffer.getvalue())
    contents[6:10] = struct.pack("<HH", width, height)
    return bytes(contents)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(65_000, 65_000), (12_649, 12_649)], ids=str)
@pytest.mark.parametrize("header", [png_header, jpeg_header, bmp_header, gif_header])
def test_an_image_of_too_many_pixels_is_not_decoded(
    header: Callable[..., bytes],
    size: tuple[int, int],
    artefact: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: Any) -> Any:
        pytest.fail("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", forbidden)
    monkeypatch.setattr("repnet.data.decoding._decode_jpeg", forbidden)
    contents = header(*size)
    with pytest.raises(ValueError, match="pixels"):
        decode(contents)
    image = artefact.parent / "image.png"
    image.write_bytes(contents)
    code, output, errors = run(artefact, image)
    assert (code, output) == (2, "")
    assert "pixels" in errors
    assert len(errors.splitlines()) == 1


def test_gray_levels_are_computed_in_strips(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(artefact)
    pixels = torch.randint(256, (3, 37, 11), dtype=torch.uint8)
    whole = predictor.prepare(pixels)
    sizes: list[int] = []

    def counted(strip: np.ndarray) -> np.ndarray:
        sizes.append(strip.size)
        return gray(strip)

    gray = predictor_module._gray
    monkeypatch.setattr(predictor_module, "_gray", counted)
    monkeypatch.setattr(predictor_module, "_STRIP", 50)
    assert np.array_equal(predictor.prepare(pixels), whole)
    assert len(sizes) == 10
    assert max(sizes) <= 3 * 50


def test_a_narrow_image_is_not_made_long(tmp_path: Path) -> None:
    write_artefact(tmp_path, COLORS)
    predictor = Predictor(tmp_path)
    with pytest.raises(InputError, match=r"one of its sides is 1,000,000 times as long"):
        predictor.prepare(torch.zeros(3, 1, 1_000_000, dtype=torch.uint8))


def test_a_pipe_is_no_image(
    artefact: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    os.mkfifo(tmp_path / "image.png")
    code, _, errors = run(artefact, tmp_path / "image.png")
    assert (code, errors) == (
        2,
        f"error: '{tmp_path / 'image.png'}' is neither a file nor a folder\n",
    )
    with pytest.raises(InputError, match="it is not a file"):
        Predictor(artefact).prepare(tmp_path / "image.png")
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "image.png")


BOMB = "\n".join(
    ["a0: &a0 [0]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)
CONFIGS = {
    "bomb": (BOMB, "stands for more than 100,000 values by its aliases"),
    "circle": ("a: &a [*a]", "stands for more than 100,000 values by its aliases"),
    "broken": ("model: [", "is damaged: while parsing"),
    "tab": ("model:\n\t- 1", "is damaged: while scanning"),
    "deep": ("[" * 5000, "is damaged"),
    "text": ("hello", "is damaged"),
    "list": ("[model]", "is damaged: it lacks"),
    "empty": ("", "is damaged: it lacks model, data"),
    "binary": (b"\xff\xfe", "is damaged: it is not UTF-8"),
    "twice": ("a: 1\na: 2", "is damaged"),
    "large": ("#" * 1_000_001, "has more than 1,000,000 bytes"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_resumed_is_one_line(name: str, tmp_path: Path) -> None:
    contents, reason = CONFIGS[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    with pytest.raises(InputError, match=reason) as refusal:
        read_config(path)
    assert len(str(refusal.value).splitlines()) == 1


def test_aliases_that_a_run_writes_are_read(tmp_path: Path) -> None:
    shared = [1, 2]
    parts = dict.fromkeys(("data", "loss", "optimizer", "trainer", "seed"), shared)
    text = yaml.safe_dump({"model": shared, **parts})
    assert "*id001" in text
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path / "config.yaml").data == [1, 2]


# Tracebacks


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "DOUBLE"}, r"takes tensor\(double\), repnet gives images as tensor\(float\)"),
        ({"scalar": True}, "cannot classify images"),
        ({"constant": 10**9}, "cannot classify images: .*ConstantOfShape"),
    ],
)
def test_an_onnx_file_that_is_no_classifier_is_one_line(
    artefact: Path, run: Callable[..., tuple[int, str, str]], options: Any, reason: str
) -> None:
    pytest.importorskip("onnxruntime")
    path = add_export(artefact, onnx_file(**options))
    Image.new("L", (8, 8)).save(artefact.parent / "image.png")
    code, output, errors = run(path, artefact.parent / "image.png")
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    with pytest.raises(InputError, match=reason):
        Predictor(path).predict([artefact.parent / "image.png"])


@pytest.mark.parametrize(
    "shape", [[1, 10**10, 8], [1, 10**5, 10**5], [1, 8, -1], [1, 8.5, 8], "1x8", None, [1, 8]]
)
def test_a_shape_that_no_image_has_is_one_line(artefact: Path, shape: Any) -> None:
    rewrite(artefact, "model.json", lambda m: m["data"].update(input_shape=shape))
    for load in (Predictor, find_subject):
        with pytest.raises(InputError, match=r"(the shape of its images|have the shape)"):
            load(str(artefact))


def test_a_network_for_other_images_is_one_line(
    artefact: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    rewrite(
        artefact, "model.json", lambda m: m["data"].update(input_shape=[3, 8, 8], mean=[0.5] * 3,
                                                           std=[0.5] * 3),
    )  # fmt: skip
    Image.new("RGB", (8, 8)).save(artefact.parent / "image.png")
    code, _, errors = run(artefact, artefact.parent / "image.png")
    assert code == 2
    assert "cannot classify images: Given groups=1" in errors
    assert len(errors.splitlines()) == 1


ESCAPES = ["cat\x1b[31m", "dog\r\nINJECTED", "\u202egnu"]


def test_control_characters_are_escaped() -> None:
    assert [printable(name) for name in ESCAPES] == [
        r"cat\x1b[31m", r"dog\r\nINJECTED", r"\u202egnu",
    ]  # fmt: skip
    assert printable("größer \N{CAT FACE} 猫 \u200d") == "größer \N{CAT FACE} 猫 \u200d"
    assert printable("\udcff\ud800") == "\ufffd\ufffd"


def test_class_names_are_escaped_where_they_are_shown(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    write_artefact(tmp_path / "deploy", GRAY | {"class_names": ESCAPES})
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    for options in ([], ["--csv", "-"], ["--json", "-"]):
        code, output, _ = run(tmp_path / "deploy", tmp_path / "image.png", *options)
        assert code == 0
        assert not {"\x1b", "\r", "\u202e"} & set(output)
        assert "\nINJECTED" not in output
        assert r"\x1b[31m" in output


def test_class_names_are_escaped_in_reports_and_tables(tmp_path: Path) -> None:
    from repnet.callbacks.pictures import Pictures
    from repnet.data.fake import FakeImages
    from repnet.deploy.evaluation import evaluate
    from repnet.deploy.findings import of_evaluation
    from repnet.deploy.report import write_html

    data = FakeImages(classes=3, image_size=8)
    data.setup()
    data.class_names = ESCAPES
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    loader = data.evaluation_dataloader(1)
    report = of_evaluation(evaluate(model, model, loader, torch.device("cpu")), data)
    write_html({"verified": True, **report}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert r"cat\x1b[31m" in page
    assert "\x1b" not in page + json.dumps(report, ensure_ascii=False)
    assert "\u202e" not in page
    pictures = Pictures(class_names=ESCAPES)
    pictures.classes = 3
    pictures.images = torch.zeros(1, 3, 8, 8)
    pictures.values = torch.tensor([[2.0, 0.0, 1.0, 0.9, 7.0]])
    trainer: Any = SimpleNamespace(
        default_root_dir=tmp_path, loggers=[], global_step=1, test_dataloaders=None
    )
    pictures._draw(trainer, np.array([[0, 1, 2], [1, 1, 2]]))
    rows = (tmp_path / "per_class.csv").read_text().splitlines()
    assert rows[1].startswith(r"cat\x1b[31m,1,")
    assert len(rows) == 4


def test_the_card_shows_no_control_characters(tmp_path: Path) -> None:
    provenance = {"data": "Pets\x1b[2J\n# Best model", "split": "te\u202est", "weights": "\x07"}
    write_artefact(tmp_path, report=REPORT | {"exports": [], "provenance": provenance})
    text = write_model_card(tmp_path).read_text()
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\n# Best model" not in text


def test_a_license_is_one_that_the_hub_knows(tmp_path: Path) -> None:
    write_artefact(tmp_path, report=REPORT | {"exports": []})
    assert len(LICENSES) == len(set(LICENSES))
    for wrong in ("apache2", "MIT", "mit\nextra: true", ""):
        with pytest.raises(InputError, match="unknown license"):
            write_model_card(tmp_path, license=wrong)
    with pytest.raises(InputError, match=r"did you mean 'apache-2\.0'\?"):
        write_model_card(tmp_path, license="apache-2")
    assert not (tmp_path / "README.md").exists()
    write_model_card(tmp_path, license="apache-2.0")


def test_limits_leave_photographs_alone() -> None:
    assert MAX_PIXELS > 8000 * 6000
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
