"""Settings of all tests: every run draws the same weights and the same examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# No deadline: the first example of a test pays for torch's start, and the machine may be busy.
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("laws")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
