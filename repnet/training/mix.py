"""Mixing the images of a batch, and their labels with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from repnet.errors import InputError


class Mix:
    """Mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899), or for each batch one of both.

    Each image is mixed with its neighbor in the batch, which must be shuffled, in one proportion
    for the whole batch, drawn from Beta(alpha, alpha).

    Args:
        num_classes: of the labels.
        mixup_alpha: 0 for no mixup.
        cutmix_alpha: 0 for no CutMix.
        probability: that a batch is mixed at all.

    Raises:
        InputError: both are 0, one is negative, or `probability` is not within 0 to 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        probability: float = 1.0,
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise InputError(
                f"mixing needs mixup_alpha or cutmix_alpha above 0, not {mixup_alpha} and "
                f"{cutmix_alpha}; for none, mix=null"
            )
        if not 0 <= probability <= 1:
            raise InputError(f"mix.probability={probability} must lie between 0 and 1")
        self.num_classes = num_classes
        self.probability = probability
        self.transforms: list[v2.Transform] = []
        if mixup_alpha:
            self.transforms.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha:
            self.transforms.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return float images `(batch, channels, height, width)` and labels `(batch, classes)`.

        Args:
            images: of the same shape.
            labels: int64 `(batch,)`, or soft `(batch, classes)`.
        """
        if torch.rand(()) < self.probability:
            chosen = self.transforms[int(torch.randint(len(self.transforms), ()))]
            return chosen(images, labels)
        if labels.ndim == 1:
            labels = functional.one_hot(labels, self.num_classes).float()
        return images, labels
