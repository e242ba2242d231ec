"""`create_app`: the HTTP interface of a `Predictor`.

A request is admitted (or refused with 503), read and, by the headers of its images, checked, all
before anything is decoded. Its images are decoded in threads, as many at once as their pixels
allow, and classified together with those of other requests. All of this ends at the timeout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

from repnet.deploy.description import read_report
from repnet.deploy.formats.base import threads
from repnet.errors import InputError
from repnet.predict import Prediction, Predictor
from repnet.serve.batcher import Batcher
from repnet.serve.limits import Limits, PixelBudget
from repnet.serve.metrics import Metrics
from repnet.text import printable

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other decoder is tried
_AGAIN = {"Retry-After": "1"}  # seconds
_GONE = 499  # nginx's code of a client that does not wait for its answer; it is only counted


def create_app(predictor: Predictor, limits: Limits | None = None) -> Starlette:
    """Return an ASGI application.

    Args:
        predictor: that answers.
        limits: of requests and memory.
    """
    server = _Server(predictor, limits or Limits())
    return Starlette(
        routes=[
            Route("/predict", server.predict, methods=["POST"]),
            Route("/model", server.model),
            Route("/health", server.health),
            Route("/ready", server.ready),
            Route("/metrics", server.expose),
        ],
        exception_handlers={HTTPException: _refusal},
        lifespan=server.lifespan,
    )


class _Server:
    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.metrics = Metrics()
        self.top1 = _verified_accuracy(predictor)
        self.in_flight = 0

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.budget = PixelBudget(self.limits.pixels)
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.metrics.pixels.set_function(lambda: self.budget.total - self.budget.free)
        self.batcher = Batcher(self.predictor, self.limits.batch, self.metrics.batches.observe)
        with ThreadPoolExecutor(threads()) as self.decoders:
            self.batches = asyncio.create_task(self.batcher.run())
            yield
            self.batches.cancel()

    async def predict(self, request: Request) -> Response:
        """Return the likeliest classes of each image, best first."""
        start, code = time.perf_counter(), 500
        try:
            response = await self._admit(request)
            code = response.status_code
            return response
        except HTTPException as error:
            code = error.status_code
            raise
        except ClientDisconnect:
            code = _GONE
            return Response(status_code=code)
        finally:
            self.metrics.requests.labels(code).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)

    async def _admit(self, request: Request) -> Response:
        if self.in_flight >= self.limits.requests:
            raise HTTPException(
                503, f"{self.in_flight:,} requests are being answered; try again", _AGAIN
            )
        self.in_flight += 1
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await self._answer(request)
        except TimeoutError:
            raise HTTPException(
                504, f"there was no answer within {self.limits.timeout:g} seconds", _AGAIN
            ) from None
        finally:
            self.in_flight -= 1

    async def _answer(self, request: Request) -> Response:
        top = _top(request)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "send multipart/form-data with files named image")
        most = self.limits.request_bytes
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > most:
            raise HTTPException(413, f"the request has more than {most:,} bytes")
        bounded = Request(request.scope, _bounded(request.receive, most))
        async with bounded.form(max_files=self.limits.request_images) as form:
            files = [file for file in form.getlist("image") if isinstance(file, UploadFile)]
            if not files:
                raise HTTPException(400, "there is no file named image")
            names = [printable(f.filename or f"image {i}") for i, f in enumerate(files)]
            found = await _unless_gone(request, self._classify(files, names, top))
        return JSONResponse({"predictions": [asdict(prediction) for prediction in found]})

    async def _classify(
        self, files: list[UploadFile], names: list[str], top: int
    ) -> list[Prediction]:
        pixels = [
            await asyncio.to_thread(_pixels, file.file, name)
            for file, name in zip(files, names, strict=True)
        ]
        most = min(self.limits.request_pixels, self.limits.pixels)
        if sum(pixels) > most:
            raise HTTPException(
                413,
                f"{', '.join(names)}: {sum(pixels):,} pixels; at most {most:,} are taken in one "
                "request",
            )
        await self.budget.acquire(sum(pixels))
        decoded = [
            self.decoders.submit(self._prepare, file.file, name)
            for file, name in zip(files, names, strict=True)
        ]
        try:
            images = await asyncio.gather(*map(asyncio.wrap_future, decoded))
            classify = self.batcher.classify
            answers = [
                classify(image, name, top) for image, name in zip(images, names, strict=True)
            ]
            return await asyncio.gather(*answers)
        except InputError as error:  # NaN, for instance
            raise HTTPException(422, str(error)) from error
        finally:
            self._release(decoded, pixels)

    def _release(self, decoded: list[Future[np.ndarray]], pixels: list[int]) -> None:
        """Give the pixels back, those of images that are being decoded when that has ended."""
        loop = asyncio.get_running_loop()
        for future, number in zip(decoded, pixels, strict=True):

            def release(_: Future[np.ndarray], number: int = number) -> None:
                with suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(self.budget.release, number)

            future.cancel()  # if it waits for a thread
            future.add_done_callback(release)

    def _prepare(self, file: IO[bytes], name: str) -> np.ndarray:
        try:
            return self.predictor.prepare(file.read(), formats=FORMATS)
        except InputError as error:
            raise HTTPException(400, f"{name}: {error}") from error
        except MemoryError:
            raise HTTPException(503, f"there is no memory for {name} now", _AGAIN) from None

    async def model(self, request: Request) -> Response:
        """Return what is served, and how good it was found to be."""
        return JSONResponse(
            {
                "sha256": self.predictor.hashes,
                "top1": self.top1,
                "input_shape": self.predictor.description["data"]["input_shape"],
                "images": self.predictor.rule,
                "class_names": self.predictor.class_names,
            }
        )

    async def health(self, request: Request) -> Response:
        """Return that the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Return whether a request would be taken now."""
        if self.batches.done() or self.in_flight >= self.limits.requests:
            return JSONResponse({"status": "busy"}, 503, _AGAIN)
        return JSONResponse({"status": "ready"})

    async def expose(self, request: Request) -> Response:
        """Return the metrics for Prometheus."""
        text = generate_latest(self.metrics.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


def _top(request: Request) -> int:
    text = request.query_params.get("top", "5")
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 10):
        raise HTTPException(400, f"top must be a positive number, not '{printable(text)}'")
    return int(text)


def _bounded(receive: Receive, most: int) -> Receive:
    """Return `receive`, which refuses a body of more bytes than `most`, announced or not."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            raise HTTPException(413, f"the request has more than {most:,} bytes")
        return message

    return counted


