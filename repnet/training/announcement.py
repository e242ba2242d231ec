"""`ParameterTable`: what is trained, and how, before the first step."""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer

from repnet.training.parameter_groups import parameter_table


class ParameterTable(Callback):
    """Print the optimizer's parameter groups: sizes, learning rates, weight decay."""

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
