"""`EMAWeights` in a LightningModule of anyone: which weights are where, and exact resume."""

from __future__ import annotations

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

from repnet.callbacks import EMAWeights, Reparameterize, SafeCheckpointIO, SaveOnInterrupt
from repnet.callbacks.ema import hold_chosen
from repnet.errors import InputError

STEPS = 5  # of an epoch


class Module(LightningModule):
    """Its last layer is shared, and it has a mask and a counter among its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.net[-1].weight
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.rows: list[tuple[dict[str, Tensor], float]] = []  # after each optimizer step
        self.validated: list[Tensor] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.net(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(self.net[0].weight.detach().clone())
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class Watch(Callback):
    """Keeps the raw weights after each step, and what validation left."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.validations: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.states):
            self.states.append(deepcopy(pl_module.state_dict()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations.append(deepcopy(pl_module.state_dict()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Batches:
    """A loader that knows its place, so that a run resumes within an epoch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(STEPS, 8, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(3, (STEPS, 8), generator=generator)
        self.place = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        for place in range(self.place % STEPS, STEPS):
            self.place = place + 1
            yield self.images[place], self.labels[place]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def validation(samples: int = 12) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(samples, 1, 6, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.arange(samples) % 3), 8)


def module(dropout: float = 0) -> Module:
    seed_everything(0, verbose=False)
    network = Module().double()
    network.net[3].p = dropout
    return network


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), plugins=[SafeCheckpointIO()], **settings,
    )  # fmt: skip


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        ({"decay": 0.8}, 1),
        ({"decay": 0.7, "warmup": False}, 1),
        ({"decay": 0.9, "warmup": 3}, 1),
        ({"decay": 0.8, "every_n_steps": 3}, 1),
        ({"decay": 0.8}, 2),
    ],
)
def test_averages_are_those_of_a_loop(options: dict[str, Any], accumulate: int) -> None:
    network = module()
    start = deepcopy(network.state_dict())
    ema, watch = EMAWeights(**options), Watch()
    trainer(ema, watch, accumulate_grad_batches=accumulate).fit(network, Batches(), validation())
    average = {k: v for k, v in start.items() if v.is_floating_point() and k != "mask"}
    updates = 0
    warmup = options.get("warmup", True)
    for step, state in enumerate(watch.states, 1):
        if step % options.get("every_n_steps", 1):
            continue
        decay = min(options["decay"], (1 + updates) / (10 + updates))
        if warmup is False:
            decay = options["decay"]
        elif warmup is not True and step <= warmup:
            decay = 0
        updates += decay > 0
        average = {k: decay * v + (1 - decay) * state[k] for k, v in average.items()}
    assert len(watch.states) == (10 if accumulate == 1 else 6)
    raw = watch.states[-1]
    assert not torch.allclose(average["net.0.weight"], raw["net.0.weight"], rtol=1e-3)
    torch.testing.assert_close(dict(network.state_dict()), {**raw, **average}, rtol=1e-12, atol=0)
    assert network.net[1].num_batches_tracked == 10


def test_the_default_decay_is_bounded_at_first() -> None:
    ema = EMAWeights()
    assert [ema.decay_at(n, n) for n in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert ema.decay_at(10**6, 10**6) == 0.9999
    assert EMAWeights(warmup=5).decay_at(5, 0) == 0
    assert EMAWeights(warmup=5).decay_at(6, 0) == 0.1
    assert EMAWeights(warmup=0).decay_at(1, 0) == 0.1


@pytest.mark.parametrize("validate", ["ema", "raw"])
def test_both_sets_are_validated_and_the_choice_is_saved(validate: Any, tmp_path: Path) -> None:
    watch = Watch()
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    run = trainer(best, EMAWeights(0.7, validate=validate), watch, **options)
    plain = Watch()
    trainer(plain, **options, default_root_dir=tmp_path / "plain").fit(
        module(dropout=0.2), Batches(), validation()
    )
    network = module(dropout=0.2)
    run.fit(network, Batches(), validation())
    for state, expected in zip(watch.states, plain.states, strict=True):
        same(state, expected)  # averaging does not touch training
    other = "raw" if validate == "ema" else "ema"
    score, other_score = watch.metrics[-1]["val/loss"], watch.metrics[-1][f"{other}/val/loss"]
    raw_score = plain.metrics[-1]["val/loss"]
    assert (score if validate == "raw" else other_score) == pytest.approx(raw_score, rel=1e-6)
    assert abs(score - other_score) > 1e-4
    last = watch.validations[-1] if validate == "ema" else watch.states[-1]
    same(dict(network.state_dict()), last)  # after training the choice is in the network

    checkpoint = torch.load(best.best_model_path, weights_only=True)
    epoch = checkpoint["epoch"]
    assert checkpoint["ema"]["saved"] == validate
    same(checkpoint["state_dict"], watch.validations[epoch])
    sets = {validate: checkpoint["state_dict"], other: checkpoint[f"state_dict_{other}"]}
    same(sets["raw"], plain.states[STEPS * (epoch + 1) - 1])
    assert not torch.equal(sets["raw"]["net.0.weight"], sets["ema"]["net.0.weight"])
    assert torch.equal(sets["ema"]["tied.weight"], sets["ema"]["net.6.weight"])

    tested = run.test(network, validation(), ckpt_path=best.best_model_path, verbose=False)
    assert tested[0]["test/loss"] == pytest.approx(watch.metrics[epoch]["val/loss"], rel=1e-6)
    same(dict(network.state_dict()), checkpoint["state_dict"])
    run.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    for key in ("state_dict", f"state_dict_{other}"):
        same(again[key], checkpoint[key])


@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize("validate", ["ema", "raw"])
def test_a_resumed_run_is_the_unbroken_one(validate: Any, step: int, tmp_path: Path) -> None:
    def checkpointing() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    def averaging() -> EMAWeights:
        return EMAWeights(0.8, validate=validate, every_n_steps=2)

    whole, resumed = module(), module()
    trainer(averaging(), checkpointing(), enable_checkpointing=True).fit(
        whole, Batches(), validation()
    )
    path = tmp_path / f"step={step}.ckpt"
    trainer(averaging(), checkpointing(), enable_checkpointing=True).fit(
        resumed, Batches(), validation(), ckpt_path=path, weights_only=True
    )
    same(dict(resumed.state_dict()), dict(whole.state_dict()))


class Interrupt(Callback):
    def __init__(self, saves: SaveOnInterrupt) -> None:
        self.saves = saves

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.saves.requested = trainer.global_step == 3


def test_an_interrupted_run_keeps_both_sets(tmp_path: Path) -> None:
    whole, ema, watch = module(), EMAWeights(0.8), Watch()
    trainer(ema, watch).fit(whole, Batches(), validation())
    saves = SaveOnInterrupt(tmp_path / "last.ckpt")
    with pytest.raises(SystemExit):
        trainer(Interrupt(saves), EMAWeights(0.8), saves, enable_checkpointing=True).fit(
            module(), Batches(), validation()
        )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    same(saved["state_dict_raw"], watch.states[2])
    resumed = module()
    trainer(EMAWeights(0.8)).fit(
        resumed, Batches(), validation(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_checkpoint_saved_during_validation_holds_both_sets(tmp_path: Path) -> None:
    class Save(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    network, watch = module(), Watch()
    run = trainer(EMAWeights(0.8), watch, Save(), max_epochs=1, num_sanity_val_steps=0)
    run.fit(network, Batches(), validation())
    inside = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    same(inside["state_dict"], watch.validations[0])
    same(inside["state_dict_raw"], watch.states[-1])


def test_a_run_without_averages_can_be_continued_with_them(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(module(), Batches(), validation())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    ema, watch, network = EMAWeights(0.6, warmup=False), Watch(), module()
    watch.states = [{}] * STEPS
    trainer(ema, watch, max_epochs=2).fit(
        network, Batches(), validation(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True
    )
    average = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]["net.0.weight"]
    for state in watch.states[STEPS:]:
        average = 0.6 * average + 0.4 * state["net.0.weight"]
    torch.testing.assert_close(network.net[0].weight.data, average, rtol=1e-12, atol=0)


def test_half_precision_weights_have_float32_averages(tmp_path: Path) -> None:
    network, watch = module().bfloat16(), Watch()

    class Half(Batches):
        def __iter__(self) -> Any:
            return ((images.bfloat16(), labels) for images, labels in super().__iter__())

    run = trainer(EMAWeights(0.99, warmup=False), watch)
    start = network.net[0].weight.detach().float()
    run.fit(network, Half(), DataLoader(list(Half()), batch_size=None))
    average = start.clone()
    for state in watch.states:
        average = 0.99 * average + 0.01 * state["net.0.weight"].float()
    run.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["net.0.weight"], average)
    assert saved["state_dict_raw"]["net.0.weight"].dtype == torch.bfloat16
    assert torch.equal(network.net[0].weight, average.bfloat16())


def test_what_changes_in_averaged_buffers_stays() -> None:
    class Change(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            hold_chosen(trainer, pl_module)
            pl_module.net[1].running_mean.fill_(7)

    network, ema = module(), EMAWeights(0.8)
    trainer(Change(), ema).fit(network, Batches(), validation())
    raw = deepcopy(ema.raw)
    ema.hold(network, "raw")
    same({name: network.state_dict()[name] for name in raw}, raw)
    ema.hold(network, "ema")
    assert (network.net[1].running_mean == 7).all()


def test_the_folded_network_is_the_averaged_one() -> None:
    network, ema, fold = module(), EMAWeights(0.8), Reparameterize(norms="absorb")
    trainer(fold, ema).fit(network, Batches(), validation())
    assert ema.raw is not None
    images = Batches().images[0]
    torch.testing.assert_close(fold.folded(images), network.net.eval()(images), rtol=1e-9, atol=0)
    ema.hold(network, "raw")
    assert not torch.allclose(fold.folded(images), network.net(images), rtol=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for options in ({"decay": 1.0}, {"every_n_steps": 0}, {"warmup": -1}, {"validate": "both"}):
        with pytest.raises(InputError, match="EMAWeights"):
            EMAWeights(**options)
    weights = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(InputError, match="save_weights_only=False"):
        trainer(EMAWeights(), weights, enable_checkpointing=True).fit(
            module(), Batches(), validation()
        )
