"""`Format`: how a deploy model becomes a file of another runtime, and how that file is run."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np

from repnet.errors import InputError

if TYPE_CHECKING:  # what runs a file of another runtime needs no torch
    from torch import Tensor, nn

Runner = Callable[["Tensor"], "Tensor"]
Images = TypeVar("Images", "Tensor", np.ndarray)


class ExportError(RuntimeError):
    """A runtime cannot take this network; other exports are not concerned."""


@dataclass(frozen=True)
class ImageSpec:
    """What a file takes.

    Args:
        dtype: "float32" or "uint8".
        shape: `(batch, channels, height, width)`, None for what is free.
    """

    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def loads(cls, text: str) -> ImageSpec:
        """Return what `dumps` wrote."""
        stored = json.loads(text)
        return cls(stored["dtype"], tuple(stored["shape"]))

    def dumps(self) -> str:
        return json.dumps({"dtype": self.dtype, "shape": self.shape})

    def check(self, images: Images) -> Images:
        """Return the images, contiguous; compiled code would read others as if they were.

        Raises:
            InputError: of another dtype or shape.
        """
        fits = images.ndim == len(self.shape) and all(
            size in (None, n) for size, n in zip(self.shape, images.shape, strict=True)
        )
        dtype = str(images.dtype).removeprefix("torch.")
        if not fits or dtype != self.dtype:
            shape = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise InputError(
                f"the images are {dtype} {tuple(images.shape)}, the file takes {self.dtype} "
                f"({shape})"
            )
        if isinstance(images, np.ndarray):
            return np.ascontiguousarray(images)
        return images.contiguous()


class ArrayRunner(ABC):
    """Runs a file on arrays, and on tensors where they are given; it imports no torch."""

    @abstractmethod
    def run(self, images: np.ndarray) -> np.ndarray:
        """Return float32 logits `(batch, classes)` of images, as `Format.load` says."""

    def __call__(self, images: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(self.run(images.detach().cpu().numpy()))


def threads() -> int:
    """Return how many threads a runtime may use: torch's number where torch is in use."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Format(ABC):
    """A file format and its runtime. Stateless; one subclass in one file for each.

    Attributes:
        name: as in `export=[name]` and in `report.json`.
        extra: of repnet, `pip install "repnet[extra]"`; None where torch is enough.
        packages: modules that writing and running need.
        runtime: those of them that running needs; None for all.
        suffix: of the file; a companion file, if any, has the same stem.
        precisions: that it can be written in; the first is the default.
        int8_packages: modules that `repnet.deploy.int8` needs in addition to quantize its float32
            file; None where it cannot.
        native: whether the file is code, which no check makes safe.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    runtime: ClassVar[tuple[str, ...] | None] = None
    suffix: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    int8_packages: ClassVar[tuple[str, ...] | None] = None
    native: ClassVar[bool] = False

    @abstractmethod
    def export(
        self,
        model: nn.Module,
        example: Tensor,
        path: Path,
        *,
        precision: str = "fp32",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write `model` to `path`; the batch size stays free where the format allows it.

        Args:
            model: in evaluation mode, on the CPU unless the runtime is for a GPU.
            example: one batch of its input: float32 images `(batch, channels, height, width)`, or
                uint8 where the preprocessing is part of the model.
            path: with `suffix`; a companion file is written beside it.
            precision: one of `precisions`, but for int8, which `repnet.deploy.int8` makes.
            metadata: text that is stored in the file, such as the class names.

        Raises:
            ExportError: the runtime cannot take this network, for instance one of its operators.
        """

    @abstractmethod
    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        """Return the file as a function of its own runtime, without the model's Python code.

        The function maps images, as in `export` and of any batch size, to float32 logits
        `(batch, classes)` on the CPU. Arithmetic is in `precision` and nothing less.

        Raises:
            ExportError: the file cannot be run.
        """

    def skip_reason(self) -> str | None:
        """Return why this machine cannot make or run such a file, None where it can."""
        return None

    def files(self, path: Path) -> list[Path]:
        """Return the files that make up the export at `path`."""
        return [path]

    def contents(self, path: Path) -> list[Path]:
        """Return the files of the export at `path`; of one that is a directory, those inside."""
        found: list[Path] = []
        for file in self.files(path):
            inside = sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]
            found += inside
        return found

    def file_name(self, precision: str = "fp32") -> str:
        """Return the name of the file in an artefact's directory."""
        return f"model{'' if precision == 'fp32' else f'_{precision}'}{self.suffix}"

    def require(self, *, int8: bool = False, run: bool = False) -> None:
        """Raise an `InputError` that names the extra where a package is missing.

        Args:
            int8: whether the file is to be quantized.
            run: whether it is there already, and only run.
        """
        needed = self.packages
        if run and self.runtime is not None:
            needed = self.runtime
        elif int8:
            needed = (*needed, *(self.int8_packages or ()))
        missing = [name for name in needed if find_spec(name) is None]
        if missing:
            raise InputError(
                f'export={self.name} needs {", ".join(missing)}: pip install "repnet[{self.extra}]"'
            )
