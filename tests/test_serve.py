"""`examples/serve`: the HTTP server."""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repnet.errors import InputError
from repnet.predict import Predictor
from tests.artefacts import COLORS, write_artefact
from tests.commands import ROOT, environment

pytest.importorskip("python_multipart")
httpx = pytest.importorskip("httpx")
testing = pytest.importorskip("fastapi.testclient")

FOLDER = ROOT / "examples" / "serve"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("serve") / "deploy"
    report = {
        "verified": True,
        "metrics": {"deploy_form": {"top1": 0.75}},
        "exports": [{"file": "model.pt2", "top1": 0.5}],
    }
    write_artefact(directory, formats=["torch_export"], report=report)
    return directory


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("serve_app", FOLDER / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_app"] = module  # FastAPI looks the annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(app: Any, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("REPNET_ARTEFACT", str(artefact))
    with testing.TestClient(app.app) as client:
        yield client


def encoded(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return the start of a PNG that claims a size; its pixels would never end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def post(client: Any, *contents: bytes, **options: Any) -> Any:
    files = [("image", (f"{index}.png", data)) for index, data in enumerate(contents)]
    return client.post("/predict", files=files, **options)


def test_predictions_are_those_of_the_predictor(client: Any, artefact: Path) -> None:
    contents = [encoded(0), encoded(1, "JPEG"), encoded(2, size=(7, 90))]
    answer = post(client, *contents, params={"top": 2})
    assert answer.status_code == 200, answer.text
    expected = Predictor(artefact).predict(contents, top=2)
    found = answer.json()["predictions"]
    assert [entry["image"] for entry in found] == ["0.png", "1.png", "2.png"]
    for entry, prediction in zip(found, expected, strict=True):
        assert [s["name"] for s in entry["scores"]] == [s.name for s in prediction.scores]
        for score, other in zip(entry["scores"], prediction.scores, strict=True):
            assert score["probability"] == pytest.approx(other.probability, rel=1e-5)


def test_requests_at_the_same_time_do_not_mix(client: Any, artefact: Path) -> None:
    contents = [encoded(seed) for seed in range(12)]
    expected = [p.scores[0].probability for p in Predictor(artefact).predict(contents, top=1)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda data: post(client, data).json(), contents))
    found = [answer["predictions"][0]["scores"][0]["probability"] for answer in answers]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 12


@pytest.mark.parametrize(("file", "top1"), [(None, 0.75), ("model.pt2", 0.5)])
def test_it_says_what_it_serves(
    app: Any, artefact: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, top1: float
) -> None:
    monkeypatch.setenv("REPNET_ARTEFACT", str(artefact / file if file else artefact))
    monkeypatch.setenv("REPNET_TRUST", "native")
    with testing.TestClient(app.app) as client:
        assert client.get("/health").json() == {"status": "ok"}
        model = client.get("/model").json()
        assert post(client, encoded()).status_code == 200
    hashes = json.loads((artefact / "model.json").read_text())["hashes"]
    name = file or "model.safetensors"
    assert model["sha256"] == {name: hashes[name]}
    assert model["top1"] == top1
    assert model["class_names"] == COLORS["class_names"]
    assert model["input_shape"] == [3, 16, 16]
    assert "20 pixels" in model["images"]


@pytest.mark.parametrize(
    ("contents", "code", "reason"),
    [
        (b"", 400, "0.png is empty"),
        (b"hello", 415, "0.png is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "0.png is none of"),
        (encoded()[:300], 400, "0.png: cannot read the image"),
        (encoded()[:20], 400, "0.png"),
        (png_header(8000, 6000), 413, "8000 x 6000 pixels"),
        (png_header(60_000, 60_000), 413, "0.png"),
        (encoded(size=(2100, 100)), 413, "20 times"),
    ],
    ids=["empty", "text", "postscript", "half", "header", "large", "bomb", "narrow"],
)
def test_bad_images_are_the_fault_of_the_client(
    client: Any, contents: bytes, code: int, reason: str
) -> None:
    answer = post(client, contents)
    assert answer.status_code == code, answer.text
    assert reason in answer.json()["detail"]
    answer = post(client, encoded(), contents)  # one of two
    assert answer.status_code == code
    assert post(client, encoded()).status_code == 200  # and it goes on


@pytest.mark.filterwarnings("ignore")  # of PIL, where it takes the other format
def test_the_decoder_is_that_of_the_format_that_was_checked(client: Any) -> None:
    contents = two_formats()
    with Image.open(io.BytesIO(contents)) as image:
        assert (image.format, image.size) == ("IM", (12_000, 12_000))
    assert post(client, contents).status_code == 200  # as a TIFF of one pixel


def two_formats() -> bytes:
    """Return a TIFF of one pixel, whose unused bytes are the header of another format of PIL."""
    header = b"II*\0" + struct.pack("<I", 600)
    header += b": x\nImage type: L 1 image\nImage size (x*y): 12000*12000\n"
    header = header.ljust(511, b"\0") + b"\x1a"
    short, long = 3, 4
    entries = [(256, short, 1), (257, short, 1), (258, short, 8), (259, short, 1), (262, short, 1),
               (273, long, 580), (277, short, 1), (278, short, 1), (279, long, 1)]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    return header.ljust(600, b"\0") + directory + struct.pack("<I", 0)


def test_bad_requests_are_refused(client: Any) -> None:
    assert client.post("/predict", json={"image": "x"}).status_code == 415
    assert client.post("/predict", content=b"x").status_code == 415
    for options in (
        {"files": {"picture": b"x"}},
        {"files": {"image": ("a.png", encoded())}, "params": {"top": 0}},
        {"files": {"image": ("a.png", encoded())}, "params": {"top": "many"}},
        {"data": {"image": "text"}, "files": {"other": b"x"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ):
        answer = client.post("/predict", **options)
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["detail"], str)
    assert client.get("/predict").status_code == 405
    answer = post(client, *[encoded()] * 33)
    assert answer.status_code == 413
    assert "at most 32" in answer.json()["detail"]


def test_large_requests_are_refused(client: Any, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_BYTES", 10_000)
    answer = post(client, b"x" * 20_000)
    assert answer.status_code == 413
    assert "10,000 bytes" in answer.json()["detail"]

    def chunks() -> Iterator[bytes]:  # without a length
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 1000

    answer = client.post(
        "/predict", content=chunks(), headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 413, answer.text
    assert post(client, encoded(size=(8, 8))).status_code == 200


def test_a_broken_artefact_does_not_start(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artefact(tmp_path)
    contents = bytearray((tmp_path / "model.safetensors").read_bytes())
    contents[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(contents)
    monkeypatch.setenv("REPNET_ARTEFACT", str(tmp_path))
    with pytest.raises(InputError, match="was changed"), testing.TestClient(app.app):
        pass


def test_the_command_of_the_readme_serves(artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "uvicorn app:app --app-dir examples/serve" in (FOLDER / "README.md").read_text()
    command = ["-m", "uvicorn", "app:app", "--app-dir", str(FOLDER), "--port", str(port)]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path, env=environment(REPNET_ARTEFACT=str(artefact)), stdout=log, stderr=log,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for _ in range(600):
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.1)
            answer = client.post("/predict", files=[("image", ("a.png", encoded()))])
            assert answer.status_code == 200, answer.text
            expected = Predictor(artefact).predict([encoded()], top=1)[0].scores[0]
            assert answer.json()["predictions"][0]["scores"][0]["name"] == expected.name
    finally:
        server.terminate()
        assert server.wait(30) in (0, -15)
        log.close()
