"""`Predictor`: from image files to class names and probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from repnet.deploy.description import DESCRIPTION, WEIGHTS, class_names, image_shape
from repnet.deploy.exported import ExportedFile, is_exported
from repnet.errors import InputError, one_line
from repnet.images import MAX_PIXELS, SUFFIXES, open_rgb, resize
from repnet.text import printable

if TYPE_CHECKING:  # of files of other runtimes, nothing here needs torch
    from torch import Tensor, nn

_LARGEST_SIDE = 8192  # pixels to which the shorter side of an image is resized
_LARGEST_FILE = 1_000_000_000  # bytes; an image of `MAX_PIXELS` has 540 MB at 16 bits
_STRIP = 1_000_000  # pixels of which gray levels are computed at once

Source: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray | Tensor"


@dataclass(frozen=True)
class Score:
    """A class and its probability; `index` is its place in the network's output."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first."""

    image: str
    scores: list[Score]


class Predictor:
    """A deploy model with the preparation of images and the class names that belong to it.

    Images are prepared by the rule of evaluation: the shorter side is resized and the center
    cropped, where the data set did so; else they are resized to the size of the training images.

    Args:
        artefact: a directory that `deploy.py` wrote, or a file in it.
        trust: names of packages that may be imported to build the network; "native" for files that
            are code.
        device: of the network.

    Raises:
        InputError: the artefact or the device cannot be used, or `model.json` does not say how
            images are prepared.
    """

    def __init__(
        self, artefact: str | Path, *, trust: Sequence[str] = (), device: str = "cpu"
    ) -> None:
        self.artefact = Path(artefact)
        self.model: nn.Module | ExportedFile
        if is_exported(self.artefact):
            self.model = ExportedFile(self.artefact, trust=trust, device=device)
        else:
            from repnet.deploy.artifact import load_deployed  # the first import of torch

            self.model = load_deployed(self.artefact, trust=trust, device=device)
        self.device = device
        # What a network knows of itself are attributes that nn.Module does not declare.
        about: Any = self.model
        self.description: dict[str, Any] = about.description
        self.takes_uint8: bool = about.input_is_uint8
        data: Any = self.description.get("data")
        self.channels, self.height, self.width = image_shape(data, self.artefact)
        try:
            self.resize, self.decode_at = (
                None if data.get(key) is None else int(data[key]) for key in ("resize", "decode_at")
            )
            known = [side for side in (self.resize, self.decode_at) if side is not None]
            if known and not 1 <= min(known) <= max(known) <= _LARGEST_SIDE:
                raise ValueError(f"a length must be at least 1 and at most {_LARGEST_SIDE:,}")
            self.mean, self.std = (
                np.array(data[key], np.float32).reshape(self.channels, 1, 1)
                for key in ("mean", "std")
            )
            names = class_names(self.description)
            if names is None:
                raise ValueError("class_names is no list")
            self.class_names = names
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"'{artefact}': its {DESCRIPTION} does not say how images are prepared (data: "
                f"mean, std, resize, class_names): {error!r}"
            ) from error
        if self.channels not in (1, 3):
            raise InputError(
                f"'{artefact}' takes images of {self.channels} channels; only gray and RGB "
                "images can be prepared for it"
            )

    @property
    def rule(self) -> str:
        """How an image is prepared, for people."""
        size = f"{self.height} x {self.width}"
        if self.resize is None:
            return f"resized to {size} pixels where it has another size"
        return f"shorter side resized to {self.resize} pixels, center {size} cropped"

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what was loaded, by file; the first file is the one that is run."""
        files = self.model.files if isinstance(self.model, ExportedFile) else [WEIGHTS]
        return {file: self.description["hashes"][file] for file in files}

    def predict(
        self, images: Iterable[Source], *, top: int = 5, batch_size: int = 32
    ) -> list[Prediction]:
        """Return a prediction for each image.

        Args:
            images: paths, contents of files, PIL images, or arrays and tensors, uint8 `(channels,
                height, width)`.
            top: classes of each.
            batch_size: images that the network sees at once.

        Raises:
            InputError: an image cannot be read.
        """
        images = list(images)
        predictions = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            names = [
                printable(str(image)) if isinstance(image, str | Path) else f"image {index}"
                for index, image in enumerate(batch, start)
            ]
            prepared = [self.prepare(image) for image in batch]
            predictions += self.classify(prepared, names, top=top)
        return predictions

    def prepare(self, image: Source, *, formats: tuple[str, ...] | None = None) -> np.ndarray:
        """Return an image as the model takes it, `(channels, height, width)`.

        Args:
            image: as in `predict`.
            formats: of PIL that may be tried to decode a file; None for all.

        Raises:
            InputError: it cannot be read.
        """
        try:
            pixels = _with_channels(_read(image, self.decode_at, formats), self.channels)
            self._check_ratio(*pixels.shape[1:])
        except (OSError, ValueError) as error:
            name = f" '{printable(str(image))}'" if isinstance(image, str | Path) else ""
            raise InputError(f"cannot read the image{name}: {error}") from error
        if self.resize is None:
            pixels = resize(pixels, self.height, self.width)
        elif not self.takes_uint8:  # else the model itself resizes and crops
            height, width = pixels.shape[1:]
            shorter = min(height, width)
            height, width = (self.resize * side // shorter for side in (height, width))
            pixels = resize(pixels, height, width, crop=(self.height, self.width))
        if self.takes_uint8:
            return pixels
        return (pixels.astype(np.float32) / np.float32(255) - self.mean) / self.std

    def _check_ratio(self, height: int, width: int) -> None:
        """Refuse an image whose longer side would be too long when its shorter one is resized."""
        ratio = max(height, width) / min(height, width)
        if ratio * (self.resize or min(self.height, self.width)) ** 2 > MAX_PIXELS:
            raise ValueError(
                f"one of its sides is {ratio:,.0f} times as long as the other: {height:,} x "
                f"{width:,} pixels"
            )

    def classify(
        self, images: Sequence[np.ndarray], names: Sequence[str], *, top: int = 5
    ) -> list[Prediction]:
        """Return the predictions of images that `prepare` returned, run as one batch.

        Raises:
            InputError: the model's outputs are not numbers, or not as many as there are classes.
        """
        groups = [list(group) for _, group in groupby(images, key=lambda image: image.shape)]
        if self.takes_uint8 and self.resize is not None:  # of full size: not many at once
            groups = [[image] for image in images]
        probabilities = np.concatenate([self._probabilities(np.stack(group)) for group in groups])
        if probabilities.shape[1] != len(self.class_names):
            raise InputError(
                f"'{self.artefact}' returns {probabilities.shape[1]} classes, its {DESCRIPTION} "
                f"names {len(self.class_names)}"
            )
        predictions = []
        for name, row in zip(names, probabilities, strict=True):
            if not np.isfinite(row).all():
                raise InputError(f"'{self.artefact}' returns NaN or infinity for '{name}'")
            best = (-row).argsort(stable=True)[:top].tolist()
            scores = [Score(self.class_names[i], i, float(row[i])) for i in best]
            predictions.append(Prediction(name, scores))
        return predictions

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities in float64, `(batch, classes)`.

        Raises:
            InputError: the model does not take these images, or returns something else.
        """
        try:
            logits = self._logits(images)
            found = (logits.ndim, len(logits), logits.dtype.kind)
            if found != (2, len(images), "f"):
                raise ValueError(
                    f"it returns {logits.shape} of {logits.dtype} for {len(images)} images"
                )
            with np.errstate(invalid="ignore"):  # `classify` looks for NaN
                shares = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
            return shares / shares.sum(1, keepdims=True)
        except Exception as error:  # a file may describe any network, in any runtime
            raise InputError(
                f"'{self.artefact}' cannot classify images: {one_line(error)}"
            ) from error

    def _logits(self, images: np.ndarray) -> np.ndarray:
        if isinstance(self.model, ExportedFile):
            return self.model.run(images)
        import torch

        with torch.inference_mode():
            logits: Tensor = self.model(torch.from_numpy(images).to(self.device)).cpu()
        return (logits.double() if logits.is_floating_point() else logits).numpy()


