"""Data modules of someone's own, in commands and in Python."""

from __future__ import annotations

import json
import os
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from repnet.data import OwnData, as_image_data
from repnet.errors import InputError
from tests.commands import ROOT, run

MODULE = """
    import torch
    from lightning import LightningDataModule
    from torch.utils.data import DataLoader, TensorDataset

    class Cells(LightningDataModule):
        class_names = ["round", "square"]
        mean, std = [0.5], [0.25]

        def __init__(self, root=".", batch_size=4):
            super().__init__()
            self.batch_size = batch_size

        def prepare_data(self):
            self.prepared = True

        def setup(self, stage):
            generator = torch.Generator().manual_seed(0)
            images = torch.rand(24, 1, 16, 16, generator=generator)
            labels = torch.arange(24) % 2
            images[labels == 1] += 1
            whole = [(images[i], int(labels[i])) for i in range(24 * self.prepared)]
            self.parts = {"fit": (whole[:12], whole[12:16]), "test": whole[16:]}[stage]
            if stage == "fit":
                self.train, self.val = self.parts

        def train_dataloader(self):
            return DataLoader(self.train, self.batch_size, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.val, self.batch_size)

        def test_dataloader(self):
            return DataLoader(self.parts, self.batch_size)
"""


def test_a_data_module_of_ones_own_is_trained_resumed_evaluated_and_deployed(
    tmp_path: Path,
) -> None:
    (tmp_path / "cells.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "cells.yaml").write_text("_target_: cells.Cells\nroot: .\n")
    paths = f"{ROOT}:{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    options: Any = {"cwd": tmp_path, "PYTHONPATH": paths}
    cpu = "trainer.accelerator=cpu"
    done = run("train.py", "--config-dir", "conf", "data=cells", "trainer.max_epochs=1", cpu,
               "pictures=false", "hydra.run.dir=run", **options)  # fmt: skip
    assert "12 / 4 / 8 images to train / validate / test, 1x16x16, 2 classes" in done.stdout
    assert "trust=[cells]" in done.stdout  # of the command that deploys
    refused = run("train.py", "resume=run", "trainer.max_epochs=2", code=2, **options)
    assert "trust=[cells]" in refused.stderr
    run("train.py", "resume=run", "trainer.max_epochs=2", "trust=[cells]", **options)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 2
    run("train.py", "eval=run", "trust=[cells]", cpu, "hydra.run.dir=eval", **options)
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["samples"] == 8
    run("deploy.py", "ckpt=run", "trust=[cells]", "data.batch_size=2", "data.root=elsewhere",
        "device=cpu", **options)  # fmt: skip
    report = json.loads((tmp_path / "run" / "deploy" / "report.json").read_text())
    assert (report["verified"], report["samples"]) == (True, 8)
    model = json.loads((tmp_path / "run" / "deploy" / "model.json").read_text())
    assert model["data"]["class_names"] == ["round", "square"]
    assert model["data"]["mean"] == [0.5]


class Plain(LightningDataModule):
    """Twelve images of three classes, whose loaders tests change."""

    def __init__(self, **loaders: Any) -> None:
        super().__init__()
        self.num_classes = 3
        images = torch.arange(12.0).reshape(12, 1, 1, 1).expand(12, 1, 2, 2)
        self.dataset = TensorDataset(images, torch.arange(12) % 3)
        self.loaders = loaders

    def loader(self, split: str, **options: Any) -> Any:
        if split in self.loaders:
            return self.loaders[split]
        return DataLoader(self.dataset, 4, **options)

    def train_dataloader(self) -> Any:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader("val")

    def test_dataloader(self) -> Any:
        return self.loader("test")


def test_processes_prepare_data_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    events = []

    class Slow(Plain):
        def prepare_data(self) -> None:
            events.append("begin")
            time.sleep(0.2)
            events.append("end")

    with ThreadPoolExecutor(2) as pool:  # the lock is one between processes, too
        list(pool.map(lambda _: as_image_data(Slow()).setup(), range(2)))
    assert events == ["begin", "end"] * 2


def numbers(loader: Any) -> list[list[float]]:
    return [images[:, 0, 0, 0].tolist() for images, _ in loader]


def test_shuffled_batches_can_be_resumed_and_shared() -> None:
    data = as_image_data(Plain())
    loader: Any = data.train_dataloader()
    whole = numbers(loader)
    loader.batch_sampler.start = 1
    assert numbers(loader) == whole[1:]
    loader.batch_sampler.set_epoch(1)
    assert numbers(loader) != whole
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, overfit_batches=0)
    assert numbers(data.val_dataloader()) == [[1, 3, 5, 7], [9, 11]]
    assert numbers(data.train_dataloader()) == whole[1:2]
    assert data.class_names == ["0", "1", "2"]


def test_a_sampler_of_ones_own_is_kept_on_one_device() -> None:
    module = Plain()
    sampler = WeightedRandomSampler([0.0] * 11 + [1.0], 6)
    module.loaders["train"] = DataLoader(module.dataset, 3, sampler=sampler)
    data = as_image_data(module)
    assert numbers(data.train_dataloader()) == [[11.0] * 3] * 2
    assert data.batch_size == 3
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(InputError, match="WeightedRandomSampler, which cannot be shared"):
        data.train_dataloader()


def test_loaders_keep_their_collation_and_find_the_classes_of_a_subset() -> None:
    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.stack(images) / 2, torch.stack(labels)

    module = Plain()
    del module.num_classes
    module.dataset.classes = ["a", "b", "c"]
    part = Subset(module.dataset, range(6))
    module.loaders["train"] = DataLoader(part, 2, shuffle=True, collate_fn=collate)
    data = as_image_data(module)
    data.setup()
    assert data.class_names == ["a", "b", "c"]
    seen = sorted(number for batch in numbers(data.train_dataloader()) for number in batch)
    assert seen == [0, 0.5, 1, 1.5, 2, 2.5]
    assert "mean" not in data.describe()  # so that no prediction is made with another one


class Moving(Plain):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Scaling(Plain):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Untested(Plain):
    test_dataloader = LightningDataModule.test_dataloader


def stream() -> Any:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    return DataLoader(Stream())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Moving, "Moving changes batches in on_after_batch_transfer"),
        (Scaling, "Scaling changes batches in on_before_batch_transfer"),
        (Untested, "Untested has no test_dataloader"),
        (lambda: Plain(val=[1]), "Plain returns list of NoneType from val_dataloader"),
        (lambda: Plain(train=stream()), "returns DataLoader of Stream from train_dataloader"),
        (
            lambda: Plain(test=DataLoader(TensorDataset(torch.zeros(2, 2, 2), torch.zeros(2)))),
            r"yields \(float32 \(1, 2, 2\), float32 \(1,\)\) from test_dataloader",
        ),
        (
            lambda: Plain(test=DataLoader([{"image": 1}])),
            r"yields \(dict\) from test_dataloader",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        OwnData(make()).setup()


def test_classes_must_be_known_and_other_objects_are_no_data() -> None:
    module = Plain()
    del module.num_classes
    with pytest.raises(InputError, match="give it the attribute class_names"):
        OwnData(module).setup()
    with pytest.raises(InputError, match="list is no LightningDataModule"):
        as_image_data([])
