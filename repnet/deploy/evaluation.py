"""Both forms of a network on the same real samples, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLOSEST = 24  # samples that a report shows


@dataclass(frozen=True)
class ChangedSample:
    """A sample whose predicted class differs between the two forms.

    Args:
        index: in the evaluation split.
        train_form: predicted class.
        deploy_form: predicted class.
        margin: by how much the train form prefers its class over that of the deploy form (logits).
        rounding: by how much the arithmetic of both forms can move a margin of this sample: twice
            the largest differences of their logits to the same weights in float64.
    """

    index: int
    train_form: int
    deploy_form: int
    margin: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        """Whether the train form itself cannot tell the two classes apart at this precision."""
        return self.margin <= self.rounding


@dataclass(frozen=True)
class Close:
    """A sample whose prediction is close to flipping.

    Args:
        index: in the evaluation split.
        label: its true class.
        predicted: by the deploy form.
        runner_up: the class that comes second.
        margin: by how much the prediction is ahead (logits).
        image: as the network sees it, float `(channels, height, width)`.
    """

    index: int
    label: int
    predicted: int
    runner_up: int
    margin: float
    image: Tensor


@dataclass
class Evaluation:
    """Predictions of both forms over one split.

    Args:
        samples: evaluated by both.
        agreeing: samples with the same argmax.
        changed: the others.
        max_difference: largest absolute difference of a logit.
        max_logit: largest absolute logit of the train form.
        finite: whether every logit of both forms is a number.
        sums: correct top-1 and top-5 predictions and summed loss, by form.
        logits: of the deploy form, a CPU tensor for each batch.
        labels: likewise.
        closest: samples with the smallest margins, the smallest first.
    """

    samples: int = 0
    agreeing: int = 0
    changed: list[ChangedSample] = field(default_factory=list)
    max_difference: float = 0.0
    max_logit: float = 0.0
    finite: bool = True
    sums: dict[str, dict[str, float]] = field(
        default_factory=lambda: {
            form: dict.fromkeys(("top1", "loss"), 0.0) for form in ("train_form", "deploy_form")
        }
    )
    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    closest: list[Close] = field(default_factory=list)

    @property
    def agreement(self) -> float:
        return self.agreeing / self.samples if self.samples else 0.0

    @property
    def relative_difference(self) -> float:
        return self.max_difference / self.max_logit if self.max_logit else self.max_difference

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Means over all samples: fractions `top1` and `top5`, and the cross-entropy `loss`.

        There is no `top5` of five classes or fewer.
        """
        return {
            form: {key: value / max(1, self.samples) for key, value in sums.items()}
            for form, sums in self.sums.items()
        }


@torch.inference_mode()
def evaluate(
    train_form: nn.Module,
    deploy_form: nn.Module,
    batches: Iterable[Any],
    device: torch.device,
) -> Evaluation:
    """Run both forms on the same batches, in the same dtype and layout, and compare each sample.

    Args:
        train_form: in evaluation mode, on `device`.
        deploy_form: in evaluation mode, on `device`.
        batches: `(images, labels)`.
        device: where the batches are sent.
    """
    evaluation = Evaluation()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        logits, folded = train_form(images), deploy_form(images)
        expected, actual = logits.argmax(1), folded.argmax(1)
        difference = (logits - folded).abs()
        evaluation.finite &= bool(logits.isfinite().all() and folded.isfinite().all())
        evaluation.max_difference = larger(evaluation.max_difference, difference.max().item())
        evaluation.max_logit = max(evaluation.max_logit, logits.abs().max().item())
        differing = (expected != actual).nonzero().flatten()
        if len(differing):
            rounding = _rounding(train_form, logits, images, differing)
            rounding += _rounding(deploy_form, folded, images, differing)
            rounding *= 2  # a margin is the difference of two logits
            for position, error in zip(differing.tolist(), rounding.tolist(), strict=True):
                a, b = int(expected[position]), int(actual[position])
                margin = (logits[position, a] - logits[position, b]).item()
                index = evaluation.samples + position
                evaluation.changed.append(ChangedSample(index, a, b, margin, error))
        for form, output in (("train_form", logits), ("deploy_form", folded)):
            _count(evaluation.sums[form], output, labels)
        evaluation.closest = _closest(evaluation, images, folded, labels)
        evaluation.logits.append(folded.float().cpu())
        evaluation.labels.append(labels.cpu())
        evaluation.samples += len(images)
        evaluation.agreeing += len(images) - len(differing)
    return evaluation


def larger(first: float, second: float) -> float:
    """Return the larger of two; NaN wins, unlike in `max`."""
    return first if first != first or first > second else second


def _closest(evaluation: Evaluation, images: Tensor, logits: Tensor, labels: Tensor) -> list[Close]:
    """Return the closest samples so far, with those of a batch."""
    if logits.shape[1] < 2:
        return []
    best, classes = logits.topk(2)
    margins = best[:, 0] - best[:, 1]
    found = list(evaluation.closest)
    for i in margins.argsort()[:CLOSEST].tolist():
        if len(found) < CLOSEST or margins[i] < found[-1].margin:
            found.append(
                Close(
                    index=evaluation.samples + i,
                    label=int(labels[i]),
                    predicted=int(classes[i, 0]),
                    runner_up=int(classes[i, 1]),
                    margin=margins[i].item(),
                    image=images[i].cpu().clone(),
                )
            )
    return sorted(found, key=lambda close: close.margin)[:CLOSEST]


def _rounding(model: nn.Module, logits: Tensor, images: Tensor, samples: Tensor) -> Tensor:
    """Return the largest error of each sample's logits against the same weights in float64."""
    exact = deepcopy(model).double()(images[samples].double())
    return (exact - logits[samples].double()).abs().amax(1)


def _count(sums: dict[str, float], logits: Tensor, labels: Tensor) -> None:
    sums["top1"] += int((logits.argmax(1) == labels).sum())
    if logits.shape[1] > 5:
        ranked = logits.topk(5, dim=1).indices == labels[:, None]
        sums["top5"] = sums.get("top5", 0.0) + int(ranked.any(1).sum())
    sums["loss"] += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
