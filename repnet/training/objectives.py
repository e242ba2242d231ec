"""What is minimized in training.

An objective is called as `objective(network, images, labels)` and returns a scalar: `network` runs
the model, `labels` are int64 `(batch,)` or soft `(batch, classes)`. Objectives nest through `base`.
In a config, give `base` as `{_target_: ..., _partial_: true}`: it receives the loss and all else
that its signature asks for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from repnet.errors import InputError
from repnet.symbolic import evaluating

Network = Callable[[Tensor], Any]
Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Network, Tensor, Tensor], Tensor]


class Supervised(nn.Module):
    """The loss of the logits, and of those of auxiliary heads, where the network returns several.

    `loss(main) + auxiliary_weight * mean(loss(auxiliary))`

    Args:
        loss: called with logits `(batch, classes)` and labels.
        auxiliary_weight: of the auxiliary heads of GoogLeNet (0.3 in arXiv:1409.4842), Inception
            and others that return more than one tensor in training.
    """

    def __init__(self, loss: Loss, auxiliary_weight: float = 0.3) -> None:
        super().__init__()
        self.loss = loss
        self.auxiliary_weight = auxiliary_weight

    def forward(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        main, *auxiliary = (precise(logits) for logits in all_logits(network(images)))
        loss = self.loss(main, labels)
        if not auxiliary:
            return loss
        others = torch.stack([self.loss(logits, labels) for logits in auxiliary])
        return loss + self.auxiliary_weight * others.mean()


class RDrop(nn.Module):
    """R-Drop (arXiv:2106.14448): two passes with different dropout shall predict the same.

    `(loss(first) + loss(second)) / 2 + alpha * (KL(first, second) + KL(second, first)) / 2`, with
    the divergences of the predicted distributions averaged over the batch. Both passes are one, of
    a batch that holds each image twice: a step costs two, and batch norm sees the doubled batch,
    whose mean and (biased) variance over equal images are those of the batch itself.

    Args:
        loss: called with logits `(batch, classes)` and labels.
        alpha: of the divergence; the paper takes 0.6 for image classification, 1 to 5 for text.
        model: checked for dropout or stochastic depth, without which both passes are equal.
        base: an objective in place of `Supervised(loss)`; it sees the doubled batch.
        **known: passed on to `base`.

    Raises:
        InputError: `model` has no dropout.
    """

    def __init__(
        self,
        loss: Loss,
        alpha: float = 1.0,
        *,
        model: nn.Module | None = None,
        base: Objective | None = None,
        **known: Any,
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise InputError(f"R-Drop needs alpha >= 0, not {alpha}")
        if model is not None:
            _check_dropout(model)
        self.alpha = alpha
        self.base = based(base, loss, model=model, **known)

    def forward(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        recorded = Recorded(network)
        loss = self.base(recorded, torch.cat([images, images]), torch.cat([labels, labels]))
        return loss + self.alpha * symmetric_divergence(*recorded.logits.chunk(2))


def rdrop_loss(
    logits: Tensor,
    logits_other: Tensor,
    labels: Tensor,
    loss: Loss = functional.cross_entropy,
    alpha: float = 1.0,
) -> Tensor:
    """Return the loss of R-Drop from two passes over the same images; see `RDrop`.

    Args:
        logits: `(batch, classes)` of one pass.
        logits_other: of another, with different dropout.
        labels: of the batch.
        loss: called with logits and labels.
        alpha: of the divergence.

    Example:
        >>> loss = rdrop_loss(model(images), model(images), labels, alpha=0.6)
    """
    supervised = (loss(precise(logits), labels) + loss(precise(logits_other), labels)) / 2
    return supervised + alpha * symmetric_divergence(logits, logits_other)


def symmetric_divergence(logits: Tensor, logits_other: Tensor) -> Tensor:
    """Return `(KL(p, q) + KL(q, p)) / 2` of two predictions, averaged over the batch."""
    first, second = (precise(x).log_softmax(1) for x in (logits, logits_other))
    # KL(p, q) + KL(q, p) = sum (p - q) (log p - log q)
    return ((first.exp() - second.exp()) * (first - second)).sum(1).mean() / 2


class Distillation(nn.Module):
    """Distilling the Knowledge in a Neural Network (arXiv:1503.02531, section 2).

    `(1 - alpha) * loss + alpha * T^2 * KL(softmax(teacher / T), softmax(student / T))`, with the
    divergence averaged over the batch.

    The teacher sees the student's own images, after augmentation and mixing, and so must have been
    trained with the same normalization. It is frozen, in no state dict and in no checkpoint, and
    goes to the images' device when it is first called.

    Args:
        loss: called with logits `(batch, classes)` and labels.
        teacher: of the same classes; see `repnet.training.load_teacher`.
        alpha: share of the teacher, 0 to 1.
        temperature: T.
        num_classes: the teacher must have as many.
        input_shape: `(channels, height, width)`; with it the teacher is tried at once.
        base: an objective in place of `Supervised(loss)`.
        **known: passed on to `base`.

    Raises:
        InputError: the teacher does not take these images, or has other classes.
    """

    def __init__(
        self,
        loss: Loss,
        teacher: nn.Module,
        alpha: float = 0.5,
        temperature: float = 4.0,
        *,
        num_classes: int | None = None,
        input_shape: Sequence[int] | None = None,
        base: Objective | None = None,
        **known: Any,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1 or temperature <= 0:
            raise InputError(
                "distillation needs alpha from 0 to 1 and a temperature above 0, not "
                f"alpha={alpha}, temperature={temperature}"
            )
        self.alpha, self.temperature = alpha, temperature
        # In a tuple, because a module that is an attribute would be trained and saved.
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self.base = based(base, loss, num_classes=num_classes, input_shape=input_shape, **known)
        if input_shape is not None:
            _try_teacher(teacher, input_shape, num_classes)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        recorded = Recorded(network)
        loss = self.base(recorded, images, labels)
        student, teacher = recorded.logits, self._teach(recorded.images)
        if student.shape != teacher.shape:
            raise InputError(
                f"the teacher's logits are {tuple(teacher.shape)}, the student's "
                f"{tuple(student.shape)}; the teacher must have the same classes"
            )
        divergence = functional.kl_div(
            (precise(student) / self.temperature).log_softmax(1),
            (precise(teacher) / self.temperature).log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
        return (1 - self.alpha) * loss + self.alpha * self.temperature**2 * divergence

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Tensor:
        parameter = next(self.teacher.parameters(), images)
        if parameter.device != images.device:
            self.teacher.to(images.device)
        if self.teacher.training:
            self.teacher.eval()
        return all_logits(self.teacher(images.to(parameter.dtype)))[0].to(images.dtype)


class Recorded:
    """A network that keeps what it received and the logits that it returned last."""

    images: Tensor
    logits: Tensor

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, images: Tensor) -> Any:
        outputs = self.network(images)
        self.images, self.logits = images, all_logits(outputs)[0]
        return outputs


def based(base: Objective | None, loss: Loss, **known: Any) -> Objective:
    """Return the objective that another builds upon, `Supervised(loss)` for None.

    Args:
        base: an objective, or a partial that makes one from `loss` and those of `known` that its
            signature asks for.
        loss: called with logits and labels.
        **known: the model, its number of classes and the like; None for what is not known.
    """
    if base is None:
        return Supervised(loss)
    if not isinstance(base, functools.partial):
        return base
    accepted = inspect.signature(base).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    given = {
        key: value
        for key, value in known.items()
        if value is not None and (key in accepted or takes_all) and key not in base.keywords
    }
    return base(loss=loss, **given)


def all_logits(outputs: Any) -> list[Tensor]:
    """Return the logits that a network's output holds, those of its main head first.

    Args:
        outputs: a tensor; a tuple or list whose first entry is that of the main head; or a mapping
            with `logits` or `out`, whose keys that begin with `aux` are auxiliary. None is left
            out.

    Raises:
        InputError: anything else.
    """
    if isinstance(outputs, Mapping):
        main = [outputs[key] for key in ("logits", "out") if key in outputs][:1]
        found = [*main, *(v for k, v in outputs.items() if str(k).startswith("aux"))]
    else:
        main = found = [*outputs] if isinstance(outputs, tuple | list) else [outputs]
    found = [logits for logits in found if logits is not None]
    if not main or not found or not all(isinstance(logits, Tensor) for logits in found):
        kind = f"{list(outputs)}" if isinstance(outputs, Mapping) else type(outputs).__name__
        raise InputError(
            f"the network returns {kind} in training; logits are wanted: a tensor, a tuple of "
            "tensors, or a dict with 'logits' or 'out'"
        )
    return found


def precise(logits: Tensor) -> Tensor:
    """Return logits in float32 where they are in half precision, in which losses lose digits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


