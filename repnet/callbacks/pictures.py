"""`Pictures`: what a test gets wrong, as pictures and a table."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from repnet.callbacks.drawing import draw_classes, draw_confusions, draw_worst, most_confused
from repnet.callbacks.reparameterize import find_network
from repnet.files import write_text
from repnet.lightning import Callback, is_a
from repnet.text import printable

LABELS = ("labels", "label", "targets", "target", "y")


class Pictures(Callback):
    """After a test draw confusions, accuracy by class and the worst predictions.

    Writes `confusion.png`, `classes.png`, `worst.png`, `worst.csv` (which images those are) and
    `per_class.csv`, and sends the pictures to the trainer's loggers. Logits are what the network
    returned last in each test step. With several processes all predictions are gathered, and the
    first process draws.

    Args:
        directory: of the files; None for the trainer's `default_root_dir`.
        attribute: where the network is, as in `Reparameterize`.
        worst: number of images in the grid.
        class_names: None for `class_names` of the data module, or numbers.
        mean: of the normalization, to be undone; None for that of the data module.
        std: like `mean`.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        attribute: str | None = None,
        *,
        worst: int = 24,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.attribute = attribute
        self.worst = worst
        self.class_names = class_names
        self.mean, self.std = mean, std
        self.hook: Any = None
        self._reset()

    def _reset(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None
        self.classes = 0
        self.pairs: list[Tensor] = []  # (2, batch): labels, predictions
        self.passed = 0  # images of this process before the batch
        self.images = self.values = torch.empty(0)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        self._remove()
        network = find_network(pl_module, self.attribute)
        self.hook = network.register_forward_hook(self._see)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        seen, self.seen = self.seen, None
        labels = _labels(batch)
        first, self.passed = self.passed, self.passed + (0 if labels is None else len(labels))
        if seen is None or labels is None or dataloader_idx:
            return
        images, logits = seen
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            return
        logits, labels = logits.float(), labels.to(logits.device)
        self.classes = logits.shape[1]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        confidences, predictions = logits.softmax(1).max(1)
        self.pairs.append(torch.stack([labels, predictions]).cpu())
        own = torch.arange(first, first + len(labels), device=labels.device)
        indices = trainer.global_rank + own * trainer.world_size  # processes take turns
        values = torch.stack([losses.double(), labels, predictions, confidences, indices], 1).cpu()
        chosen = losses.topk(min(self.worst, len(losses))).indices
        self._keep_worst(images[chosen].float().cpu(), values[chosen.cpu()])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        pairs = torch.cat(self.pairs, 1) if self.pairs else torch.empty(2, 0, dtype=torch.int64)
        if trainer.world_size > 1:
            pairs = self._gather(pairs)
        if trainer.is_global_zero:
            if pairs.shape[1]:
                self._draw(trainer, pairs.numpy())
            else:
                warnings.warn(
                    "Pictures draws nothing: it wants test batches of (images, labels), labels of "
                    "int64, and a network that returns logits (batch, classes)",
                    stacklevel=2,
                )
        self._reset()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._remove()

    def _see(self, module: Any, inputs: Any, outputs: Any) -> None:
        tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        if inputs and isinstance(inputs[0], Tensor) and tensors:
            self.seen = inputs[0].detach(), tensors[0].detach()

    def _remove(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def _keep_worst(self, images: Tensor, values: Tensor) -> None:
        same = self.images.shape[1:] == images.shape[1:]  # images of other sizes start anew
        images = torch.cat([self.images, images]) if same else images
        values = torch.cat([self.values, values]) if same else values
        order = values[:, 0].argsort(descending=True)[: self.worst]
        self.images, self.values = images[order], values[order]

    def _gather(self, pairs: Tensor) -> Tensor:
        """Return the predictions of all processes, and keep the worst of all."""
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (pairs, self.images, self.values))
        self.images = self.values = torch.empty(0)
        for _, images, values in everyone:
            if len(images):
                self._keep_worst(images, values)
        return torch.cat([pairs for pairs, _, _ in everyone], 1)

    def _draw(self, trainer: Trainer, pairs: numpy.ndarray) -> None:
        data = getattr(trainer, "datamodule", None)
        directory = self.directory or Path(trainer.default_root_dir)
        labels, predictions = pairs
        names = self.class_names or getattr(data, "class_names", None) or []
        if len(names) != self.classes:
            names = [str(index) for index in range(self.classes)]
        names = [printable(str(name)) for name in names]
        totals = numpy.bincount(labels, minlength=self.classes)
        correct = numpy.bincount(labels[labels == predictions], minlength=self.classes)
        write_text(directory / "per_class.csv", _table(labels, predictions, names))
        draw_confusions(labels, predictions, names, directory / "confusion.png")
        draw_classes(correct, totals, names, directory / "classes.png")
        losses, true, wrong, confidences, indices = self.values.T.tolist()
        rows = [
            (_sample_name(trainer, int(index)), int(a), int(b), confidence, loss)
            for index, a, b, confidence, loss in zip(
                indices, true, wrong, confidences, losses, strict=True
            )
        ]
        write_text(directory / "worst.csv", _worst_table(rows, names))
        mean = self.mean or getattr(data, "mean", None)
        std = self.std or getattr(data, "std", None)
        draw_worst(
            _as_pictures(self.images, mean, std).numpy(),
            [int(x) for x in true],
            [int(x) for x in wrong],
            confidences,
            losses,
            names,
            directory / "worst.png",
            samples=[name for name, *_ in rows],
        )
        for name in ("confusion", "classes", "worst"):
            send_picture(trainer.loggers, directory / f"{name}.png", trainer.global_step)


def send_picture(loggers: Sequence[Any], path: str | Path, step: int = 0) -> None:
    """Send a PNG file to those loggers that take pictures: TensorBoard, W&B, MLflow.

    Args:
        loggers: of a trainer.
        path: its stem is the name of the picture.
        step: of the training.
    """
    path = Path(path)
    for logger in loggers:
        if is_a(logger, "TensorBoardLogger"):
            from PIL import Image

            with Image.open(path) as image:
                pixels = numpy.asarray(image.convert("RGB"))
            logger.experiment.add_image(path.stem, pixels, step, dataformats="HWC")
        elif is_a(logger, "WandbLogger"):
            logger.log_image(path.stem, [str(path)])
        elif is_a(logger, "MLFlowLogger"):
            logger.experiment.log_artifact(logger.run_id, str(path), "pictures")


def _sample_name(trainer: Trainer, index: int) -> str:
    """Return the file of a test image, or its number in the split."""
    loaders = trainer.test_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    name = getattr(getattr(loader, "dataset", None), "name", None)
    return printable(str(name(index))) if callable(name) else f"test {index}"


def _worst_table(rows: Sequence[tuple[str, int, int, float, float]], names: Sequence[str]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "class", "predicted", "probability", "loss"])
    for name, true, predicted, confidence, loss in rows:
        writer.writerow([name, names[true], names[predicted], round(confidence, 6), round(loss, 6)])
    return table.getvalue()


