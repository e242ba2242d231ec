"""Callbacks, in plain Lightning scripts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from repnet.callbacks import NonFiniteLossError, SafeCheckpointIO, StopOnNonFiniteLoss
from repnet.checkpoint import save_checkpoint
from repnet.data import FakeImages
from repnet.files import write_atomically
from repnet.training import Classifier


class Diverging(Classifier):
    """Returns NaN from the sixth step on."""

    def training_step(self, batch: Any, batch_index: int) -> Any:
        loss = super().training_step(batch, batch_index)
        return loss * float("nan") if self.global_step >= 5 else loss


@pytest.mark.parametrize("every_n_steps", [1, 100])
def test_training_stops_before_a_bad_weight_is_saved(tmp_path: Path, every_n_steps: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    module = Diverging(net, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.125))
    saver = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[SafeCheckpointIO()],
        callbacks=[StopOnNonFiniteLoss(every_n_steps), saver],
    )  # fmt: skip
    data = FakeImages(image_size=2, classes=3, train_size=12, batch_size=4)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 6 \(epoch 2, learning rate 0.125\)"
                       f".*last good checkpoint: {tmp_path / 'last.ckpt'}"):  # fmt: skip
        trainer.fit(module, data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint({"step": 1}, path)

    class NotPlain:
        pass

    with pytest.raises(Exception, match="NotPlain|Can't|local object"):
        save_checkpoint({"step": 2, "object": NotPlain()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file_that_does_not_read_back_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda p: p.write_text("old"))

    def refuse(p: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, lambda p: p.write_text("new"), check=refuse)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
