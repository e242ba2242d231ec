"""What tests of models share: batch norms that are not at their defaults, and one error measure."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def randomize_batch_norm(model: Model) -> Model:
    """Return `model` in evaluation mode, after giving its batch norms random statistics and affine.

    At the defaults (mean 0, variance 1, weight 1, bias 0) a flipped sign of the running mean passes
    every test. Running variances lie in [0.3, 2], weights in +-[0.5, 1.5].
    """
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2)
        if module.weight is not None:
            sign = torch.randint(2, module.weight.shape, device=module.weight.device) * 2 - 1
            module.weight.uniform_(0.5, 1.5).mul_(sign)
        if module.bias is not None:
            module.bias.normal_()
    return model.eval()


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Return `max |expected - actual| / max |expected|`, absolute where `expected` is zero.

    Raises:
        AssertionError: the shapes differ, or there is nothing to compare.
    """
    assert expected.shape == actual.shape, f"{tuple(expected.shape)} != {tuple(actual.shape)}"
    assert expected.numel() > 0
    difference = (expected - actual).abs().max().item()
    scale = expected.abs().max().item()
    return difference / scale if scale > 0 else difference