def find_images(places: Iterable[str | Path]) -> list[Path]:
    """Return the files among `places`, and the images below the folders among them, sorted.

    Raises:
        InputError: there is no such place, or a folder without images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            if not place.exists():
                raise InputError(f"there is no image or folder '{place}'")
            if not place.is_file():  # a device or a pipe may be endless
                raise InputError(f"'{place}' is neither a file nor a folder")
            found.append(place)
            continue
        inside = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        images = sorted(
            path
            for path in inside
            if path.is_file() and not any(p[0] == "." for p in path.relative_to(place).parts)
        )
        if not images:
            raise InputError(f"the folder '{place}' holds no images ({' '.join(SUFFIXES)})")
        found += images
    return found


def _read(image: Source, decode_at: int | None, formats: tuple[str, ...] | None) -> np.ndarray:
    """Return uint8 pixels `(channels, height, width)`; `decode_at`, `formats` as in `open_rgb`."""
    if isinstance(image, str | Path | bytes):
        image = open_rgb(_contents(image), decode_at=decode_at, formats=formats)
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"it has mode {image.mode}; convert it to 8 bits")
        if "transparency" in image.info:  # of a palette: PIL warns of the direct way
            image = image.convert("RGBA")
        if image.mode != "RGB":
            image = image.convert("RGB")
        return np.asarray(image).transpose(2, 0, 1)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.size == 0:
        raise ValueError(
            f"an array must be uint8 (channels, height, width), not {pixels.dtype} {pixels.shape}"
        )
    return pixels


def _contents(image: str | Path | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    path = Path(image)
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    if path.exists() and path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"it has more than {_LARGEST_FILE:,} bytes")
    return path.read_bytes()


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[0] == channels:
        return pixels
    if pixels.shape[0] == 1:
        return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))
    if pixels.shape[0] != 3:
        raise ValueError(f"it has {pixels.shape[0]} channels, neither 1 (gray) nor 3 (RGB)")
    # In strips, as int32 takes four times the memory, several times.
    rows = max(1, _STRIP // pixels.shape[2])
    strips = [pixels[:, at : at + rows] for at in range(0, pixels.shape[1], rows)]
    return np.concatenate([_gray(strip) for strip in strips], 1)


def _gray(pixels: np.ndarray) -> np.ndarray:
    # PIL's weights (ITU-R 601-2), rounded: gray levels that were repeated come back as they were.
    red, green, blue = pixels.astype(np.int32)
    gray = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return gray.astype(np.uint8)[None]
