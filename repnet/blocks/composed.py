"""A block written as a list of branches, for instance in YAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from repnet.blocks.block import Block
from repnet.layers import Sum


class ComposedBlock(Block):
    """The sum of any branches.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of every branch.
        groups: of every branch.
        branches: each is called as `branch(in_channels, out_channels, stride=..., groups=...)`
            and returns a module, or None where the branch does not exist for this shape.
        **options: `attention` and `activation` of `Block`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        branches: Sequence[Callable[..., nn.Module | None]],
        stride: int = 1,
        groups: int = 1,
        **options: Any,
    ) -> None:
        modules = [b(in_channels, out_channels, stride=stride, groups=groups) for b in branches]
        super().__init__(Sum(*modules), out_channels, **options)
