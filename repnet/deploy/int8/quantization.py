"""`quantize`: an exported fp32 file becomes an int8 file of the same format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from repnet.deploy.formats import format_named
from repnet.errors import InputError


def quantize(
    format_name: str,
    source: Path,
    target: Path,
    images: Tensor,
    *,
    keep: Sequence[str] = (),
    per_channel: bool = True,
) -> None:
    """Write an int8 form of an exported network, calibrated on images (post-training quantization).

    Weights are symmetric with a scale for each output channel, activations have one scale each.
    The same file and images give the same result. Inputs, outputs and what precedes the first layer
    of a file that takes uint8 images (its preprocessing) stay as they are.

    Args:
        format_name: "openvino" (by NNCF) or "onnx" (by ONNX Runtime, quantize-dequantize nodes).
        source: exported in fp32 from a folded model.
        target: is written, with its companion file.
        images: what the network takes, `(n, channels, height, width)`: float32, or uint8 where the
            preprocessing is part of the file.
        keep: names of convolutions and linear layers, as in the folded model, that stay in float.
        per_channel: False gives each weight one scale, as some runtimes do; for comparison.

    Raises:
        InputError: another format, a missing package, no images, a file in train or int8 form, or
            a name in `keep` that the file does not have.

    Example:
        >>> quantize("openvino", Path("model.xml"), Path("model_int8.xml"), images)
    """
    if not len(images):
        raise InputError("int8 needs images of the training data for its calibration; got none")
    if format_name not in ("openvino", "onnx"):
        raise InputError(f"int8 is for openvino and onnx, not for '{format_name}'")
    format_named(format_name).require(int8=True)
    if format_name == "openvino":
        from repnet.deploy.int8.openvino import quantize_openvino as run
    else:
        from repnet.deploy.int8.onnx import quantize_onnx as run
    run(Path(source), Path(target), images, keep=keep, per_channel=per_channel)
