"""Run the commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ["data=fake", "data.train_size=32", "data.batch_size=16", "data.image_size=16",
        "trainer.max_epochs=1", "trainer.accelerator=cpu"]  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths),
            "COLUMNS": "200", **variables}  # fmt: skip


def run(
    script: str, *arguments: str | Path, cwd: Path, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT ARGUMENTS` in `cwd` and check its exit code."""
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, (
        f"exit code {result.returncode}, not {code}\n{result.stdout}\n{result.stderr}"
    )
    return result
