"""What is said and written of a run before its first step."""

from __future__ import annotations

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
from repnet.training.parameter_groups import parameter_table


class ParameterTable(Callback):
    """Print the optimizer's parameter groups, and blocks that grow where they are folded."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        from rich.console import Console
        from rich.table import Table

        for optimizer in trainer.optimizers:
            table = Table(title=type(optimizer).__name__, title_justify="left")
            table.add_column("parameters")
            for column in ("tensors", "values", "learning rate", "weight decay"):
                table.add_column(column, justify="right")
            for row in parameter_table(optimizer, pl_module):
                rate, decay = row.learning_rate, row.weight_decay
                table.add_row(
                    row.group,
                    f"{row.parameters:,}",
                    f"{row.values:,}",
                    "-" if rate is None else f"{rate:.4g}",
                    "-" if decay is None else f"{decay:.4g}",
                )
            Console().print(table)
        for line in growing_blocks(pl_module):
            print(line, flush=True)


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
    """Write `config.yaml` when training starts: then nothing is left that could be refused.

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
