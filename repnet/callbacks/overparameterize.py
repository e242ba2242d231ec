"""`OverParameterize`: trains any network in a multi-branch form."""

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

    This is `repnet.overparameterize`, done in place. It happens in `setup`, so that a checkpoint of
    the run fits when it is resumed or tested; a module that already has its blocks stays as it is.
    The network must exist by then: make it in `__init__` or in `configure_model`, not in
    `LightningModule.setup`, which Lightning calls later.

    Args:
        block: as in `overparameterize`.
        where: as in `overparameterize`; names are relative to `attribute`.
        init: as in `overparameterize`.
        batches: as in `overparameterize`, on the CPU; they are passed to the network.
        attribute: path of the network, such as `"model"` or `"model.backbone"`; None for the whole
            LightningModule without its metrics and losses, which are recognized by their type
            (torchmetrics, losses of torch.nn) or by "loss", "criterion" or "metric" in their name.

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
        pl_module.configure_model()  # Lightning calls it again, which has no effect
        replaced = insert_blocks(
            pl_module.get_submodule(self.attribute or ""),
            self.block,
            where=self.where,
            init=self.init,
            batches=self.batches,
            excluded=metrics_and_losses(pl_module) if self.attribute is None else (),
            parent=pl_module,
        )
        self.replaced = replaced or self.replaced


def metrics_and_losses(module: nn.Module) -> list[nn.Module]:
    """Return the submodules whose type or name says that they are not part of the network."""
    return [
        m
        for name, m in module.named_modules()
        if isinstance(m, Metric | MetricCollection | _Loss)
        or any(word in name.lower() for word in _NOT_TRAINED)
    ]
