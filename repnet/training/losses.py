"""Losses that torch does not have, of logits and labels, hard or soft."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


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
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        # expm1: 1 - p keeps its digits, and its gradient, where p is nearly 1
        focus = (-log_p.expm1()).clamp_min(0) ** self.gamma
        return -(as_soft(labels, logits) * focus * log_p).sum(1).mean()


def as_soft(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels as `(batch, classes)`, in the dtype of the logits."""
    if labels.ndim == 1:
        labels = functional.one_hot(labels, logits.shape[1])
    return labels.to(logits.dtype)
