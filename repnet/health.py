"""Signs of trouble in batch norms before folding freezes them, and in folded weights after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504
FLOAT16_TINY = torch.finfo(torch.float16).tiny  # 6.1e-5, below which precision is lost


def norm_health(model: nn.Module) -> list[str]:
    """Return one sentence for each kind of trouble in the running statistics of `model`.

    Folding turns them into constants, so it should be known before if a norm never saw a batch or
    a channel is constant.
    """
    broken, untrained, tiny = (
        "have statistics that are not finite",
        "have the statistics of a norm that never saw a batch (mean 0, variance 1)",
        "have channels with a variance below eps, which the norm amplifies as noise",
    )
    found: dict[str, list[str]] = {broken: [], untrained: [], tiny: []}
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or norm.running_var is None:
            continue
        assert norm.running_mean is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            found[broken].append(name)
        elif bool((mean == 0).all() and (variance == 1).all()):
            found[untrained].append(name)
        elif bool((variance < norm.eps).any()):
            found[tiny].append(name)
    return _sentences(found)


def weight_health(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    """Return one sentence for each kind of trouble that folded weights make in half precision.

    Args:
        model: contains the layers.
        layers: the folded layers.
    """
    large, small = (
        "are so large that float16 overflows or nearly does (its limit is 65504)",
        "are so small that float16 rounds them coarsely (below 6.1e-5)",
    )
    found: dict[str, list[str]] = {large: [], small: []}
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        for key, tensor in layer.named_parameters():
            size = tensor.detach().abs().max().item() if tensor.numel() else 0.0
            name = f"{names.get(layer, '')}.{key}".lstrip(".")
            if size > FLOAT16_MAX / 16:
                found[large].append(name)
            elif key.endswith("weight") and 0 < size < FLOAT16_TINY:
                found[small].append(name)
    return _sentences(found)


def _sentences(found: dict[str, list[str]], most: int = 5) -> list[str]:
    sentences = []
    for trouble, names in found.items():
        listed = [name or "the model itself" for name in names]
        rest = f" and {len(listed) - most} more" if len(listed) > most else ""
        if names:
            sentences.append(f"{len(names)} {trouble}: {', '.join(listed[:most])}{rest}")
    return sentences
