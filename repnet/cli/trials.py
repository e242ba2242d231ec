"""Which directory a job of a sweep trains in: the one that already holds it, or a new one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import read_write

from repnet.errors import InputError
from repnet.files import lock_file
from repnet.records import METRICS, RESULT, read_result

STARTING = ("sweep=", "+sweep=", "trust=")
RECORD = "job.json"  # the overrides of a job, written when it starts


@contextmanager
def claim(
    sweep: Path, directory: Path, overrides: Sequence[str], *, main: bool = True
) -> Iterator[Path]:
    """Give the directory of the job with these overrides, which no other process has meanwhile.

    A job is known by its overrides, not by its number: a sweep that is run again with more values,
    or by a sweeper that chooses other ones, finds what is there and overwrites nothing.

    Args:
        sweep: directory of all jobs.
        directory: for a job that is not known yet, if it is free.
        overrides: of the job.
        main: whether this is the first process, where a cluster starts one for each device; the
            others follow it.
    """
    if not main:
        yield _await(sweep, overrides)
        return
    file = _known(sweep, overrides) or _new(sweep, directory, overrides)
    try:
        yield Path(file.name).parent
    finally:
        file.close()


@contextmanager
def as_single_run(directory: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Make this process look as if it had been started for one job, in `directory`.

    Loggers find the directory in Hydra's config. Lightning starts the other processes of `ddp` with
    this command line, where `-m` would start the whole sweep again, and leaves its environment
    behind, in which the next job would wait for processes that nobody starts.

    Args:
        directory: of the job.
        arguments: of the command that runs only this job.
    """
    config: Any = HydraConfig.instance().cfg
    with read_write(config.hydra), read_write(config.hydra.runtime):
        config.hydra.runtime.output_dir = config.hydra.run.dir = str(directory)
    command_line, environment = sys.argv, dict(os.environ)
    sys.argv = [sys.argv[0], *_flags(sys.argv[1:]), *arguments]
    try:
        yield
    finally:
        sys.argv = command_line
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def identity(overrides: Sequence[str]) -> list[str]:
    """Return what makes a job the one that it is: not how it is started."""
    return sorted(override for override in overrides if not override.startswith(STARTING))


def record_of(directory: Path) -> dict[str, Any] | None:
    """Return what `claim` wrote: `overrides`, and `launched`, seconds since 1970."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # being written at this moment, or damaged
    return record if isinstance(record, dict) and "overrides" in record else None


def result_of(directory: Path) -> dict[str, Any] | None:
    """Return `result.json`, of a job that has ended; None for one that has not.

    A damaged one counts as none, so that the job continues from its last checkpoint.
    """
    try:
        result = read_result(directory)
    except InputError:
        return None
    if result is None or not result.keys() >= {"overrides"}:
        return None
    return result if "error" in result or result.keys() >= {"val", "test"} else None


def restart(directory: Path) -> None:
    """Remove what an earlier attempt has left behind."""
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    for name in (METRICS, "config.yaml", "pruned.json", RESULT):
        (directory / name).unlink(missing_ok=True)


def _known(sweep: Path, overrides: Sequence[str]) -> IO[str] | None:
    for path in sorted(sweep.glob(f"*/{RECORD}")):
        record = record_of(path.parent)
        if record and identity(record["overrides"]) == identity(overrides):
            file = path.open("r+", encoding="utf-8")
            if _lock(file):
                return file
            file.close()  # runs in another process: the sampler has drawn the same values twice
    return None


def _new(sweep: Path, directory: Path, overrides: Sequence[str]) -> IO[str]:
    others = (sweep / str(number) for number in count(len(list(sweep.glob("*/")))))
    for candidate in chain([directory], others):
        candidate.mkdir(parents=True, exist_ok=True)
        if (candidate / RESULT).exists():
            continue
        try:
            file = (candidate / RECORD).open("x", encoding="utf-8")
        except FileExistsError:
            continue
        _lock(file)
        json.dump({"overrides": list(overrides), "launched": time.time()}, file, indent=2)
        file.flush()
        return file
    raise AssertionError("numbers do not end")


def _await(sweep: Path, overrides: Sequence[str], seconds: float = 120) -> Path:
    for _ in range(int(seconds)):
        for path in sorted(sweep.glob(f"*/{RECORD}")):
            record = record_of(path.parent)
            if record and identity(record["overrides"]) == identity(overrides):
                return path.parent
        time.sleep(1)
    raise InputError(f"process 0 of this job has not begun it in '{sweep}'; is that a shared disk?")


def _flags(arguments: Sequence[str]) -> list[str]:
    """Return what says where configs are."""
    kept = []
    for i, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if name in ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"):
            kept += [argument] if equals else list(arguments[i : i + 2])
    return kept


def _lock(file: IO[str]) -> bool:
    # Without locks, equal values that are drawn at the same time meet in one directory.
    return os.name != "posix" or lock_file(file)
