"""`fold_branches`: the partially folded network, in which each block is convolution and norm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.blocks.block import Block
from repnet.checkpoint import MODEL_PREFIX, find_checkpoint, model_from, read_checkpoint
from repnet.errors import InputError, one_line
from repnet.fold import reparameterize
from repnet.layers import Sum
from repnet.symbolic import evaluating
from repnet.weights import load_weights


@torch.no_grad()
def fold_branches(network: nn.Module, batches: Iterable[Any]) -> list[str]:
    """Fold each block of several branches, in place, to one convolution with its batch norm.

    As `reparameterize(norms="keep")` does. Where no norm is left, because each branch had its own
    (or none), a new one takes over the bias, with the mean and variance of what it receives: so the
    network computes the same, and has the keys of the same network with `block="plain"`.

    Args:
        network: changed; modes and devices stay.
        batches: its inputs on its device, or `(input, ...)` tuples of which the first is taken.

    Returns:
        The names of the blocks that were folded.

    Raises:
        InputError: there is no batch, or the network itself is one convolution.
    """
    inputs = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    if not inputs:
        raise InputError("fold_branches needs a batch; got none")
    folded, report = reparameterize(
        network, inputs[0][:2], norms="keep", method="modules", return_report=True
    )
    names = [fold.name for fold in report.folded]
    if "" in names:
        raise InputError(f"the whole {type(network).__name__} is one convolution")
    norms = []
    for name in names:
        old, new = network.get_submodule(name), folded.get_submodule(name)
        place = f"{name}.conv" if isinstance(old, Block) else name  # a block without activation
        in_block = isinstance(network.get_submodule(place.rpartition(".")[0]), Block)
        needs_norm = _needs_norm(old, new, in_block)
        network.set_submodule(place, new.train(old.training))
        if needs_norm:
            norms.append(_insert_norm(network, place))
    for name, norm in folded.named_modules():
        if isinstance(norm, _BatchNorm):  # it may have taken a bias
            network.get_submodule(name).load_state_dict(norm.state_dict())
    _give_statistics(network, norms, inputs)
    for block in network.modules():
        if isinstance(block, Block) and _is_conv_and_norm(block.conv):
            conv, norm = block.conv.children()
            block.conv = nn.Sequential(OrderedDict(conv=conv, bn=norm))
    return names


def load_folded(
    model: nn.Module,
    source: str | Path,
    batches: Iterable[Any],
    *,
    head: bool = True,
    trust: Sequence[str] = (),
) -> str | None:
    """Load a checkpoint of several branches into the same network of plain blocks, by folding.

    Args:
        model: changed in place, where it has no branches and the checkpoint has.
        source: a `.ckpt` of repnet, or a run directory; any other file is left to `load_weights`.
        batches: as in `fold_branches`.
        head: False leaves the classifier of `model` as it is.
        trust: packages that may be imported to build the checkpoint's network.

    Returns:
        What was loaded, in words; None where there was nothing to fold, and nothing was loaded.

    Raises:
        InputError: the folded weights do not fit the model.
    """
    if _branches(model):
        return None
    try:
        path = find_checkpoint(source)
        contents = read_checkpoint(path)
    except InputError:
        return None  # `load_weights` knows more formats, and says what is wrong with the file
    keys = {key.removeprefix(MODEL_PREFIX) for key in contents["state_dict"]}
    if keys == model.state_dict().keys():
        return None
    network = model_from(contents, path, trust=trust)
    if not _branches(network):
        return None
    try:
        names = fold_branches(network, batches)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path}: its network does not take the images of these data, with which its branches "
            f"would be folded ({one_line(error)}); choose its own block instead of a plain one"
        ) from error
    try:
        report = load_weights(model, network.state_dict(), head=head)
    except InputError as error:
        raise InputError(f"{path}, with its {len(names)} blocks folded: {error}") from error
    return f"{path}: {len(names)} blocks folded to one convolution each; {report}"


def _branches(network: nn.Module) -> bool:
    return any(isinstance(module, Sum) and len(module) > 1 for module in network.modules())


def _needs_norm(old: nn.Module, new: nn.Module, in_block: bool) -> bool:
    """Return whether what was folded had norms, or would have one as a plain block."""
    if type(new) is not nn.Conv2d or new.bias is None:
        return False
    if hasattr(old, "original_bias"):  # it took the place of a convolution, which had none
        return False
    return in_block or any(isinstance(module, _BatchNorm) for module in old.modules())


def _insert_norm(network: nn.Module, name: str) -> nn.BatchNorm2d:
    """Let a norm follow a convolution, and take over its bias."""
    conv = network.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    norm = nn.BatchNorm2d(conv.out_channels).to(conv.weight)
    norm.bias = nn.Parameter(conv.bias)
    conv.bias = None
    pair = nn.Sequential(OrderedDict(conv=conv, bn=norm)).train(conv.training)
    for parameter in norm.parameters():
        parameter.requires_grad_(conv.weight.requires_grad)
    norm.weight.fill_((1 + norm.eps) ** 0.5)  # its statistics are 0 and 1
    network.set_submodule(name, pair)
    return norm


def _give_statistics(
    network: nn.Module, norms: Sequence[nn.BatchNorm2d], inputs: Sequence[Any]
) -> None:
    """Give norms that change nothing the statistics of what they receive; they change nothing."""
    sums = {norm: torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms}
    counts = dict.fromkeys(norms, 0)

    def see(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        sums[norm] += torch.stack([x.sum(1), x.square().sum(1)]).cpu()
        counts[norm] += x.shape[1]

    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        with evaluating(network):
            for x in inputs:
                network(x)
    finally:
        for handle in handles:
            handle.remove()
    for norm in norms:
        mean, square = sums[norm] / max(1, counts[norm])
        variance = (square - mean.square()).clamp_min(0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        # Of the values as they are stored, so that rounding them changes nothing.
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.add_(norm.running_mean)


def _is_conv_and_norm(module: nn.Module) -> bool:
    kinds = [type(child) for child in module.children()]
    names = [name for name, _ in module.named_children()]
    return kinds == [nn.Conv2d, nn.BatchNorm2d] and names != ["conv", "bn"]
