"""`FoldedValidation`: what the deployed form would score, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from repnet.callbacks.reparameterize import (
    as_example,
    find_network,
    network_inputs,
    step_arguments,
)
from repnet.fold import reparameterize
from repnet.lightning import Callback


class FoldedValidation(Callback):
    """Log what the LightningModule's own validation logs, of the folded network, as `folded/NAME`.

    After a validation a second one runs on a copy of the LightningModule that holds the folded
    network: its `on_validation_epoch_start`, `validation_step` and `on_validation_epoch_end`, with
    metrics from zero. Logged values are averaged over samples; those that are to be reduced in
    another way are left out. The LightningModule, its metrics and the random numbers of training
    stay as they are. What a step does beside logging (writing files, say) happens twice.

    Args:
        every_n_epochs: a second validation takes as long as the first.
        attribute: where the network is, as in `Reparameterize`.
    """

    metric_prefix = "folded"

    def __init__(self, every_n_epochs: int = 1, attribute: str | None = None) -> None:
        self.every_n_epochs = every_n_epochs
        self.attribute = attribute

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        validate_copy(
            trainer, pl_module, self.metric_prefix, lambda: self._folded(trainer, pl_module)
        )

    def _folded(self, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
        network = find_network(pl_module, self.attribute)
        example = as_example(network, next(network_inputs(trainer, pl_module, network)))
        folded = reparameterize(network, example)
        # Everything is copied but the network, in whose place the copies find the folded one.
        return deepcopy(pl_module, {id(network): folded})


def validate_copy(
    trainer: Trainer, pl_module: LightningModule, prefix: str, make: Callable[[], LightningModule]
) -> None:
    """Log what the validation of a changed copy of a LightningModule logs, as `prefix/NAME`.

    To be called in `on_validation_epoch_end`; see `FoldedValidation` for what it does.

    Args:
        trainer: whose validation is run again.
        pl_module: stays as it is.
        prefix: of the names.
        make: returns the copy.
    """
    # Tensors made in inference mode cannot be parameters.
    with isolate_rng(), torch.inference_mode(False), torch.no_grad():
        values = _validate(trainer, pl_module, make().eval())
    for name, value in values.items():
        pl_module.log(f"{prefix}/{name}", value, sync_dist=True)


def _validate(
    trainer: Trainer, pl_module: LightningModule, copy: LightningModule
) -> dict[str, float]:
    copy.trainer = trainer
    for module in copy.modules():
        if isinstance(module, Metric):
            module.reset()
    logged = _Logged()
    copy.log, copy.log_dict = logged.log, logged.log_dict  # type: ignore[assignment]
    copy.on_validation_epoch_start()
    for step, args in step_arguments(trainer, pl_module):
        logged.batch = args[0]
        with trainer.precision_plugin.val_step_context():
            getattr(copy, step)(*args)
    logged.batch = None
    copy.on_validation_epoch_end()
    return logged.means(trainer)


class _Logged:
    """Stands in for the logging of a LightningModule."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.sums: dict[str, Tensor] = {}  # (sum of values times samples, samples)
        self.metrics: dict[str, Metric] = {}

    def log(
        self,
        name: str,
        value: Any,
        *args: Any,
        reduce_fx: Any = "mean",
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(value, Metric):
            self.metrics[name] = value
        elif reduce_fx in ("mean", torch.mean):
            samples = 1 if self.batch is None else batch_size or extract_batch_size(self.batch)
            pair = torch.tensor([float(value) * samples, samples], dtype=torch.float64)
            self.sums[name] = self.sums.get(name, torch.zeros_like(pair)) + pair

    def log_dict(self, values: Any, *args: Any, **options: Any) -> None:
        items = (
            values.items(keep_base=False)
            if isinstance(values, MetricCollection)
            else values.items()
        )
        for name, value in items:
            self.log(name, value, **options)

    def means(self, trainer: Trainer) -> dict[str, float]:
        """Return the means over all processes."""
        means = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        for name, pair in self.sums.items():
            total = trainer.strategy.reduce(pair.to(trainer.strategy.root_device), reduce_op="sum")
            means[name] = float(total[0] / total[1])
        return means
