"""Time of a training step with Lightning and our callbacks, beside a bare PyTorch loop.

    python benchmarks/overhead.py repvgg_tiny:32:64 repvgg_a0:64:16 --threads 2

A case is MODEL:PIXELS:BATCH; take one whose step lasts at least 50 ms. Both train their own copy of
the model on the same images in memory, and take turns within one run, a few steps each, so that
both see the same moods of the machine. CPU time is that of the process: with --threads 1 other jobs
do not disturb it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from repnet import create_model
from repnet.callbacks import History, SaveOnInterrupt, StopOnNonFiniteLoss
from repnet.training import Classifier, repvgg_parameter_groups, warmup_cosine


class Turns(Callback):
    """After every few steps of Lightning times as many of a bare loop; the last of the callbacks.

    Args:
        model: trained by the bare loop.
        batches: without end.
        steps: of a turn.
        turns: the first of them warms up.
    """

    def __init__(self, model: nn.Module, batches: Iterator[Any], steps: int, turns: int) -> None:
        self.model, self.batches, self.steps = model, batches, steps
        self.optimizer = sgd(repvgg_parameter_groups(model))
        total = steps * turns
        self.scheduler = warmup_cosine(self.optimizer, total_steps=total, steps_per_epoch=total)
        self.loss = nn.CrossEntropyLoss()
        self.times: dict[str, list[tuple[float, float]]] = {"lightning": [], "bare": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.model.to(pl_module.device)
        self._mark(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.steps:
            return
        self._take("lightning", pl_module)
        for _ in range(self.steps):
            images, labels = (x.to(pl_module.device) for x in next(self.batches))
            loss = self.loss(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        self._take("bare", pl_module)

    def _mark(self, module: LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def _take(self, name: str, module: LightningModule) -> None:
        wall, cpu = self.wall, self.cpu
        self._mark(module)
        self.times[name].append((self.wall - wall, self.cpu - cpu))


sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4)


def measure(case: str, steps: int, turns: int, accelerator: str) -> None:
    name, size, batch = case.split(":")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, int(batch), 3, int(size), int(size), generator=generator)
    labels = torch.randint(10, (4, int(batch)), generator=generator)
    batches = [batches for _ in range(steps) for batches in zip(images, labels, strict=True)]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    model = create_model(name, num_classes=10)
    module = Classifier(copy.deepcopy(model), 10, optimizer=sgd, scheduler=warmup_cosine)
    taking = Turns(model.train(), iter(cycle(loader)), steps, turns)
    with tempfile.TemporaryDirectory() as directory:
        callbacks = [
            StopOnNonFiniteLoss(),
            History(directory, echo=False),
            SaveOnInterrupt(Path(directory) / "last.ckpt"),
            taking,
        ]
        Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=-1,
            max_steps=steps * turns,
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        ).fit(module, loader)
    for kind, label in enumerate(("wall", "CPU")):
        ours = [times[kind] for times in taking.times["lightning"][1:]]
        bare = [times[kind] for times in taking.times["bare"][1:]]
        ratios = [a / b for a, b in zip(ours, bare, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"{case:22s} {label:4s} {1e3 * median(ours) / steps:7.2f} ms, bare "
            f"{1e3 * median(bare) / steps:7.2f} ms: {median(ratios) - 1:+.2%} "
            f"({low - 1:+.2%} ... {high - 1:+.2%}), "
            f"{1e3 * median(a - b for a, b in zip(ours, bare, strict=True)) / steps:+.2f} ms, "
            f"{len(ratios)} turns of {steps} steps",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=["repvgg_tiny:32:64", "repvgg_a0:64:16"])
    parser.add_argument("--steps", type=int, default=1, help="in a turn")
    parser.add_argument("--turns", type=int, default=200, help="of each loop, and one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    print(f"torch {torch.__version__}, {options.accelerator}, {options.threads} threads; quartiles")
    for case in options.cases:
        torch.manual_seed(0)
        measure(case, options.steps, options.turns, options.accelerator)


if __name__ == "__main__":
    main()
