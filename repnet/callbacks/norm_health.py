"""`NormHealth`: what looks wrong in batch norms is said before they are deployed."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from repnet.callbacks.reparameterize import as_example, find_network, network_inputs
from repnet.equivalence import FoldMismatchError
from repnet.fold import reparameterize
from repnet.health import norm_health
from repnet.lightning import Callback


class NormHealth(Callback):
    """Warn of norms that never saw a batch, of variances near 0, of weights too large for float16.

    One warning for each kind of trouble, with the names of the modules. After training the network
    is folded, in memory only, because it is the folded weights that overflow.

    Args:
        every_n_epochs: also look at the statistics (not at folded weights) after so many epochs; 0
            for the end of training only.
        fold: fold at the end; False looks at the statistics only.
        attribute: where the network is, as in `Reparameterize`.
    """

    def __init__(
        self, every_n_epochs: int = 0, *, fold: bool = True, attribute: str | None = None
    ) -> None:
        self.every_n_epochs = every_n_epochs
        self.fold = fold
        self.attribute = attribute

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if self.every_n_epochs and not epochs % self.every_n_epochs:
            _warn(f"epoch {epochs}", norm_health(find_network(pl_module, self.attribute)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Later than `on_train_end`, in which statistics are estimated anew.
        network = find_network(pl_module, self.attribute)
        if not self.fold:
            _warn("trained", norm_health(network))
            return
        example = as_example(network, next(network_inputs(trainer, pl_module, network)))
        try:
            _, report = reparameterize(network, example, return_report=True)
        except (ValueError, FoldMismatchError) as error:
            # Not every network folds; its norms can be looked at.
            _warn("trained", [*norm_health(network), f"the network does not fold: {error}"])
        else:
            _warn("trained", report.health)


def _warn(when: str, troubles: list[str]) -> None:
    for trouble in troubles:
        rank_zero_warn(f"batch norms ({when}): {trouble}")
