"""Kill a process at a chosen stage of a write.

`python tests/kills.py STAGE NAME SCRIPT ARGUMENTS` runs a command and kills it in its first write
to a file or directory called NAME.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
# The operation before which the process is killed: nothing is there yet; half of the file is
# written; all of it is, but it does not have its name yet; it has its name.
STAGES = {
    "before": "tempfile.mkstemp",
    "half": "os.chmod",
    "whole": "os.rename",
    "renamed": "shutil.rmtree",
}


def kill_at(stage: str | int, name: str) -> None:
    """Have this process killed in its next write to a file or directory called `name`.

    Args:
        stage: one of `STAGES`, or how many operations on temporary files the write may begin.
        name: without its directory.
    """
    operations: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = Path(arguments[0]) if arguments and isinstance(arguments[0], str | Path) else Path()
        if not {path.name, path.parent.name} & {p for p in path.parts if p.startswith(f".{name}.")}:
            return
        operations.append(event)
        if isinstance(stage, int):
            due = len(operations) > stage
        else:  # a sweep removes directories too, before the write begins
            due = event == STAGES[stage] and (stage != "renamed" or "os.rename" in operations)
        if due:
            if stage == "half":
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(call: Callable[[], object]) -> int:
    """Return how `call()` ends in a fork of this process: 0, 1 for an error, or `KILLED`."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(stage: str | int, path: Path, write: Callable[[Path], object]) -> int:
    """Return how `write(path)` ends in a fork that is killed at `stage`."""

    def call() -> None:
        kill_at(stage, path.name)
        write(path)

    return forked(call)


if __name__ == "__main__":
    kill_at(*sys.argv[1:3])
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
