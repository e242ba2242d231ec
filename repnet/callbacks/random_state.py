"""`RandomState`: a resumed run draws the random numbers that the unbroken one draws."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer

from repnet.lightning import Checkpoint


class RandomState(Checkpoint):
    """Keep random numbers and the place in the epoch of every process in each checkpoint.

    With it, a run on the CPU that was killed and resumed ends with the same bits as an unbroken
    one, where the training loader's batch sampler has the attribute `start`
    (`repnet.data.TrainBatches`), the number of batches to leave out. Other loaders start the epoch
    anew. A run that is resumed with another number of processes draws new random numbers.

    As a `Checkpoint` it restores after all other callbacks have started.
    """

    def __init__(self) -> None:
        self.restored: list[dict[str, Any]] = []
        self.world_size = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.world_size = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        own = _random_state()
        if self.world_size == 1:
            return {"processes": [own]}
        states: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict["processes"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self.restored) == trainer.world_size:
            _set_random_state(self.restored[trainer.global_rank])
        batches: Any = getattr(trainer.train_dataloader, "batch_sampler", None)
        if trainer.fit_loop.restarting and hasattr(batches, "start"):
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            batches.start = done % int(trainer.num_training_batches)
        self.restored = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.restored = []  # a test loads it too


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (what transforms draw from)
    name, keys, *rest = numpy_state
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
