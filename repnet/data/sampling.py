"""Which samples make each batch, and with which random numbers: the same ones in every run.

Nothing here depends on how many processes load, nor on whether a run was cut and resumed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from repnet.errors import InputError


class Batch(list[int]):
    """The indices of one batch, and the seed of its augmentation."""

    def __init__(self, indices: Iterable[int], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed


class TrainBatches(Sampler[list[int]]):
    """Whole batches in a new order each epoch, a share of them for each process.

    Batch `b` of rank `r` is slice `b * world_size + r` of the epoch's order, so that all processes
    together take in step `b` what one process with `world_size` times the batch size takes. What
    is left over at the end of the order is left out.

    Args:
        length: of the data set.
        batch_size: of one process.
        seed: the same in all processes.
        rank: of this process.
        world_size: number of processes.
        shuffle: False takes the same batches in every epoch.
        labels: of the data set, int64 `(n,)`, to draw each class equally often; None to take each
            sample once.

    Raises:
        InputError: there is not one batch for each process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        labels: Tensor | None = None,
    ) -> None:
        if batch_size < 1 or length < batch_size * world_size:
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise InputError(
                f"data.batch_size={batch_size}{devices} does not fit a training split of {length} "
                f"images; choose 1 to {length // world_size}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.labels = labels
        self.epoch = 0
        self.start = 0  # batches that the next iteration leaves out: a resumed run has done them

    @property
    def sampler(self) -> TrainBatches:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next iteration takes."""
        self.epoch = epoch if self.shuffle else 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start, self.start = self.epoch, self.start, 0
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order = (
            torch.randperm(self.length, generator=generator)
            if self.labels is None
            else balanced_order(self.labels, generator)
        )
        for number in range(start, len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            indices = order[first : first + self.batch_size].tolist()
            yield Batch(indices, derived_seed(self.seed, epoch, self.rank, number))


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many indices as labels, in which all classes are equally frequent.

    No sample of a class is drawn again before all of them were.

    Args:
        labels: int64 `(n,)`.
        generator: of the random numbers.
    """
    counts = [count for count in labels.bincount().tolist() if count]
    draws = -(-len(labels) // len(counts))
    order = torch.cat(
        [
            torch.cat(
                [
                    members[torch.randperm(len(members), generator=generator)]
                    for _ in range(-(-draws // len(members)))
                ]
            )[:draws]
            for members in labels.argsort(stable=True).split(counts)
        ]
    )
    return order[torch.randperm(len(order), generator=generator)[: len(labels)]]


class EvaluationBatches(Sampler[list[int]]):
    """Every sample exactly once: rank `r` takes the samples `r`, `r + world_size`, ...

    All processes get the same number of batches, without which the collective calls of a forward
    pass would wait forever. The last batches of two processes may differ by one sample, and hold
    one more than `batch_size`.

    Args:
        length: of the data set.
        batch_size: of one process.
        rank: of this process.
        world_size: number of processes.

    Raises:
        InputError: there are fewer samples than processes.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise InputError(f"data.batch_size={batch_size} must be at least 1")
        if length < world_size:
            raise InputError(
                f"an evaluation split of {length} images cannot be shared by {world_size} devices; "
                f"use trainer.devices={max(1, length)} or more images"
            )
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size
        fewest = length // world_size
        self.batches = -(-fewest // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.batches):
            last = number == self.batches - 1
            end = None if last else (number + 1) * self.batch_size
            yield list(self.indices[number * self.batch_size : end])


class SeededDataset(Dataset[Any]):
    """A data set whose random numbers come from the seed of each `Batch`.

    The random numbers of the process that loads are not touched.

    Args:
        dataset: with `__getitem__`, or `__getitems__` for whole batches.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        with seeded(indices.seed) if isinstance(indices, Batch) else nullcontext():
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]


class EpochLoader(DataLoader[Any]):
    """A loader that starts at the first request for a batch.

    Lightning makes the iterator of a resumed run before it knows the epoch and the position, and
    worker processes would start with batches of another epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generator inside, and put them back after.

    `torch.manual_seed` would seed the accelerators too, which are busy with the model.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (what transforms draw from)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def derived_seed(*numbers: int) -> int:
    """Return 63 bits that depend on all numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
