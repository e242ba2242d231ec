"""The learning rate for another batch size."""

from __future__ import annotations

import math
from typing import Literal

from repnet.errors import InputError

Rule = Literal["linear", "sqrt"]


def scaled_learning_rate(base: float, base_batch: int, batch: int, rule: Rule = "linear") -> float:
    """Return the learning rate for `batch` images per step, known to be good for `base_batch`.

    Args:
        base: learning rate at `base_batch`.
        base_batch: images per optimizer step.
        batch: images per optimizer step of all devices, accumulated batches included.
        rule: "linear", `base * batch / base_batch`, for SGD (arXiv:1706.02677, section 2.1), or
            "sqrt", `base * sqrt(batch / base_batch)`, for Adam and its kin.

    Raises:
        InputError: the rule is unknown, or a batch is not positive.
    """
    if rule not in ("linear", "sqrt"):
        raise InputError(f"unknown rule '{rule}' for the learning rate; choose linear or sqrt")
    if min(base_batch, batch) < 1:
        raise InputError(f"batches must be positive, got base_batch={base_batch}, batch={batch}")
    ratio = batch / base_batch
    return base * (math.sqrt(ratio) if rule == "sqrt" else ratio)


def describe_scaling(base: float, base_batch: int, batch: int, rule: Rule = "linear") -> str:
    """Return `scaled_learning_rate` as a line: `lr 0.4 = 0.1 x 1024/256`."""
    scaled = scaled_learning_rate(base, base_batch, batch, rule)
    ratio = f"sqrt({batch}/{base_batch})" if rule == "sqrt" else f"{batch}/{base_batch}"
    return f"lr {scaled:.6g} = {base:.6g} x {ratio}"
