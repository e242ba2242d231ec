"""Training that meets NaN: stop or skip."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from repnet.callbacks import (
    LastCheckpoint,
    NonFiniteLossError,
    SafeCheckpointIO,
    SkipNonFiniteSteps,
    StopOnNonFiniteLoss,
)
from repnet.data import FakeImages
from repnet.training import Classifier, layerwise_parameter_groups, warmup_cosine


class Poisoned(Classifier):
    """Sees NaN in one image of each batch whose number in the run is in `bad`."""

    bad: tuple[int, ...] = ()
    mode = "images"

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        self.count = getattr(self, "count", -1) + 1
        self.before = {key: value.clone() for key, value in self.state_dict().items()}
        if self.count in self.bad and self.mode == "images":
            batch[0][1, 0, 0, 0] = math.nan

    def training_step(self, batch: Any, batch_index: int) -> Any:
        loss = super().training_step(batch, batch_index)
        if self.count in self.bad and self.mode == "gradients":
            loss = loss + InfiniteGradient.apply(next(self.parameters())).sum() * 0
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        changed = [not torch.equal(v, self.before[k]) for k, v in self.state_dict().items()]
        self.changes = [*getattr(self, "changes", []), any(changed)]


class InfiniteGradient(torch.autograd.Function):
    """Finite forwards, infinite backwards."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, math.inf)


def fit(module: Classifier, callbacks: list[Any], **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[SafeCheckpointIO()], callbacks=callbacks, max_epochs=2, gradient_clip_val=1.0,
        use_distributed_sampler=False, enable_checkpointing=any(
            isinstance(callback, LastCheckpoint) for callback in callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, FakeImages(image_size=2, classes=3, train_size=32, batch_size=4))


def poisoned(*bad: int, mode: str = "images", lr: float = 0.1, **options: Any) -> Poisoned:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))
    sgd = functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=0.1)
    module = Poisoned(net, 3, optimizer=sgd, **options)
    module.bad, module.mode = bad, mode
    return module


