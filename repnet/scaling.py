"""`absorb`: a norm goes into the convolution or linear layer before it."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from repnet.convolution import Layer, as_module
from repnet.equivalence import Inputs, relative_difference
from repnet.kernel import ConvKernel, NotFoldableError
from repnet.precision import InFloat64
from repnet.symbolic import kernel_of

TOLERANCE = 1e-10
PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def absorb(layer: Layer, norm: ConvKernel, inputs: Inputs) -> nn.Module:
    """Return the layer, in float64, that computes `norm(layer(x))`.

    Args:
        layer: in evaluation mode, without hooks.
        norm: a channelwise map.
        inputs: shapes that the layer takes.

    Raises:
        NotFoldableError: there is none.
    """
    axes = layer.weight.ndim - 2
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    try:
        with torch.no_grad():
            kernel = kernel_of(layer, channels, axes=axes, dtype=torch.float64)
            return as_module(kernel.then(norm.over(axes)), like=layer)
    except NotFoldableError as error:
        return _scaled(layer, norm, inputs, str(error))


def _scaled(layer: Layer, norm: ConvKernel, inputs: Inputs, reason: str) -> nn.Module:
    """Return a copy of a layer that no kernel can follow, with its weight scaled by the norm.

    Padding by reflection, or by what depends on the size of the input, is no part of a kernel, but
    leaves this right; a layer that normalizes its weight does not. So both are run on random
    numbers.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight.shape[0] != norm.out_channels:
        raise NotFoldableError(reason)
    scale, shift = norm.weight.detach().flatten(), norm.bias
    copy = deepcopy(layer)
    copy.weight = _parameter(weight.double() * scale.reshape(-1, *(1,) * (weight.ndim - 1)), weight)
    if bias is not None or shift is not None:
        total = torch.zeros_like(scale) if bias is None else bias.double() * scale
        copy.bias = _parameter(total if shift is None else total + shift, weight)
    if weight.is_meta:
        if type(layer).forward not in PLAIN:
            raise NotFoldableError(reason)
        return copy
    with torch.no_grad(), InFloat64():
        sample = Inputs(*tree_map(lambda x: _random(x, weight), (inputs.args, inputs.kwargs)))
        output = sample(layer)
        axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
        expected = norm.over(0)(output.movedim(axis, -1).flatten(0, -2))
        actual = sample(copy).movedim(axis, -1).flatten(0, -2)
    if not relative_difference(expected, actual) <= TOLERANCE:
        raise NotFoldableError(f"{reason}; and its output does not scale with its weight")
    return copy


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=like.requires_grad)


def _random(value: object, like: Tensor) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, dtype=torch.float64, device=like.device)
    return value
