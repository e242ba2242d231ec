"""What the process of a form is told. It imports little, since every form has such a process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Form:
    """One way to run a network.

    Args:
        description: for people.
        network: `train`, `deploy` or `timm`.
        precision: of its arithmetic.
        channels_last: memory format of PyTorch.
        compile: mode of `torch.compile`, None for eager PyTorch.
        runtime: format of an exported file, None for PyTorch.
        devices: that it is for.
    """

    description: str
    network: str = "deploy"
    precision: str = "fp32"
    channels_last: bool = False
    compile: str | None = None
    runtime: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Recipe:
    """What another process needs to run a form; plain data.

    Args:
        path: of the pickled network, or of the exported file.
        device: `cpu` or `cuda`.
        form: how to run it.
        preprocess: whether it takes uint8 images.
    """

    path: Path
    device: str
    form: Form
    preprocess: bool = False


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, after its type where that is not one of repnet's."""
    lines = str(error).strip().splitlines() or [""]
    own = type(error).__module__.partition(".")[0] == "repnet"
    return lines[0] if own else f"{type(error).__name__}: {lines[0]}"
