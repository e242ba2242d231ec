"""Batch norms around training: estimated anew, frozen, looked at."""

from __future__ import annotations

import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from repnet import reparameterize
from repnet.callbacks import (
    BatchNormRecalibration,
    EMAWeights,
    FreezeBatchNorm,
    NormHealth,
    recalibrate_batch_norm,
)
from repnet.equivalence import Inputs
from repnet.errors import InputError
from repnet.models import RepVGG
from tests.commands import environment
from tests.models import randomize_batch_norm


def network() -> nn.Sequential:
    seed_everything(0, verbose=False)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return randomize_batch_norm(layers.double()).train()


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.net(images * 2), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", functional.cross_entropy(self.net(batch[0] * 2), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def data(samples: int = 20, **options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 1, 6, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.arange(samples) % 3), 8, **options)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **settings,
    )  # fmt: skip


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.cat([v.movedim(1, -1).flatten(0, -2) for v in values])
    return x.mean(0), x.var(0, correction=0)


def test_statistics_are_those_of_all_values_together() -> None:
    model = network()
    before = deepcopy(model.state_dict())
    batches = [images * 3 - 1 for images, _ in data(20)]  # of 8, 8 and 4 samples
    names = recalibrate_batch_norm(model, batches)
    assert names == ["1", "5"]
    assert all(module.training for module in model.modules())
    first = [model[0](x) for x in batches]
    # In between, norms work with the statistics of each batch; dropout drops nothing.
    norm = model[1]
    hidden = [functional.batch_norm(x, None, None, norm.weight, norm.bias, True) for x in first]
    second = [model[4](x.relu()) for x in hidden]
    after = model.state_dict()
    for name, values in (("1", first), ("5", second)):
        mean, variance = moments(values)
        close(after[f"{name}.running_mean"], mean)
        close(after[f"{name}.running_var"], variance)
    for key in before:
        if "running" not in key:
            close(after[key], before[key])


def test_kinds_of_batches_and_of_norms() -> None:
    batches, results = list(data(16)), []
    for given in (batches, [x for x, _ in batches], [Inputs((x,)) for x, _ in batches]):
        model = network()
        recalibrate_batch_norm(model, given)
        results.append(statistics(model))
    close(results[1], results[0])
    close(results[2], results[0])

    frozen = network()
    before = statistics(frozen)
    frozen[1].eval()
    assert recalibrate_batch_norm(frozen, batches) == ["5"]
    assert not frozen[1].training
    assert frozen[5].training
    close(frozen[1].running_mean, before["1.running_mean"])
    evaluated = network().eval()
    assert recalibrate_batch_norm(evaluated, batches, frozen=[evaluated[5]]) == ["1"]
    assert not any(module.training for module in evaluated.modules())
    assert recalibrate_batch_norm(evaluated, []) == []
    without = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False).double())
    assert recalibrate_batch_norm(without, batches) == []


def test_values_that_are_not_finite_change_nothing() -> None:
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(InputError, match="'1' received values that are not finite"):
        recalibrate_batch_norm(model, [torch.full((4, 1, 6, 6), torch.inf, dtype=torch.float64)])
    close(model.state_dict(), before)
    with pytest.raises(ZeroDivisionError):
        recalibrate_batch_norm(model, (1 / 0 for _ in range(1)))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_network_is_recalibrated_after_training() -> None:
    module, expected = Module(), network()
    trainer(BatchNormRecalibration(2)).fit(module, data(), data())
    expected.load_state_dict(module.net.state_dict())
    recalibrate_batch_norm(expected, [x * 2 for x, _ in data(16)])
    close(statistics(module.net), statistics(expected))
    assert module.net[1].num_batches_tracked == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_training_does_not_notice(workers: int) -> None:
    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            self.weights = deepcopy(pl_module.net[0].weight.data)

    def trained(*callbacks: Callback) -> Tensor:
        module, keep = Module(), Keep()
        generator = torch.Generator().manual_seed(3)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = data(64, shuffle=True, generator=generator, **options)
        with warnings.catch_warnings(action="ignore"):  # of the number of workers
            trainer(keep, *callbacks, val_check_interval=3).fit(module, loader, data())
        return keep.weights

    recalibration = BatchNormRecalibration(2, every_validation=True)
    torch.testing.assert_close(trained(recalibration), trained(), rtol=0, atol=0)


