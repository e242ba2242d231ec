"""`OverParameterize`: any network is trained in a multi-branch form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric, MetricCollection

from repnet.block_insertion import MakeBlock, Where, insert_blocks
from repnet.lightning import Callback

_NOT_TRAINED = ("loss", "criterion", "metric")


class OverParameterize(Callback):
    """Replace convolutions of the LightningModule by blocks, before its optimizers are made.

    See `repnet.overparameterize`, here done in place. It happens in `setup`, so that a checkpoint
    of the run fits when it is resumed or tested; a module in which it happened stays as it is. A
    network must exist by then: one made in `configure_model` does, because that hook is called
    first, one made in `LightningModule.setup` does not.

    Args:
        block: as in `overparameterize`.
        where: as there; names are relative to `attribute`.
        init: as there.
        batches: as there, on the CPU; they are given to the network.
        attribute: where the network is, as in `"model"` or `"model.backbone"`; None for the whole
            LightningModule without its metrics and losses (torchmetrics, losses of torch.nn, and
            what has "loss", "criterion" or "metric" in its name).

    Example:
        >>> trainer = Trainer(callbacks=[OverParameterize("dbb"), Reparameterize("deploy")])
    """

    def __init__(
        self,
        block: str | MakeBlock = "repvgg",
        *,
        where: Where | Sequence[Where] | None = None,
        init: Literal["preserve", "paper"] = "preserve",
        batches: Iterable[Any] | None = None,
        attribute: str | None = None,
    ) -> None:
        self.block = block
        self.where = where
        self.init: Literal["preserve", "paper"] = init
        self.batches = batches
        self.attribute = attribute
        self.replaced: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.configure_model()  # Lightning calls it again, and it does nothing then
        network: nn.Module = pl_module
        parent = None
        if self.attribute is not None:
            network = pl_module.get_submodule(self.attribute)
            parent = pl_module.get_submodule(self.attribute.rpartition(".")[0])
        replaced = insert_blocks(
            network,
            self.block,
            where=self.where,
            init=self.init,
            batches=self.batches,
            excluded=metrics_and_losses(pl_module) if self.attribute is None else (),
            parent=parent,
        )
        self.replaced = replaced or self.replaced


def metrics_and_losses(module: nn.Module) -> list[nn.Module]:
    """Return the submodules that are no part of the network, by their type or name."""
    return [
        m
        for name, m in module.named_modules()
        if isinstance(m, Metric | MetricCollection | _Loss)
        or any(word in name.lower() for word in _NOT_TRAINED)
    ]
