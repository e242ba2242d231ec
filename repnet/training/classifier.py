"""`Classifier`, the LightningModule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores

from repnet.errors import InputError
from repnet.lightning import LightningModule
from repnet.training.cpu_convolutions import CpuConvolutions
from repnet.training.freezing import freeze as frozen_parts
from repnet.training.objectives import Objective, Supervised
from repnet.training.parameter_groups import repvgg_parameter_groups, scale_learning_rates

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)


class Classifier(LightningModule):
    """Train any image classifier; logs `train/loss` and `{val,test}/{loss,top1,top5,f1}`.

    `f1` is the mean over classes (macro). After a test, `recall_of_classes` holds the share of each
    class's images that were recognized, None for a class without any.

    Args:
        model: maps images `(batch, channels, height, width)` to logits `(batch, num_classes)`.
        num_classes: for the metrics; there is no top-5 of five classes or fewer.
        optimizer: called with parameter groups; the default is that of RepVGG's authors.
        scheduler: called as `scheduler(optimizer, total_steps=, steps_per_epoch=)`; stepped after
            every optimizer step.
        loss: called with logits and labels in training.
        objective: called as `objective(network, images, labels)`, returns the training loss; a
            module with parameters of its own has them trained. None for `loss` of the logits.
        mix: called with the images and labels of a training batch, returns others: mixup, cutmix.
        parameter_groups: called with `model`.
        channels_last: hold the model and its input in that memory format.
        freeze: globs for names of modules within the model that are held in evaluation and not
            trained; `["stem", "stages"]` trains the head alone.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] = SGD,
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        objective: Objective | None = None,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        parameter_groups: Callable[[nn.Module], Iterable[Any]] = repvgg_parameter_groups,
        channels_last: bool = False,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.frozen = frozen_parts(self.model, freeze)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.objective = objective or Supervised(loss or nn.CrossEntropyLoss())
        self.mix = mix
        self.parameter_groups = parameter_groups
        # Lightning's own mean over processes truncates uneven counts of images.
        self.losses = nn.ModuleDict(
            {f"{split}_loss": MeanMetric(nan_strategy="disable") for split in ("val", "test")}
        )
        self.loss_sum: Tensor | float = 0.0  # of this epoch's steps
        self.loss_steps = 0
        ranks = [1, 5] if num_classes > 5 else [1]
        accuracies = MetricCollection(
            {f"top{k}": MulticlassAccuracy(num_classes, average="micro", top_k=k) for k in ranks}
        )
        self.accuracies = nn.ModuleDict(
            {f"{split}_accuracy": accuracies.clone(prefix=f"{split}/") for split in ("val", "test")}
        )
        self.f1 = nn.ModuleDict(
            {f"{split}_f1": MulticlassF1Score(num_classes) for split in ("val", "test")}
        )
        self.class_scores = MulticlassStatScores(num_classes, average="none")
        self.recall_of_classes: list[float | None] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))

    def metric_names(self, *splits: str) -> list[str]:
        """Return what a callback may monitor: the metrics of training and validation.

        Args:
            splits: "train" or "val"; both where there are none.
        """
        accuracies = self.accuracies["val_accuracy"].keys()  # type: ignore[operator]
        names = ["train/loss", "val/loss", "val/f1", *accuracies]
        return [name for name in names if not splits or name.partition("/")[0] in splits]

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        for name in self.frozen:  # whatever has called `train()`
            self.model.get_submodule(name).eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        with self._safely():
            loss = self.objective(self.forward, images, labels)
        # Summed here and logged once, which is much cheaper than a log of each step.
        self.loss_sum = self.loss_sum + loss.detach()
        self.loss_steps += 1
        return loss

    def _safely(self) -> AbstractContextManager[Any]:
        """Return a context without the convolutions that torch gets wrong on a CPU."""
        if self.device.type != "cpu":
            return nullcontext()
        return CpuConvolutions(channels_last=self.memory_format is torch.channels_last)

    def on_train_batch_end(self, *args: Any) -> None:
        trainer = self.trainer
        if trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            self._log_loss()

    def on_train_epoch_end(self) -> None:
        if self.loss_steps:  # the epoch was cut short otherwise, and callbacks do not see the loss
            self._log_loss()

    def _log_loss(self) -> None:
        mean = self.loss_sum / self.loss_steps
        self.log("train/loss", mean, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        self.loss_sum, self.loss_steps = 0.0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_loss"] = {"sum": float(self.loss_sum), "steps": self.loss_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("epoch_loss", {"sum": 0.0, "steps": 0})
        self.loss_sum, self.loss_steps = saved["sum"], saved["steps"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "val")

    def on_test_epoch_start(self) -> None:
        self.class_scores.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.class_scores.update(*self._evaluate(batch, "test"))

    def on_test_epoch_end(self) -> None:
        hits, _, _, _, images = self.class_scores.compute().T.tolist()
        self.recall_of_classes = [
            round(hit / count, 6) if count else None
            for hit, count in zip(hits, images, strict=True)
        ]

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        metrics = self.accuracies[f"{split}_accuracy"]
        metrics.update(logits, labels)  # type: ignore[operator]
        f1 = self.f1[f"{split}_f1"]
        f1.update(logits, labels)  # type: ignore[operator]
        mean = self.losses[f"{split}_loss"]
        # One value per image: torchmetrics 1.9 drops weights where it does not look for NaN.
        mean.update(loss.expand(len(images)))  # type: ignore[operator]
        self.log(f"{split}/loss", mean, on_step=False, on_epoch=True)  # type: ignore[arg-type]
        self.log_dict(metrics, prog_bar=True, on_step=False, on_epoch=True)  # type: ignore[arg-type]
        self.log(f"{split}/f1", f1, on_step=False, on_epoch=True)  # type: ignore[arg-type]
        return logits, labels

    def configure_optimizers(self) -> Any:
        groups = list(self.parameter_groups(self.model))
        if isinstance(self.objective, nn.Module) and (own := list(self.objective.parameters())):
            groups.append({"params": own, "name": "objective"})
        optimizer = scale_learning_rates(self.optimizer(groups))
        if self.scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 0:  # of a stream without a length
            raise InputError("a schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        total = int(steps)
        self.trainer.fit_loop.setup_data()  # without max_epochs nobody has counted the batches yet
        batches = self.trainer.num_training_batches
        epoch = total  # of a stream that has no length
        if batches != float("inf"):
            epoch = max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))
        scheduler = self.scheduler(optimizer, total_steps=total, steps_per_epoch=epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
