"""What happens when training meets NaN: `StopOnNonFiniteLoss` or `SkipNonFiniteSteps`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repnet.checkpoint import save_checkpoint
from repnet.lightning import Callback


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite."""


@dataclass
class _Step:
    number: int
    rates: list[float]  # learning rates of the groups
    batch: Any
    batch_index: int
    own_loss: Tensor  # of this process
    loss: Tensor  # of all processes, perhaps still on its way to the CPU
    arrival: Any  # of the loss: a CUDA event, or None

    def has_arrived(self) -> bool:
        return self.arrival.query() if self.arrival else self.loss.device.type == "cpu"


class StopOnNonFiniteLoss(Callback):
    """Raise at the first step whose loss is NaN or infinite, before its weights are saved.

    No checkpoint is written either once the weights themselves are not finite.

    Args:
        lag: steps; on an accelerator the loss is looked at at most so many steps later, so that
            the device need not be waited for, and always before an evaluation or a checkpoint.
        path: where to put the batch of that step, images and labels as tensors; other processes
            than the first add their rank to the name. None: nowhere.
    """

    def __init__(self, lag: int = 4, *, path: str | Path | None = None) -> None:
        self.lag = lag
        self.path = path
        self.pending: deque[_Step] = deque()
        self.rates: list[float] = []  # of the last step, the schedule being ahead

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pending.clear()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.rates = _learning_rates(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        own = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        loss = _copied(own, trainer)
        self.pending.append(_Step(trainer.global_step, self.rates, batch, batch_idx, own, *loss))
        alone = trainer.world_size == 1  # several processes must raise at the same step
        while self.pending and (
            len(self.pending) > self.lag or (alone and self.pending[0].has_arrived())
        ):
            self._look(trainer)
        if trainer.is_last_batch:
            self._look_at_all(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_at_all(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look_at_all(trainer)
        if name := _non_finite_name(pl_module):
            raise NonFiniteLossError(
                f"'{name}' is not finite after step {trainer.global_step} "
                f"{_where(trainer, self.rates, pl_module, name)}; {_advice(trainer)}"
            )

    def _look_at_all(self, trainer: Trainer) -> None:
        while self.pending:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        step = self.pending.popleft()
        if step.arrival:
            step.arrival.synchronize()
        if step.loss.isfinite():
            return
        self.pending.clear()
        where = ""
        if not step.own_loss.isfinite():
            facts = {"step": step.number, "batch_index": step.batch_index}
            where = _save_batch(self.path, trainer, step.batch, facts)
        raise NonFiniteLossError(
            f"the loss is {step.loss.item()} at step {step.number} {_where(trainer, step.rates)}"
            f"{where}; {_advice(trainer)}"
        )


class SkipNonFiniteSteps(Callback):
    """Leave out the update of every step whose loss or gradients are NaN or infinite.

    The weights stay, the buffers (running statistics) are put back to where they were before the
    step, the learning-rate schedule goes on. All processes skip together. Name it after callbacks
    that change gradients. Each step waits for the device to know its loss.

    Args:
        limit: so many steps skipped in a row raise `NonFiniteLossError`.
        path: where to put the first batch that was bad; see `StopOnNonFiniteLoss`.
    """

    def __init__(self, limit: int = 20, *, path: str | Path | None = None) -> None:
        self.limit = limit
        self.path = path
        self.skipped = self.in_a_row = 0
        self.buffers: list[tuple[Tensor, Tensor]] | None = None  # each with its copy
        self.batch: Any = None
        self.batch_index = 0
        self.bad_batch: Any = None
        self.saved = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.buffers = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.buffers is None:  # not in the middle of accumulating gradients
            self.buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        self.batch, self.batch_index = batch, batch_idx

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self.bad_batch is None and not loss.isfinite():
            self.bad_batch = self.batch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        own = self.bad_batch is not None
        bad = _anywhere(own, trainer)
        # A gradient scaler looks for itself, and infinity is what it expects now and then.
        if not bad and getattr(trainer.precision_plugin, "scaler", None) is None:
            own = not _gradients_are_finite(optimizer)
            bad = _anywhere(own, trainer)
        if bad:
            self._skip(trainer, optimizer, own=own)
        else:
            self.in_a_row = 0
        self.buffers = self.bad_batch = self.batch = None

    def _skip(self, trainer: Trainer, optimizer: Any, *, own: bool) -> None:
        optimizer.zero_grad(set_to_none=True)  # optimizers pass over what has no gradient
        with torch.no_grad():
            for buffer, copy in self.buffers or ():
                buffer.copy_(copy)
        self.skipped += 1
        self.in_a_row += 1
        where = ""
        if own and not self.saved:
            facts = {"step": trainer.global_step + 1, "batch_index": self.batch_index}
            batch = self.batch if self.bad_batch is None else self.bad_batch
            where = _save_batch(self.path, trainer, batch, facts)
            self.saved = True
        if self.in_a_row >= self.limit:
            raise NonFiniteLossError(
                f"{self.in_a_row} steps in a row had a loss or gradients that are not finite, the "
                f"last one step {trainer.global_step + 1} "
                f"{_where(trainer, _learning_rates(trainer))}{where}; {_advice(trainer)}"
            )
        if trainer.is_global_zero:
            print(
                f"step {trainer.global_step + 1} was skipped, its loss or gradients are not finite "
                f"({self.skipped} skipped so far){where}",
                flush=True,
            )


def _copied(loss: Tensor, trainer: Trainer) -> tuple[Tensor, Any]:
    """Return the loss of all processes, on its way to the CPU, and the event of its arrival."""
    if trainer.world_size > 1:
        loss = loss.clone()
        torch.distributed.all_reduce(loss)  # the sum: NaN and infinity survive it
    if loss.device.type != "cuda":
        return loss, None
    copy = torch.empty(loss.shape, dtype=loss.dtype, pin_memory=True)
    copy.copy_(loss, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return copy, arrival


def _gradients_are_finite(optimizer: torch.optim.Optimizer) -> bool:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(nn.utils.get_total_norm(gradients, norm_type=float("inf")).isfinite())


def _anywhere(flag: bool, trainer: Trainer) -> bool:
    """Return whether the flag is set in any process."""
    if trainer.world_size == 1:
        return flag
    flags = torch.tensor(float(flag), device=trainer.strategy.root_device)
    torch.distributed.all_reduce(flags)
    return bool(flags)


def _non_finite_name(module: nn.Module) -> str | None:
    """Return the name of a parameter that is not finite or a buffer with NaN, if there is one."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return name
    # Infinity may be meant: masks hold it.
    return next((name for name, buffer in module.named_buffers() if buffer.isnan().any()), None)


def _learning_rates(trainer: Trainer) -> list[float]:
    return [float(group["lr"]) for group in trainer.optimizers[0].param_groups]


def _where(
    trainer: Trainer,
    rates: list[float],
    module: nn.Module | None = None,
    name: str | None = None,
) -> str:
    """Return the epoch and a learning rate: of the group of a parameter, else the highest."""
    groups = trainer.optimizers[0].param_groups
    parameter = None if module is None else dict(module.named_parameters()).get(name or "")
    own = [i for i, group in enumerate(groups) if any(p is parameter for p in group["params"])]
    index = own[0] if own else max(range(len(rates)), key=rates.__getitem__)
    rate = f"learning rate {rates[index]:.3g}"
    if len(set(rates)) > 1:
        highest = "" if own else "highest "
        rate = f"{highest}{rate}, of '{groups[index].get('name', f'group {index}')}'"
    return f"(epoch {trainer.current_epoch + 1}, {rate})"


def _advice(trainer: Trainer) -> str:
    saved = [
        str(path)
        for callback in trainer.checkpoint_callbacks
        for path in (getattr(callback, "best_model_path", ""), getattr(callback, "path", ""))
        if path and Path(path).exists()
    ]
    return (
        f"last good checkpoint: {saved[-1] if saved else 'none'}. Try a lower learning rate, a "
        "longer warm-up or gradient clipping"
    )


def _save_batch(
    path: str | Path | None, trainer: Trainer, batch: Any, facts: dict[str, int]
) -> str:
    """Write the tensors of a batch, and return where they are, as a part of a message."""
    if path is None:
        return ""
    path = Path(path)
    if trainer.global_rank:
        path = path.with_name(f"{path.stem}_{trainer.global_rank}{path.suffix}")
    tensors = [leaf.detach().cpu() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    try:
        save_checkpoint({"batch": tensors, "epoch": trainer.current_epoch, **facts}, path)
    except (OSError, RuntimeError) as error:
        return f"; its batch could not be saved ({error})"
    return f"; its batch is in {path}"
