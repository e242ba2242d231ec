"""`ExportedFile`: a file of an artefact, run by its own runtime; needs torch only if that does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repnet.deploy.description import (
    DESCRIPTION,
    WEIGHTS,
    check_hashes,
    class_names,
    files_of,
    read_description,
)
from repnet.deploy.formats.base import ArrayRunner, ExportError
from repnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def is_exported(path: Path) -> bool:
    """Return whether a path is that of another file of an artefact than its network's."""
    if path.name in (WEIGHTS, DESCRIPTION) or (path / DESCRIPTION).is_file():
        return False
    return (path.parent / DESCRIPTION).is_file()


class ExportedFile:
    """An exported file of an artefact, whose hashes are checked.

    It maps images `(batch, channels, height, width)`, normalized floats or, where `input_is_uint8`,
    the pixels themselves, to float32 logits `(batch, classes)` on the CPU. A pickle of it names the
    file, which is checked again where it is loaded.

    Args:
        path: of the file, beside `model.json`.
        trust: with "native", files that are code may be loaded.
        device: where it runs.

    Raises:
        InputError: the artefact does not have this file, it was changed, its runtime is missing, or
            it is code and not trusted.
    """

    def __init__(self, path: str | Path, *, trust: Sequence[str] = (), device: str = "cpu") -> None:
        from repnet.deploy.formats import format_named

        path = Path(path)
        description = read_description(path.parent)
        listed = description.get("exports")
        entries = (
            [e for e in listed if path.name in files_of(e)] if isinstance(listed, list) else []
        )
        if not entries:
            raise InputError(
                f"'{path.parent / DESCRIPTION}' does not list '{path.name}', so that nobody "
                "verified it"
            )
        entry = entries[0]
        chosen = format_named(entry["format"])
        file = path.with_name(entry["file"])
        check_hashes(path.parent, description, entry["files"])
        used = {part.relative_to(path.parent).as_posix() for part in chosen.contents(file)}
        if unlisted := sorted(used - set(entry["files"])):
            raise InputError(
                f"'{path.parent / DESCRIPTION}' does not list '{unlisted[0]}', so that nobody "
                "verified it"
            )
        if chosen.native and "native" not in trust:
            raise InputError(
                f"'{path}' is code, which can do whatever you can; if you made it or know who "
                "did, pass trust=['native'] (commands: --trust native). model.safetensors and ONNX "
                "files hold no code"
            )
        chosen.require(run=True)
        self.path, self.trust, self.device = path, tuple(trust), device
        self.description: dict[str, Any] = description
        self.class_names = class_names(description)
        self.files: list[str] = sorted(entry["files"], key=lambda name: name != entry["file"])
        self.precision = str(entry["precision"])
        self.input_is_uint8 = bool(entry["preprocess"])
        try:
            self.runner = chosen.load(file, precision=self.precision, device=device)
        except ExportError as error:
            raise InputError(f"'{path}' cannot be run: {error}") from error

    def __call__(self, images: Tensor) -> Tensor:
        return self.runner(images)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the same of arrays."""
        if isinstance(self.runner, ArrayRunner):
            return self.runner.run(images)
        import torch

        logits: np.ndarray = self.runner(torch.from_numpy(images)).numpy()
        return logits

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ExportedFile, trust=self.trust, device=self.device), (self.path,)
