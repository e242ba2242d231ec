"""`TorchExport`: a `.pt2` file, a graph of torch's operators that runs without the model's code."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive._package import load_pt2

from repnet.deploy.formats.base import ExportError, Format, ImageSpec, Runner
from repnet.deploy.preprocess import Preprocessed
from repnet.errors import first_line

METADATA = "metadata.json"


class TorchExport(Format):
    """`torch.export.save`; `torch.export.load(path).module()` runs it where torch is installed.

    An exported program is code: its operators can write files, and `torch.export.load` executes
    the pickles, Python expressions and native libraries that a file may hold. `export` writes none
    of these, but no check of a file makes it safe, so its origin must be known.
    """

    name = "torch_export"
    suffix = ".pt2"
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
        program = exported_program(model, example, precision=precision)
        program.example_inputs = None  # they would be stored, as a pickle
        files = {METADATA: json.dumps(dict(metadata or {}), ensure_ascii=False)}
        torch.export.save(program, path, extra_files=files)

    def load(self, path: Path, *, precision: str = "fp32", device: str = "cpu") -> Runner:
        try:
            program = load_pt2(str(path)).exported_programs["model"]
            if device != "cpu":
                program = move_to_device_pass(program, device)
            takes = image_spec(program)
            module = program.module()
        except Exception as error:  # a file may be damaged in many ways
            raise ExportError(f"'{path}' cannot be loaded: {first_line(error)}") from error

        @torch.no_grad()
        def run(images: Tensor) -> Tensor:
            return cast(Tensor, module(takes.check(images).to(device))).cpu()

        return run


def image_spec(program: ExportedProgram) -> ImageSpec:
    """Return what a program of one input takes."""
    (name,) = program.graph_signature.user_inputs
    (node,) = (n for n in program.graph.nodes if n.op == "placeholder" and n.name == name)
    value = node.meta["val"]
    sides = tuple(n if isinstance(n, int) else None for n in value.shape)
    return ImageSpec(str(value.dtype).removeprefix("torch."), sides)


def exported_program(
    model: nn.Module,
    example: Tensor,
    *,
    precision: str = "fp32",
    batch: int | None = None,
) -> ExportedProgram:
    """Return `model` as a graph of torch's own operators, with its weights and nothing else.

    Names of modules and lines of source files are left out.

    Args:
        model: not changed.
        example: of its input, any batch size.
        precision: "bf16" for weights and activations in bfloat16; images and logits stay float32.
        batch: the only size of a batch; None for any.

    Raises:
        ExportError: it branches on values, or uses operators that torch does not have.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if precision == "bf16":
        model = _in_bfloat16(model)
    # A size of 1 would be taken for a constant.
    images = example[:1].repeat(2 if batch is None else batch, 1, 1, 1)
    sizes = {} if batch is not None else {0: Dim("batch", min=1)}
    if isinstance(model, Preprocessed) and model.resize is not None:
        sizes |= {2: Dim("height", min=1), 3: Dim("width", min=1)}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=(sizes or None,))
    except Exception as error:  # forward is anyone's code
        raise ExportError(f"torch.export cannot take this network: {first_line(error)}") from error
    nodes = list(_nodes(program))
    foreign = {str(n.target) for n in nodes if n.op == "call_function" and not _is_torch(n.target)}
    if foreign:
        raise ExportError(
            f"the network uses {', '.join(sorted(foreign))}, which only runs where the library "
            "that defines it is imported"
        )
    for node in nodes:
        node.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
    return program


class InBFloat16(nn.Module):
    """A network with bfloat16 weights and activations; floats in, float32 logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images.bfloat16())).float()


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """Return the network in bfloat16; preprocessing, which is cheap, keeps float32."""
    if isinstance(model, Preprocessed):
        model.model = InBFloat16(model.model)
        return model
    return InBFloat16(model)


def _nodes(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _is_torch(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    return not isinstance(target, torch._ops.OperatorBase)  # arithmetic of sizes
