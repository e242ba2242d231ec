"""Images and augmentation that grow with the epoch, in a LightningModule of anyone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from repnet.callbacks import ProgressiveAugmentation, ProgressiveResizing
from repnet.callbacks.progressive import resized
from repnet.data.augment import ProgressiveRandAugment
from repnet.errors import InputError


class Images(Dataset):
    """Each label is the magnitude of the augmentation at the time."""

    def __init__(self, augment: list[Any], size: tuple[int, int]) -> None:
        self.augment, self.size = augment, size

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.full((3, *self.size), 40 * index, dtype=torch.uint8)
        return self.augment[1](image).float(), self.augment[1].magnitude


class Data(LightningDataModule):
    def __init__(self, workers: int = 0, size: tuple[int, int] = (12, 12)) -> None:
        super().__init__()
        self.augment = [v2.RandomHorizontalFlip(), ProgressiveRandAugment(1, magnitude=20)]
        self.options = {"num_workers": workers, "persistent_workers": workers > 0}
        self.images = Images(self.augment, size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 2, **self.options)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 2)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.sizes: list[tuple[bool, Any]] = []

    def forward(self, images: Tensor, scale: Tensor) -> Tensor:
        self.sizes.append((self.training, tuple(images.shape[2:])))
        return self.conv(images).mean((2, 3)) * scale


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.magnitudes: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.magnitudes.append(batch[1].tolist())
        return self.net(batch[0] / 255, scale=torch.ones(1)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0], scale=torch.ones(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(
    module: Module, data: Any, *callbacks: Callback, epochs: int = 3, **options: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), max_epochs=epochs,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # of the number of workers
        trainer.fit(module, data, **options)
    return trainer


def test_images_grow_in_training_only() -> None:
    module = Module()
    fit(module, Data(), ProgressiveResizing([[2, [8, 10]], [1, 6]]))
    trained = [size for training, size in module.net.sizes if training]
    assert trained == [(12, 12)] * 3 + [(6, 6)] * 3 + [(8, 10)] * 3
    assert {size for training, size in module.net.sizes if not training} == {(12, 12)}
    assert not module.net._forward_pre_hooks


def test_the_shorter_side_counts_and_resizing_is_antialiased() -> None:
    module = Module()
    fit(module, Data(size=(12, 18)), ProgressiveResizing({0: 8}, attribute="net"), epochs=1)
    assert {size for training, size in module.net.sizes if training} == {(8, 12)}

    received: list[Tensor] = []
    resizing = ProgressiveResizing({0: 4})
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    resizing.on_train_batch_start(trainer, module, None, 0)
    module.net.conv.register_forward_pre_hook(lambda m, args: received.append(args[0]))
    images = torch.rand(2, 3, 12, 12)
    module.net.train()(images, torch.ones(1))
    expected = functional.interpolate(images, (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(received[0], expected)
    assert not torch.allclose(received[0], functional.interpolate(images, (4, 4), mode="bilinear"))
    module.net.eval()(images, torch.ones(1))
    assert received.pop() is images
    module.net.train()
    resizing.on_exception(trainer, module, RuntimeError())
    module.net(images, torch.ones(1))
    assert received[1] is images


def test_images_in_half_precision_are_resized() -> None:
    images = torch.rand(2, 3, 12, 12)
    half = resized(images.bfloat16(), [7])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), resized(images, [7]), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_grows_in_workers_too(workers: int) -> None:
    module = Module()
    fit(module, Data(workers), ProgressiveAugmentation({0: 0.3, 1: 0.7, 2: 1}))
    assert module.magnitudes == [[6, 6]] * 3 + [[14, 14]] * 3 + [[20, 20]] * 3


@pytest.mark.parametrize("step", [3, 4])  # at the end of an epoch, and within one
def test_a_resumed_run_has_the_strength_and_size_of_its_epoch(step: int, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        scales = {0: 0.3, 1: 0.7, 2: 1.0}
        return [ProgressiveAugmentation(scales), ProgressiveResizing({0: 4, 1: 6, 2: 8}), saves]

    fit(Module(), Data(), *callbacks(), epochs=2)
    module = Module()
    path = tmp_path / f"step={step}.ckpt"
    fit(module, Data(1), *callbacks(), ckpt_path=path, weights_only=True)
    steps = 6 - step
    assert module.magnitudes == [[14, 14]] * steps + [[20, 20]] * 3
    trained = [size for training, size in module.net.sizes if training]
    assert trained == [(6, 6)] * steps + [(8, 8)] * 3


def test_the_magnitude_is_that_of_the_operations() -> None:
    image = torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8)
    augment, plain = ProgressiveRandAugment(2, magnitude=20), v2.RandAugment(2, magnitude=10)
    augment.scale = 0.5
    for seed in range(10):
        torch.manual_seed(seed)
        expected = plain(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(augment(image), expected, rtol=0, atol=0)
    augment.scale = 0
    assert augment.magnitude == 0


def test_transforms_may_be_given_and_must_be_there() -> None:
    augment = ProgressiveRandAugment()
    module, loader = Module(), DataLoader(Images([None, augment], (12, 12)), 2)
    fit(module, loader, ProgressiveAugmentation({0: 0.5}, [v2.Compose([augment])]), epochs=1)
    assert augment.magnitude == 4
    with pytest.raises(InputError, match="use it in place of torchvision's RandAugment"):
        fit(Module(), loader, ProgressiveAugmentation({0: 0.5}))


@pytest.mark.parametrize("values", [{}, {-1: 1}, {"first": 1}, [1], None])
def test_bad_epochs_are_refused(values: Any) -> None:
    for make in (ProgressiveResizing, ProgressiveAugmentation):
        with pytest.raises(InputError, match="maps epochs, from 0, to values"):
            make(values)


def test_bad_sizes_and_scales_are_refused() -> None:
    with pytest.raises(InputError, match="sizes are 1 or more"):
        ProgressiveResizing({0: 0})
    with pytest.raises(InputError, match="scales are between 0 and 1"):
        ProgressiveAugmentation({0: 2})
