"""`Reparameterize`: folds, verifies and saves the trained network."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from repnet.callbacks.overparameterize import metrics_and_losses
from repnet.equivalence import Equivalence, FoldMismatchError, Inputs, compare
from repnet.files import write_atomically, write_json
from repnet.fold import reparameterize
from repnet.lightning import Callback
from repnet.symbolic import evaluating

# If all outputs agree up to this many roundings of the dtype, a changed prediction was a tie.
ROUNDINGS = 64


class Reparameterize(Callback):
    """Fold the network after training, compare both forms on the validation data, and save.

    The LightningModule stays as it is; the folded network is `callback.folded`. Both forms are
    compared in float64, with the weights as they are saved. Every process folds and compares on its
    share of the data, and all must agree. The first process writes `model.safetensors` (the state
    dict) and `report.json`, whose figures are those of its share.

    Args:
        save_dir: where to write the two files; None writes nothing.
        attribute: path of the network, such as `"model"`; None for the only child of the
            LightningModule that holds convolutions (metrics and losses aside), or else the
            LightningModule itself.
        norms: "keep" for the architecture from before `OverParameterize`, key for key; "absorb"
            also folds norms that follow convolutions.
        limit_batches: number of batches of the validation data (or, without any, of the training
            data) to compare on; None for all.

    Raises:
        FoldMismatchError: folding changed a prediction; only the report was written.
    """

    def __init__(
        self,
        save_dir: str | Path | None = None,
        attribute: str | None = None,
        *,
        norms: Literal["keep", "absorb"] = "keep",
        limit_batches: int | None = None,
    ) -> None:
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.attribute = attribute
        self.norms: Literal["keep", "absorb"] = norms
        self.limit_batches = limit_batches
        self.folded: nn.Module | None = None
        self.report: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in `on_train_end`, where other callbacks put averaged weights into the network.
        device, home = trainer.strategy.root_device, pl_module.device
        pl_module.to(device if device.type == "cuda" else home)
        try:
            self._fold(trainer, pl_module)
        finally:
            pl_module.to(home)

    def _fold(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = find_network(pl_module, self.attribute)
        example = next(network_inputs(trainer, pl_module, network))
        folded, fold_report = reparameterize(
            network, as_example(network, example), norms=self.norms, return_report=True
        )
        batches = islice(network_inputs(trainer, pl_module, network), self.limit_batches)
        equivalence = compare(
            deepcopy(network).double(),
            deepcopy(folded).double(),
            (inputs.to(torch.float64) for inputs in batches),
        )
        folded = folded.cpu()
        same = trainer.strategy.reduce_boolean_decision(_same_predictions(equivalence, folded))
        self.report = {
            "verified": same,
            "norms": self.norms,
            "samples": equivalence.samples,
            "agreement": equivalence.agreement,
            "max_relative_error": equivalence.max_relative_error,
            "folded": [fold.name for fold in fold_report.folded],
            "skipped": fold_report.skipped,
        }
        if self.save_dir is not None and trainer.is_global_zero:
            if same:
                _save(folded, self.save_dir / "model.safetensors")
            write_json(self.save_dir / "report.json", self.report)
        if not same:
            raise FoldMismatchError(
                f"folding changed {1 - equivalence.agreement:.2%} of the predictions on "
                f"{equivalence.samples} samples, relative error "
                f"{equivalence.max_relative_error:.1e}; nothing was saved but the report",
                equivalence=equivalence,
            )
        self.folded = folded


def _same_predictions(equivalence: Equivalence, network: nn.Module) -> bool:
    """Return whether no prediction changed, ties aside."""
    epsilons = [torch.finfo(p.dtype).eps for p in network.parameters() if p.is_floating_point()]
    close = equivalence.max_relative_error <= ROUNDINGS * max(epsilons)
    return close or equivalence.agreement == 1


def _save(network: nn.Module, path: Path) -> None:
    state = {key: value.contiguous().clone() for key, value in network.state_dict().items()}

    def check(written: Path) -> None:
        if load_file(written).keys() != state.keys():
            raise OSError(f"'{path}' was not written as a whole")

    write_atomically(path, lambda temporary: save_file(state, temporary), check)


def find_network(pl_module: LightningModule, attribute: str | None) -> nn.Module:
    """Return the network within a LightningModule; `attribute` is that of `Reparameterize`."""
    if attribute is not None:
        return pl_module.get_submodule(attribute)
    others = {id(m) for m in metrics_and_losses(pl_module)}  # metrics overload `==`
    networks = [
        child
        for child in pl_module.children()
        if id(child) not in others and any(isinstance(m, nn.Conv2d) for m in child.modules())
    ]
    return networks[0] if len(networks) == 1 else pl_module


def network_inputs(
    trainer: Trainer, pl_module: LightningModule, network: nn.Module
) -> Iterator[Inputs]:
    """Yield the inputs of the network in the LightningModule's own step, batch by batch.

    Each step is stopped at the network's first call, so that it logs nothing. The batches are those
    of the trainer's validation or, without any, of its training.

    Raises:
        RuntimeError: the step does not call the network, or there is no batch.
    """
    batches = 0
    for step, args in step_arguments(trainer, pl_module):
        yield _received(pl_module, network, step, args)
        batches += 1
    if not batches:
        raise RuntimeError("there is nothing to fold on: the trainer has no batch")


def step_arguments(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
    """Yield the name and the arguments of each step of one validation, or else of one epoch.

    As in the trainer's own loops, batches are on the module's device and went through its hooks.
    """
    loaders, name, mode = trainer.val_dataloaders, "validation_step", "sequential"
    limits: list[Any] = list(trainer.num_val_batches)
    if loaders is None or not any(limits):
        loaders, name, mode = trainer.train_dataloader, "training_step", "max_size_cycle"
        limits = [trainer.num_training_batches]
    if loaders is None:
        return
    combined = CombinedLoader(loaders, mode)  # type: ignore[arg-type]
    combined.limits = limits * (len(combined.flattened) if mode != "sequential" else 1)
    several = mode == "sequential" and len(combined.flattened) > 1
    counted = is_param_in_hook_signature(getattr(pl_module, name), "batch_idx", min_args=2)
    for batch, index, loader in combined:
        if index >= limits[loader]:
            return  # only the sequential mode applies limits itself
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
        batch = trainer.strategy.batch_to_device(batch, pl_module.device, dataloader_idx=loader)
        yield name, (batch, *([index] if counted else []), *([loader] if several else []))


class _Received(Exception):
    """Ends a step at the call of the network, and carries the inputs out."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs


