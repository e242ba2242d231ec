"""Load on `repnet serve`: clients that ask without a pause, then large images all at once.

    python benchmarks/serve.py DEPLOY/model.onnx --clients 50 --seconds 60

Clients and server share the machine, so that the figures are a lower bound. The memory of the
server is that of its process, from /proc: Linux only.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
from PIL import Image

BOUNDARY = "image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", help="directory of deploy.py, or a file in it")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="of the JPEG")
    parser.add_argument("--large", type=int, default=14, help="PNGs of 6,300 x 6,300 pixels")
    arguments = parser.parse_args()
    with server(arguments.artefact) as (pid, port):
        print(f"memory at the start: {memory(pid, 'VmRSS'):,.0f} MB")
        load(pid, port, arguments.clients, arguments.seconds, tuple(arguments.size))
        large(pid, port, arguments.large)


def load(pid: int, port: int, clients: int, seconds: float, size: tuple[int, int]) -> None:
    body = form(noise(size), "JPEG")
    ask(port, body)  # one alone
    times: list[float] = []
    codes: Counter[int] = Counter()
    lock = threading.Lock()
    end = time.perf_counter() + seconds

    def client(_: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() < end:
            start = time.perf_counter()
            code = ask(port, body, connection)
            with lock:
                times.append(time.perf_counter() - start)
                codes[code] += 1

    resident = []
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, index) for index in range(clients)]
        for part in range(1, 7):
            time.sleep(max(0.0, end - seconds * (1 - part / 6) - time.perf_counter()))
            resident.append(memory(pid, "VmRSS"))
        for future in running:
            future.result()
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    answers = ", ".join(f"{count:,} x {code}" for code, count in sorted(codes.items()))
    print(f"{clients} clients for {seconds:g} s, a JPEG of {size[0]} x {size[1]} each: {answers}")
    print(f"{codes[200] / seconds:,.1f} images/s, p50 {p50:,.0f} ms, p99 {p99:,.0f} ms")
    print(f"memory at each sixth: {', '.join(f'{value:,.0f}' for value in resident)} MB")


def large(pid: int, port: int, number: int) -> None:
    body = form(Image.new("RGB", (6300, 6300), (120, 60, 30)), "PNG")
    start = time.perf_counter()
    with ThreadPoolExecutor(number) as pool:
        codes = Counter(pool.map(lambda _: ask(port, body), range(number)))
    seconds = time.perf_counter() - start
    answers = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
    print(f"{number} PNGs of 6,300 x 6,300 pixels at once: {answers} in {seconds:.0f} s")
    while "repnet_pixels_in_flight 0.0" not in metrics(port):  # of requests that timed out
        time.sleep(1)
    print(f"memory: {memory(pid, 'VmHWM'):,.0f} MB at most, {memory(pid, 'VmRSS'):,.0f} MB after")


def ask(port: int, body: bytes, connection: HTTPConnection | None = None) -> int:
    """Return the status of one request."""
    connection = connection or HTTPConnection("127.0.0.1", port, timeout=120)
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    connection.request("POST", "/predict?top=5", body, kind)
    response = connection.getresponse()
    response.read()
    return response.status


def metrics(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def form(image: Image.Image, kind: str) -> bytes:
    """Return the body of a request with one image."""
    file = io.BytesIO()
    image.save(file, kind)
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return head.encode() + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()


def noise(size: tuple[int, int]) -> Image.Image:
    """Return colors that change slowly, which JPEG compresses about as photographs."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def memory(pid: int, key: str) -> float:
    """Return a line of /proc/PID/status, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000


@contextmanager
def server(artefact: str) -> Iterator[tuple[int, int]]:
    """Yield the process and the port of a server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repnet", "serve", artefact, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:  # it has said why
            sys.exit(process.wait())
        yield process.pid, int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