# Under what names modules of torch, torchvision, timm and others keep their rate of dropping.
_RATES = ("drop_prob", "drop_rate", "drop_path_rate", "dropout")


def drops(model: nn.Module) -> bool:
    """Return whether dropout or stochastic depth is active in a model in training."""
    for module in model.modules():
        dropping = isinstance(module, StochasticDepth) or "drop" in type(module).__name__.lower()
        names = (*_RATES, "p") if dropping else _RATES
        rates = [getattr(module, name, None) for name in names]
        if any(isinstance(rate, float | int) and rate > 0 for rate in rates):
            return True
    return False


def _check_dropout(model: nn.Module) -> None:
    if not drops(model):
        raise InputError(
            f"R-Drop compares two passes with different dropout, and {type(model).__name__} has "
            "none: set model.dropout=0.1 (before the head) or, for residual networks, "
            "model.drop_path=0.1 (stochastic depth)"
        )


def _try_teacher(teacher: nn.Module, input_shape: Sequence[int], num_classes: int | None) -> None:
    shape = "x".join(str(size) for size in input_shape)
    tensor = next(teacher.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), evaluating(teacher):
            logits = all_logits(teacher(tensor.new_zeros(1, *input_shape)))[0]
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the teacher does not take images of {shape}: {reason}") from error
    if num_classes is not None and logits.shape != (1, num_classes):
        raise InputError(
            f"the teacher returns {tuple(logits.shape[1:])} for each image, the student has "
            f"{num_classes} classes; take a teacher that was trained on the same classes"
        )
