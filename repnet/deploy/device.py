"""Devices: whether one is there, and its name."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from repnet.errors import InputError, first_line


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device that computes.

    Raises:
        InputError: there is none of that name.
    """
    try:
        torch.empty(1, device=name).add(1).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={name} cannot be used: {first_line(error)}; use device=cpu"
        ) from error
    return torch.device(name)


def hardware(device: torch.device) -> str:
    """Return what a latency is measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'' if threads == 1 else 's'}"


def processor() -> str:
    """Return the name of the CPU."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
