"""Post-training quantization of OpenVINO files, by NNCF."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from repnet.deploy.int8.graph import Graph, Kind, Node
from repnet.deploy.signal_stack import signal_stack_kept

_LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
_KINDS: dict[str, Kind] = {
    "BatchNormInference": "norm",
    "FakeQuantize": "quantizer",
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Divide"), "affine"),
}


def quantize_openvino(
    source: Path, target: Path, images: Tensor, *, keep: Sequence[str], per_channel: bool
) -> None:
    """See `repnet.deploy.int8.quantize`.

    The range of an activation goes from the smallest to the largest value over all images, and
    biases are corrected on images. NNCF's defaults, the mean of the images' ranges and fast bias
    correction, left three times the error on small images (docs/int8.md).
    """
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    model = openvino.Core().read_model(source)
    graph = read_graph(source, model)
    graph.check()
    kept = graph.layers_of(keep)
    if model.input(0).get_element_type() == openvino.Type.u8:
        kept += graph.before_layers()
    batch = model.input(0).get_partial_shape()[0]
    size = batch.get_length() if batch.is_static else 1
    batches = [part.numpy() for part in images.split(size) if len(part) == size]
    with _quiet(), signal_stack_kept():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=kept) if kept else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                weights_quantization_params=QuantizationParameters(per_channel=per_channel),
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            ),
        )
    for index, op in enumerate(quantized.get_ordered_ops()):
        if re.fullmatch(r"[A-Z]\w*_\d+", op.get_friendly_name()):  # counted by the process
            op.set_friendly_name(f"{op.get_type_name()}/{index}")
    openvino.save_model(quantized, target, compress_to_fp16=False)


def read_graph(source: Path, model: Any) -> Graph:
    """Return the operations of an `openvino.Model`."""
    nodes = []
    for op in model.get_ordered_ops():
        kind, name = op.get_type_name(), op.get_friendly_name()
        if kind in ("Constant", "Parameter", "Result"):
            continue
        parents = [op.input_value(i).get_node() for i in range(op.get_input_size())]
        inputs = tuple("" if p.get_type_name() == "Parameter" else p.get_friendly_name()
                       for p in parents if _constant(p) is None)  # fmt: skip
        weight = _constant(parents[1]) if kind in _LAYERS else None
        if weight is not None:
            shape = list(parents[1].get_output_shape(0))
            grouped = kind == "GroupConvolution"
            kernel = None
            if kind != "MatMul":
                kernel = (shape[0] if grouped else 1, *([1, *shape][-2:]))
            modules = (
                weight.get_friendly_name().removesuffix(".weight"),
                name.partition("/")[0],
            )
            nodes.append(Node(name, "layer", inputs, modules, kernel))
        elif _KINDS.get(kind) == "affine" and len(inputs) > 1:
            nodes.append(Node(name, "sum" if kind == "Add" else "other", inputs))
        else:
            nodes.append(Node(name, _KINDS.get(kind, "other"), inputs))
    return Graph(str(source), nodes)


def _constant(node: Any) -> Any:
    """Return the constant that a node's result is computed from, None if the input takes part."""
    while node.get_type_name() in ("Convert", "Reshape", "Transpose", "FakeQuantize"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let NNCF show its progress on a terminal's stderr, and nothing else."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
