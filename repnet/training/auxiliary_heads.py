"""`AuxiliaryHeads`: deep supervision of any network, without a change to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repnet.errors import InputError
from repnet.symbolic import evaluating
from repnet.training.objectives import Loss, Network, Objective, based, precise


class AuxiliaryHeads(nn.Module):
    """Deep supervision (arXiv:1409.5185): small heads on what parts of the network return.

    `base + weight * mean over places of loss(head(output of the place))`

    The heads are the objective's: they are trained and are in training checkpoints, but not in the
    network, and so not in a deployed model. Compile the network, if at all, without this objective.

    Args:
        loss: called with logits `(batch, classes)` and labels.
        model: the network, whose parts are listened to while the objective runs.
        num_classes: of the heads.
        places: names of submodules that return maps `(batch, channels, height, width)`, tokens
            `(batch, tokens, channels)` or vectors `(batch, channels)`.
        input_shape: `(channels, height, width)` of an image, to find out how many channels.
        weight: of the heads' mean loss.
        hidden_channels: of a 3x3 convolution with batch norm and ReLU in front of each pooling;
            None for none.
        base: an objective in place of `Supervised(loss)`.
        **known: passed on to `base`.

    Raises:
        InputError: there is no such place, or it does not return one such tensor.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        model: nn.Module,
        num_classes: int,
        places: Sequence[str],
        input_shape: Sequence[int],
        weight: float = 0.1,
        hidden_channels: int | None = None,
        base: Objective | None = None,
        **known: Any,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.weight = weight
        self.places = list(places)
        self._model = (model,)  # in a tuple: the network is not a part of its objective
        if not self.places:
            raise InputError("auxiliary heads need places, names of parts such as stages.1")
        tensor = next(model.parameters())
        with torch.no_grad(), evaluating(model), self._listening() as outputs:
            model(tensor.new_zeros(1, *input_shape))
        self.heads = nn.ModuleList(
            _head(outputs[place], num_classes, hidden_channels) for place in self.places
        ).to(tensor.device, tensor.dtype)
        self.base = based(
            base,
            loss,
            model=model,
            num_classes=num_classes,
            input_shape=input_shape,
            **known,
        )

    def forward(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        with self._listening() as outputs:
            loss = self.base(network, images, labels)
        features = [outputs[place] for place in self.places]
        if any(len(feature) != len(labels) for feature in features):
            raise InputError(
                "auxiliary heads receive another batch than the labels: R-Drop doubles it; make "
                "the heads its base instead (objective.base)"
            )
        logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        return (
            loss + self.weight * torch.stack([self.loss(precise(x), labels) for x in logits]).mean()
        )

    @contextmanager
    def _listening(self) -> Iterator[dict[str, Tensor]]:
        """Record what the places return; outside of the context the model has no hooks."""
        outputs: dict[str, Tensor] = {}
        model = self._model[0]
        handles = []
        try:
            for place in self.places:
                part = _part(model, place)
                handles.append(part.register_forward_hook(_recorder(outputs, place)))
            yield outputs
        finally:
            for handle in handles:
                handle.remove()
        for place in self.places:
            if place not in outputs:
                raise InputError(
                    f"'{place}' was not called while {type(model).__name__} ran; name a part that "
                    "is called, of the network that is trained"
                )


def _part(model: nn.Module, place: str) -> nn.Module:
    try:
        return model.get_submodule(place)
    except AttributeError as error:
        children = ", ".join(name for name, _ in model.named_children())
        raise InputError(
            f"{type(model).__name__} has no part '{place}' for an auxiliary head; it has "
            f"{children}, and what is inside them"
        ) from error


def _recorder(outputs: dict[str, Tensor], place: str) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4:
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"'{place}' returns {kind}; an auxiliary head takes a tensor (batch, channels, "
                "height, width), (batch, tokens, channels) or (batch, channels)"
            )
        outputs[place] = output

    return record


class _TokenMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _head(feature: Tensor, num_classes: int, hidden_channels: int | None) -> nn.Sequential:
    head = nn.Sequential()
    if feature.ndim == 4:
        channels = feature.shape[1]
        if hidden_channels is not None:
            head.append(nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False))
            head.append(nn.BatchNorm2d(hidden_channels)).append(nn.ReLU())
            channels = hidden_channels
        head.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    else:
        channels = feature.shape[-1]
        if feature.ndim == 3:
            head.append(_TokenMean())
    return head.append(nn.Linear(channels, num_classes))
