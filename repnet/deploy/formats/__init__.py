"""The files of other runtimes, one module for each."""

from __future__ import annotations

from importlib import import_module

from repnet.deploy.formats.base import ExportError, Format, Runner
from repnet.errors import InputError
from repnet.spec import unknown_name

_CLASSES = {
    "onnx": "Onnx",
    "openvino": "OpenVino",
    "torch_export": "TorchExport",
    "aot_inductor": "AotInductor",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
    "coreml": "CoreML",
}

FORMATS = tuple(_CLASSES)

__all__ = ["FORMATS", "ExportError", "Format", "Runner", "format_named"]


def format_named(name: str) -> Format:
    """Return a format by its name; its packages are imported when it is used.

    Raises:
        InputError: there is no such format.
    """
    if name not in _CLASSES:
        raise InputError(unknown_name("export", name, FORMATS))
    cls = getattr(import_module(f"repnet.deploy.formats.{name}"), _CLASSES[name])
    found: Format = cls()
    return found
