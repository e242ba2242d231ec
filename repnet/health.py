"""What looks wrong in batch norms before folding freezes them, and in folded weights after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504
FLOAT16_TINY = torch.finfo(torch.float16).tiny  # 6.1e-5, below which precision is lost


def norm_health(model: nn.Module) -> list[str]:
    """Return one sentence for each kind of trouble in the running statistics of `model`.

    Folding makes a constant of them: statistics of a norm that never saw a batch, or of a channel
    that is constant, are better known before.
    """
    untrained, tiny, broken = [], [], []
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or norm.running_var is None:
            continue
        assert norm.running_mean is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            broken.append(name)
        elif bool((mean == 0).all() and (variance == 1).all()):
            untrained.append(name)
        elif bool((variance < norm.eps).any()):
            tiny.append(name)
    return list(
        _sentences(
            (broken, "have statistics that are not finite"),
            (
                untrained,
                "have the statistics of a norm that never saw a batch (mean 0, variance 1)",
            ),
            (tiny, "have channels with a variance below eps, which the norm amplifies as noise"),
        )
    )


def weight_health(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    """Return one sentence for each kind of trouble that folded weights make in half precision.

    Args:
        model: which holds the layers.
        layers: the folded ones.
    """
    names = {module: name for name, module in model.named_modules()}
    large, small = [], []
    for layer in layers:
        for key, tensor in layer.named_parameters():
            size = _largest(tensor)
            name = ".".join(part for part in (names.get(layer, ""), key) if part)
            if size > FLOAT16_MAX / 16:
                large.append(name)
            elif key.endswith("weight") and 0 < size < FLOAT16_TINY:
                small.append(name)
    return list(
        _sentences(
            (large, "are so large that float16 overflows or nearly does (its limit is 65504)"),
            (small, "are so small that float16 rounds them coarsely (below 6.1e-5)"),
        )
    )


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(-low.item(), high.item())


def _sentences(*kinds: tuple[list[str], str]) -> Iterator[str]:
    for names, trouble in kinds:
        if names:
            yield f"{len(names)} {trouble}: {_listing(names)}"


def _listing(names: Iterable[str], most: int = 5) -> str:
    listed = [name or "the model itself" for name in names]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
