"""`as_module`: the torch layer of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from repnet.kernel import ConvKernel, NotFoldableError
from repnet.symbolic import transpose_weight

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
    layer = _without_values(kernel)
    *_, conv = layer.modules()
    kernel = kernel.exact()
    weight = kernel.weight
    if getattr(conv, "transposed", False):
        weight = transpose_weight(weight, kernel.groups)
    is_last = weight.ndim == 4 and any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in like.parameters()
    )
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    weight = weight.detach().contiguous(memory_format=memory_format)
    if weight.data_ptr() in {p.data_ptr() for p in like.parameters()}:
        weight = weight.clone()  # the layer must not share memory with the model
    trainable = any(p.requires_grad for p in like.parameters())
    conv.weight = nn.Parameter(weight, requires_grad=trainable)
    if kernel.bias is not None:
        conv.bias = nn.Parameter(kernel.bias.detach().clone(), requires_grad=trainable)
    return layer.eval()


def _without_values(kernel: ConvKernel) -> nn.Module:
    """Return the layer on the meta device, after a padding layer if the padding is uneven."""
    channels, bias = (kernel.in_channels, kernel.out_channels), kernel.bias is not None
    if kernel.axes == 0:
        if kernel.groups > 1:
            raise NotFoldableError("torch has no linear layer with groups")
        return nn.Linear(*channels, bias=bias, device="meta")
    befores, afters = zip(*kernel.padding, strict=True)
    settings: dict[str, Any] = {
        "kernel_size": kernel.kernel_size,
        "stride": kernel.stride,
        "dilation": kernel.dilation,
        "groups": kernel.groups,
        "bias": bias,
        "device": "meta",
    }
    if max(kernel.upsample) > 1:
        reach = [d * (k - 1) for d, k in zip(kernel.dilation, kernel.kernel_size, strict=True)]
        padding = tuple(r - before for r, before in zip(reach, befores, strict=True))
        extra = tuple(after - before for before, after in kernel.padding)
        limits = map(max, kernel.upsample, kernel.dilation)
        if (
            max(kernel.stride) > 1
            or min(*padding, *extra) < 0
            or any(n >= limit for n, limit in zip(extra, limits, strict=True))
        ):
            raise NotFoldableError(
                "torch has no transposed convolution with this stride and padding"
            )
        settings |= {"stride": kernel.upsample, "padding": padding, "output_padding": extra}
        return getattr(nn, f"ConvTranspose{kernel.axes}d")(*channels, **settings)
    convolution = getattr(nn, f"Conv{kernel.axes}d")
    if befores == afters and min(befores) >= 0:
        return convolution(*channels, **settings, padding=befores)
    sides = tuple(side for sides in reversed(kernel.padding) for side in sides)
    pad = getattr(nn, f"ZeroPad{kernel.axes}d")(sides)
    return nn.Sequential(pad, convolution(*channels, **settings))
