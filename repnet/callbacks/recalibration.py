"""Batch norms' running statistics, estimated anew: exactly, over a number of training batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from copy import copy, deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from repnet.callbacks.ema import hold_chosen
from repnet.callbacks.reparameterize import find_network, network_inputs
from repnet.equivalence import Inputs
from repnet.errors import InputError
from repnet.lightning import Callback


class BatchNormRecalibration(Callback):
    """Estimate all running statistics of the network anew, before it is deployed.

    Running statistics lag behind the weights, and averaged weights (`EMAWeights`, whose averages
    are recalibrated where there are any) have never seen a batch. The batches are drawn like those
    of training, augmentation included; the network receives what it receives in `training_step`,
    and all but the norms is in evaluation. Norms that training leaves in evaluation (frozen ones)
    stay as they are, and so do the random numbers and the loaders of training.

    Args:
        batches: of the training data; where an epoch has fewer, all of it.
        every_validation: do so before every validation, too: what is validated, and saved after it,
            then is what would be deployed. Otherwise only the network at the end of training is
            recalibrated, and checkpoints that were written before are not.
        attribute: where the network is, as in `Reparameterize`.
    """

    def __init__(
        self, batches: int = 100, *, every_validation: bool = False, attribute: str | None = None
    ) -> None:
        if batches < 1:
            raise InputError(f"BatchNormRecalibration(batches={batches}): 1 or more are needed")
        self.batches = batches
        self.every_validation = every_validation
        self.attribute = attribute
        self.frozen: set[nn.Module] = set()
        self.trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.trained or batch_idx == 0:  # once an epoch; a resumed one begins anywhere
            network = find_network(pl_module, self.attribute)
            self.frozen = {norm for norm in _norms(network) if not norm.training}
            self.trained = True

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Later than `on_validation_start`, in which averaged weights are put into the network.
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.every_validation and fitting:
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hold_chosen(trainer, pl_module)
        self._recalibrate(trainer, pl_module)

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = find_network(pl_module, self.attribute)
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            inputs = network_inputs(_training_only(trainer, self.batches), pl_module, network)
            recalibrate_batch_norm(network, inputs, frozen=self.frozen)


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, frozen: Collection[nn.Module] = ()
) -> list[str]:
    """Set the running statistics of batch norms to mean and variance over all of `batches`.

    They are those of all values together (the variance is that of the population), not an average
    over batches, and under `torch.distributed` those of all processes. Meanwhile the norms work
    with the statistics of each batch, as in training, and all else is in evaluation.

    Args:
        model: changed in place; parameters, counters and modes stay. Its norms that are in
            evaluation while the model itself is in training count as frozen.
        batches: inputs of the model on its device: a tensor, `(input, ...)` of which the first is
            taken, or `repnet.equivalence.Inputs`.
        frozen: norms that stay as they are.

    Returns:
        The names of the norms that have new statistics; those that no batch reached keep theirs.

    Raises:
        InputError: a norm reached values that are not finite.

    Example:
        >>> recalibrate_batch_norm(model, islice(train_loader, 100))
    """
    modes = {module: module.training for module in model.modules()}
    norms = {
        norm: _Moments(norm)
        for norm in _norms(model)
        if norm not in frozen and (norm.training or not model.training)
    }
    kept = {norm: deepcopy(norm._buffers) for norm in norms}
    handles = [norm.register_forward_pre_hook(moments) for norm, moments in norms.items()]
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        for batch in batches:
            inputs = batch if isinstance(batch, Inputs) else Inputs((_first(batch),))
            model(*inputs.args, **(inputs.kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for norm, buffers in kept.items():
            for key, value in buffers.items():
                if value is not None:
                    getattr(norm, key).copy_(value)
    names = {module: name for name, module in model.named_modules()}
    results = {norm: moments.result() for norm, moments in norms.items()}
    bad = [names[norm] for norm, found in results.items() if found and not _finite(*found)]
    if bad:
        raise InputError(
            f"the batch norm '{bad[0]}' received values that are not finite; nothing was "
            "recalibrated. Look at the data and at the weights before it"
        )
    changed = []
    for norm, found in results.items():
        if found is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(found[0])
            norm.running_var.copy_(found[1])
            changed.append(names[norm])
    return changed


class _Moments:
    """Sums up what a norm receives: number, mean and sum of squared deviations by channel."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        # float32 at least: half precision cannot sum.
        dtype = torch.promote_types(norm.running_mean.dtype, torch.float32)
        self.mean = torch.zeros_like(norm.running_mean, dtype=dtype)
        self.squares = torch.zeros_like(self.mean)
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].to(self.mean.dtype)
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        count = x.numel() // x.shape[1]
        self.add(count, mean, count * variance)

    def add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add a group of values (Chan, Golub and LeVeque 1979)."""
        if count:
            share = count / (self.count + count)
            difference = mean - self.mean
            self.squares = self.squares + squares + self.count * share * difference.square()
            self.mean = self.mean + share * difference
            self.count += count

    def result(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and variance, of all processes; None if there was no value."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            mine = torch.stack([torch.full_like(self.mean, self.count), self.mean, self.squares])
            groups = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(groups, mine)
            self.count, self.mean, self.squares = 0, *torch.zeros_like(mine[1:])
            for count, mean, squares in groups:
                self.add(round(float(count[0])), mean, squares)
        return (self.mean, self.squares / self.count) if self.count else None


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield module


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _training_only(trainer: Trainer, batches: int) -> Any:
    """Return what `network_inputs` reads of a trainer that has only training data, and a copy."""
    return SimpleNamespace(
        train_dataloader=tree_map(_aside, trainer.train_dataloader),
        num_training_batches=min(batches, trainer.num_training_batches),
        val_dataloaders=None,
        num_val_batches=[],
        precision_plugin=trainer.precision_plugin,
        strategy=trainer.strategy,
    )


def _aside(loader: Any) -> Any:
    """Return a loader of the same data that can be iterated while the first one is, too."""
    try:
        aside = copy(loader)
    except TypeError:  # an iterator, which has no copies
        return loader
    state = getattr(aside, "__dict__", {})
    data = getattr(loader, "dataset", None)
    for key in ("sampler", "batch_sampler", "generator"):
        if key in state:
            state[key] = deepcopy(state[key], {id(data): data})
    if isinstance(loader, DataLoader):  # workers that persist belong to one iterator
        state["persistent_workers"] = False
    return aside
