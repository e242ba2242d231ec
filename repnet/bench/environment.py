"""On what was measured."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from repnet import __version__
from repnet.deploy.device import processor

_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "executorch",
             "tensorrt", "timm")  # fmt: skip


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return the hardware, the versions and the day as plain data."""
    versions = {"repnet": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = processor()
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": device,
        "hardware": hardware,
        "threads": threads if device == "cpu" else None,
        "system": platform.platform(),
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sentence(environment: dict[str, Any]) -> str:
    """Return an environment in one line."""
    threads = environment["threads"]
    plural = "" if threads == 1 else "s"
    versions = ", ".join(
        f"{name} {number}" for name, number in environment["versions"].items() if name != "repnet"
    )
    return (
        f"{environment['hardware']}{f', {threads} thread{plural}' if threads else ''}; "
        f"{versions}; {environment['created'][:10]}"
    )
