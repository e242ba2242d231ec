"""Fine-tune torchvision's ResNet-18 with multi-branch blocks, and get a ResNet-18 back.

    python examples/finetune_resnet.py

Only the two callbacks know of repnet. Real use starts from `resnet18(weights="DEFAULT")` with your
own images; here it learns the 8x8 digits of scikit-learn, from random weights, so that nothing
must be downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from repnet.callbacks import OverParameterize, Reparameterize


class DigitClassifier(LightningModule):
    """A plain LightningModule around a plain ResNet-18."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.model = resnet18(num_classes=10)
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(images), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def digits(image_size: int, batch_size: int, samples: int) -> tuple[DataLoader, DataLoader]:
    """Return loaders of the training and of the validation images."""
    data = load_digits()
    images = torch.tensor(data.images[:samples] / 16, dtype=torch.float32)[:, None]
    images = functional.interpolate(images, size=image_size, mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(data.target[:samples])
    split = 4 * len(images) // 5
    train = TensorDataset(images[:split], labels[:split])
    validation = TensorDataset(images[split:], labels[split:])
    return (
        DataLoader(train, batch_size, shuffle=True, drop_last=True),
        DataLoader(validation, batch_size),
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Return the fraction of right predictions."""
    model.eval()
    right = [(model(images).argmax(1) == labels) for images, labels in loader]
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train, fold, and load the result into torchvision's own class."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--block", default="repvgg", help="a name in configs/block")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1797, help="of the digits, at most 1797")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--directory", type=Path, default=Path("outputs/finetune_resnet"))
    options = parser.parse_args()

    seed_everything(0, verbose=False)
    train, validation = digits(options.image_size, options.batch_size, options.samples)
    module = DigitClassifier(options.learning_rate)
    fold = Reparameterize(options.directory)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[OverParameterize(options.block, attribute="model"), fold],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, train, validation)
    assert fold.folded is not None

    plain = resnet18(num_classes=10)
    plain.load_state_dict(load_file(options.directory / "model.safetensors"), strict=True)
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (module.model, plain)]
    print(f"accuracy with branches  {accuracy(module.model, validation):.2%}, {count[0]:.2f} M")
    print(f"accuracy folded back    {accuracy(fold.folded, validation):.2%}, {count[1]:.2f} M")
    print(f"accuracy in torchvision {accuracy(plain, validation):.2%}: every key fits")


if __name__ == "__main__":
    main()
