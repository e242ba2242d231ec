"""Which process writes, where several train or evaluate together."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Return whether this is the first process of all nodes, before they are connected."""
    for name in ("RANK", "SLURM_PROCID"):  # of all nodes: torchrun's and srun's
        if name in os.environ:
            return int(os.environ[name]) == 0
    # Lightning starts the processes of each node itself.
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))
