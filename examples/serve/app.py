"""An HTTP server for a deploy model, in any of its formats.

    REPNET_ARTEFACT=deploy/model.xml uvicorn app:app --app-dir examples/serve

`POST /predict` takes images, `GET /model` says what is served, `GET /health` that it is there.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from threading import Lock
from typing import Annotated, Any

import torch
from fastapi import FastAPI, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from repnet.errors import InputError
from repnet.predict import Predictor

MAX_BYTES = int(os.environ.get("REPNET_MAX_BYTES", 20_000_000))  # of a request
MAX_IMAGES = 32  # of a request
MAX_PIXELS = 40_000_000  # of an image: 120 MB when decoded
MAX_RATIO = 20  # of its sides: resizing the shorter one lengthens the longer
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other decoder is tried


class LimitBody:
    """Middleware that refuses a body of more than `MAX_BYTES`, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        too_large = HTTPException(413, f"the request has more than {MAX_BYTES:,} bytes")

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BYTES:
                raise too_large
            return message

        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > MAX_BYTES:
            response = JSONResponse({"detail": too_large.detail}, too_large.status_code)
            await response(scope, receive, send)
        else:
            await self.app(scope, counted, send)


@asynccontextmanager
async def load(app: FastAPI) -> AsyncIterator[None]:
    """Load the artefact, and run it once: a broken one does not even start."""
    predictor = Predictor(
        os.environ["REPNET_ARTEFACT"], trust=os.environ.get("REPNET_TRUST", "").split()
    )
    blank = torch.zeros(predictor.channels, predictor.height, predictor.width, dtype=torch.uint8)
    predictor.predict([blank])
    app.state.predictor, app.state.lock = predictor, Lock()
    yield


app = FastAPI(title="repnet", lifespan=load)
app.add_middleware(LimitBody)


@app.post("/predict")
def predict(
    request: Request, image: list[UploadFile], top: Annotated[int, Query(ge=1)] = 5
) -> dict[str, Any]:
    """Return the likeliest classes of each image, best first."""
    if len(image) > MAX_IMAGES:
        raise HTTPException(413, f"{len(image)} images; at most {MAX_IMAGES} in one request")
    names = [upload.filename or f"image {index}" for index, upload in enumerate(image)]
    predictor: Predictor = request.app.state.predictor
    # FastAPI calls this in a thread of its pool: images are decoded side by side, networks run in
    # turn, as one uses all cores.
    prepared = [
        prepare(predictor, upload.file.read(), name)
        for upload, name in zip(image, names, strict=True)
    ]
    with request.app.state.lock:
        predictions = predictor.classify(prepared, names, top=top)
    return {"predictions": [asdict(prediction) for prediction in predictions]}


@app.get("/model")
def model(request: Request) -> dict[str, Any]:
    """Return what is served, and how good it was found to be."""
    predictor: Predictor = request.app.state.predictor
    return {
        "sha256": predictor.hashes,
        "top1": verified_accuracy(predictor),
        "input_shape": predictor.description["data"]["input_shape"],
        "images": predictor.rule,
        "class_names": predictor.class_names,
    }


@app.get("/health")
def health() -> dict[str, str]:
    """Return that the model is loaded."""
    return {"status": "ok"}


@app.exception_handler(RequestValidationError)
async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 instead of FastAPI's 422, 415 where the body is no form, and say what is wrong."""
    assert isinstance(error, RequestValidationError)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return JSONResponse({"detail": "send multipart/form-data with files named image"}, 415)
    first = error.errors()[0]
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 400)


def verified_accuracy(predictor: Predictor) -> float | None:
    """Return the top-1 accuracy that `deploy.py` measured of this very file, if it is known."""
    path = predictor.artefact / "report.json"
    if not path.exists():  # a file of the artefact is served
        path = predictor.artefact.with_name("report.json")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        top1 = {export["file"]: export["top1"] for export in report["exports"]}
        top1["model.safetensors"] = report["metrics"]["deploy_form"]["top1"]
        return top1[next(iter(predictor.hashes))]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def prepare(predictor: Predictor, contents: bytes, name: str) -> torch.Tensor:
    """Return an image as the model takes it, after a look at its header.

    Raises:
        HTTPException: 400 for no or half an image, 413 for too large a one, 415 for other formats.
    """
    if not contents:
        raise HTTPException(400, f"{name} is empty")
    try:
        with Image.open(io.BytesIO(contents), formats=FORMATS) as image:  # decodes nothing yet
            width, height = image.size
    except UnidentifiedImageError:
        raise HTTPException(415, f"{name} is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise HTTPException(413, f"{name}: {error}") from error
    except Exception as error:  # decoders of damaged files fail in every way that there is
        raise HTTPException(400, f"{name} is damaged: {error}") from error
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        raise HTTPException(
            413,
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are taken, and one side "
            f"may be {MAX_RATIO} times as long as the other",
        )
    try:
        return predictor.prepare(contents, formats=FORMATS)
    except InputError as error:
        raise HTTPException(400, f"{name}: {error}") from error
