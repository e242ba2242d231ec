"""`as_module`: the torch layer of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from repnet.kernel import ConvKernel, NotFoldableError


def as_module(kernel: ConvKernel, *, like: nn.Module) -> nn.Module:
    """Return the layer that computes `kernel`; it is trainable and channels-last as `like` is.

    Raises:
        NotFoldableError: torch has no such layer.
    """
    (top, bottom), (left, right) = kernel.padding
    settings: dict[str, Any] = {
        "in_channels": kernel.in_channels,
        "out_channels": kernel.out_channels,
        "kernel_size": kernel.kernel_size,
        "dilation": kernel.dilation,
        "groups": kernel.groups,
        "bias": kernel.bias is not None,
        "device": "meta",
    }
    layer: nn.Module
    conv: nn.Conv2d | nn.ConvTranspose2d
    weight = kernel.weight
    if kernel.upsample == (1, 1):
        if (top, left) == (bottom, right) and min(top, left) >= 0:
            layer = conv = nn.Conv2d(**settings, stride=kernel.stride, padding=(top, left))
        else:
            conv = nn.Conv2d(**settings, stride=kernel.stride)
            layer = nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)
    else:
        reach = [d * (k - 1) for d, k in zip(kernel.dilation, kernel.kernel_size, strict=True)]
        padding = (reach[0] - top, reach[1] - left)
        output_padding = (bottom - top, right - left)
        limits = [max(s, d) for s, d in zip(kernel.upsample, kernel.dilation, strict=True)]
        if (
            kernel.stride != (1, 1)
            or min(*padding, *output_padding) < 0
            or any(o >= limit for o, limit in zip(output_padding, limits, strict=True))
        ):
            raise NotFoldableError(
                "torch has no transposed convolution with this stride and padding"
            )
        layer = conv = nn.ConvTranspose2d(
            **settings, stride=kernel.upsample, padding=padding, output_padding=output_padding
        )
        weight = weight.unflatten(0, (kernel.groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    trainable = any(p.requires_grad for p in like.parameters())
    memory_format = torch.contiguous_format
    if any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in like.parameters()
    ):
        memory_format = torch.channels_last
    weight = weight.detach().contiguous(memory_format=memory_format)
    conv.weight = nn.Parameter(weight, requires_grad=trainable)
    if kernel.bias is not None:
        conv.bias = nn.Parameter(kernel.bias.detach(), requires_grad=trainable)
    return layer.eval()
