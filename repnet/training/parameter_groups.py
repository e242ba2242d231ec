"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from repnet.layers import branch_norms


def repvgg_parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups that decay what RepVGG's authors decay.

    Weights of convolutions and linear layers decay, and so does the gamma of a batch norm that is a
    branch itself (it scales the identity). Biases and the gammas behind convolutions do not.

    Args:
        model: parameters that do not require gradients are left out.

    Returns:
        Two groups for a torch optimizer: the first takes the optimizer's own weight decay.
    """
    scales = {id(norm.weight) for norm in branch_norms(model)}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 or id(parameter) in scales
            (decay if decays else no_decay).append(parameter)
    return [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
