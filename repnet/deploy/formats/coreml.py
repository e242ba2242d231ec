"""`CoreML`: an `.mlpackage` directory for Apple's devices."""

from __future__ import annotations

import gc
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repnet.deploy.formats.base import ExportError, Format, Runner
from repnet.deploy.formats.torch_export import exported_program
from repnet.deploy.preprocess import Preprocessed
from repnet.errors import first_line


class CoreML(Format):
    """Core ML's ML program, for iOS 16, macOS 13 and later; written anywhere, run on macOS only.

    Input `images` (int32 instead of uint8, of which Core ML has no arrays), output `logits`. The
    batch size is 1, which the Neural Engine needs; Core ML's own batches are lists of inputs. A
    package is data and runs no code of its own.
    """

    name = "coreml"
    extra = "coreml"
    packages = ("coremltools",)
    suffix = ".mlpackage"
    precisions = ("fp32", "fp16")

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
        if isinstance(model, Preprocessed) and model.resize is not None:
            raise ExportError(
                "Core ML files take one size of images, but this network resizes any: pass "
                "export.preprocess=false"
            )
        example = example if example.is_floating_point() else example.int()
        program = exported_program(_Images(model), example, batch=1)
        with _third_party_warnings():
            import coremltools

            types = coremltools.precision
            try:
                converted = coremltools.convert(
                    program.run_decompositions({}),
                    convert_to="mlprogram",
                    outputs=[coremltools.TensorType(name="logits", dtype=np.float32)],
                    minimum_deployment_target=coremltools.target.iOS16,
                    compute_precision=types.FLOAT16 if precision == "fp16" else types.FLOAT32,
                    skip_model_load=True,
                )
            except Exception as error:  # of any depth of the converter
                raise ExportError(
                    f"Core ML cannot take this network: {first_line(error)}"
                ) from error
            converted.user_defined_metadata.update(metadata or {})
            converted.save(str(path))
            del converted
            gc.collect()  # removes its temporary directories

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        self.require()
        if reason := self.skip_reason():
            raise ExportError(reason)
        with _third_party_warnings():
            import coremltools

            units = coremltools.ComputeUnit
            try:
                # Other units compute in float16, whatever the precision of the file.
                chosen = units.CPU_ONLY if precision == "fp32" else units.ALL
                loaded = coremltools.models.MLModel(str(path), compute_units=chosen)
                (entry,) = loaded.get_spec().description.input
            except Exception as error:  # a directory may be damaged in many ways
                raise ExportError(f"'{path}' cannot be loaded: {first_line(error)}") from error
        integers = entry.type.multiArrayType.dataType == 131104  # ArrayDataType.INT32

        def run(images: Tensor) -> Tensor:
            values = images.detach().cpu().to(torch.int32 if integers else torch.float32).numpy()
            answers = loaded.predict([{"images": value[None]} for value in values])
            return torch.cat([torch.from_numpy(answer["logits"]).float() for answer in answers])

        return run

    def skip_reason(self) -> str | None:
        if platform.system() != "Darwin":
            return "Core ML files run on macOS only, and nothing is shipped that was not run"
        return None


class _Images(nn.Module):
    """Names the input of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


@contextmanager
def _third_party_warnings() -> Iterator[None]:
    """Hide what coremltools 9 says about its own calls, and about directories that it leaves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Function _TORCH_OPS_REGISTRY")
        warnings.filterwarnings("ignore", message="Implicitly cleaning up")
        warnings.filterwarnings("ignore", message="overflow encountered in cast")
        warnings.filterwarnings("ignore", message="(read|open)_(text|binary) is deprecated")
        yield
