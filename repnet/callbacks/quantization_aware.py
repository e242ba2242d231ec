"""`QuantizationAware`: a network is fine-tuned so that int8 does it less harm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from repnet.callbacks.reparameterize import find_network
from repnet.deploy.int8.fake import quantized_activation, quantized_weight
from repnet.deploy.int8.plain import fold_branches
from repnet.errors import InputError
from repnet.layers import Sum
from repnet.lightning import Callback


class QuantizationAware(Callback):
    """Train and validate with the rounding of int8, whose gradient is that of no rounding.

    For fine-tuning: a few epochs with a hundredth to a tenth of the first learning rate. Weights of
    convolutions and linear layers are rounded with a scale per output channel (batch norms after
    them are folded later, and leave these steps as they are), their inputs to 256 steps between
    moving averages of minimum and maximum. Only `forward` changes: checkpoints hold the same keys
    as without, in float, and are deployed and quantized like any other.

    What is quantized in the end is one convolution for each block, so that is what is trained here.
    From `train.py`, take the network of plain blocks, into which `pretrained` folds a checkpoint of
    several branches. In other projects, pass `batches`: then the blocks of the network become
    convolutions with batch norm before its optimizers are made (see `fold_branches`).

    Args:
        keep: globs for names within the network (`*` matches dots, too) of layers that stay in
            float, as when it is quantized.
        momentum: of the moving averages, the share of the newest batch.
        batches: of training data, on the CPU, to fold on: inputs or `(input, ...)` tuples.
        attribute: where the network is, as in `Reparameterize`.

    Raises:
        InputError: the network has blocks of several branches and there are no `batches`, or a glob
            selects nothing.

    Example:
        >>> trainer = Trainer(callbacks=[QuantizationAware(batches=islice(loader, 10))])
    """

    def __init__(
        self,
        keep: Sequence[str] = (),
        *,
        momentum: float = 0.01,
        batches: Iterable[Any] | None = None,
        attribute: str | None = None,
    ) -> None:
        self.keep = list(keep)
        self.momentum = momentum
        self.batches = batches
        self.attribute = attribute
        self.folded: list[str] = []
        self.layers: dict[str, nn.Module] = {}
        self.ranges: dict[str, Range] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        pl_module.configure_model()  # Lightning calls it again, and it does nothing then
        network = find_network(pl_module, self.attribute)
        if self.batches is not None:
            self.folded = fold_branches(network, self.batches) or self.folded
        _refuse_branches(network)
        layers = {n: m for n, m in network.named_modules() if type(m) in _FAKE}
        for glob in self.keep:
            if not any(fnmatchcase(name, glob) for name in layers):
                raise InputError(
                    f"QuantizationAware(keep=['{glob}']) selects nothing; there are "
                    f"{', '.join(layers) or 'no layers'}"
                )
        self.layers = {
            name: layer
            for name, layer in layers.items()
            if not any(fnmatchcase(name, glob) for glob in self.keep)
        }
        self.ranges = {name: Range(self.momentum) for name in self.layers}
        for name, layer in self.layers.items():
            layer.range = self.ranges[name]  # type: ignore[assignment]
            layer.__class__ = _FAKE[type(layer)]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Each process has seen other images; what is saved next is that of the first.
        if trainer.world_size > 1:
            for found in self.ranges.values():
                if found.low is not None and found.high is not None:
                    pair = torch.stack([found.low, found.high]).to(pl_module.device)
                    found.low, found.high = trainer.strategy.reduce(pair, reduce_op="mean").unbind()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()  # before callbacks fold the network

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        return {name: [found.low, found.high] for name, found in self.ranges.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, found in self.ranges.items():
            found.low, found.high = state_dict.get(name, (None, None))

    def _restore(self) -> None:
        for layer in self.layers.values():
            layer.__class__ = _REAL[type(layer)]
            del layer.range
        self.layers = {}


class Range:
    """Moving averages of the minimum and the maximum of a layer's input.

    No module, so that it adds nothing to the keys of the network.

    Args:
        momentum: share of the newest batch.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def __call__(self, x: Tensor, *, observe: bool) -> Tensor:
        """Return `x` rounded to int8; as it is before the first batch of training."""
        if observe:
            self._observe(x.detach())
        if self.low is None or self.high is None:
            return x
        return quantized_activation(x, self.low.to(x.device), self.high.to(x.device))

    def _observe(self, x: Tensor) -> None:
        low, high = (value.float() for value in torch.aminmax(x))
        if self.low is None or self.high is None:
            if torch.isfinite(low + high):
                self.low, self.high = low, high
            return
        old = self.low.to(x.device), self.high.to(x.device)
        new = (torch.lerp(o, n, self.momentum) for o, n in zip(old, (low, high), strict=True))
        # One batch of NaN, whose step may be skipped, must not stay in the average.
        self.low, self.high = (
            torch.where(n.isfinite(), n, o) for n, o in zip(new, old, strict=True)
        )


class _Convolution:
    range: Range

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.range(x, observe=self.training)
        return self._conv_forward(x, quantized_weight(self.weight), self.bias)


class _Conv1d(_Convolution, nn.Conv1d): ...


class _Conv2d(_Convolution, nn.Conv2d): ...


class _Conv3d(_Convolution, nn.Conv3d): ...


class _Linear(nn.Linear):
    range: Range

    def forward(self, x: Tensor) -> Tensor:
        x = self.range(x, observe=self.training)
        return functional.linear(x, quantized_weight(self.weight), self.bias)


_FAKE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _Conv1d,
    nn.Conv2d: _Conv2d,
    nn.Conv3d: _Conv3d,
    nn.Linear: _Linear,
}
_REAL = {fake: real for real, fake in _FAKE.items()}


def _refuse_branches(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, Sum) and len(module) > 1:
            raise InputError(
                f"quantization-aware training is for the partially folded network, and '{name}' "
                "has branches; python train.py block=plain pretrained=RUN/checkpoints/best.ckpt "
                "pretrained_head=true callbacks=[quantization_aware] folds a run's network and "
                "trains it further. In other projects, QuantizationAware(batches=...) folds"
            )
