"""`EquivalentKernelDecay`: weight decay of the kernels that will be deployed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from repnet.callbacks.reparameterize import as_example, find_network
from repnet.convolution import Layer
from repnet.equivalence import Inputs
from repnet.errors import InputError
from repnet.fold import reparameterize
from repnet.fold.observe import without_values
from repnet.lightning import SHARDING, Callback, is_a
from repnet.surroundings import prepared
from repnet.symbolic import kernel_of, twin


class EquivalentKernelDecay(Callback):
    """Decay the folded kernel of every multi-branch block instead of the weights of its branches.

    The gradient of `weight_decay / 2 * |K|^2` is added to the gradients before they are clipped. K
    is the weight that `kernel_of` gives for the block in evaluation mode: running variances are
    constants, and the weights of convolutions, gammas and layer scales receive their part. The
    optimizer's own weight decay then skips these parameters. It still applies to biases and betas,
    to plain convolutions with their norms, and to the head.

    RepVGG's authors published a different formula for their block (`get_custom_L2`, after
    arXiv:2101.03697): it divides each weight of the kernel by how strongly the branches act on it,
    `gamma^2 / var` summed over the branches that reach it, holds the gammas constant, and leaves
    the identity out. It decays the smallest `|branch weights|^2` that gives the kernel, so that
    coefficients of ordinary weight decay fit. `normalize=True` applies that formula to every block
    whose kernel is linear in the weights of its convolutions.

    The optimizer's parameter groups are split only while it steps. Schedules, other callbacks and
    checkpoints see them as they were made, and a run may be resumed with or without this callback.
    With Adam and AdamW the penalty is a part of the gradient, not decoupled from it.

    Args:
        weight_decay: the coefficient; the published one is 1e-4, normalized.
        attribute: path of the network, as in `Reparameterize`.
        normalize: use the published formula instead of the exact kernel.

    Raises:
        InputError: no block was found, the strategy shards parameters, or `normalize=True` with a
            block whose kernel is not linear in its weights.

    Example:
        >>> trainer = Trainer(callbacks=[EquivalentKernelDecay(1e-4)])
    """

    def __init__(
        self, weight_decay: float = 1e-4, attribute: str | None = None, *, normalize: bool = False
    ) -> None:
        if weight_decay < 0:
            raise InputError(f"weight_decay={weight_decay} must not be negative")
        self.weight_decay = weight_decay
        self.attribute = attribute
        self.normalize = normalize
        self.blocks: list[FoldableBlock] | None = None  # found in the first step
        self._example: Any = None
        self._handles: list[Any] = []
        self._whole: dict[Optimizer, list[dict[str, Any]]] = {}  # groups before the split

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_a(trainer.strategy, *SHARDING):
            raise InputError(
                f"EquivalentKernelDecay needs whole weights, and {type(trainer.strategy).__name__} "
                "shards them; use ddp"
            )
        others = [c for c in trainer.callbacks if isinstance(c, EquivalentKernelDecay)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise InputError("one EquivalentKernelDecay decays every block; remove the others")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = find_network(pl_module, self.attribute)
        self.blocks = None

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._example = as_example(network, Inputs(args, kwargs))
            handle.remove()  # modules with hooks are not folded

        handle = network.register_forward_pre_hook(keep, with_kwargs=True)
        self._handles = [handle]
        for optimizer in trainer.optimizers:
            restore = lambda optimizer, args, kwargs: self._restore(optimizer)
            self._handles.append(optimizer.register_step_post_hook(restore))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._restore(optimizer)  # a scaler may have skipped the step before
        if self.blocks is None:
            self.blocks = self._find(pl_module)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        blocks = [b for b in self.blocks if any(id(p) in own for p in b.parameters)]
        if trainer.world_size > 1:
            _share_statistics(blocks)
        factor = self.weight_decay
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            factor *= scaler.get_scale()  # a fused optimizer unscales in its step
        decayed: set[int] = set()
        for parameter, gradient in kernel_gradients(blocks, normalize=self.normalize):
            if parameter.grad is not None and id(parameter) in own:
                parameter.grad.add_(gradient, alpha=factor)
                decayed.add(id(parameter))
        self._split(optimizer, decayed)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._restore(*trainer.optimizers)

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        self._restore(*trainer.optimizers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._example = [], None

    def _find(self, pl_module: LightningModule) -> list[FoldableBlock]:
        network = find_network(pl_module, self.attribute)
        name = type(network).__name__
        if self._example is None:
            raise InputError(
                f"EquivalentKernelDecay: the training step does not call {name}; name what it "
                "calls with attribute="
            )
        blocks = foldable_blocks(network, self._example)
        self._example = None
        if not blocks:
            raise InputError(
                f"EquivalentKernelDecay: no block of {name} has several branches; remove it, the "
                "optimizer's weight_decay does the same there"
            )
        if self.normalize:
            for block in blocks:
                block.check_linear()
        return blocks

    def _split(self, optimizer: Optimizer, decayed: set[int]) -> None:
        """Move the parameters with these ids into groups of their own, without weight decay."""
        self._whole[optimizer] = optimizer.param_groups
        optimizer.param_groups = []
        for group in self._whole[optimizer]:
            for inside, change in ((False, {}), (True, {"weight_decay": 0.0})):
                params = [p for p in group["params"] if (id(p) in decayed) == inside]
                if params or not inside:  # the first keeps what the optimizer writes into it
                    optimizer.param_groups.append({**group, "params": params, **change})

    def _restore(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            if optimizer in self._whole:
                optimizer.param_groups = self._whole.pop(optimizer)


@dataclass(frozen=True)
class FoldableBlock:
    """A module that computes one convolution in evaluation mode."""

    name: str
    module: nn.Module
    in_channels: int
    axes: int  # spatial axes of the input

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trained weights of all modules other than norms."""
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        left_out = {id(p) for norm in norms for p in norm.parameters()}
        return [p for p in self.parameters if id(p) not in left_out and p.ndim > 1]

    def kernel(self) -> Tensor:
        """Return the weight of the convolution, `(out, in / groups, kh, kw)`, differentiable."""
        return kernel_of(self.module, self.in_channels, axes=self.axes).weight

    def check_linear(self) -> None:
        """Check that each weight enters one weight of the kernel, and linearly.

        Raises:
            InputError: a weight enters several, or not linearly.
        """
        weights = self.weights
        if not weights:
            return
        with torch.enable_grad():
            kernel = self.kernel()
            jacobian = _Jacobian(kernel, weights)
            curved = torch.autograd.grad(
                [c.sum() for c in jacobian.column_sums if c.requires_grad],
                weights,
                retain_graph=True,
                materialize_grads=True,
            )
            with isolate_rng():
                sign = torch.randn_like(kernel).sign()
            back = torch.autograd.grad(kernel, weights, sign, retain_graph=True)
            spread = jacobian @ back - jacobian.reach() * sign
        if any(c.any() for c in curved) or spread.abs().max() > 1e-3:
            raise InputError(
                f"EquivalentKernelDecay: the kernel of '{self.name}' is no sum of scaled "
                "convolutions, which the published formula needs; use normalize=False"
            )


