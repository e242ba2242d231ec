"""Which samples make a batch, and which random numbers they draw."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning import Trainer
from torch import Tensor, nn

from repnet.data import FakeImages
from repnet.data.sampling import (
    Batch,
    EvaluationBatches,
    SeededDataset,
    TrainBatches,
    balanced_order,
)
from repnet.errors import InputError
from repnet.training import Classifier
from tests.commands import environment

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))


@given(SIZES)
def test_an_evaluation_takes_every_sample_once(sizes: tuple[int, int, int]) -> None:
    length, batch_size, world_size = sizes
    if length < world_size:
        with pytest.raises(InputError, match="cannot be shared by"):
            EvaluationBatches(length, batch_size, world_size=world_size)
        return
    samplers = [
        EvaluationBatches(length, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert sorted(i for share in batches for batch in share for i in batch) == [*range(length)]
    assert {len(share) for share in batches} == {len(samplers[0])}  # else a collective would hang
    assert all(1 <= len(batch) <= batch_size + 1 for share in batches for batch in share)
    if world_size == 1:
        assert all(len(batch) <= batch_size for batch in batches[0])


@given(SIZES, st.integers(0, 3))
def test_processes_take_together_what_one_takes(sizes: tuple[int, int, int], epoch: int) -> None:
    length, batch_size, world_size = sizes
    if length < batch_size * world_size:
        with pytest.raises(InputError, match=rf"data.batch_size={batch_size}.*{length} images"):
            TrainBatches(length, batch_size, seed=0, world_size=world_size)
        return
    samplers = [TrainBatches(length, batch_size * world_size, seed=1)]
    samplers += [
        TrainBatches(length, batch_size, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.sampler.set_epoch(epoch)  # as Lightning does
    one, *shares = [list(sampler) for sampler in samplers]
    assert len(one) == len(samplers[0]) == length // (batch_size * world_size)
    together = [[i for batch in batches for i in batch] for batches in zip(*shares, strict=True)]
    assert together == one
    used = [i for batch in one for i in batch]
    assert len(set(used)) == len(used)
    seeds = {batch.seed for share in shares for batch in share if isinstance(batch, Batch)}
    assert len(seeds) == sum(len(share) for share in shares)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[list[int]]:
        batches = TrainBatches(100, 10, seed=seed, **options)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(0, 0, shuffle=False) == order(0, 1, shuffle=False)
    batches = TrainBatches(100, 10, seed=0)
    batches.start = 7
    assert list(batches) == order(0, 0)[7:]
    assert list(batches) == order(0, 0)  # the next iteration is a whole one
    assert len(batches) == 10


class Drawing:
    """Each sample is one draw of each random number generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])  # noqa: NPY002


def draw() -> list[float]:
    return Drawing()[0].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [0, 3])
def test_augmentation_depends_on_the_batch_only(workers: int) -> None:
    class Data(FakeImages):
        def load(self) -> Any:
            self.class_names, self.input_shape = ["a"], (1, 1, 1)
            return Drawing(), Drawing(), Drawing()

    loader = Data(batch_size=4, num_workers=workers).train_dataloader()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    before = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    batches = torch.stack(list(loader))
    assert draw() == before  # the training process draws what it would have drawn
    expected = [SeededDataset(Drawing()).__getitems__(batch) for batch in loader.batch_sampler]
    torch.testing.assert_close(batches, torch.stack([torch.stack(b) for b in expected]))
    assert len(batches.unique()) == batches.numel()


def test_a_batch_beyond_the_training_split_is_refused_before_the_first_step() -> None:
    data = FakeImages(image_size=2, train_size=12, batch_size=13)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(InputError, match=r"data.batch_size=13 does not fit .* 12 images; .* 1 to"):
        trainer.fit(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), 10), data)


