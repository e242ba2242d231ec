"""`sensitivity`: what int8 does to each layer of a folded network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.deploy.int8.fake import quantized_activation, quantized_weight
from repnet.deploy.int8.graph import REMEDY
from repnet.errors import InputError
from repnet.fold import reparameterize
from repnet.symbolic import evaluating

BATCH = 16  # images at a time: at 224 pixels about 0.2 GiB for RepVGG-A0
MAX_DB = 120.0  # of a layer without noise


@dataclass(frozen=True)
class LayerSensitivity:
    """A convolution or linear layer of a folded network, and its error in int8.

    Args:
        name: of the module.
        sqnr_db: signal-to-quantization-noise ratio of its output, `10 log10(sum y^2 / sum (y -
            y8)^2)`, where y8 has this layer's weight and input in int8 and all before it in float.
            6 dB are one bit; the prediction of a layer below about 20 dB is in danger.
        weight_min: of all weights.
        weight_max: of all weights.
        weight_spread: the largest absolute weight of a channel, largest over median of the
            channels. One scale for the whole weight leaves the median channel `127 / spread` steps.
        activation_min: of the input, over all images.
        activation_max: of the input, over all images.
    """

    name: str
    sqnr_db: float
    weight_min: float
    weight_max: float
    weight_spread: float
    activation_min: float
    activation_max: float


@torch.no_grad()
def sensitivity(model: nn.Module, images: Tensor) -> list[LayerSensitivity]:
    """Return the error that int8 causes in each convolution and linear layer, in running order.

    Weights are symmetric with a scale per output channel, activations affine with one scale from
    minimum to maximum, as in the int8 files. The images pass twice, however many layers there are:
    once for the ranges, once for the errors.

    Args:
        model: folded; may begin with its preprocessing.
        images: for calibration, what the model takes, on its device.

    Raises:
        InputError: the model is in train form, there is no image, or an activation is not finite.
    """
    if not len(images):
        raise InputError("sensitivity needs images; got none")
    require_folded(model, images[:1])
    layers = {
        name: _Layer(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    }
    for see in ("see_range", "see_error"):
        handles = [
            layer.module.register_forward_hook(getattr(layer, see)) for layer in layers.values()
        ]
        try:
            with evaluating(model):
                for batch in images.split(BATCH):
                    model(batch)
        finally:
            for handle in handles:
                handle.remove()
    return [layer.result() for layer in layers.values() if layer.ran]


def require_folded(model: nn.Module, images: Tensor) -> None:
    """Do nothing if folding would change nothing in `model`.

    Args:
        model: any.
        images: an example of its input.

    Raises:
        InputError: it is in train form, or folded in part only.
    """
    if getattr(model, "reparameterized", None) == "absorb":
        return
    _, report = reparameterize(model, images, method="modules", return_report=True)
    if not report.folded:
        return
    first = report.folded[0]
    modules = dict(model.named_modules())
    norms = [name for name in first.replaced if isinstance(modules.get(name), _BatchNorm)]
    what = f"batch norm '{norms[0]}'" if norms else f"branches in '{first.name}'"
    raise InputError(
        f"int8 is for the folded network, and this {type(model).__name__} has {what}; {REMEDY}"
    )


class _Layer:
    """Collects what a layer receives, and how its output changes in int8."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.weight: Tensor = module.weight  # type: ignore[assignment]
        self.weight8 = quantized_weight(self.weight)
        self.low, self.high = math.inf, -math.inf
        self.signal = self.noise = 0.0

    @property
    def ran(self) -> bool:
        return self.low <= self.high

    def see_range(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        low, high = (float(value) for value in torch.aminmax(args[0]))
        if not math.isfinite(low + high):
            raise InputError(f"the input of '{self.name}' is not finite; look at the weights")
        self.low, self.high = min(self.low, low), max(self.high, high)

    def see_error(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = quantized_activation(
            args[0], args[0].new_tensor(self.low), args[0].new_tensor(self.high)
        )
        if isinstance(module, nn.Linear):
            output8 = nn.functional.linear(x, self.weight8, module.bias)
        else:
            output8 = module._conv_forward(x, self.weight8, module.bias)  # type: ignore[operator]
        self.signal += _energy(output)
        self.noise += _energy(output8 - output)

    def result(self) -> LayerSensitivity:
        noise = max(self.noise, self.signal * 10 ** (-MAX_DB / 10))
        peaks = self.weight.detach().abs().flatten(1).amax(1)
        median = float(peaks.quantile(0.5))
        return LayerSensitivity(
            name=self.name,
            sqnr_db=10 * math.log10(self.signal / noise) if self.signal else MAX_DB,
            weight_min=float(self.weight.min()),
            weight_max=float(self.weight.max()),
            weight_spread=float(peaks.max()) / median if median else math.inf,
            activation_min=self.low,
            activation_max=self.high,
        )


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
