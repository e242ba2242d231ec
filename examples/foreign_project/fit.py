"""repnet's training callbacks in a project that has nothing else of repnet.

    python examples/foreign_project/fit.py --epochs 12 --directory outputs/foreign

A ResNet of torchvision learns the 8x8 digits of scikit-learn, in a LightningModule of the project's
own. The loss is R-Drop; callbacks do the rest, and write the plain ResNet back.
"""

from __future__ import annotations

import argparse

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet

from repnet.callbacks import (
    BatchNormRecalibration,
    EMAWeights,
    EquivalentKernelDecay,
    OverParameterize,
    ProgressiveResizing,
    Reparameterize,
    SafeCheckpointIO,
)
from repnet.training import rdrop_loss


class Digits(LightningModule):
    """A plain LightningModule around a plain ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
        self.model.fc = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(512, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch  # two passes differ by dropout
        return rdrop_loss(self.model(images), self.model(images), labels, alpha=0.6)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        right = self.model(images).argmax(1) == labels
        self.log("val/accuracy", right.float().mean(), batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-4)


def loaders(size: int, samples: int) -> tuple[DataLoader, DataLoader]:
    """Return loaders of the training and of the validation images."""
    digits = load_digits()
    images = torch.tensor(digits.images[:samples] / 16, dtype=torch.float32)[:, None]
    images = functional.interpolate(images, size=size, mode="bilinear").repeat(1, 3, 1, 1)
    data = TensorDataset(images, torch.tensor(digits.target[:samples]))
    train, val = torch.utils.data.random_split(data, [0.8, 0.2])
    return DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(val, 256)


def main() -> None:
    """Train, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--samples", type=int, default=1797, help="images of the data set to use")
    parser.add_argument("--directory", default="outputs/foreign")
    arguments = parser.parse_args()
    seed_everything(0)
    callbacks = [
        OverParameterize("ac", where="model.layer1.*"),
        EMAWeights(decay=0.95),
        BatchNormRecalibration(batches=10, every_validation=True),
        EquivalentKernelDecay(weight_decay=1e-4),
        ProgressiveResizing({0: 16, max(1, arguments.epochs // 2): 24}),
        Reparameterize(arguments.directory),
        ModelCheckpoint(arguments.directory, filename="best", monitor="val/accuracy", mode="max"),
    ]
    trainer = Trainer(plugins=SafeCheckpointIO(), callbacks=callbacks,
                      max_epochs=arguments.epochs, logger=False)  # fmt: skip
    trainer.fit(Digits(), *loaders(24, arguments.samples))
    print({k: v.item() for k, v in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
