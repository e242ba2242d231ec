"""`TensorRT`: an `.engine` file, for the kind of NVIDIA GPU that it is made on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repnet.deploy.formats.base import ExportError, Format, ImageSpec, Runner
from repnet.deploy.formats.onnx_export import in_float16, onnx_file
from repnet.deploy.preprocess import Preprocessed

MAX_BATCH = 256  # larger ones are split
_LARGEST_SIDE = 2048  # pixels, of images that the network itself resizes


class TensorRT(Format):
    """NVIDIA's TensorRT, from the ONNX file; batches of 1 to 256 images, tuned for 1.

    The types are those of the ONNX file (a strongly typed network), without TF32: TensorRT chooses
    kernels, not precisions. An engine holds no metadata, runs only with the TensorRT version and
    GPU architecture that made it, and may hold machine code: load only files of known origin.
    """

    name = "tensorrt"
    extra = "tensorrt"
    packages = ("tensorrt", "onnx", "onnxscript", "onnxslim")
    suffix = ".engine"
    precisions = ("fp32", "fp16")
    native = True

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
        import tensorrt

        file = onnx_file(in_float16(model) if precision == "fp16" else model, example, metadata)
        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse(file):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise ExportError(f"TensorRT cannot read this network: {'; '.join(errors)}")
        config = builder.create_builder_config()
        config.clear_flag(tensorrt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        resizes = isinstance(model, Preprocessed) and model.resize is not None
        profile.set_shape(network.get_input(0).name, *_shapes(example, resizes))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ExportError("TensorRT cannot build this network; its messages say why")
        path.write_bytes(engine)

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        self.require()
        import tensorrt

        where = torch.device(device)
        if where.type != "cuda":  # it has no other
            where = torch.device("cuda")
        with torch.cuda.device(where):
            runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
            context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise ExportError(
                f"'{path}' cannot be loaded: it is damaged, or was made for another GPU or "
                f"TensorRT than {tensorrt.__version__}"
            )
        return _Engine(tensorrt, engine, context, where)

    def skip_reason(self) -> str | None:
        if not torch.cuda.is_available():
            return "TensorRT needs an NVIDIA GPU, and torch finds none"
        if find_spec("tensorrt") is None:
            return 'TensorRT is not installed: pip install "repnet[tensorrt]"'
        return None


class _Engine:
    """Runs an engine on tensors of torch."""

    def __init__(self, tensorrt: Any, engine: Any, context: Any, device: torch.device) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {n: engine.get_tensor_mode(n) == tensorrt.TensorIOMode.INPUT for n in names}
        (self.input,) = (name for name in names if is_input[name])
        (self.output,) = (name for name in names if not is_input[name])
        uint8 = engine.get_tensor_dtype(self.input) == tensorrt.DataType.UINT8
        shape = tuple(None if n < 0 else n for n in engine.get_tensor_shape(self.input))
        self.takes = ImageSpec("uint8" if uint8 else "float32", shape)
        _, _, largest = engine.get_tensor_profile_shape(self.input, 0)
        self.max_batch = largest[0]
        self.engine, self.context, self.device = engine, context, device  # the engine must live
        self.stream = torch.cuda.Stream(device)

    def __call__(self, images: Tensor) -> Tensor:
        parts = self.takes.check(images).split(self.max_batch)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            return torch.cat([self._run(part.to(self.device)) for part in parts])

    def _run(self, images: Tensor) -> Tensor:
        if not self.context.set_input_shape(self.input, tuple(images.shape)):
            raise ExportError(f"the engine does not take images of {tuple(images.shape)}")
        shape = tuple(self.context.get_tensor_shape(self.output))
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        self.context.set_tensor_address(self.input, images.data_ptr())
        self.context.set_tensor_address(self.output, logits.data_ptr())
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ExportError("TensorRT failed to run the engine")
        return logits.cpu()  # waits for the stream


def _shapes(example: Tensor, resizes: bool) -> tuple[tuple[int, ...], ...]:
    """Return the smallest, usual and largest shape of the images."""
    _, channels, height, width = example.shape
    low, high = ((1, 1), (_LARGEST_SIDE,) * 2) if resizes else ((height, width),) * 2
    return (
        (1, channels, *low),
        (1, channels, height, width),
        (MAX_BATCH, channels, *high),
    )
