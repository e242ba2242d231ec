"""`OpenVino`: an `.xml` file with its `.bin`, run with OpenVINO on the CPU."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from repnet import __version__
from repnet.deploy.formats.base import ArrayRunner, ExportError, Format, ImageSpec, threads
from repnet.deploy.signal_stack import signal_stack_kept

if TYPE_CHECKING:
    from torch import Tensor, nn

# Without the hint, OpenVINO takes bfloat16 on every CPU that has it. The float layers of an int8
# file are in float32, so that what its gate measures is the quantization.
_HINTS = {"fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32"}


class OpenVino(Format):
    """The ONNX file, read by OpenVINO and stored as its own.

    In fp16 the weights are stored in half the size and computed with in float32. In bf16 they are
    stored in float32, and OpenVINO computes in bfloat16 if the CPU has it, else in float32. Files
    in int8 are made by `repnet.deploy.int8`.
    """

    name = "openvino"
    extra = "openvino"
    packages = ("openvino", "onnx", "onnxscript", "onnxslim")
    runtime = ("openvino",)
    suffix = ".xml"
    precisions = ("fp32", "fp16", "bf16")
    int8_packages = ("nncf",)

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
        from repnet.deploy.formats.onnx_export import check_float16, onnx_file

        if precision == "fp16":
            check_float16(model)
        contents = onnx_file(model, example)
        import openvino
        from openvino.passes import ConstantFolding, Manager

        try:
            converted = openvino.Core().read_model(contents)
            passes = Manager()
            passes.register_pass(ConstantFolding())  # until then, biases depend on shapes
            passes.run_passes(converted)
        except Exception as error:  # whatever its ONNX reader meets
            raise ExportError(f"OpenVINO cannot express this network: {_reason(error)}") from error
        for index, operation in enumerate(converted.get_ordered_ops()):
            if re.fullmatch(r"[A-Z]\w*_\d+", operation.friendly_name):  # counted by the process
                operation.friendly_name = f"{operation.get_type_name()}/{index}"
        for key, value in {"producer": f"repnet {__version__}", **(metadata or {})}.items():
            converted.set_rt_info(value, ["model_info", key])
        openvino.save_model(converted, path, compress_to_fp16=precision == "fp16")
        if str(example.dtype) == "torch.uint8":
            _keep_float32(path, _preprocessing(converted))

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> ArrayRunner:
        self.require(run=True)
        try:
            return _Compiled(path, precision)
        except Exception as error:  # a file may be damaged in many ways
            raise ExportError(f"OpenVINO cannot load '{path}': {_reason(error)}") from error

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def require(self, *, int8: bool = False, run: bool = False) -> None:
        super().require(int8=int8, run=run)
        # Importing openvino or nncf would write to the home directory and report it to Google. They
        # do without this package where it is missing.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class _Compiled(ArrayRunner):
    """A file, compiled for one image at a time and, when they come, for batches of any size.

    A free batch size costs RepVGG-A0 0.3 ms of 13 (224 pixels, bf16, one core). Where height and
    width are free as well, there is only the one compilation.
    """

    def __init__(self, path: Path, precision: str) -> None:
        import openvino

        self.core = openvino.Core()
        self.model = self.core.read_model(path)  # once: the file may be replaced later
        self.settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads(),
            # Processes beside each other would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        images = self.model.input()
        dtype = np.dtype(images.element_type.to_dtype()).name
        sides = [side.get_length() if side.is_static else None for side in images.partial_shape]
        self.takes = ImageSpec(dtype, tuple(sides))
        self.has_single = sides[0] is None and None not in sides[1:]
        # OpenVINO 2026.1 to 2026.3 at least crash there with a free batch size (its issue 37577).
        self.one_by_one = self.has_single and precision == "int8" and has_amx()
        self.compiled = {self.has_single: self._compile(self.has_single)}
        self.lock = threading.Lock()  # a compiled model runs one request at a time

    def run(self, images: np.ndarray) -> np.ndarray:
        array = self.takes.check(images)
        parts = np.split(array, len(array)) if self.one_by_one and len(array) else [array]
        with self.lock:
            return np.concatenate([self._run(part) for part in parts])

    def _run(self, images: np.ndarray) -> np.ndarray:
        single = self.has_single and len(images) == 1
        if single not in self.compiled:
            self.compiled[single] = self._compile(single)
        logits: np.ndarray
        (logits,) = self.compiled[single](images).values()
        return logits

    def _compile(self, single: bool) -> Any:
        model = self.model.clone()
        if single:
            model.reshape([1, *self.takes.shape[1:]])
        with signal_stack_kept():
            return self.core.compile_model(model, "CPU", self.settings)


def has_amx() -> bool:
    """Return whether the CPU has matrix instructions for int8."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_int8" in flags.read_text()


def _preprocessing(model: Any) -> set[str]:
    """Return the names of the operations between the images and the first layers."""
    found = {model.input().get_node().friendly_name}
    for operation in model.get_ordered_ops():
        sources = [value.get_source_output().get_node() for value in operation.inputs()]
        weights = any(source.get_type_name() == "Constant" for source in sources[1:])
        layer = "Convolution" in operation.get_type_name() or (
            operation.get_type_name() == "MatMul" and weights
        )
        if not layer and any(source.friendly_name in found for source in sources):
            found.add(operation.friendly_name)
    return found


def _keep_float32(path: Path, operations: set[str]) -> None:
    """Mark operations of a file, so that bfloat16 does not reach them.

    It would round the positions of pixels: of 375 x 500 pixels, half of them shifted.
    """
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") in operations:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(0 if layer.find("data") is None else 1, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _reason(error: Exception) -> str:
    """Return the last line, which says it; the first ones are files of OpenVINO."""
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