async def _unless_gone(request: Request, work: Awaitable[list[Prediction]]) -> list[Prediction]:
    """Return the result of `work`, which is cancelled if the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.create_task(until_gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


def _pixels(file: IO[bytes], name: str) -> int:
    """Return how many pixels an image has, by its header.

    Raises:
        HTTPException: 400 for no or half an image, 413 for one that nobody decodes, 415 for other
            formats.
    """
    try:
        if not file.read(1):
            raise HTTPException(400, f"{name} is empty")
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:  # decodes nothing yet
            width, height = image.size
    except HTTPException:
        raise
    except UnidentifiedImageError:
        raise HTTPException(415, f"{name} is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"{name}: {error}") from error
    except Exception as error:  # decoders of damaged files fail in every way that there is
        raise HTTPException(400, f"{name} is damaged: {error}") from error
    finally:
        file.seek(0)
    return width * height


def _verified_accuracy(predictor: Predictor) -> float | None:
    """Return the top-1 accuracy that `deploy.py` measured of this very file, if it is known."""
    path = predictor.artefact
    try:
        report: Any = read_report(path if path.is_dir() else path.parent, predictor.description)
        top1 = {export["file"]: export["top1"] for export in report["exports"]}
        top1["model.safetensors"] = report["metrics"]["deploy_form"]["top1"]
        return float(top1[next(iter(predictor.hashes))])
    except (InputError, OSError, TypeError, KeyError):  # not there, changed, or of another version
        return None
