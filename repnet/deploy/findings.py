"""What is found on the way, as the plain data of `report.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repnet.complexity import count_macs, count_parameters
from repnet.data import ImageDataModule
from repnet.deploy import png
from repnet.deploy.evaluation import Close, Evaluation
from repnet.deploy.kernel_pictures import kernel_pictures, pictured_blocks
from repnet.deploy.where import where
from repnet.equivalence import TOLERANCES, Equivalence
from repnet.fold import FoldReport
from repnet.text import printable

MOST_CLASSES = 200  # of a confusion matrix; of more, the pairs that are confused most
WORST_PAIRS = 50
THUMBNAIL = 112  # pixels of the longer side


def of_fold(fold: FoldReport) -> dict[str, Any]:
    """Return what was folded and left, and the proof."""
    assert fold.proof is not None
    return of_proof(fold.proof) | {
        "fold": {
            "folded": [{"name": f.name, "replaced": list(f.replaced)} for f in fold.folded],
            "skipped": fold.skipped,
            "left": fold.left,
        },
        "warnings": fold.health,
        "cast_error": None if fold.cast is None else fold.cast.max_relative_error,
    }


def of_proof(proof: Equivalence) -> dict[str, Any]:
    """Return the errors of blocks and outputs in float64."""
    block, output = TOLERANCES[torch.float64]
    return {
        "max_relative_error": proof.max_relative_error,
        "rest_error": proof.rest_error,
        "blocks": [asdict(block) for block in proof.blocks],
        "tolerance": {"block": block, "output": output},
    }


def of_evaluation(evaluation: Evaluation, data: ImageDataModule) -> dict[str, Any]:
    """Return accuracy, agreement, what is confused, and what is close to flipping."""
    return {
        "samples": evaluation.samples,
        "agreement": evaluation.agreement,
        "metrics": evaluation.metrics,
        "logit_difference": evaluation.relative_difference,
        "changed": [{**asdict(s), "tie": s.is_tie} for s in evaluation.changed],
        **_confusion(evaluation, data.class_names),
        "closest": [_close(close, data) for close in evaluation.closest],
    }


def of_network(
    train_form: nn.Module,
    deploy_form: nn.Module,
    input_shape: Sequence[int],
    blocks: Sequence[str],
) -> dict[str, Any]:
    """Return size and cost, where they are, and pictures of some of the folded `blocks`."""
    pictured = pictured_blocks(train_form, deploy_form, blocks)
    forms = {"train_form": train_form, "deploy_form": deploy_form}
    return {
        "parameters": {name: count_parameters(form) for name, form in forms.items()},
        "macs": {name: count_macs(form, input_shape) for name, form in forms.items()},
        "where": where(train_form, deploy_form, input_shape),
        "kernels": kernel_pictures(train_form, deploy_form, pictured),
    }


def _confusion(evaluation: Evaluation, names: Sequence[str]) -> dict[str, Any]:
    if not evaluation.samples:
        return {"confusion": None}
    predicted = torch.cat([logits.argmax(1) for logits in evaluation.logits])
    labels = torch.cat(evaluation.labels)
    classes = max(len(names), int(predicted.max()) + 1, int(labels.max()) + 1)
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2)
    matrix = counts.reshape(classes, classes)
    if classes <= MOST_CLASSES:
        return {
            "confusion": {
                "class_names": [printable(name) for name in names],
                "matrix": matrix.tolist(),
            }
        }
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(WORST_PAIRS, len(wrong)))
    return {
        "confusion": None,
        "worst_pairs": [
            {"true": _name(place // classes, names), "predicted": _name(place % classes, names),
             "count": count}
            for count, place in zip(counts.tolist(), places.tolist(), strict=True)
            if count
        ],
    }  # fmt: skip


def _name(index: int, names: Sequence[str]) -> str:
    return printable(names[index]) if index < len(names) else str(index)


def _close(close: Close, data: ImageDataModule) -> dict[str, Any]:
    names = data.class_names
    return {
        "index": close.index,
        "label": _name(close.label, names),
        "predicted": _name(close.predicted, names),
        "runner_up": _name(close.runner_up, names),
        "margin": close.margin,
        "image": png.encode(_pixels(close.image, data), largest=THUMBNAIL),
    }


def _pixels(image: Tensor, data: ImageDataModule) -> np.ndarray:
    """Return an image as it was before it was normalized, uint8 `(height, width, channels)`."""
    std, mean = torch.tensor(data.std), torch.tensor(data.mean)
    image = image.float() * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)
    pixels = image.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return pixels[..., :3].numpy() if pixels.shape[-1] >= 3 else pixels[..., 0].numpy()
