"""`Onnx`: a `.onnx` file, run with ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repnet.deploy.formats.base import ArrayRunner, ExportError, Format, ImageSpec, threads
from repnet.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
_EXTERNAL = "session.model_external_initializers_file_folder_path"


class Onnx(Format):
    """torch's exporter, simplified by onnxslim, checked by onnx.

    The input is `images`, the output `logits`; the file holds its weights. In fp16, weights and
    activations are float16, images and logits stay float32; ONNX Runtime has no float16
    convolutions for x86 and computes them in float32 there.
    """

    name = "onnx"
    extra = "onnx"
    packages = ("onnx", "onnxruntime", "onnxscript", "onnxslim")
    runtime = ("onnxruntime",)
    suffix = ".onnx"
    precisions = ("fp32", "fp16")
    int8_packages = ()

    def export(
        self,
        model: nn.Module,
        example: Tensor,
        path: Path,
        *,
        precision: str = "fp32",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.require()
        from repnet.deploy.formats.onnx_export import in_float16, onnx_file

        model = in_float16(model) if precision == "fp16" else model
        path.write_bytes(onnx_file(model, example, metadata))

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> ArrayRunner:
        self.require(run=True)
        return _Session(path, precision, device)

    def require(self, *, int8: bool = False, run: bool = False) -> None:
        super().require(int8=int8, run=run)
        # Version 1.31 writes to the home directory when it is imported, and reports what it runs.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class _Session(ArrayRunner):
    def __init__(self, path: Path, precision: str, device: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads()
        options.log_severity_level = 4  # fatal; the message of an error is in its exception
        # Else its threads keep the cores busy after a call, while another runtime is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            providers = _cuda(onnxruntime, device, tf32=precision != "fp32")
        try:
            # From memory, with an empty directory beside it: no hash covers weights in other files.
            with tempfile.TemporaryDirectory() as empty:
                options.add_session_config_entry(_EXTERNAL, empty)
                contents = path.read_bytes()
                session = onnxruntime.InferenceSession(contents, options, providers=providers)
            (value,), (_,) = session.get_inputs(), session.get_outputs()
        except Exception as error:  # ONNX Runtime has an error class for every status
            reason = one_line(error)
            if "External data" in reason:
                reason = "it keeps weights in another file, which nobody verified"
            raise ExportError(f"ONNX Runtime cannot load '{path}': {reason}") from error
        if value.type not in _DTYPES:
            raise ExportError(
                f"'{path}' takes {value.type}, repnet gives images as {' or '.join(_DTYPES)}"
            )
        sides = (side if isinstance(side, int) else None for side in value.shape)
        self.takes = ImageSpec(_DTYPES[value.type], tuple(sides))
        self.session, self.input = session, value.name

    def run(self, images: np.ndarray) -> np.ndarray:
        logits: np.ndarray
        (logits,) = self.session.run(None, {self.input: self.takes.check(images)})
        return logits


def _cuda(onnxruntime: Any, device: str, *, tf32: bool) -> list[Any]:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    options = {"device_id": int(device.partition(":")[2] or 0), "use_tf32": int(tf32)}
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
