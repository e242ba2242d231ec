"""Which parameters decay, and how fast each learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from repnet.errors import InputError
from repnet.layers import branch_norms

Groups = list[dict[str, Any]]
LR_SCALE = "lr_scale"


def repvgg_parameter_groups(model: nn.Module) -> Groups:
    """Return parameter groups that decay what RepVGG's authors decay.

    Weights of convolutions and linear layers decay, and so does the gamma of a batch norm that is a
    branch itself (it scales the identity). Biases and the gammas behind convolutions do not.

    Args:
        model: parameters that do not require gradients are left out, here and below.

    Returns:
        Two groups for a torch optimizer: the first takes the optimizer's own weight decay.
    """
    scales = {id(norm.weight) for norm in branch_norms(model)}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in _trained(model):
        decays = parameter.ndim > 1 or id(parameter) in scales
        (decay if decays else no_decay).append(parameter)
    return [
        {"params": decay, "name": "weights and identity norms"},
        {"params": no_decay, "weight_decay": 0.0, "name": "other norms and biases"},
    ]


def no_norm_or_bias_decay(model: nn.Module) -> Groups:
    """Return two groups: weights decay, and parameters of one dimension do not.

    Those are biases and all that norms hold: the rule of most recipes (arXiv:1812.01187, section
    3.1), and of MobileOne.
    """
    return _split(list(_trained(model)), "weights", "norms and biases")


def all_decay(model: nn.Module) -> Groups:
    """Return one group, so that everything decays, as in a plain torch script."""
    return [{"params": list(_trained(model)), "name": "all"}]


def layerwise_parameter_groups(model: nn.Module, decay: float = 0.75) -> Groups:
    """Return groups that learn the slower the deeper they lie below the head, for fine-tuning.

    The learning rate of a layer k places before the last one is `decay ** k` times the optimizer's
    (arXiv:1801.06146, section 3.2). The layers are the children of `model` in the order in which it
    names them, those of `Sequential` and `ModuleList` in their place; a norm belongs to the layer
    before it. Norms and biases do not decay.

    Args:
        model: holds its layers in the order of their depth.
        decay: in (0, 1].

    Returns:
        Groups with the key `lr_scale`, which `scale_learning_rates(optimizer)` applies.

    Raises:
        InputError: `decay` is not in that range.

    Example:
        >>> optimizer = scale_learning_rates(SGD(layerwise_parameter_groups(model), lr=0.01))
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay={decay} must be in (0, 1]; 1 is one learning rate for all layers")
    layers: list[list[nn.Parameter]] = []
    seen: set[int] = set()
    for own in _layers(model):
        new = [p for p in own if id(p) not in seen]  # a shared one belongs to its first layer
        seen.update(id(p) for p in new)
        if layers and all(p.ndim < 2 for p in new):
            layers[-1] += new
        else:
            layers.append(new)
    groups: Groups = []
    for depth, parameters in enumerate(layers):
        trained = [p for p in parameters if p.requires_grad]
        scale = {LR_SCALE: decay ** (len(layers) - 1 - depth)}
        kinds = _split(trained, f"layer {depth} weights", f"layer {depth} norms and biases")
        groups += [{**group, **scale} for group in kinds if group["params"]]
    return groups


def scale_learning_rates(optimizer: Optimizer) -> Optimizer:
    """Multiply each group's learning rate by its `lr_scale`, once; return the optimizer.

    Call it before a schedule is made, which remembers the learning rates that it finds.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop(LR_SCALE, 1.0)
    return optimizer


class ParameterRow(NamedTuple):
    """One parameter group.

    Args:
        group: its name.
        parameters: how many tensors.
        values: how many numbers in them.
        learning_rate: None where nothing is trained.
        weight_decay: None where nothing is trained.
    """

    group: str
    parameters: int
    values: int
    learning_rate: float | None
    weight_decay: float | None


def parameter_table(optimizer: Optimizer, model: nn.Module) -> list[ParameterRow]:
    """Return a row for each group, and one for parameters of `model` that no group has, if any.

    Args:
        optimizer: a schedule may have set its learning rates to those of the first step already;
            the peaks are shown.
        model: what is trained.
    """
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        rate = group.get("initial_lr", group.get("lr"))
        decay = group.get("initial_weight_decay", group.get("weight_decay", 0.0))
        rows.append(
            ParameterRow(
                group.get("name", f"group {number}"),
                *_size(group["params"]),
                None if rate is None else float(rate),
                float(decay),
            )
        )
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [p for p in model.parameters() if id(p) not in taken]
    if left:
        rows.append(ParameterRow("not trained", *_size(left), None, None))
    return rows


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def _split(parameters: list[nn.Parameter], weights: str, others: str) -> Groups:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "name": weights},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "name": others},
    ]


def _layers(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters of each layer, in order of definition."""
    own = list(module.parameters(recurse=False))
    if own:
        yield own
    for child in module.children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _layers(child)
        elif parameters := list(child.parameters()):
            yield parameters


def _size(parameters: list[nn.Parameter]) -> tuple[int, int]:
    return len(parameters), sum(p.numel() for p in parameters)
