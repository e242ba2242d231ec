"""`read_config`: the `config.yaml` of a run, which may have come from somebody else."""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repnet.errors import InputError, one_line

_LARGEST_FILE = 1_000_000  # bytes
_MOST_VALUES = 100_000  # a config has some hundred
# Without them there is nothing to resume.
_PARTS = ("model", "data", "loss", "optimizer", "trainer", "seed")


def read_config(path: Path) -> DictConfig:
    """Return the config that a run was started with.

    Raises:
        InputError: it is damaged or incomplete, or its aliases stand for more values than fit into
            memory.
    """
    start = f"cannot resume: '{path}'"
    if path.stat().st_size > _LARGEST_FILE:
        raise InputError(f"{start} has more than {_LARGEST_FILE:,} bytes, no config of a run has")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if _values(root, {}) > _MOST_VALUES:
            raise InputError(f"{start} stands for more than {_MOST_VALUES:,} values by its aliases")
        saved = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError) as error:
        raise InputError(f"{start} is damaged: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{start} is damaged: it is not UTF-8") from error
    missing = [key for key in _PARTS if key not in saved]
    if not isinstance(saved, DictConfig) or missing:
        raise InputError(f"{start} is damaged: it lacks {', '.join(missing)}")
    return saved


def _values(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return how many values a node stands for, infinitely many where it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until the nodes inside are counted
        inside = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        known[id(node)] = 1 + sum(_values(part, known) for part in inside)
    return known[id(node)]
