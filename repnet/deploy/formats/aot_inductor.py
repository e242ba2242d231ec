"""`AotInductor`: the network compiled to a native library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from repnet.deploy.formats.base import ExportError, Format, ImageSpec, Runner
from repnet.deploy.formats.torch_export import exported_program, image_spec
from repnet.errors import first_line

_INPUT = "repnet.input"  # key of the `ImageSpec` in the metadata


class AotInductor(Format):
    """An AOTInductor package; `torch._inductor.aoti_load_package(path)` runs it.

    The file holds machine code: to load it is to run a program, so its origin must be known. It
    needs the processor's vector instructions that it was compiled for, and torch of the same minor
    version. It does not check what it is given; `load` does.
    """

    name = "aot_inductor"
    suffix = ".aot.pt2"
    precisions = ("fp32", "bf16")
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
        from torch._inductor import aoti_compile_and_package

        program = exported_program(model, example, precision=precision)
        options: dict[str, Any] = {
            "freezing": True,  # weights are constants; RepVGG-A0, batch 1: 37 ms instead of 41
            # Else every instruction of this processor is used, and no record says which.
            "cpp.march": "",
            "aot_inductor.metadata": {
                **(metadata or {}),
                _INPUT: image_spec(program).dumps(),
            },
        }
        try:
            with torch.no_grad():
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        except Exception as error:  # of torch's compiler, or of that of C++
            raise ExportError(
                f"AOTInductor cannot compile this network: {first_line(error)}"
            ) from error

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        from torch._inductor import aoti_load_package

        takes, where = _check(path)
        if torch.device(device).type != where:
            raise ExportError(f"'{path}' was compiled for {where}, not for {device}")
        try:
            compiled = aoti_load_package(str(path))
        except Exception as error:  # of the loader of libraries
            raise ExportError(f"'{path}' cannot be loaded: {first_line(error)}") from error

        @torch.no_grad()
        def run(images: Tensor) -> Tensor:
            return cast(Tensor, compiled(takes.check(images).to(device))).cpu()

        return run

    def skip_reason(self) -> str | None:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:  # what is missing differs with the platform
            return "AOTInductor needs a C++ compiler: install g++, or name one in CXX"
        return None


def _check(path: Path) -> tuple[ImageSpec, str]:
    """Return what a package takes and the device that it runs on; does not load its code.

    Raises:
        ExportError: it is no package of `AotInductor`, or for other processors.
    """
    from torch._inductor.codecache import get_device_information

    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        stored = loader.load_metadata_from_package(str(path), "model")
        takes, where = ImageSpec.loads(stored[_INPUT]), stored["AOTI_DEVICE_KEY"]
        here = get_device_information(where)
        wanted = {key: set(str(stored[key]).split()) for key in here}
    except Exception as error:  # a file may be damaged in many ways
        raise ExportError(
            f"'{path}' is not a package of AOTInductor that repnet wrote: {first_line(error)}"
        ) from error
    for key, words in wanted.items():
        if missing := words - set(here[key].split()):
            raise ExportError(
                f"'{path}' was compiled for another machine, with {' '.join(sorted(missing))}; "
                "compile it where it is used"
            )
    return takes, where
