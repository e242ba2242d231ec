"""`FreezeBatchNorm`: norms whose statistics training does not move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.block_insertion import Where, conditions_of, matches
from repnet.callbacks.reparameterize import find_network
from repnet.errors import InputError
from repnet.lightning import Callback


class FreezeBatchNorm(Callback):
    """Hold batch norms in evaluation through all epochs, for fine-tuning with small batches.

    They work with their running statistics, as they do when deployed. (To share statistics over
    processes instead, `Trainer(sync_batchnorm=True)` does.)

    Args:
        where: a glob for names within the network (`*` matches dots, too), a predicate of `(name,
            module)`, a type of norm or of a module around it, or a list of these, of which any may
            hold; None for all.
        affine: also freeze their weights and biases.
        attribute: where the network is, as in `Reparameterize`.

    Raises:
        InputError: nothing is selected.

    Example:
        >>> trainer = Trainer(callbacks=[FreezeBatchNorm("backbone.*")])
    """

    def __init__(
        self,
        where: Where | Sequence[Where] | None = None,
        *,
        affine: bool = True,
        attribute: str | None = None,
    ) -> None:
        self.where = where
        self.affine = affine
        self.attribute = attribute
        self.norms: dict[str, _BatchNorm] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        network = find_network(pl_module, self.attribute)
        norms = {n: m for n, m in network.named_modules() if isinstance(m, _BatchNorm)}
        conditions = conditions_of("*" if self.where is None else self.where)
        self.norms = {
            name: norm
            for name, norm in norms.items()
            if any(matches(condition, name, network) for condition in conditions)
        }
        if not self.norms:
            raise InputError(
                f"FreezeBatchNorm(where={self.where!r}) selects no batch norm; there are "
                + (", ".join(norms) or "none")
            )
        if self.affine:
            for norm in self.norms.values():
                norm.requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Since the setup, `sync_batchnorm` has put others in their places.
        network: Any = find_network(pl_module, self.attribute)
        self.norms = {name: network.get_submodule(name) for name in self.norms}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for norm in self.norms.values():  # whatever has called `train()`
            norm.training = False
