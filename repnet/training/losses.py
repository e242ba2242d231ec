"""Losses that torch does not have, of logits and labels, hard or soft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from repnet.errors import InputError


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's, with weights of the classes in a form that a config can hold.

    Args:
        class_weights: see `weights_of_classes`.
        label_smoothing: mixes the labels with `1 / classes`.
        class_counts: as in `weights_of_classes`.
    """

    def __init__(
        self,
        class_weights: str | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        *,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(label_smoothing=label_smoothing)
        weights = weights_of_classes(class_weights, class_counts)
        self.register_buffer("weight", weights, persistent=False)


class BinaryCrossEntropy(nn.Module):
    """Each class on its own, as in "ResNet strikes back" (arXiv:2110.00476).

    Args:
        label_smoothing: mixes the labels with `1 / classes`.
        sum_classes: sum over the classes instead of the mean; the batch is always averaged.
    """

    def __init__(self, label_smoothing: float = 0.0, *, sum_classes: bool = False) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.sum_classes = sum_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        soft = as_soft(labels, logits)
        smooth = soft * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        loss = functional.binary_cross_entropy_with_logits(logits, smooth)
        return loss * logits.shape[1] if self.sum_classes else loss


class FocalLoss(nn.Module):
    """`-sum over classes of y (1 - p)^gamma log p`, with softmax (after arXiv:1708.02002, eq. 4).

    Args:
        gamma: how much less a class counts that is predicted well already; 0 for cross-entropy.
        class_weights: see `weights_of_classes`.
        class_counts: as in `weights_of_classes`.
    """

    weight: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        class_weights: str | Sequence[float] | None = None,
        *,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        weights = weights_of_classes(class_weights, class_counts)
        self.register_buffer("weight", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        # expm1: 1 - p keeps its digits, and its gradient, where p is nearly 1
        focus = (-log_p.expm1()).clamp_min(0) ** self.gamma
        weight = 1 if self.weight is None else self.weight
        return -(as_soft(labels, logits) * weight * focus * log_p).sum(1).mean()


def weights_of_classes(
    wanted: str | Sequence[float] | None, counts: Sequence[int] | None
) -> Tensor | None:
    """Return the factor of each class in a loss, `(classes,)`; None for equal ones.

    Args:
        wanted: a number of at least 0 for each class; "balanced" for `images / (classes * images of
            the class)`, with which all classes count the same; None for no weights.
        counts: training images of each class, needed for "balanced".

    Raises:
        InputError: not as many numbers as classes, or something else.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        if counts is None:
            raise InputError("class_weights=balanced needs class_counts, images of each class")
        images = torch.tensor(counts, dtype=torch.float32).clamp_min(1)
        return images.sum() / (len(counts) * images)
    numbers = isinstance(wanted, Sequence) and all(isinstance(w, int | float) for w in wanted)
    if not numbers or not all(0 <= weight < float("inf") for weight in wanted):  # type: ignore[operator]
        raise InputError(
            f"class_weights={wanted} is neither 'balanced' nor a list of numbers of at least 0"
        )
    if counts is not None and len(wanted) != len(counts):
        raise InputError(
            f"class_weights has {len(wanted)} numbers, the data has {len(counts)} classes"
        )
    return torch.tensor(wanted, dtype=torch.float32)


def as_soft(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels as `(batch, classes)`, in the dtype of the logits."""
    if labels.ndim == 1:
        labels = functional.one_hot(labels, logits.shape[1])
    return labels.to(logits.dtype)
