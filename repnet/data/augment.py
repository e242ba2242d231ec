"""`ProgressiveRandAugment`, whose strength can be changed while worker processes use it."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import v2


class ProgressiveRandAugment(v2.RandAugment):
    """torchvision's RandAugment of a magnitude that is scaled from outside (arXiv:1909.13719).

    Args:
        num_ops: operations on each image.
        magnitude: at scale 1, of `num_magnitude_bins`.
        **options: of `torchvision.transforms.v2.RandAugment`.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9, **options: Any) -> None:
        self.shared = torch.ones(()).share_memory_()  # by all processes
        super().__init__(num_ops, magnitude, **options)

    @property
    def scale(self) -> float:
        """Between 0 and 1."""
        return float(self.shared)

    @scale.setter
    def scale(self, value: float) -> None:
        self.shared.fill_(value)

    @property
    def magnitude(self) -> int:
        """What an operation takes now."""
        return round(self.full_magnitude * self.scale)

    @magnitude.setter
    def magnitude(self, value: int) -> None:
        self.full_magnitude = value
