"""The output directory: nothing in it is lost, and it is replaced as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from repnet.deploy.description import DESCRIPTION, PAGE, REPORT, WEIGHTS
from repnet.errors import InputError
from repnet.files import NEW, replace_directory, reserve, sweep_leftovers

REPORTS = (REPORT, PAGE)  # of an earlier refusal: nothing to lose
CARD = "README.md"  # of `repnet.hub`


def sweep_target(directory: Path) -> None:
    """Remove what killed deployments to `directory` have left in it and beside it."""
    directory = directory.resolve()
    sweep_leftovers(directory)
    sweep_leftovers(directory.parent, directory.name)


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuse a directory that holds what must not be replaced.

    Raises:
        InputError: it is a file, holds something that no deployment wrote, or an artefact that may
            not be overwritten.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"'{directory}' is a file; choose another hydra.run.dir")
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    own = {WEIGHTS, DESCRIPTION, CARD} | _exported(directory)
    if foreign := sorted(held - set(REPORTS) - own):
        raise InputError(
            f"'{directory}' holds '{foreign[0]}', which no deployment wrote and none may replace; "
            "choose another hydra.run.dir"
        )
    if held - set(REPORTS) and not overwrite:
        raise InputError(
            f"'{directory}' is not empty; replace it with deploy.overwrite=true, or choose another "
            "hydra.run.dir"
        )


def _exported(directory: Path) -> set[str]:
    """Return the names of what the artefact in `directory` says it holds."""
    try:
        hashes = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))["hashes"]
        return {Path(file).parts[0] for file in hashes}
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return set()


class Stage:
    """A temporary directory, `path`, that takes the place of `directory` when all went well.

    Args:
        directory: made, or replaced; `directory.2`, or the next free name, is made where that is
            not allowed when all is done.
        overwrite: whether an artefact may be replaced.
    """

    def __init__(self, directory: Path, *, overwrite: bool) -> None:
        self.directory = directory.resolve() if directory.is_symlink() else directory
        self.overwrite = overwrite

    def __enter__(self) -> Stage:
        target = self.directory.absolute()
        self._reserved = ExitStack()
        try:
            self.path = self._reserved.enter_context(reserve(target)) / NEW
            self.path.mkdir()
        except OSError as error:
            raise InputError(f"cannot write to '{target.parent}': {error}") from error
        return self

    def keep(self, files: Collection[str]) -> None:
        """Remove all but the named files, relative to `path`."""
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.path).as_posix() not in files:
                path.unlink()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        with self._reserved:
            if kind is not None:
                return
            self._avoid_what_came_since()
            try:
                if (self.directory / CARD).is_file():  # may have been written by hand
                    shutil.copy2(self.directory / CARD, self.path / CARD)
                replace_directory(self.path.parent, self.directory)
            except OSError as error:
                others = (self.directory.with_name(f"{self.directory.name}.{n}") for n in count(2))
                kept = next(path for path in others if not path.exists())
                self.path.rename(kept)
                raise InputError(
                    f"cannot replace '{self.directory}' ({error}); the result is in '{kept}'"
                ) from error

    def _avoid_what_came_since(self) -> None:
        """Choose a free name beside a directory that holds what must not be replaced."""
        wanted, number = self.directory, 1
        while True:
            try:
                return check_target(self.directory, self.overwrite)
            except InputError:
                number += 1
                self.directory = wanted.with_name(f"{wanted.name}.{number}")
