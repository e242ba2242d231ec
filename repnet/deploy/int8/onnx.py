"""Post-training quantization of ONNX files, by ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from repnet.deploy.int8.graph import Graph, Kind, Node

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_KINDS: dict[str, Kind] = {
    "BatchNormalization": "norm",
    "QuantizeLinear": "quantizer",
    "DequantizeLinear": "quantizer",
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), "affine"),
}


def quantize_onnx(
    source: Path, target: Path, images: Tensor, *, keep: Sequence[str], per_channel: bool
) -> None:
    """See `repnet.deploy.int8.quantize`.

    Quantize-dequantize pairs around each operation: uint8 activations between the smallest and the
    largest value over all images, int8 weights. Logits stay in float, since 256 steps would make
    ties of them.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(source)
    graph = read_graph(source, model)
    graph.check()
    kept = graph.layers_of(keep)
    if model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        kept += graph.before_layers()
    with tempfile.TemporaryDirectory() as folder:
        shaped = Path(folder) / "model.onnx"
        # Optimizations would rename what `kept` names; symbolic shapes fail where preprocessing
        # takes images of any size.
        quant_pre_process(
            str(source), str(shaped), skip_optimization=True, skip_symbolic_shape=True
        )
        quantize_static(
            shaped,
            target,
            _Images(model.graph.input[0], images),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
    quantized = onnx.load(target)
    _restore_inputs(quantized.graph, model.graph, graph.layers_of(keep))
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    onnx.checker.check_model(quantized)
    onnx.save(quantized, target)


def read_graph(source: Path, model: Any) -> Graph:
    """Return the operations of an `onnx.ModelProto`."""
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    constants |= {node.output[0]: () for node in model.graph.node if node.op_type == "Constant"}
    origins = {value.name: "" for value in model.graph.input}
    nodes = []
    for node in model.graph.node:
        origins |= dict.fromkeys(node.output, node.name)
        kind = node.op_type
        inputs = tuple(origins[i] for i in node.input if i in origins and i not in constants)
        if kind in _LAYERS and node.input[1] in constants:
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            height, width = [1, 1, *constants[node.input[1]][2:]][-2:]
            kernel = None if kind in ("Gemm", "MatMul") else (groups, height, width)
            modules = (node.input[1].removesuffix(".weight"), node.name)
            nodes.append(Node(node.name, "layer", inputs, modules, kernel))
        elif _KINDS.get(kind) == "affine" and len(inputs) > 1:
            nodes.append(Node(node.name, "sum" if kind == "Add" else "other", inputs))
        else:
            nodes.append(Node(node.name, _KINDS.get(kind, "other"), inputs))
    return Graph(str(source), nodes)


def _restore_inputs(graph: Any, original: Any, names: Sequence[str]) -> None:
    """Let operations take in float what they took in the original graph.

    Another operation may have left a pair in front of them, which also does the work of a ReLU:
    that was removed, and the convolution before it has taken over the name of its output.
    """
    makers = {output: node.name for node in graph.node for output in node.output}
    makers_before = {output: node for node in original.node for output in node.output}
    inputs = {node.name: node.input for node in original.node}
    restored: dict[str, str] = {}
    nodes: list[Any] = []
    for node in graph.node:
        if node.name in names:
            for index, name in enumerate(inputs[node.name]):
                before = makers_before.get(name)
                if before is not None and before.name != makers.get(name) and name not in restored:
                    activation = copy.deepcopy(before)
                    if name in makers:
                        activation.input[0] = name
                    activation.output[0] = f"{name}_float"
                    nodes.append(activation)
                    restored[name] = activation.output[0]
                node.input[index] = restored.get(name, name)
        nodes.append(node)
    needed = {value.name for value in graph.output}
    used = []
    for node in reversed(nodes):
        if needed.intersection(node.output):  # pairs that nothing takes any more are left out
            needed.update(node.input)
            used.append(copy.deepcopy(node))
    del graph.node[:]
    graph.node.extend(reversed(used))


class _Images:
    """Hands calibration images to ONNX Runtime, as many at a time as the file takes."""

    def __init__(self, value: Any, images: Tensor) -> None:
        size = value.type.tensor_type.shape.dim[0].dim_value or 1
        self.name = value.name
        self.batches = iter([part for part in images.split(size) if len(part) == size])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}
