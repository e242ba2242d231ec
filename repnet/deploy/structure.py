"""What a folded network must look like."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from repnet.blocks import Block
from repnet.deploy.gate import VerificationError


def check_structure(train_form: nn.Module, deploy_form: nn.Module, *, allow_norms: bool) -> None:
    """Compare what is there after folding with what has to be.

    Args:
        train_form: with its blocks.
        deploy_form: folded.
        allow_norms: whether batch norms may be left.

    Raises:
        VerificationError: a block is not one convolution, or a batch norm is left.
    """
    modules = dict(deploy_form.named_modules())
    for name, block in train_form.named_modules():
        if not isinstance(block, Block):
            continue
        place = f"{name}.conv" if name else "conv"
        while place not in modules:  # what is around it was folded with it
            place = place.rpartition(".")[0]
        convolutions = [m for m in modules[place].modules() if isinstance(m, _ConvNd)]
        if len(convolutions) != 1:
            raise VerificationError(
                f"'{place}' should be one convolution, and has {len(convolutions)} "
                f"({type(modules[place]).__name__})"
            )
    norms = [name for name, module in modules.items() if isinstance(module, _BatchNorm)]
    if norms and not allow_norms:
        raise VerificationError(
            f"{len(norms)} batch norms could not be folded, the first is '{norms[0]}' (reasons in "
            "the report); ship the network with them by deploy.allow_norms=true"
        )
