"""`as_module`: the torch layer of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from repnet.kernel import ConvKernel, NotFoldableError
from repnet.symbolic import transpose_weight

CONVOLUTIONS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PADS: tuple[Any, ...] = (None, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
Layer = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)


def as_module(kernel: ConvKernel, *, like: nn.Module) -> nn.Module:
    """Return the layer that computes `kernel`; it is trainable and channels-last as `like` is.

    Raises:
        NotFoldableError: torch has no such layer.
    """
    layer: nn.Module
    if kernel.axes == 0:
        layer = _linear(kernel)
    elif max(kernel.upsample) == 1:
        layer = _convolution(kernel)
    else:
        layer = _transposed(kernel)
    *_, conv = layer.modules()
    trainable = any(p.requires_grad for p in like.parameters())
    memory_format = torch.contiguous_format
    if any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in like.parameters()
    ):
        memory_format = torch.channels_last
    kernel = kernel.to(kernel.dtype)
    weight = kernel.weight
    if isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        weight = transpose_weight(weight, kernel.groups)
    if weight.ndim != 4:
        memory_format = torch.contiguous_format
    given = {p.data_ptr() for p in like.parameters()}  # whose memory the layer must not share
    weight = weight.detach().contiguous(memory_format=memory_format)
    weight = weight.clone() if weight.data_ptr() in given else weight
    conv.weight = nn.Parameter(weight, requires_grad=trainable)
    if kernel.bias is not None:
        conv.bias = nn.Parameter(kernel.bias.detach().clone(), requires_grad=trainable)
    return layer.eval()


def _settings(kernel: ConvKernel) -> dict[str, Any]:
    return {
        "in_channels": kernel.in_channels,
        "out_channels": kernel.out_channels,
        "kernel_size": kernel.kernel_size,
        "stride": kernel.stride,
        "dilation": kernel.dilation,
        "groups": kernel.groups,
        "bias": kernel.bias is not None,
        "device": "meta",
    }


def _linear(kernel: ConvKernel) -> nn.Module:
    if kernel.groups > 1:
        raise NotFoldableError("torch has no linear layer with groups")
    bias = kernel.bias is not None
    return nn.Linear(kernel.in_channels, kernel.out_channels, bias=bias, device="meta")


def _convolution(kernel: ConvKernel) -> nn.Module:
    convolution, pad = CONVOLUTIONS[kernel.axes], PADS[kernel.axes]
    befores = tuple(before for before, _ in kernel.padding)
    if all(before == after >= 0 for before, after in kernel.padding):
        return convolution(**_settings(kernel), padding=befores)
    sides = tuple(side for sides in reversed(kernel.padding) for side in sides)
    return nn.Sequential(pad(sides), convolution(**_settings(kernel)))


def _transposed(kernel: ConvKernel) -> nn.Module:
    padding, output_padding = [], []
    for axis, (before, after) in enumerate(kernel.padding):
        padding.append(kernel.dilation[axis] * (kernel.kernel_size[axis] - 1) - before)
        output_padding.append(after - before)
    limits = [max(s, d) for s, d in zip(kernel.upsample, kernel.dilation, strict=True)]
    if (
        max(kernel.stride) > 1
        or min(*padding, *output_padding) < 0
        or any(extra >= limit for extra, limit in zip(output_padding, limits, strict=True))
    ):
        raise NotFoldableError("torch has no transposed convolution with this stride and padding")
    settings = {**_settings(kernel), "stride": kernel.upsample}
    transposed = TRANSPOSED[kernel.axes]
    return transposed(**settings, padding=tuple(padding), output_padding=tuple(output_padding))
