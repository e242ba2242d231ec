"""`OverParameterize`, `FoldedValidation` and `Reparameterize` in a LightningModule of anyone."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

import repnet.callbacks.reparameterize as fold_callback
from repnet.block_insertion import inserted_blocks
from repnet.callbacks import FoldedValidation, OverParameterize, Reparameterize
from repnet.equivalence import FoldMismatchError
from tests.commands import run


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class Module(LightningModule):
    """Its batches are dicts, its images are normalized in the step, and it has no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.accuracy = MulticlassAccuracy(3)
        self.seen = SumMetric()
        self.perceptual_loss = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
        self.losses: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.net(batch["image"] * 2 - 1)
        return logits, functional.cross_entropy(logits, batch["label"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        _, loss = self.step(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, loss = self.step(batch)
        self.accuracy(logits, batch["label"])
        self.log("val/loss", loss, batch_size=len(logits))
        self.seen(len(logits))
        self.log_dict({"val/accuracy": self.accuracy, "val/seen": self.seen})
        self.log("val/largest", logits.max(), reduce_fx="max")

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/epoch": torch.tensor(float(self.current_epoch))})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Samples(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


def loader(*, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(20, 3, 8, 8, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    return DataLoader(Samples(images, labels), 8, shuffle=shuffle)  # 8, 8 and 4 samples


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip


def test_the_network_comes_back_key_for_key(tmp_path: Path) -> None:
    module = Module()
    before = deepcopy(module.net.state_dict())
    over, fold = OverParameterize("repvgg"), Reparameterize(tmp_path)
    trainer(over, fold).fit(module, loader(shuffle=True), loader())
    assert over.replaced == ["net.0", "net.3"]  # not inside of the loss
    assert set(inserted_blocks(module)) == {"net.0", "net.3"}
    plain = network()
    weights = load_file(tmp_path / "model.safetensors")
    assert list(fold.folded.state_dict()) == list(before)
    plain.load_state_dict(weights, strict=True)
    assert not torch.equal(weights["0.weight"], before["0.weight"])
    x = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(plain.eval()(x), module.net.eval()(x))
    torch.testing.assert_close(plain(x), fold.folded(x), rtol=0, atol=0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == fold.report
    assert report["verified"] is True
    assert report["samples"] == 20
    assert report["agreement"] == 1
    assert 0 < report["max_relative_error"] < 1e-6
    assert report["folded"] == ["0", "3"]
    assert report["norms"] == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "report.json"]


def test_norms_may_be_absorbed_and_batches_limited() -> None:
    module = Module()
    fold = Reparameterize(attribute="net", norms="absorb", limit_batches=1)
    trainer(OverParameterize("ac", attribute="net"), fold).fit(module, loader(), loader())
    assert not [m for m in fold.folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert fold.report["samples"] == 8


def test_a_convolution_that_the_rest_of_the_module_uses_stays_shared() -> None:
    module: Any = Module()
    module.parts = nn.ModuleDict({"net": module.net})
    module.again = module.net[3]
    OverParameterize(attribute="parts.net").setup(trainer(), module, "fit")
    assert list(inserted_blocks(module)) == ["net.0", "net.3"]
    assert module.again is module.net[3]


def test_without_validation_the_training_data_is_used() -> None:
    fold = Reparameterize()
    limits = {"limit_val_batches": 0, "limit_train_batches": 2}
    trainer(OverParameterize(), fold, **limits).fit(Module(), loader(), loader())
    assert fold.report["samples"] == 16


def test_a_changed_prediction_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fold_callback.reparameterize

    def wrong(*args: Any, **options: Any) -> Any:
        folded, report = real(*args, **options)
        folded[-1].bias.data[0] += 100
        return folded, report

    monkeypatch.setattr(fold_callback, "reparameterize", wrong)
    fold = Reparameterize(tmp_path)
    with pytest.raises(FoldMismatchError, match="folding changed .* of the predictions on 20"):
        trainer(OverParameterize(), fold).fit(Module(), loader(), loader())
    assert fold.folded is None
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["verified"] is False


def test_the_step_must_call_the_network() -> None:
    with pytest.raises(RuntimeError, match="validation_step does not call Conv2d; .*attribute="):
        trainer(Reparameterize(attribute="perceptual_loss")).fit(Module(), loader(), loader())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_is_resumed_and_tested_in_fresh_objects(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None, module: Module | None = None) -> Module:
        seed_everything(5, verbose=False)
        module = module or Module()
        saver = ModelCheckpoint(tmp_path, f"after_{epochs}", enable_version_counter=False)
        fitting = trainer(
            OverParameterize("dbb"), saver, max_epochs=epochs, enable_checkpointing=True
        )
        fitting.fit(module, loader(), loader(), ckpt_path=checkpoint)
        return module

    whole = fit(2)
    half = fit(1)
    resumed = fit(2, tmp_path / "after_1.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    fresh = Module()
    scores = trainer(OverParameterize("dbb")).validate(
        fresh, loader(), ckpt_path=tmp_path / "after_1.ckpt", verbose=False
    )
    torch.testing.assert_close(fresh.state_dict(), half.state_dict(), rtol=0, atol=0)
    assert scores[0]["val/loss"] > 0
    again = fit(1, module=half)  # the same object once more
    assert set(inserted_blocks(again)) == {"net.0", "net.3"}


def test_the_optimizer_sees_the_branches() -> None:
    module = Module()
    fitting = trainer(OverParameterize("mobileone"))
    fitting.fit(module, loader(), loader())
    held = {id(p) for group in fitting.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.net.parameters()} == held


class Configured(Module):
    """Makes its network where Lightning says that large ones be made."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


def test_a_network_made_in_configure_model() -> None:
    module, fold = Configured(), Reparameterize()
    trainer(OverParameterize(where="net.3"), fold).fit(module, loader(), loader())
    assert fold.report["folded"] == ["3"]


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 2}])
def test_folded_validation_logs_the_same_scores_and_disturbs_nothing(
    options: dict[str, Any],
) -> None:
    def fit(*callbacks: Callback) -> tuple[Module, dict[str, float]]:
        seed_everything(2, verbose=False)
        module = Module()
        fitting = trainer(OverParameterize("qarepvgg"), *callbacks, max_epochs=3, **options)
        fitting.fit(module, loader(shuffle=True), loader())
        return module, {k: float(v) for k, v in fitting.callback_metrics.items()}

    module, plain = fit()
    watched, metrics = fit(FoldedValidation())
    assert watched.losses == module.losses
    torch.testing.assert_close(watched.state_dict(), module.state_dict(), rtol=0, atol=0)
    folded = {k.removeprefix("folded/"): v for k, v in metrics.items() if k.startswith("folded/")}
    assert {k: v for k, v in metrics.items() if not k.startswith("folded/")} == plain
    del plain["val/largest"]
    assert folded.keys() == plain.keys()
    assert folded == pytest.approx(plain, rel=1e-5)
    assert folded["val/epoch"] == 2
    assert folded["val/seen"] == (16 if options else 20)


def test_folded_validation_tells_what_folding_would_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    import repnet.callbacks.folded_validation as validation_callback

    calls = []

    def wrong(model: nn.Module, example: Any) -> nn.Module:
        calls.append(example[0].shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    monkeypatch.setattr(validation_callback, "reparameterize", wrong)
    fitting = trainer(FoldedValidation(every_n_epochs=2), max_epochs=3, num_sanity_val_steps=2)
    module = Module()
    fitting.fit(module, loader(), loader())
    assert calls == [(2, 3, 8, 8)]
    assert isinstance(module.net[0], nn.Conv2d)


def test_folded_validation_leaves_the_module_as_it_was_when_a_step_fails() -> None:
    class Failing(Module):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            if not isinstance(self.net[0], nn.Conv2d) or self.trainer is None:
                return super().validation_step(batch, batch_idx)
            raise OSError("as if the disk were full")

    module = Failing()
    with pytest.raises(OSError, match="disk were full"):
        trainer(OverParameterize(), FoldedValidation()).fit(module, loader(), loader())
    assert set(inserted_blocks(module)) == {"net.0", "net.3"}
    assert not module.net._forward_pre_hooks
    assert "log" not in module.__dict__


def test_the_example_ends_in_torchvision(tmp_path: Path) -> None:
    options = ["--epochs=1", "--samples=160", "--batch-size=32", f"--directory={tmp_path}"]
    done = run("examples/finetune_resnet.py", *options, cwd=tmp_path)
    lines = done.stdout.splitlines()[-3:]
    assert "every key fits" in lines[2]
    assert len({line.split("%")[0].split()[-1] for line in lines}) == 1
    assert (tmp_path / "report.json").exists()