class _Jacobian:
    """The Jacobian of a kernel with respect to weights, one row for each weight of the kernel."""

    def __init__(self, kernel: Tensor, weights: Sequence[nn.Parameter]) -> None:
        self.ones = torch.ones_like(kernel, requires_grad=True)
        # This is linear in the ones, and its derivative with respect to them is the Jacobian.
        self.column_sums = torch.autograd.grad(kernel, weights, self.ones, create_graph=True)

    def __matmul__(self, direction: Sequence[Tensor]) -> Tensor:
        return torch.autograd.grad(self.column_sums, self.ones, direction, retain_graph=True)[0]

    def reach(self) -> Tensor:
        """Return the squared length of each row, if each column has one entry."""
        return self @ [c.detach() for c in self.column_sums]


def foldable_blocks(network: nn.Module, example_input: Any) -> list[FoldableBlock]:
    """Return the outermost blocks of several branches that `reparameterize` would fold.

    Args:
        network: not changed; a compiled one is unwrapped.
        example_input: as for `reparameterize`.
    """
    source = prepared(network)
    # A compiled part is a copy here, which must share the statistics of the part that is trained.
    buffers = {name.replace("_orig_mod.", ""): b for name, b in network.named_buffers()}
    for name, buffer in list(source.named_buffers()):
        owner, _, key = name.rpartition(".")
        source.get_submodule(owner)._buffers[key] = buffers.get(name, buffer)
    fold: Any = partial(reparameterize, norms="keep", method="modules", return_report=True)
    with isolate_rng():
        try:  # tensors without values make the algebra cheap
            sketch = twin(source, device="meta")
            folded, report = fold(sketch, tree_map(without_values, example_input))
        except ValueError:  # forward reads values
            folded, report = fold(source, example_input)
    blocks = []
    for name in (found.name for found in report.folded):
        layers = (m for m in folded.get_submodule(name).modules() if isinstance(m, Layer))
        layer = next(layers)  # a padding may precede it
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        module = source.get_submodule(name)
        blocks.append(FoldableBlock(name, module, channels, layer.weight.ndim - 2))
    return blocks


def kernel_gradients(
    blocks: Iterable[FoldableBlock], *, normalize: bool = False
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter with its gradient of `|K|^2 / 2`, where K is the kernel of its block.

    Args:
        blocks: see `foldable_blocks`.
        normalize: see `EquivalentKernelDecay`.
    """
    for block in blocks:  # one at a time, so that their kernels need not be held together
        parameters = block.weights if normalize else block.parameters
        if not parameters:
            continue
        with torch.enable_grad():
            kernel = block.kernel()
            gradient = kernel.detach()
            if normalize:
                jacobian = _Jacobian(kernel, parameters)
                reach = jacobian.reach()
                gradient = jacobian @ [w.detach() for w in parameters] / reach.where(reach > 0, 1)
            found = torch.autograd.grad(kernel, parameters, gradient, allow_unused=True)
        yield from ((p, g) for p, g in zip(parameters, found, strict=True) if g is not None)


def _share_statistics(blocks: Sequence[FoldableBlock]) -> None:
    """Copy the running statistics of the first process, as DDP does before each forward.

    Until then each process has those of its own batches, with which it would decay its copy of the
    weights differently from the others.
    """
    buffers = [b for block in blocks for b in block.module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.flatten() for b in buffers])
    distributed.broadcast(flat, src=0)
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
