"""Training that begins with small images and weak augmentation (MobileOne, arXiv:2206.04040)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from repnet.callbacks.reparameterize import find_network
from repnet.data.augment import ProgressiveRandAugment
from repnet.errors import InputError
from repnet.lightning import Callback

T = TypeVar("T")
ByEpoch = Mapping[int, T] | Iterable[tuple[int, T]]


class ProgressiveResizing(Callback):
    """Resize the images that the network receives in training, to a size that grows with the epoch.

    The resizing is bilinear and antialiased, and runs on the device, in front of the network.
    Validation sees the images as they are. The data needs no change, and the run can be resumed.

    Args:
        sizes: pixels (of the shorter side, or height and width) by the epoch from which they hold,
            counted from 0, or pairs of an epoch and a size. Before the first of these epochs images
            are not resized.
        attribute: path of the network, as in `Reparameterize`. Its floating-point inputs of four
            dimensions are taken for images.

    Example:
        >>> trainer = Trainer(callbacks=[ProgressiveResizing({0: 160, 37: 192, 112: 224})])
    """

    def __init__(self, sizes: ByEpoch[int | Sequence[int]], attribute: str | None = None) -> None:
        self.sizes = {
            epoch: [size] if isinstance(size, int) else list(size)
            for epoch, size in _by_epoch("ProgressiveResizing(sizes=...)", sizes).items()
        }
        for size in self.sizes.values():
            if min(size) < 1:
                raise InputError(f"ProgressiveResizing: {size} pixels; sizes are 1 or more")
        self.attribute = attribute
        self.handle: RemovableHandle | None = None

    # The hook exists during a training step only, so that no fold or copy of the network has it.
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        size = _at(self.sizes, trainer.current_epoch)
        if size is None:
            return

        def resize(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map(lambda x: resized(x, size), (args, kwargs)) if module.training else None

        network = find_network(pl_module, self.attribute)
        self.handle = network.register_forward_pre_hook(resize, with_kwargs=True)

    def on_train_batch_end(self, *args: Any, **options: Any) -> None:
        self._remove()

    def on_exception(self, *args: Any, **options: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def resized(value: Any, size: Sequence[int]) -> Any:
    """Return images in another size, anything else unchanged.

    Args:
        value: images are floating-point tensors `(batch, channels, height, width)`.
        size: `[shorter side]` or `[height, width]`, pixels.
    """
    if not (isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()):
        return value
    old = list(value.shape[-2:])
    new = list(size) if len(size) == 2 else [round(side * size[0] / min(old)) for side in old]
    if old == new:
        return value
    # Not every device interpolates in half precision.
    wide = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    return functional.interpolate(wide, new, mode="bilinear", antialias=True).to(value.dtype)


class ProgressiveAugmentation(Callback):
    """Strengthen `repnet.data.augment.ProgressiveRandAugment` with the epoch.

    The change also reaches worker processes, persistent ones included.

    Args:
        scales: share of the full magnitude by the epoch from which it holds, counted from 0, or
            pairs of an epoch and a share. Before the first of these epochs it is 1.
        transforms: transforms that contain the augmentation; None for `trainer.datamodule.augment`.

    Raises:
        InputError: they do not contain it.

    Example:
        >>> trainer = Trainer(callbacks=[ProgressiveAugmentation({0: 0.3, 37: 0.7, 112: 1.0})])
    """

    def __init__(self, scales: ByEpoch[float], transforms: Iterable[Any] | None = None) -> None:
        self.scales = _by_epoch("ProgressiveAugmentation(scales=...)", scales)
        if not all(0 <= scale <= 1 for scale in self.scales.values()):
            raise InputError("ProgressiveAugmentation: scales are between 0 and 1")
        self.transforms = None if transforms is None else list(transforms)
        self.epoch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.epoch = 0
        if stage == "fit" and not self._found(trainer):
            raise InputError(
                "ProgressiveAugmentation found no repnet.data.augment.ProgressiveRandAugment in "
                "the augmentation of the data; use it in place of torchvision's RandAugment"
            )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The workers of the loaders start before the trainer restores its epoch.
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_progress"]["current"]
        ended = loops["epoch_loop.batch_progress"]["is_last_batch"]
        within = progress["processed"] < progress["ready"]
        self.epoch = progress["processed"] + (ended and within)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale(trainer, self.epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale(trainer, trainer.current_epoch)

    def _scale(self, trainer: Trainer, epoch: int) -> None:
        scale = _at(self.scales, epoch)
        for transform in self._found(trainer):
            transform.scale = 1.0 if scale is None else scale

    def _found(self, trainer: Trainer) -> list[ProgressiveRandAugment]:
        datamodule = getattr(trainer, "datamodule", None)
        transforms = self.transforms or getattr(datamodule, "augment", None) or []
        return list(_within(transforms))


def _within(transforms: Iterable[Any]) -> Iterator[ProgressiveRandAugment]:
    for transform in transforms:
        if isinstance(transform, ProgressiveRandAugment):
            yield transform
        else:  # containers of torchvision hold lists, not submodules
            yield from _within(getattr(transform, "transforms", ()))


def _by_epoch(name: str, values: ByEpoch[T]) -> dict[int, T]:
    try:
        by_epoch = {int(epoch): value for epoch, value in dict(values).items()}
    except (TypeError, ValueError):
        by_epoch = {}
    if not by_epoch or min(by_epoch) < 0:
        raise InputError(f"{name} maps epochs, from 0, to values, as in {{0: 160, 37: 192}}")
    return dict(sorted(by_epoch.items()))


def _at(values: Mapping[int, T], epoch: int) -> T | None:
    begun = [value for start, value in values.items() if start <= epoch]
    return begun[-1] if begun else None
