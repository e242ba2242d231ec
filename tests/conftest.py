"""Settings of all tests: every run draws the same weights and the same examples."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import settings

# No deadline: the first example of a test pays for torch's start, and the machine may be busy.
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("laws")

# The tensors are small, and pytest's workers share the cores: on 2 cores, 2 workers with 2 threads
# each took 60 s for test_kernel.py, and 10 to 16 s with 1 thread each (other jobs were running).
torch.set_num_threads(1)

# Where there is no GPU, fake tensors (of torch.export, of tracing) come with a fake one, for which
# the first backward pass starts threads. Tests that fork and train would then fail, so that pass
# is run now.
torch.ones(1, requires_grad=True).backward()


with suppress(ImportError):  # comes with TensorBoard
    from absl import logging

    # Hydra, when it configures logging, closes all handlers. This one would close the stream to
    # which it writes, pytest's, unless it is the standard error of the process.
    logging.get_absl_handler().python_handler.stream = sys.__stderr__


# Files of few, long tests go first: at the end, one worker would be alone with them.
LONG = ["test_train.py", "test_sweep.py", "test_bench.py", "test_exporting.py", "test_int8.py",
        "test_ddp.py", "test_resume.py", "test_deploy.py", "test_formats_torch.py",
        "test_experiments.py", "test_formats.py", "test_wheel.py"]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
