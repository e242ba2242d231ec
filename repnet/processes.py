"""Which process writes, where several train or evaluate together."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Return whether this is the first process of all nodes, before they are connected."""
    if "RANK" in os.environ:  # torchrun's, over all nodes
        return int(os.environ["RANK"]) == 0
    # srun numbers its tasks over all nodes; Lightning starts processes of its own, which inherit
    # the number of the task.
    return not any(int(os.environ.get(n, 0)) for n in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))
