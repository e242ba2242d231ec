"""`onnx_file`: a network as the contents of an ONNX file."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repnet import __version__
from repnet.deploy.formats.base import ExportError
from repnet.deploy.formats.torch_export import exported_program
from repnet.deploy.preprocess import Preprocessed
from repnet.errors import first_line

# The one that torch's exporter writes without a conversion; ONNX Runtime 1.14 of 2023 runs it.
OPSET = 18

_CHATTER = ("onnxscript", "onnx_ir")  # they log each of their rewrites
_AXES = {0: "batch", 2: "height", 3: "width"}


def onnx_file(
    model: nn.Module, example: Tensor, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return an ONNX file with any batch size, named after the modules, without external data.

    Raises:
        ExportError: the network has an operator that ONNX lacks, or over 2 GB.
    """
    import onnx
    import onnxslim

    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    program = exported_program(model, example)
    try:
        with torch.no_grad():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
        assert exported is not None
        file = onnxslim.slim(exported.model_proto)
    except Exception as error:  # of any depth of the exporter
        raise ExportError(f"ONNX cannot express this network: {_reason(error)}") from error
    file.producer_name, file.producer_version = "repnet", __version__
    _clean(file)
    onnx.helper.set_model_props(file, dict(metadata or {}))
    try:
        onnx.checker.check_model(file, full_check=True)
        contents: bytes = file.SerializeToString(deterministic=True)
    except Exception as error:
        raise ExportError(f"the ONNX file is not valid: {first_line(error)}") from error
    return contents


def in_float16(model: nn.Module) -> nn.Module:
    """Return a copy with float16 weights and activations, float32 images and logits.

    Preprocessing, which is cheap, keeps float32.

    Raises:
        ExportError: a weight is beyond the range of float16.
    """
    if isinstance(model, Preprocessed):
        preprocessed = copy.copy(model)
        preprocessed._modules = {**model._modules, "model": in_float16(model.model)}
        return preprocessed
    check_float16(model)
    return _Float16(copy.deepcopy(model).half()).eval()


def check_float16(model: nn.Module) -> None:
    """Refuse weights that float16 cannot hold.

    Raises:
        ExportError: there is one.
    """
    limit = torch.finfo(torch.float16).max
    for name, value in model.state_dict().items():
        largest = value.abs().max().item() if value.is_floating_point() and value.numel() else 0
        if largest > limit:
            raise ExportError(
                f"'{name}' holds {largest:.3g}, float16 ends at {limit:.0f}: use another precision"
            )


class _Float16(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.half())
        return logits.float()


def _reason(error: BaseException) -> str:
    """Return one line of what the exporter reports, with the operator at fault."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    innermost = first_line(chain[-1])
    found = re.search(r"target=torch\.ops\.([\w.]+)", "\n".join(map(str, chain)))
    if found is None:
        return innermost
    unknown = "No ONNX function" in innermost
    return f"it has no operator for {found[1]}" if unknown else f"{found[1]}: {innermost}"


def _clean(file: Any) -> None:
    """Name operations after their modules, and free axes by what they are."""
    names: set[str] = set()
    for node in file.graph.node:
        modules = [name.removesuffix(".weight") for name in node.input if name.endswith(".weight")]
        if modules and modules[0] not in names:
            node.name = modules[0]
        names.add(node.name)
    sides = file.graph.input[0].type.tensor_type.shape.dim
    axes = {side.dim_param: _AXES[axis] for axis, side in enumerate(sides) if side.dim_param}
    for value in (*file.graph.input, *file.graph.output):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param in axes:
                side.dim_param = axes[side.dim_param]
    del file.graph.value_info[:]  # follows from the rest
