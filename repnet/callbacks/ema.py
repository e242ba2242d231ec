"""`EMAWeights`: the average of the weights over training is validated, saved and deployed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from repnet.callbacks.folded_validation import validate_copy
from repnet.errors import InputError
from repnet.lightning import SHARDING, Callback, is_a

Weights = Literal["ema", "raw"]


class EMAWeights(Callback):
    """Average weights and buffers over training: `average += (1 - decay) * (weight - average)`.

    One set of weights, `validate`, is in the network in each validation and after training: `val/*`
    are its metrics, a checkpoint's `state_dict` holds it, and it is tested, folded and deployed.
    The other set is validated too and logged as `raw/val/...` or `ema/val/...`, and stands in the
    checkpoint as `state_dict_raw` or `state_dict_ema`, so that a resumed run continues exactly;
    `checkpoint["ema"]["saved"]` says which is which.

    Running statistics are averaged like weights: those of the last step belong to the last weights.
    Integer buffers, and those that are not finite, are the network's own in both sets. Averages of
    half-precision weights are kept in float32, which small changes are not lost in.

    Lightning's own `EMAWeightAveraging` has no warm-up, averages integer buffers too, keeps the
    averages on the CPU, and neither saves nor validates the raw weights by choice.

    Args:
        decay: of one update, between 0 and 1; 0.9999 averages over about 10,000 updates.
        warmup: True bounds the decay by `(1 + n) / (10 + n)` in update `n` (from 0), so that the
            first weights are soon forgotten; a number of optimizer steps does so after these, in
            which the average is a copy; False has `decay` from the start.
        every_n_steps: optimizer steps between updates.
        validate: the set that is validated, saved and deployed.
        validate_other: also validate the other set, which takes as long again.

    Raises:
        InputError: an argument is out of range, the strategy shards weights, or a checkpoint is
            saved without the callbacks, which would hold raw weights.

    Example:
        >>> trainer = Trainer(callbacks=[EMAWeights(decay=0.999)])
    """

    averages: dict[str, Tensor]
    raw: dict[str, Tensor] | None  # while the network holds the averages
    tensors: _Tensors | None

    def __init__(
        self,
        decay: float = 0.9999,
        *,
        warmup: bool | int = True,
        every_n_steps: int = 1,
        validate: Weights = "ema",
        validate_other: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"EMAWeights(decay={decay}): choose a decay of 0 or more, below 1")
        if warmup < 0 or every_n_steps < 1:
            raise InputError(
                f"EMAWeights(warmup={warmup}, every_n_steps={every_n_steps}): numbers of steps; "
                "warmup is 0 or more, every_n_steps 1 or more"
            )
        if validate not in ("ema", "raw"):
            raise InputError(f"EMAWeights(validate='{validate}'): choose 'ema' or 'raw'")
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.validate: Weights = validate
        self.validate_other = validate_other
        self.metric_prefix = _other(validate) if validate_other else None
        self._forget()

    def decay_at(self, step: int, update: int) -> float:
        """Return the decay of an update.

        Args:
            step: optimizer steps done.
            update: updates done before this one, copies not counted.
        """
        if self.warmup is False:
            return self.decay
        if self.warmup is not True and step <= self.warmup:
            return 0.0
        return min(self.decay, (1 + update) / (10 + update))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        if is_a(trainer.strategy, *SHARDING):
            raise InputError(
                f"EMAWeights averages whole weights, and {type(trainer.strategy).__name__} shards "
                "them; use the strategy ddp"
            )
        partial = [c for c in trainer.checkpoint_callbacks if getattr(c, "save_weights_only", 0)]
        if partial and self.validate == "ema":
            raise InputError(
                "ModelCheckpoint(save_weights_only=True) saves the raw weights, because it asks no "
                "callback; set save_weights_only=False, or EMAWeights(validate='raw')"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tensors = _Tensors(pl_module)
        if not self.averages:
            self.step = trainer.global_step
        with torch.no_grad():
            self.averages = {
                name: _average_like(tensor).copy_(self.averages.get(name, tensor))
                for name, tensor in self.tensors.named().items()
                if name in self.averages or _is_averaged(tensor)
            }

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Stands still where gradients are accumulated.
        if trainer.global_step - self.step < self.every_n_steps:
            return
        self.step = trainer.global_step
        decay = self.decay_at(self.step, self.updates)
        self.updates += decay > 0
        assert self.tensors is not None
        named = self.tensors.named()
        averages = list(self.averages.values())
        weights = [named[name].detach().to(average.dtype)
                   for name, average in self.averages.items()]  # fmt: skip
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.hold(pl_module, self.validate)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not (fitting and self.validate_other and self.averages):
            return
        if self.raw is None:
            other, weights = "ema", self.averages
            _agree(pl_module, weights)
        else:
            other, weights = "raw", self.raw

        def copy() -> LightningModule:
            made = deepcopy(pl_module)
            _fill(_Tensors(made).named(), weights)
            return made

        validate_copy(trainer, pl_module, other, copy)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.hold(pl_module, "raw")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hold(pl_module, self.validate)

    def hold(self, pl_module: LightningModule, weights: Weights) -> None:
        """Put one set of weights into the network, and the other one aside.

        What was changed in the buffers of the averages while the network held them stays changed.

        Args:
            pl_module: changed in place.
            weights: the set.
        """
        if not self.averages or (weights == "ema") == (self.raw is not None):
            return
        named = _Tensors(pl_module).named()
        with torch.inference_mode(False), torch.no_grad():
            if self.raw is None:
                _agree(pl_module, self.averages)
                self.raw = {name: named[name].detach().clone() for name in self.averages}
                _fill(named, self.averages)
            else:
                self._keep_buffers(pl_module)
                raw, self.raw = self.raw, None
                _fill(named, raw)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self.averages:
            return
        if self.raw is not None:
            self._keep_buffers(pl_module)
        state, names = checkpoint["state_dict"], _Tensors(pl_module).names
        sets = {
            kind: {**state, **{n: values[first] for n, first in names.items() if first in values}}
            for kind, values in (("raw", self.raw or {}), ("ema", self.averages))
        }
        other = _other(self.validate)
        checkpoint["state_dict"] = sets[self.validate]
        checkpoint[f"state_dict_{other}"] = sets[other]
        checkpoint["ema"] = {"saved": self.validate, "step": self.step, "updates": self.updates}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._forget()
        entry = checkpoint.get("ema")
        if not isinstance(entry, dict) or "saved" not in entry:
            return  # of a run without averages, which begin with its weights
        saved = entry["saved"]
        sets = {
            saved: checkpoint["state_dict"],
            _other(saved): checkpoint[f"state_dict_{_other(saved)}"],
        }
        named = _Tensors(pl_module).named()
        missing = [name for name in named if name not in sets["ema"] or name not in sets["raw"]]
        if missing:
            raise InputError(f"the averages of the checkpoint lack '{missing[0]}' of the network")
        floating = [name for name, tensor in named.items() if _is_averaged(tensor)]
        self.averages = {name: sets["ema"][name] for name in floating}
        self.step, self.updates = entry["step"], entry["updates"]
        if trainer.state.fn == "fit":
            with torch.no_grad():
                _fill(named, {name: sets["raw"][name] for name in floating})
        elif saved == "ema":  # which Lightning has loaded
            self.raw = {name: sets["raw"][name] for name in floating}

    def _forget(self) -> None:
        self.averages = {}
        self.raw = None
        self.step = 0  # optimizer steps done when the averages were updated
        self.updates = 0
        self.tensors = None

    def _keep_buffers(self, pl_module: LightningModule) -> None:
        named = _Tensors(pl_module).named()
        for name, _ in pl_module.named_buffers():
            average = self.averages.get(name)
            if average is not None and not torch.equal(
                average.to(named[name]), named[name]
            ):  # of a half-precision buffer that nobody changed, the float32 average stays
                average.copy_(named[name])


def hold_chosen(trainer: Trainer, pl_module: LightningModule) -> None:
    """Put the weights that are deployed into the network at the end of training.

    For callbacks that come before an `EMAWeights` in the trainer's list; without one it does
    nothing.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMAWeights):
            callback.hold(pl_module, callback.validate)