def _labels(batch: Any) -> Tensor | None:
    found = None
    if isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    elif isinstance(batch, dict):
        found = next((batch[key] for key in LABELS if key in batch), None)
    whole = isinstance(found, Tensor) and found.dtype == torch.int64
    return found if whole else None


def _as_pictures(images: Tensor, mean: Any, std: Any) -> Tensor:
    """Return images `(n, height, width, channels)` in 0 ... 1, without their normalization."""
    if mean is not None and std is not None and len(mean) == images.shape[1]:
        images = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        images = (images - low) / (high - low).clamp_min(1e-9)
    return images.clamp(0, 1).permute(0, 2, 3, 1)


def _table(labels: numpy.ndarray, predictions: numpy.ndarray, names: Sequence[str]) -> str:
    """Return a row for each class: images, recall, precision and most frequent mistake."""
    totals = numpy.bincount(labels, minlength=len(names))
    predicted = numpy.bincount(predictions, minlength=len(names))
    correct = numpy.bincount(labels[labels == predictions], minlength=len(names))
    mistakes: dict[int, tuple[int, int]] = {}
    for true, wrong, count in most_confused(labels, predictions):
        mistakes.setdefault(true, (wrong, count))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", "images", "recall", "precision", "mistaken_for", "mistakes"])
    for index, name in enumerate(names):
        wrong, count = mistakes.get(index, (-1, 0))
        writer.writerow(
            [
                name,
                totals[index],
                round(correct[index] / totals[index], 6) if totals[index] else "",
                round(correct[index] / predicted[index], 6) if predicted[index] else "",
                names[wrong] if count else "",
                count,
            ]
        )
    return table.getvalue()
