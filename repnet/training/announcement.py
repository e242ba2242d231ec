"""What is said and written of a run before its first step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from repnet.blocks import Block
from repnet.files import write_text
from repnet.kernel import NotFoldableError
from repnet.symbolic import kernel_of, twin
from repnet.training.loggers import log_hyperparameters
from repnet.training.parameter_groups import ParameterRow, parameter_table


class ParameterTable(Callback):
    """Print the optimizer's parameter groups, and blocks that grow where they are folded.

    Groups whose names differ in their number only, such as one for each layer, share a line.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        from repnet.terminal import print_table

        for optimizer in trainer.optimizers:
            table = Table(
                title=type(optimizer).__name__,
                title_justify="left",
                box=SIMPLE_HEAD,
                padding=(0, 1, 0, 0),
            )
            table.add_column("parameters")
            for column in ("tensors", "values", "learning rate", "weight decay"):
                table.add_column(column, justify="right")
            for name, rows in _alike(parameter_table(optimizer, pl_module)).items():
                table.add_row(
                    name,
                    f"{sum(row.parameters for row in rows):,}",
                    f"{sum(row.values for row in rows):,}",
                    _range([row.learning_rate for row in rows]),
                    _range([row.weight_decay for row in rows]),
                )
            print_table(table)
        network: Any = getattr(pl_module, "model", pl_module)  # without a teacher beside it
        for line in growing_blocks(network):
            print(line, flush=True)


def _alike(rows: Iterable[ParameterRow]) -> dict[str, list[ParameterRow]]:
    """Return the rows by name, those whose names differ in their first number together."""
    number = re.compile(r"\d+")
    kinds: dict[str, list[ParameterRow]] = {}
    for row in rows:
        kinds.setdefault(number.sub("#", row.group, count=1), []).append(row)
    named = {}
    for alike in kinds.values():
        numbers = list(dict.fromkeys("".join(number.findall(row.group)[:1]) for row in alike))
        named[number.sub("-".join([numbers[0], *numbers[1:][-1:]]), alike[0].group, count=1)] = (
            alike
        )
    return named


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:.4g}" if low == high else f"{low:.2g} to {high:.2g}"


def growing_blocks(network: nn.Module) -> list[str]:
    """Return a line for each kind of block whose one convolution is larger than its branches."""
    lines: dict[str, list[str]] = {}
    for name, block in network.named_modules():
        if not isinstance(block, Block):
            continue
        convs: list[Any] = [m for m in block.conv.modules() if isinstance(m, _ConvNd)]
        before = sum(conv.weight.numel() for conv in convs)
        try:
            kernel = kernel_of(twin(block.conv, device="meta"), convs[0].in_channels)
        except NotFoldableError:  # deployment will say why
            continue
        after, (height, width) = kernel.weight.numel(), kernel.weight.shape[2:]
        if after > before:
            cost = f"one {height}x{width} convolution with {after:,} instead of {before:,} weights"
            lines.setdefault(cost, []).append(name)
    return [
        f"'{names[0]}'{f' and {len(names) - 1} more' if names[1:] else ''} will deploy as {cost}"
        for cost, names in lines.items()
    ]


class RunConfig(Callback):
    """Write `config.yaml` when training starts, and tell the loggers: nothing can be refused then.

    A resumed run that has nothing left to train keeps its own.

    Args:
        config: plain data.
        directory: of the run.
    """

    def __init__(self, config: dict[str, Any], directory: Path) -> None:
        self.config = config
        self.path = directory / "config.yaml"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            write_text(self.path, yaml.safe_dump(self.config, sort_keys=False))
            log_hyperparameters(trainer.loggers, self.config)