class _Tensors:
    """Finds parameters and saved buffers, of which modules may have replaced some.

    `names` maps the names in the state dict to the first that a shared tensor has there.
    """

    def __init__(self, module: nn.Module) -> None:
        saved = module.state_dict().keys()
        self.places: dict[str, tuple[dict[str, Any], str]] = {}
        self.names: dict[str, str] = {}
        seen: dict[int, str] = {}
        for prefix, part in module.named_modules(remove_duplicate=False):
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    name = f"{prefix}.{key}" if prefix else key
                    if tensor is not None and name in saved:
                        self.names[name] = first = seen.setdefault(id(tensor), name)
                        self.places.setdefault(first, (tensors, key))

    def named(self) -> dict[str, Tensor]:
        return {name: tensors[key] for name, (tensors, key) in self.places.items()}


def _is_averaged(tensor: Tensor) -> bool:
    constant = not isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all())
    return (tensor.is_floating_point() or tensor.is_complex()) and not constant


def _average_like(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.empty_like(tensor, dtype=torch.float32 if half else None, requires_grad=False)


def _fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


def _agree(pl_module: LightningModule, averages: dict[str, Tensor]) -> None:
    """Give all processes the averaged buffers of the first one, as DDP does with its buffers."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name, _ in pl_module.named_buffers():
            if name in averages:
                torch.distributed.broadcast(averages[name], 0)


def _other(weights: str) -> Weights:
    return "raw" if weights == "ema" else "ema"
