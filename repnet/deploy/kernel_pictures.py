"""The branches of a block as the kernels that they are, beside the one kernel that they become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repnet.deploy import png
from repnet.kernel import ConvKernel, NotFoldableError, add
from repnet.layers import PadBatchNorm, Scale, Sum
from repnet.symbolic import kernel_of

LARGEST = 4_000_000  # weights of a kernel that is worth its memory


def kernel_pictures(
    train_form: nn.Module, deploy_form: nn.Module, blocks: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the effective kernel of each branch of some blocks, and the folded one, as pictures.

    A picture shows the Frobenius norm over all channels at each tap, on one scale for the block.
    The kernels of the branches, with what follows their sum, add up to the folded one, and so
    `share = <branch, folded> / <folded, folded>` adds up to 1: it is the part of the folded kernel
    that the branch accounts for, negative where the branch works against the others. `norm` is the
    branch's own Frobenius norm relative to that of the folded kernel; these do not add up.

    Args:
        train_form: has the branches.
        deploy_form: what folding made of it.
        blocks: names of folded modules; those that are not a sum of branches are left out.

    Returns:
        For each block: its name `block`, the `kernel_size`, its `branches` (`name`, `layers`,
        `share`, `norm`, `image`), the `folded` image, and the `difference` between the sum of the
        branches and the stored kernel, relative to the latter.
    """
    pictures = []
    for name in blocks:
        try:
            picture = _picture(train_form.get_submodule(name), deploy_form.get_submodule(name))
        except (NotFoldableError, AttributeError):  # folded some other way than as a sum
            continue
        if picture is not None:
            pictures.append({"block": name, **picture})
    return pictures


def pictured_blocks(
    train_form: nn.Module, deploy_form: nn.Module, blocks: Iterable[str], count: int = 2
) -> list[str]:
    """Return the names of the blocks with the most to show: branches, then taps, then depth apart.

    Args:
        train_form: has the branches.
        deploy_form: what folding made of it.
        blocks: names of folded modules in order of execution.
        count: of names, at most; the first and the last of those that are equal in this.
    """
    worth: dict[tuple[int, int], list[str]] = {}
    for name in blocks:
        try:
            branches = _branches(train_form.get_submodule(name))
            layer = _convolution(deploy_form.get_submodule(name))
        except AttributeError:
            continue
        if layer is not None and len(branches) > 1 and layer.weight.numel() <= LARGEST:
            taps = layer.weight.shape[2:].numel()
            worth.setdefault((min(taps, 2), len(branches)), []).append(name)
    if not worth:
        return []
    best = worth[max(worth)]
    return list(dict.fromkeys((best[0], best[-1])))[:count]


@torch.no_grad()
def _picture(block: nn.Module, folded: nn.Module) -> dict[str, Any] | None:
    branches = _branches(block)
    layer = _convolution(folded)
    if len(branches) < 2 or layer is None or layer.weight.is_meta:
        return None
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    options: dict[str, Any] = {"axes": layer.weight.ndim - 2, "dtype": torch.float64}
    whole = kernel_of(folded, channels, **options)
    nothing = replace(whole, weight=torch.zeros_like(whole.weight), bias=None)
    kernels = [kernel_of(chain, channels, **options) for _, _, chain in branches]
    kernels = [add([kernel, nothing]) for kernel in kernels]  # with the taps of the folded one
    # The folded one may have a tap less, where all of them are zero.
    whole = add([whole, replace(kernels[0], weight=torch.zeros_like(kernels[0].weight), bias=None)])
    if any(kernel.weight.shape != whole.weight.shape for kernel in kernels):
        return None
    total = whole.weight
    energy = total.square().sum()
    if not energy > 0:
        return None
    difference = (sum(kernel.weight for kernel in kernels) - total).norm() / energy.sqrt()
    taps = [_taps(kernel) for kernel in (*kernels, whole)]
    scale = max(float(tap.max()) for tap in taps)
    if not numpy.isfinite(scale):
        return None
    images = [png.encode(png.ramp(tap / scale)) for tap in taps]
    return {
        "kernel_size": list(whole.kernel_size),
        "branches": [
            {
                "name": name,
                "layers": layers,
                "share": ((kernel.weight * total).sum() / energy).item(),
                "norm": (kernel.weight.norm() / energy.sqrt()).item(),
                "image": image,
            }
            for (name, layers, _), kernel, image in zip(branches, kernels, images[:-1], strict=True)
        ],
        "folded": images[-1],
        "difference": float(difference),
    }


def _branches(block: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """Return name, description and module of each branch of a sum, or of a sum in a sequence.

    In a sequence the module of a branch includes what comes before and after the sum. A bias there
    is added by each of them, but the weights, all that is drawn, are linear.
    """
    if isinstance(block, Sum):
        return [
            (name, f"{'identity, ' * isinstance(branch, _BatchNorm)}{_describe(branch)}", branch)
            for name, branch in block.named_children()
        ]
    if isinstance(block, nn.Sequential):
        children = list(block.named_children())
        for index, (key, child) in enumerate(children):
            if inner := _branches(child):
                before = [module for _, module in children[:index]]
                after = [module for _, module in children[index + 1 :]]
                return [
                    (f"{key}.{name}", layers, nn.Sequential(*before, branch, *after))
                    for name, layers, branch in inner
                ]
    return []


def _convolution(module: nn.Module) -> _ConvNd | nn.Linear | None:
    return next((m for m in module.modules() if isinstance(m, _ConvNd | nn.Linear)), None)


def _taps(kernel: ConvKernel) -> numpy.ndarray:
    """Return the norm over channels at each tap, `(height, width)`."""
    taps: Tensor = kernel.weight.square().sum((0, 1))
    while taps.ndim > 2:  # a volume, seen from the front
        taps = taps.sum(0)
    while taps.ndim < 2:
        taps = taps.unsqueeze(0)
    return taps.sqrt().cpu().numpy()


def _describe(branch: nn.Module) -> str:
    """Return the layers of a branch in a few words: `conv 1x1, norm, conv 3x3, norm`."""
    if isinstance(branch, Sum):
        return " + ".join(_describe(child) for child in branch)
    if isinstance(branch, nn.Sequential):
        words = (
            f"({_describe(child)})" if isinstance(child, Sum) else _describe(child)
            for child in branch
        )
        return ", ".join(words)
    if isinstance(branch, _ConvNd):
        kind = "transposed conv" if isinstance(branch, _ConvTransposeNd) else "conv"
        dilation = f" dilated {branch.dilation[-1]}" if max(branch.dilation) > 1 else ""
        return f"{kind} {'x'.join(map(str, branch.kernel_size))}{dilation}"
    if isinstance(branch, _BatchNorm | PadBatchNorm):
        return "norm"
    if isinstance(branch, nn.AvgPool2d):
        side = branch.kernel_size
        return f"mean {side}x{side}" if isinstance(side, int) else "mean"
    if isinstance(branch, nn.Identity):
        return "identity"
    if isinstance(branch, Scale):
        return "scale"
    return type(branch).__name__