def _received(
    pl_module: LightningModule, network: nn.Module, step: str, args: tuple[Any, ...]
) -> Inputs:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Received(Inputs(args, kwargs))

    handle = network.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    silent: Any = lambda *args, **kwargs: None
    pl_module.log = pl_module.log_dict = silent  # type: ignore[method-assign]
    try:
        with torch.no_grad(), evaluating(pl_module):
            getattr(pl_module, step)(*args)
    except _Received as received:
        return received.inputs
    finally:
        handle.remove()
        del pl_module.log, pl_module.log_dict
    raise RuntimeError(
        f"{step} does not call {type(network).__name__}; name what it calls with attribute="
    )


def as_example(network: nn.Module, inputs: Inputs, samples: int = 2) -> Any:
    """Return the first samples in the form that `reparameterize` takes."""
    bound = inspect.signature(network.forward).bind(*inputs.args, **(inputs.kwargs or {}))
    arguments: dict[Any, Any] = {**dict(enumerate(bound.args)), **bound.kwargs}
    sizes = {len(x) for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.ndim}
    if len(sizes) == 1:  # they share a batch dimension
        arguments = tree_map(
            lambda x: x[:samples] if isinstance(x, Tensor) and x.ndim else x, arguments
        )
    positional = tuple(arguments[i] for i in range(len(bound.args)))
    return positional if not bound.kwargs else arguments
