"""Run the commands as a user does."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ["data=fake", "data.train_size=32", "data.batch_size=16", "data.image_size=16",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", "pictures=false"]  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths),
            "COLUMNS": "200", **variables}  # fmt: skip


def run(
    script: str, *arguments: str | Path, cwd: Path, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT ARGUMENTS` in `cwd` and check its exit code."""
    command = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as output:
        request = {"script": command[0], "arguments": command[1:], "directory": str(cwd),
                   "variables": environment(**variables), "output": output}  # fmt: skip
        process = _warm()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"the warm process ended with {process.wait()}"
        ended = int(answer)
        texts = [(Path(output) / name).read_text() for name in ("stdout", "stderr")]
    assert ended == code, f"exit code {ended}, not {code}\n{texts[0]}\n{texts[1]}"
    return subprocess.CompletedProcess(command, ended, *texts)


@cache
def _warm() -> subprocess.Popen[str]:
    """Return a process that runs commands in its forks."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "warm.py")],
        env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    atexit.register(end)
    return process