PROCESSES = """
import functools, json, os, signal, sys, warnings
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch import nn
from repnet.callbacks import (LastCheckpoint, RandomState, SafeCheckpointIO, SaveOnInterrupt,
                              SkipNonFiniteSteps)
from repnet.data import FakeImages
from repnet.training import Classifier

class Seen(Classifier):
    signalled = poisoned = False

    def training_step(self, batch, batch_index):
        images, labels = batch
        torch.rand(1 + self.global_rank)  # each process has random numbers of its own
        if self.poisoned and batch_index == 1 and self.global_rank == 1:
            images = images * float("nan")
        if self.signalled and batch_index == 1 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step((images, labels), batch_index)

def fit(processes, name, resume=None, **flags):
    seed_everything(0, verbose=False)
    norm = nn.BatchNorm1d(12) if "poisoned" in flags else nn.Identity()
    net = nn.Sequential(nn.Flatten(), norm, nn.Linear(12, 3))
    module = Seen(net, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    vars(module).update(flags)
    path = f"{name}.ckpt"
    skip = SkipNonFiniteSteps(path=f"{name}.pt")
    trainer = Trainer(accelerator="cpu", devices=processes, max_epochs=2, logger=False,
                      strategy="ddp" if processes > 1 else "auto", num_sanity_val_steps=0,
                      enable_progress_bar=False, enable_model_summary=False,
                      use_distributed_sampler=False, plugins=[SafeCheckpointIO()],
                      callbacks=[skip, LastCheckpoint(path), RandomState(), SaveOnInterrupt(path)])
    data = FakeImages(image_size=2, classes=3, train_size=265, batch_size=16 // processes)
    trainer.fit(module, data, ckpt_path=resume)
    metrics = trainer.test(module, data, verbose=False)[0]
    return {"test": metrics, "weights": module.model[2].weight.tolist()}

warnings.simplefilter("ignore")
results = {"two": fit(2, "two"), "poisoned": fit(2, "poisoned", poisoned=True)}
try:
    fit(2, "signalled", signalled=True)
except SystemExit:
    results["resumed"] = fit(2, "signalled", resume="signalled.ckpt")
torch.distributed.destroy_process_group()
if os.environ["LOCAL_RANK"] == "0":
    results["one"] = fit(1, "one")
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("processes")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES], cwd=directory, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment(**variables, LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], texts
    return directory, json.loads(texts[0][0].splitlines()[-1])


def test_two_processes_learn_and_count_like_one(processes: tuple[Path, Any]) -> None:
    _, results = processes
    one, two = results["one"], results["two"]
    torch.testing.assert_close(torch.tensor(two["weights"]), torch.tensor(one["weights"]))
    assert two["test"]["test/top1"] == one["test"]["test/top1"]  # of 53 images
    assert two["test"]["test/loss"] == pytest.approx(one["test"]["test/loss"], rel=1e-5)


def test_a_process_that_is_signalled_stops_all_and_resumes(processes: tuple[Path, Any]) -> None:
    directory, results = processes
    assert results["resumed"] == results["two"]
    states = torch.load(directory / "signalled.ckpt", weights_only=True)["callbacks"]["RandomState"]
    first, second = (state["torch"] for state in states["processes"])
    assert not first.equal(second)


def test_processes_skip_the_same_steps(processes: tuple[Path, Any]) -> None:
    directory, results = processes
    assert torch.tensor(results["poisoned"]["weights"]).isfinite().all()
    saved = torch.load(directory / "poisoned.ckpt", weights_only=True)
    assert saved["callbacks"]["SkipNonFiniteSteps"] == {"skipped": 2, "in_a_row": 0}
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    batch = torch.load(directory / "poisoned_1.pt", weights_only=True)
    assert batch["step"] == 2
    assert not (directory / "poisoned.pt").exists()


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda x: x * 12), st.integers(0, 3)
)
def test_classes_are_drawn_equally_often(classes: list[int], seed: int) -> None:
    labels = torch.tensor(classes)
    order = balanced_order(labels, torch.Generator().manual_seed(seed))
    again = balanced_order(labels, torch.Generator().manual_seed(seed))
    assert torch.equal(order, again)
    assert len(order) == len(labels)
    drawn = labels[order].bincount(minlength=5)[labels.unique()]
    times = order.bincount(minlength=len(labels))
    if len(labels) % len(drawn):
        assert drawn.max() - drawn.min() < len(drawn)  # what the last draws leave out
        return
    assert len(drawn.unique()) == 1
    for label in labels.unique():
        of_class = times[labels == label]
        assert of_class.max() - of_class.min() <= 1  # none again before all the others


def test_a_data_module_draws_classes_equally_often() -> None:
    labels = torch.tensor([0] * 36 + [1] * 10 + [2] * 2)
    for balanced, expected in ((False, [36, 10, 2]), (True, [16, 16, 16])):
        data = FakeImages(train_size=48, classes=3, batch_size=8, balanced=balanced)
        data.setup()
        data.splits[0].labels = labels  # type: ignore[index]
        loader = data.train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            epochs.append(torch.cat([batch for _, batch in loader]))
            assert epochs[-1].bincount().tolist() == expected
        assert not torch.equal(*epochs)
        assert data.class_counts() == [36, 10, 2]
