"""When a form of the network is good enough to be shipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repnet.deploy.evaluation import Evaluation, larger

OTHER_BATCH_TOLERANCE = 0.1  # of the largest logit; exact files have `export.tolerance`


class VerificationError(RuntimeError):
    """A form does not do what the train form does; nothing but the report was saved."""


@dataclass(frozen=True)
class Gate:
    """What an exported file must hold to.

    Args:
        tolerance: largest difference of its logits to those of the deploy form, relative to the
            largest logit; a prediction may change only between classes that lie within it, which
            is a tie. Infinity where the arithmetic is coarser, and the other two limits hold.
        max_drop: how much top-1 accuracy, a fraction, may fall below that of the train form.
        min_agreement: fraction of samples with the prediction of the deploy form.
    """

    tolerance: float
    max_drop: float
    min_agreement: float


@dataclass
class Comparison:
    """An exported file beside the deploy form over one split.

    Args:
        gate: that it must hold to.
        scale: largest absolute logit of the train form.
        samples: seen by both.
        agreeing: with the same argmax.
        ties: of the others, those whose two classes lie within the tolerance.
        correct: top-1 predictions.
        difference: largest difference of a logit, relative to `scale`.
        other_batch: largest difference of a logit between an image in its batch and the same image
            in a batch of another size, relative to `scale`.
        finite: whether every logit is a number.
    """

    gate: Gate
    scale: float
    samples: int = 0
    agreeing: int = 0
    ties: int = 0
    correct: int = 0
    difference: float = 0.0
    other_batch: float = 0.0
    finite: bool = True

    @property
    def agreement(self) -> float:
        return self.agreeing / self.samples if self.samples else 0.0

    @property
    def top1(self) -> float:
        return self.correct / self.samples if self.samples else 0.0

    def add(self, actual: Tensor, expected: Tensor, labels: Tensor) -> None:
        """Count a batch of logits `(batch, classes)`.

        Raises:
            VerificationError: the file returns something of another shape.
        """
        if actual.shape != expected.shape:
            raise VerificationError(
                f"it returns {tuple(actual.shape)} for a batch, not {tuple(expected.shape)}"
            )
        actual = actual.float().cpu()
        self.finite &= bool(actual.isfinite().all())
        difference = (actual - expected).abs().max().item() / (self.scale or 1.0)
        self.difference = larger(self.difference, difference)
        predicted, before = actual.argmax(1), expected.argmax(1)
        changed = predicted != before
        rows = torch.arange(len(expected))
        if self.gate.tolerance < float("inf"):
            margin = expected[rows, before] - expected[rows, predicted]
            self.ties += int((changed & (margin <= 2 * self.gate.tolerance * self.scale)).sum())
        self.agreeing += int((~changed).sum())
        self.correct += int((predicted == labels).sum())
        self.samples += len(labels)

    def add_other_batch(self, again: Tensor, logits: Tensor, how: str) -> None:
        """Compare the logits of an image that was run in a batch of another size.

        Args:
            again: `(classes,)` in that batch.
            logits: `(classes,)` in its own.
            how: the image came.

        Raises:
            VerificationError: they differ by more than is allowed.
        """
        difference = (again.float() - logits.float()).abs().max().item() / (self.scale or 1.0)
        self.other_batch = larger(self.other_batch, difference)
        allowed = min(self.gate.tolerance, OTHER_BATCH_TOLERANCE)
        if not holds(difference, allowed):
            raise VerificationError(
                f"the logits of an image differ by {difference:.1e} of the largest where it comes "
                f"{how}, allowed {allowed:.0e}"
            )

    def refusal(self, expected_samples: int, top1: float) -> str | None:
        """Return why the file may not be shipped, None where it may.

        Args:
            expected_samples: of the split.
            top1: of the train form, a fraction.
        """
        gate = self.gate
        if self.samples != expected_samples:
            return f"it answered for {self.samples:,} of {expected_samples:,} samples"
        if not self.finite:
            return "it returns NaN or infinity"
        exact = gate.tolerance < float("inf")
        changed = self.samples - self.agreeing
        if exact and changed > self.ties:
            return f"{changed - self.ties:,} of {self.samples:,} predictions changed"
        if not holds(self.difference, gate.tolerance):
            return (
                f"its logits differ by {self.difference:.1e} of the largest, allowed "
                f"{gate.tolerance:.0e}"
            )
        if not exact and not holds(self.agreement, gate.min_agreement, least=True):
            return (
                f"{self.agreement:.2%} of its predictions are those of the deploy form, at least "
                f"{gate.min_agreement:.2%} are wanted"
            )
        if not exact and not holds(top1 - self.top1, gate.max_drop):
            return (
                f"its top-1 accuracy is {self.top1:.2%} instead of {top1:.2%}, a drop of more than "
                f"{gate.max_drop:.2%}"
            )
        return None


def holds(value: float, limit: float, *, least: bool = False) -> bool:
    """Whether a value is at most the limit, or at least it; NaN never is."""
    slack = 1e-12  # 0.9 - 0.89 is above 0.01
    return value >= limit - slack if least else value <= limit + slack


def judge(evaluation: Evaluation, tolerance: float) -> None:
    """Hold both forms' predictions against each other.

    Args:
        evaluation: over the whole split.
        tolerance: largest difference of the logits, relative to the largest logit.

    Raises:
        VerificationError: they differ.
    """
    if evaluation.samples == 0:
        raise VerificationError("the evaluation split is empty")
    if not evaluation.finite:
        raise VerificationError("a form returns NaN or infinity on the evaluation split")
    changed = [sample for sample in evaluation.changed if not sample.is_tie]
    if changed:
        first = changed[0]
        raise VerificationError(
            f"{len(changed)} of {evaluation.samples:,} predictions changed; the first is sample "
            f"{first.index}, class {first.train_form} -> {first.deploy_form}, where the train form "
            f"prefers its class by {first.margin:.2e} and rounding explains {first.rounding:.2e}"
        )
    if not holds(evaluation.relative_difference, tolerance):
        raise VerificationError(
            f"the logits differ by {evaluation.relative_difference:.1e} of the largest, allowed "
            f"deploy.tolerance={tolerance:.0e}"
        )
