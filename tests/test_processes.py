"""Which process is the first of all, by the environment that launchers set."""

from __future__ import annotations

import pytest

from repnet.processes import is_main_process


@pytest.mark.parametrize(
    ("environment", "main"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),  # torchrun, second node
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started in an interactive job
        ({"LOCAL_RANK": "1"}, False),  # Lightning's own, second device
        ({"NODE_RANK": "1"}, False),  # the same, first device of the second node
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
    ],
)
def test_the_first_process_of_all_nodes(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], main: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() is main
