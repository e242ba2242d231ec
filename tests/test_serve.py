"""`repnet serve`: the HTTP server."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repnet.predict import Prediction, Predictor
from repnet.serve.limits import Limits, PixelBudget
from tests.artefacts import COLORS, write_artefact
from tests.commands import environment

pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
httpx = pytest.importorskip("httpx")
testing = pytest.importorskip("starlette.testclient")
app = pytest.importorskip("repnet.serve.app")
command = pytest.importorskip("repnet.serve.__main__")


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


@contextmanager
def serving(predictor: Predictor, **limits: Any) -> Iterator[Any]:
    with testing.TestClient(app.create_app(predictor, Limits(**limits))) as client:
        yield client


@pytest.fixture
def client(artefact: Path) -> Iterator[Any]:
    with serving(Predictor(artefact)) as client:
        yield client


class Held(Predictor):
    """A predictor that classifies nothing before `go` is set."""

    def __init__(self, artefact: Path) -> None:
        super().__init__(artefact)
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def classify(
        self, images: Sequence[np.ndarray], names: Sequence[str], *, top: int = 5
    ) -> list[Prediction]:
        self.batches.append(list(names))
        self.begun.set()
        assert self.go.wait(60)
        return super().classify(images, names, top=top)


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


def test_requests_at_the_same_time_are_batched_and_do_not_mix(artefact: Path) -> None:
    contents = [encoded(seed) for seed in range(12)]
    expected = [p.scores[0].probability for p in Predictor(artefact).predict(contents, top=1)]
    predictor = Held(artefact)
    with serving(predictor, batch=8) as client, ThreadPoolExecutor(12) as pool:
        first = pool.submit(post, client, contents[0])
        assert predictor.begun.wait(60)
        others = [
            pool.submit(post, client, data, params={"top": 1 + index % 3})
            for index, data in enumerate(contents[1:])
        ]
        until(lambda: metric(client, "repnet_requests_in_flight") == 12)
        until(lambda: client.app.routes[0].endpoint.__self__.batcher.jobs.qsize() == 11)
        predictor.go.set()
        answers = [future.result().json()["predictions"][0] for future in (first, *others)]
    assert [answer["scores"][0]["probability"] for answer in answers] == pytest.approx(
        expected, rel=1e-5
    )
    assert [len(answer["scores"]) for answer in answers[1:]] == [1 + i % 3 for i in range(11)]
    assert list(map(len, predictor.batches)) == [1, 8, 3]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; pytest's own timeout would end it."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within a minute")


def metric(client: Any, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


@pytest.mark.parametrize(("file", "top1"), [(None, 0.75), ("model.pt2", 0.5)])
def test_it_says_what_it_serves(artefact: Path, file: str | None, top1: float) -> None:
    predictor = Predictor(artefact / file if file else artefact, trust=["native"])
    with serving(predictor) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
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
        (png_header(8000, 6000), 413, "48,000,000 pixels"),
        (png_header(60_000, 60_000), 413, "0.png"),
        (encoded(size=(1_000_000, 1)), 400, "times as long"),
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
        {"files": {"image": ("a.png", encoded())}, "params": {"top": "9" * 5000}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ):
        answer = client.post("/predict", **options)
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["detail"], str)
    assert client.get("/predict").status_code == 405
    answer = post(client, *[encoded()] * 33)
    assert answer.status_code == 400
    assert "Maximum number of files is 32" in answer.json()["detail"]


def test_large_requests_are_refused(artefact: Path) -> None:
    with serving(Predictor(artefact), request_bytes=10_000, request_pixels=3000) as client:
        answer = post(client, b"x" * 20_000)
        assert answer.status_code == 413
        assert "10,000 bytes" in answer.json()["detail"]

        def chunks() -> Iterator[bytes]:  # without a length
            yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            for _ in range(100):
                yield b"x" * 1000

        kind = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post("/predict", content=chunks(), headers=kind)
        assert answer.status_code == 413, answer.text
        answer = post(client, *[encoded()] * 3)  # 1,200 pixels each
        assert answer.status_code == 413
        assert "3,600 pixels; at most 3,000" in answer.json()["detail"]
        assert post(client, *[encoded()] * 2).status_code == 200


def test_more_requests_than_the_queue_holds_are_refused_at_once(artefact: Path) -> None:
    predictor = Held(artefact)
    with serving(predictor, requests=2) as client, ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(post, client, encoded()) for _ in range(2)]
        until(lambda: metric(client, "repnet_requests_in_flight") == 2)
        answer = post(client, encoded())
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert "2 requests are being answered" in answer.json()["detail"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200  # it need not be restarted
        predictor.go.set()
        assert [future.result().status_code for future in taken] == [200, 200]
        assert client.get("/ready").status_code == 200
        assert post(client, encoded()).status_code == 200
        assert metric(client, 'repnet_requests_total{code="503"}') == 1
        assert metric(client, 'repnet_requests_total{code="200"}') == 3


def test_work_ends_when_nobody_waits_for_it(artefact: Path) -> None:
    predictor = Held(artefact)
    with serving(predictor, timeout=0.2) as client:
        for _ in range(2):  # the first one is with the network, the second one waits for it
            answer = post(client, encoded())
            assert (answer.status_code, answer.headers["Retry-After"]) == (504, "1")
            assert "0.2 seconds" in answer.json()["detail"]
        assert metric(client, "repnet_requests_in_flight") == 0
        predictor.go.set()
        until(lambda: client.app.routes[0].endpoint.__self__.batcher.jobs.empty())
    assert len(predictor.batches) == 1


def test_a_client_that_goes_ends_its_work() -> None:
    async def check() -> None:
        gone, cancelled = asyncio.Event(), asyncio.Event()

        async def work() -> list[Prediction]:
            gone.set()
            try:
                await asyncio.sleep(3600)
            finally:
                cancelled.set()
            return []

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        with pytest.raises(app.ClientDisconnect):
            await app._unless_gone(SimpleNamespace(receive=receive), work())
        await asyncio.wait_for(cancelled.wait(), 60)

    asyncio.run(check())


def test_images_in_memory_are_bounded(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, lock = Predictor(artefact), threading.Lock()
    held, most, prepare = 0, 0, predictor.prepare

    def counted(contents: Any, **options: Any) -> np.ndarray:
        nonlocal held, most
        with lock:
            held += 1200
            most = max(most, held)
        threading.Event().wait(0.02)
        prepared = prepare(contents, **options)
        with lock:
            held -= 1200
        return prepared

    monkeypatch.setattr(predictor, "prepare", counted)
    monkeypatch.setattr(app, "threads", lambda: 8)
    with serving(predictor, pixels=3000) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: post(client, encoded(seed)), range(14)))
        assert {answer.status_code for answer in answers} == {200}
        assert metric(client, "repnet_pixels_in_flight") == 0
    assert most == 2400  # two at a time


def test_pixels_of_a_request_that_ended_are_kept_while_they_are_decoded(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, go = Predictor(artefact), threading.Event()
    prepare = predictor.prepare

    def held(contents: Any, **options: Any) -> np.ndarray:
        assert go.wait(60)
        return prepare(contents, **options)

    monkeypatch.setattr(predictor, "prepare", held)
    monkeypatch.setattr(app, "threads", lambda: 8)
    with serving(predictor, timeout=0.2, pixels=3000) as client:
        assert [post(client, encoded()).status_code for _ in range(3)] == [504] * 3
        assert metric(client, "repnet_pixels_in_flight") == 2400  # the third one had to wait
        go.set()
        until(lambda: metric(client, "repnet_pixels_in_flight") == 0)
        assert post(client, encoded()).status_code == 200


def test_large_requests_do_not_starve() -> None:
    async def check() -> list[str]:
        budget, order = PixelBudget(10), list[str]()

        async def take(name: str, pixels: int) -> None:
            await budget.acquire(pixels)
            order.append(name)

        await budget.acquire(5)
        tasks = [asyncio.create_task(take(*item)) for item in (("large", 10), ("small", 1))]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == []
        budget.release(5)
        await tasks[0]
        budget.release(10)
        await tasks[1]
        return order

    assert asyncio.run(check()) == ["large", "small"]


def test_an_image_without_a_prediction_does_not_spoil_the_others(artefact: Path) -> None:
    class Choosy(Held):
        def _logits(self, images: np.ndarray) -> np.ndarray:
            logits = super()._logits(images)
            logits[images.mean((1, 2, 3)) > 1] = np.nan
            return logits

    white = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(white, "PNG")
    predictor = Choosy(artefact)
    contents = [encoded(), white.getvalue(), encoded(1)]
    with serving(predictor) as client, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, client, encoded())
        assert predictor.begun.wait(60)
        others = [pool.submit(post, client, data) for data in contents]
        until(lambda: client.app.routes[0].endpoint.__self__.batcher.jobs.qsize() == 3)
        predictor.go.set()
        answers = [future.result() for future in (first, *others)]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200]
    assert "NaN or infinity for '0.png'" in answers[2].json()["detail"]
    assert len(predictor.batches[1]) == 3


def test_bad_input_does_not_start(
    artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_artefact(tmp_path / "broken")
    contents = bytearray((tmp_path / "broken" / "model.safetensors").read_bytes())
    contents[-1] ^= 1
    (tmp_path / "broken" / "model.safetensors").write_bytes(contents)
    handler = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, reason in (
            ([tmp_path], "is not a deploy model"),
            ([tmp_path / "broken"], "was changed"),
            ([artefact / "model.pt2"], "is code"),
            ([artefact, "--port", taken.getsockname()[1]], "cannot listen on 127.0.0.1"),
        ):
            monkeypatch.setattr(sys, "argv", ["serve", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                command.main()
            _, errors = capfd.readouterr()
            assert (end.value.code, len(errors.splitlines())) == (2, 1)
            assert reason in errors
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main()
    assert 'pip install "repnet[serve]"' in capfd.readouterr().err
    signal.signal(signal.SIGTERM, handler)


@contextmanager
def server(artefact: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the command in a process of its own; yield it, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repnet", "serve", str(artefact), "--port", "0", *arguments],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {artefact} at http://127.0.0.1:"), process.communicate()
        yield process, int(line.rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_waits_for_the_requests_that_have_begun(
    artefact: Path, number: signal.Signals, code: int
) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        + encoded() + b"\r\n--b--\r\n"
    )  # fmt: skip
    head = (
        "POST /predict?top=1 HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b"
        f"\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    expected = Predictor(artefact).predict([encoded()], top=1)[0].scores[0]
    with server(artefact) as (process, port), socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(head + body[:50])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            until(lambda: metric(client, "repnet_requests_in_flight") == 1)
        process.send_signal(number)

        def refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                return True
            return False

        until(refused)
        link.sendall(body[50:])
        with link.makefile("rb") as file:
            answer = file.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert f'"{expected.name}"'.encode() in answer
        assert process.wait(60) == code
        assert process.communicate()[1] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_files_of_other_runtimes_are_served_in_little_memory(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime" if name == "onnx" else name)
    write_artefact(tmp_path, formats=[name])
    file = tmp_path / ("model.onnx" if name == "onnx" else "model.xml")
    with server(file) as (process, port):
        files = [("image", ("a.png", encoded()))]
        answer = httpx.post(f"http://127.0.0.1:{port}/predict?top=1", files=files)
        (score,) = answer.json()["predictions"][0]["scores"]
        expected = Predictor(tmp_path).predict([encoded()], top=1)[0].scores[0]
        assert score["name"] == expected.name
        assert score["probability"] == pytest.approx(expected.probability, abs=1e-4)
        status = Path(f"/proc/{process.pid}/status").read_text()
        (resident,) = (
            int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")
        )
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        assert resident < 300_000  # kB
