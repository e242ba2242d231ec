"""Callbacks, the module and data work with `lightning` as with `pytorch_lightning`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from repnet import callbacks
from repnet.blocks import RepVGGBlock
from repnet.callbacks.pictures import send_picture
from repnet.data import Digits
from repnet.data.augment import ProgressiveRandAugment
from repnet.errors import InputError
from repnet.layers import conv_bn, global_pool
from repnet.models import create_model
from repnet.training import Classifier, warmup_cosine

NAMES = ("pytorch_lightning", "lightning.pytorch")
OPTIONS: Any = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_model_summary": False,
}

CALLBACKS: dict[str, Callable[[Path], Any]] = {
    "BatchNormRecalibration": lambda path: callbacks.BatchNormRecalibration(batches=2),
    "CheckpointEntry": lambda path: callbacks.CheckpointEntry({"form": "train"}),
    "CorruptImages": lambda path: callbacks.CorruptImages(),
    "EMAWeights": lambda path: callbacks.EMAWeights(0.5),
    "EquivalentKernelDecay": lambda path: callbacks.EquivalentKernelDecay(1e-2),
    "FoldedValidation": lambda path: callbacks.FoldedValidation(),
    "FreezeBatchNorm": lambda path: callbacks.FreezeBatchNorm(),
    "History": lambda path: callbacks.History(path, echo=False),
    "LastCheckpoint": lambda path: callbacks.LastCheckpoint(path / "last.ckpt"),
    "NormHealth": lambda path: callbacks.NormHealth(),
    "OverParameterize": lambda path: callbacks.OverParameterize("ac"),
    "Pictures": lambda path: callbacks.Pictures(path),
    "ProgressiveAugmentation": lambda path: callbacks.ProgressiveAugmentation(
        {0: 0.5}, [ProgressiveRandAugment()]
    ),
    "ProgressiveResizing": lambda path: callbacks.ProgressiveResizing({0: 6}),
    "PruneTrial": lambda path: callbacks.PruneTrial(path, monitor="val/loss", mode="min"),
    "QuantizationAware": lambda path: callbacks.QuantizationAware(batches=loader()),
    "RandomState": lambda path: callbacks.RandomState(),
    "Reparameterize": lambda path: callbacks.Reparameterize(path),
    "SaveOnInterrupt": lambda path: callbacks.SaveOnInterrupt(path / "last.ckpt"),
    "SkipNonFiniteSteps": lambda path: callbacks.SkipNonFiniteSteps(path=path / "nan.pt"),
    "StepMetrics": lambda path: callbacks.StepMetrics(),
    "StopOnNonFiniteLoss": lambda path: callbacks.StopOnNonFiniteLoss(path=path / "nan.pt"),
    "ThroughputBar": lambda path: callbacks.ThroughputBar(),
    "WeightDecaySchedule": lambda path: callbacks.WeightDecaySchedule(1e-5),
}  # fmt: skip


def module(package: Any) -> Any:
    """Return a module of someone's own, which is made of one of the packages only."""

    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                conv_bn(1, 4), nn.ReLU(), RepVGGBlock(4, 4), global_pool(), nn.Linear(4, 3)
            )

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val/loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-4)

    return Net()


def loader() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 3), 4)


def test_every_public_callback_is_here() -> None:
    callback = import_module(NAMES[0]).Callback
    public = {name for name in callbacks.__all__ if name[0].isupper()}
    assert {n for n in public if issubclass(getattr(callbacks, n), callback)} == set(CALLBACKS)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_does_the_same_under_both_names(name: str, tmp_path: Path) -> None:
    ran = []
    for package in map(import_module, NAMES):
        path = tmp_path / package.__name__
        path.mkdir()
        net, callback = module(package), CALLBACKS[name](path)
        trainer = package.Trainer(**OPTIONS, default_root_dir=path, callbacks=callback)
        trainer.fit(net, loader(), loader())
        trainer.test(net, loader(), verbose=False)
        trainer.save_checkpoint(path / "end.ckpt")
        saved = torch.load(path / "end.ckpt", weights_only=False)
        ran.append(
            {
                "weights": net.state_dict(),
                "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
                "order": [type(each).__name__ for each in trainer.callbacks],
                "files": sorted(str(p.relative_to(path)) for p in path.rglob("*")),
                "saved": sorted(saved),
                "states": [k for k in saved["callbacks"] if not k.startswith("ModelCheckpoint")],
            }
        )
    torch.testing.assert_close(ran[0].pop("weights"), ran[1].pop("weights"), rtol=0, atol=0)
    assert ran[0] == ran[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_and_the_data_modules_train_in_both(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model("repvgg_tiny", num_classes=10, in_channels=1)
    classifier, data = Classifier(net, 10, scheduler=warmup_cosine), Digits(batch_size=256)
    trainer = import_module(name).Trainer(
        **OPTIONS, enable_progress_bar=False, default_root_dir=tmp_path,
        plugins=[callbacks.SafeCheckpointIO()], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(classifier, data)
    assert trainer.global_step == 8
    assert trainer.callback_metrics["val/top1"] > 0.2
    assert trainer.test(classifier, datamodule=data, verbose=False)[0]["test/top1"] > 0.2
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 8


def test_an_object_of_both_can_be_copied_and_pickled() -> None:
    other = import_module(NAMES[1])
    history = callbacks.LastCheckpoint("x", every_n_steps=5)
    assert isinstance(history, other.callbacks.Checkpoint)
    for copy in (deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert type(copy) is type(history)
        assert vars(copy) == vars(history)
    classifier = Classifier(nn.Linear(2, 2), 2)
    copied = deepcopy(classifier)
    assert isinstance(copied, other.LightningModule)
    torch.testing.assert_close(copied.state_dict(), classifier.state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("callback", ["EMAWeights", "EquivalentKernelDecay"])
def test_sharding_is_refused_in_both(name: str, callback: str, tmp_path: Path) -> None:
    strategy = import_module(f"{name}.strategies").FSDPStrategy()
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[], checkpoint_callbacks=[])
    made = CALLBACKS[callback](tmp_path)
    hook = {"EMAWeights": "setup", "EquivalentKernelDecay": "on_fit_start"}[callback]
    with pytest.raises(InputError, match="FSDPStrategy shards"):
        getattr(made, hook)(trainer, None, *["fit"][: hook == "setup"])


@pytest.mark.parametrize("name", NAMES)
def test_pictures_reach_the_loggers_of_both(name: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "worst.png")
    logger = import_module(f"{name}.loggers").TensorBoardLogger(tmp_path)
    sent = []
    logger._experiment = SimpleNamespace(add_image=lambda tag, *_, **__: sent.append(tag))
    send_picture([logger], tmp_path / "worst.png")
    assert sent == ["worst"]
