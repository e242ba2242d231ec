"""Lightning's profilers, with what they find in the run's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from repnet.processes import is_main_process

_PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def build_profiler(name: Any, directory: str | Path) -> Any:
    """Return the profiler of that name, which writes `profile/*-profile.txt` in `directory`.

    Args:
        name: `simple` (seconds by hook), `advanced` (by function), `pytorch` (by operation, with a
            trace for TensorBoard or Perfetto); a profiler or None is returned as it is. Only the
            first process of all nodes has one by name.
        directory: of the run.
    """
    if not isinstance(name, str):
        return name
    if not is_main_process():
        return None
    return _PROFILERS[name](dirpath=Path(directory) / "profile", filename="profile")