def test_averaged_weights_are_recalibrated_and_saved(tmp_path: Path) -> None:
    module, expected = Module(), network()
    saves = ModelCheckpoint(tmp_path, filename="last")
    recalibration = BatchNormRecalibration(every_validation=True)
    # Named first, it still comes after the averages are in the network.
    trainer(recalibration, EMAWeights(0.5), saves, enable_checkpointing=True).fit(
        module, data(16), data()
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    sets = [
        {key.removeprefix("net."): value for key, value in saved[name].items()}
        for name in ("state_dict", "state_dict_raw")
    ]
    assert not torch.equal(sets[0]["0.weight"], sets[1]["0.weight"])
    expected.load_state_dict(sets[0])
    recalibrate_batch_norm(expected, [x * 2 for x, _ in data(16)])
    close({key: sets[0][key] for key in statistics(expected)}, statistics(expected))
    assert not torch.allclose(sets[1]["1.running_mean"], sets[0]["1.running_mean"], rtol=1e-3)
    close(statistics(module.net), statistics(expected))


def test_averaged_weights_are_recalibrated_in_any_order() -> None:
    modules = []
    for order in (1, -1):
        modules.append(Module())  # which seeds
        pair = [BatchNormRecalibration(), EMAWeights(0.5)][::order]
        trainer(*pair).fit(modules[-1], data(16), data())
    close(modules[0].net.state_dict(), modules[1].net.state_dict())
    expected = deepcopy(modules[0].net)
    recalibrate_batch_norm(expected, [x * 2 for x, _ in data(16)])
    close(statistics(modules[0].net), statistics(expected))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_norms_stay_frozen(affine: bool) -> None:
    module = Module()
    before = deepcopy(module.state_dict())
    freeze = FreezeBatchNorm("1", affine=affine)
    trainer(freeze, BatchNormRecalibration(every_validation=True), val_check_interval=2).fit(
        module, data(), data()
    )
    after = module.state_dict()
    assert list(freeze.norms) == ["1"]
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        close(after[f"net.1.{key}"], before[f"net.1.{key}"])
        assert not torch.equal(after[f"net.5.{key}"], before[f"net.5.{key}"])
    assert torch.equal(after["net.1.weight"], before["net.1.weight"]) is affine


def test_synchronized_norms_stay_frozen() -> None:
    class Synchronize(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            nn.SyncBatchNorm.convert_sync_batchnorm(pl_module)  # as `sync_batchnorm=True`

    module = Module()
    before = deepcopy(module.state_dict())
    trainer(Synchronize(), FreezeBatchNorm()).fit(module, data(), data())  # no GPU: it is frozen
    assert isinstance(module.net[1], nn.SyncBatchNorm)
    for key in ("1.running_mean", "1.weight", "5.running_var", "5.num_batches_tracked"):
        assert torch.equal(module.state_dict()[f"net.{key}"], before[f"net.{key}"])


def test_what_is_frozen_is_chosen() -> None:
    def frozen(where: Any) -> list[str]:
        freeze = FreezeBatchNorm(where)
        freeze.setup(trainer(), Module(), "fit")
        return list(freeze.norms)

    assert frozen(None) == frozen(nn.BatchNorm2d) == frozen(nn.Sequential) == ["1", "5"]
    assert frozen(["nothing", "5"]) == frozen(lambda name, norm: name > "1") == ["5"]
    with pytest.raises(InputError, match=r"where='x\.\*'\) selects no batch norm; there are 1, 5"):
        frozen("x.*")


def test_synchronized_norms_fold() -> None:
    blocks: Any = {"depths": (1, 1, 1, 1), "widths": (0.1,) * 4, "num_classes": 5}
    model = randomize_batch_norm(RepVGG(**blocks).double())
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = model.eval()(images)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronized.modules())
    folded = reparameterize(synchronized, images)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(images), expected, rtol=1e-9, atol=1e-12)


def test_sick_norms_are_named() -> None:
    class Sicken(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.net[1].reset_running_stats()
            pl_module.net[5].running_var[2] = 1e-9

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(NormHealth(), Sicken()).fit(Module(), data(), data())
    said = [str(w.message) for w in caught if str(w.message).startswith("batch norms")]
    assert len(said) == 2
    assert said[0].startswith("batch norms (trained): 1 have the statistics of a norm that never")
    assert said[0].endswith(": 1")
    assert said[1].endswith(": 5")


def test_norms_are_looked_at_while_training() -> None:
    class Unused(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net.spare = nn.BatchNorm2d(4)
            self.net.forward = lambda x: self.net[9](x.flatten(1)[:, :4])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(NormHealth(2, fold=False), max_epochs=3).fit(Unused(), data(), data())
    said = [str(w.message) for w in caught if str(w.message).startswith("batch norms")]
    assert [message.split(")")[0] for message in said] == [
        "batch norms (epoch 2", "batch norms (trained",
    ]  # fmt: skip
    trainer(NormHealth(1)).fit(Module(), data(), data())  # a warning would be an error


DISTRIBUTED = """
import sys, torch
from pytorch_lightning import Callback
from repnet.callbacks import BatchNormRecalibration, EMAWeights
from tests.test_norm_callbacks import Module, data, trainer

class Compare(Callback):
    def on_validation_start(self, trainer, pl_module):
        for tensor in (*ema.averages.values(), *pl_module.state_dict().values()):
            both = [torch.empty_like(tensor) for _ in range(2)]
            torch.distributed.all_gather(both, tensor)
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)

    def on_train_end(self, trainer, pl_module):
        self.on_validation_start(trainer, pl_module)
        if trainer.is_global_zero:
            torch.save([pl_module.net.state_dict(), ema.raw["net.0.weight"]], sys.argv[1])

ema = EMAWeights(0.5)
recalibration = BatchNormRecalibration(every_validation=True)
run = trainer(ema, recalibration, Compare(), devices=2,
              strategy="ddp_fork", num_sanity_val_steps=0)
run.fit(Module(), data(32), data(16))
"""


def test_processes_agree(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    command = [sys.executable, "script.py", "result.pt"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    state, raw = torch.load(tmp_path / "result.pt", weights_only=True)
    assert not torch.equal(state["0.weight"], raw)
    model = network()
    model.load_state_dict(state)
    # The first norm sees the same values in any division into batches.
    mean, variance = moments([model[0](x * 2) for x, _ in data(32)])
    close(state["1.running_mean"], mean)
    close(state["1.running_var"], variance)
