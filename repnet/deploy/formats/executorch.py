"""`ExecuTorch`: a `.pte` file for phones and small computers, run on the CPU with XNNPACK."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repnet.deploy.formats.base import ExportError, Format, ImageSpec, Runner
from repnet.deploy.formats.torch_export import exported_program, image_spec
from repnet.deploy.preprocess import Preprocessed
from repnet.errors import first_line

_METADATA = "metadata"  # a method that returns it
_INPUT = "image_spec"  # another, for an `ImageSpec`


class ExecuTorch(Format):
    """ExecuTorch with the kernels of XNNPACK; `forward` takes one image, `metadata` returns JSON.

    The batch size is 1: memory is planned for the largest batch, which a phone does not need, and
    ExecuTorch 1.5 loses the bound of a free size and plans for another. The runner takes images one
    by one. A file is data for an interpreter and runs no code of its own.
    """

    name = "executorch"
    extra = "executorch"
    packages = ("executorch",)
    suffix = ".pte"

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
                "ExecuTorch files take one size of images, but this network resizes any: pass "
                "export.preprocess=false"
            )
        program = exported_program(model, example, batch=1)
        constants = {
            _METADATA: json.dumps(dict(metadata or {})),
            _INPUT: image_spec(program).dumps(),
        }
        with _known_warnings():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            try:
                manager = to_edge_transform_and_lower(
                    program, partitioner=[XnnpackPartitioner()], constant_methods=constants
                ).to_executorch()
            except Exception as error:  # of any depth of the compiler
                raise ExportError(
                    f"ExecuTorch cannot take this network: {first_line(error)}"
                ) from error
        if missing := _missing_operators(manager):
            raise ExportError(f"ExecuTorch's runtime has no operator for {', '.join(missing)}")
        with path.open("wb") as file:
            manager.write_to_file(file)

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        self.require()
        try:
            program = _runtime().load_program(path)
            (text,) = program.load_method(_INPUT).execute([])
            takes = ImageSpec.loads(text)
            forward = program.load_method("forward")
        except Exception as error:  # a file may be damaged in many ways
            raise ExportError(f"'{path}' cannot be loaded: {first_line(error)}") from error
        takes = ImageSpec(takes.dtype, (None, *takes.shape[1:]))

        def run(images: Tensor) -> Tensor:
            images = takes.check(images.detach().cpu())
            return torch.cat([forward.execute([image])[0] for image in images.split(1)])

        return run


def _missing_operators(manager: Any) -> list[str]:
    wanted = {
        f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        for plan in manager.executorch_program.execution_plan
        for operator in plan.operators
    }
    return sorted(wanted - _runtime().operator_registry.operator_names)


def _runtime() -> Any:
    with _known_warnings():
        from executorch.runtime import Runtime
    return Runtime.get()


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Hide what ExecuTorch 1.5 says about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This API is experimental")
        warnings.filterwarnings("ignore", message="(read|open)_(text|binary) is deprecated")
        yield