@pytest.mark.parametrize("mode", ["images", "gradients"])
def test_a_skipped_step_leaves_weights_and_statistics(
    tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = poisoned(2, 9, mode=mode)
    skip = SkipNonFiniteSteps(path=tmp_path / "nan.pt")
    fit(module, [skip])
    assert module.changes == [number not in (2, 9) for number in range(16)]
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert skip.state_dict() == {"skipped": 2, "in_a_row": 0}
    told = capsys.readouterr().out.splitlines()
    assert "step 3 was skipped" in told[0]
    assert f"(1 skipped so far); its batch is in {tmp_path / 'nan.pt'}" in told[0]
    assert "step 10 was skipped" in told[1]
    saved = torch.load(tmp_path / "nan.pt", weights_only=True)
    images, labels = saved.pop("batch")
    assert saved == {"epoch": 0, "step": 3, "batch_index": 2}
    assert images.shape == (4, 3, 2, 2)
    assert labels.shape == (4,)
    assert images.isnan().any() == (mode == "images")


def test_without_it_the_same_batch_ruins_the_model() -> None:
    module = poisoned(2)
    fit(module, [])
    assert not any(value.isfinite().all() for value in module.model.parameters())


@pytest.mark.parametrize("bad", [4, 5])
def test_accumulated_gradients_are_left_out_together(bad: int) -> None:
    start = poisoned()
    ends = []
    for numbers, skipped in (((bad,), 1), ((4, 5), 1)):
        module = poisoned(*numbers)
        module.load_state_dict(start.state_dict())
        torch.manual_seed(0)  # of the order of the images
        skip = SkipNonFiniteSteps()
        fit(module, [skip], accumulate_grad_batches=2)
        assert skip.skipped == skipped
        ends.append(module.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)  # batches 4 and 5 are one step


def test_too_many_skipped_steps_in_a_row_stop_the_run() -> None:
    bad = (1, 2, 4, 5, 6, 7, 8)
    with pytest.raises(NonFiniteLossError, match=r"^4 steps in a row .* step 8 .*learning rate"):
        fit(poisoned(*bad), [SkipNonFiniteSteps(limit=4)])


@pytest.mark.parametrize("lag", [0, 100])
def test_a_stopped_run_keeps_its_batch_and_no_bad_checkpoint(tmp_path: Path, lag: int) -> None:
    path = tmp_path / "last.ckpt"
    stop = StopOnNonFiniteLoss(lag, path=tmp_path / "nan_batch.pt")
    with pytest.raises(
        NonFiniteLossError,
        match=rf"the loss is nan at step 6 .*; its batch is in {tmp_path / 'nan_batch.pt'}; last "
        rf"good checkpoint: {path}\. Try",
    ):
        fit(poisoned(5), [stop, LastCheckpoint(path, every_n_steps=1)])
    images, _ = torch.load(tmp_path / "nan_batch.pt", weights_only=True)["batch"]
    assert images.isnan().sum() == 1
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 5
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize(("value", "saved"), [(math.inf, True), (math.nan, False)])
def test_buffers_may_hold_infinity(tmp_path: Path, value: float, saved: bool) -> None:
    module = poisoned()
    module.register_buffer("mask", torch.tensor([0.0, value]))
    callbacks = [StopOnNonFiniteLoss(), LastCheckpoint(tmp_path / "last.ckpt", every_n_steps=1)]
    with nullcontext() if saved else pytest.raises(NonFiniteLossError, match="'mask' is not"):
        fit(module, callbacks)
    assert (tmp_path / "last.ckpt").exists() == saved


def test_a_loss_on_its_way_is_looked_at_after_so_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("repnet.callbacks.nonfinite._Step.has_arrived", lambda step: False)
    module = poisoned(2)
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 3 "):
        fit(module, [StopOnNonFiniteLoss(lag=2)])
    assert module.count == 2 + 2


def test_the_first_bad_batch_of_a_step_is_kept(tmp_path: Path) -> None:
    seen = []

    class Watched(Poisoned):
        def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
            super().on_train_batch_start(batch, batch_index)
            seen.append(batch[0])

    module = poisoned(4, 5)
    module.__class__ = Watched
    skip = SkipNonFiniteSteps(path=tmp_path / "nan_batch.pt")
    fit(module, [skip], accumulate_grad_batches=2)
    images, _ = torch.load(tmp_path / "nan_batch.pt", weights_only=True)["batch"]
    torch.testing.assert_close(images, seen[4], equal_nan=True, rtol=0, atol=0)
    assert skip.state_dict() == {"skipped": 1, "in_a_row": 0}


def layered(*bad: int, mode: str) -> Poisoned:
    """Learns at 0.1 in its last layer and at 0.05 in the one before it."""
    module = poisoned(*bad, mode=mode, scheduler=warmup_cosine)
    module.model.insert(1, nn.Linear(12, 12))
    module.parameter_groups = functools.partial(layerwise_parameter_groups, decay=0.5)
    return module


def test_messages_count_epochs_from_1_and_name_the_group_of_the_learning_rate(
    tmp_path: Path,
) -> None:
    # Step 10 of 16, the second in epoch 2; the schedule has gone on to step 11 when it is seen.
    rate = f"{0.1 * (1 + math.cos(math.pi * 9 / 16)) / 2:.3g}"
    bad = r"\(epoch 2, highest learning rate {}, of 'layer 1 weights'\)"
    with pytest.raises(NonFiniteLossError, match=rf"step 10 {bad.format(rate)}"):
        fit(layered(9, mode="images"), [StopOnNonFiniteLoss()])
    with pytest.raises(NonFiniteLossError, match=rf"step 10 {bad.format(rate)}"):
        fit(layered(9, mode="images"), [SkipNonFiniteSteps(limit=1)])
    last = LastCheckpoint(tmp_path / "last.ckpt", every_n_steps=1)
    rate = f"{0.05 * (1 + math.cos(math.pi * 9 / 16)) / 2:.3g}"
    where = rf"step 10 \(epoch 2, learning rate {rate}, of 'layer 0 weights'\)"
    with pytest.raises(NonFiniteLossError, match=rf"'model.1.weight' is not finite after {where}"):
        fit(layered(9, mode="gradients"), [StopOnNonFiniteLoss(), last])


def test_a_finite_loss_does_not_save_weights_that_are_not(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    module = poisoned(3, mode="gradients")
    with pytest.raises(NonFiniteLossError, match=r"'model.1.weight' is not finite after step 4"):
        fit(module, [StopOnNonFiniteLoss(), LastCheckpoint(path, every_n_steps=1)])
    assert torch.load(path, weights_only=True)["global_step"] == 3
