"""Initializes blocks so that they fold to given convolutions.

A block may be any module that `kernel_of` folds. How its kernel depends on its parameters says
which convolution of the block can take over the old weight, and which layer the old bias. The other
branches are made small, and then that weight and that bias are solved for.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.equivalence import FoldMismatchError, Inputs
from repnet.kernel import ConvKernel
from repnet.symbolic import evaluating, kernel_of

# Branches that end with a norm start with at most this share of the old kernel's size, together.
SHARE = 0.1
# Largest allowed error of a kernel, in roundings of the largest value that enters it.
ROUNDINGS = 8


@dataclass(frozen=True)
class Roles:
    """What the layers of a block do in its kernel, by name."""

    solved: list[tuple[str, str]]  # layer and parameter that take over the weight, and the bias
    path: list[str]  # norms behind that layer
    ends: list[str]  # norms at the end of the other branches


class KernelTransfer:
    """Moves the kernel of a convolution into a block of the same shape.

    Args:
        name: name of the convolution.
        conv: is not changed.
        block: its parameters are changed by the methods.
        known: a cache of the roles, which blocks of equal shape share.

    Raises:
        ValueError: nothing in the block can take over the weight or the bias.
    """

    def __init__(
        self, name: str, conv: nn.Conv2d, block: nn.Module, known: dict[Any, Roles]
    ) -> None:
        self.name, self.conv, self.block = name, conv, block
        with torch.no_grad():
            self.target = _tensors(kernel_of(conv, conv.in_channels, dtype=torch.float64))
        shape = (repr(conv), repr(block), *((n, p.shape) for n, p in block.named_parameters()))
        if shape not in known:
            known[shape] = find_roles(block, conv)
        self.roles = known[shape]
        self.path: list[Any] = [block.get_submodule(name) for name in self.roles.path]
        self.ends: list[Any] = [block.get_submodule(name) for name in self.roles.ends]

    def start(self) -> None:
        """Make the norms behind the main convolution the identity, and the other branches small."""
        for norm in self.path:
            norm.reset_parameters()
        rough = torch.promote_types(self.conv.weight.dtype, torch.float32)  # twice as fast
        kernel, leaves = self._differentiable(rough)
        scale = _slope(kernel.weight, leaves[0])
        weights = [norm.weight.clone() for norm in self.ends]
        for norm in self.ends:
            norm.weight.zero_()
        others = kernel.weight - kernel_of(self.block, self.conv.in_channels).weight
        size, old_size = (w.flatten(1).norm(dim=1) for w in (others, self.target[0]))
        factor = torch.where(size > SHARE * old_size, SHARE * old_size / size, 1.0)
        for norm, weight in zip(self.ends, weights, strict=True):
            norm.weight.copy_(weight * factor)
            norm.bias.mul_(factor)
        if self.path:
            self.path[-1].weight.div_(scale.flatten())  # the old learning rate fits the new weight

    def solve(self) -> None:
        """Set the main weight, and the bias, so that the kernel is that of the convolution."""
        kernel, leaves = self._differentiable(torch.float64)
        for parameter, leaf, target, actual in zip(
            self._solved(self.block),
            leaves,
            self.target,
            _tensors(kernel),
            strict=False,  # there may be no bias to solve for
        ):
            slope = _slope(actual, leaf)
            if not slope.abs().min() > 1e-9 * slope.abs().max():
                raise ValueError(
                    f"cannot over-parameterize '{self.name}': a scale of the block is zero, "
                    f"perhaps only in {self.conv.weight.dtype}; do it in float32"
                )
            parameter.copy_(leaf + (target - actual) / slope)

    def check(self) -> None:
        """Do nothing if the kernel is that of the convolution, up to rounding.

        Raises:
            FoldMismatchError: it is not.
        """
        kernel = kernel_of(self.block, self.conv.in_channels, dtype=torch.float64)
        for expected, actual, parameter in zip(
            self.target,
            _tensors(kernel),
            [*self._solved(self.block), self.target[1]],
            strict=False,
        ):
            scale = max(expected.abs().max().item(), parameter.abs().max().item())
            error = (expected - actual).abs().max().item()
            if not error <= ROUNDINGS * torch.finfo(self.conv.weight.dtype).eps * scale:
                raise FoldMismatchError(
                    f"the block that replaces '{self.name}' does not fold to it: the kernels "
                    f"differ by {error:.1e} at values up to {scale:.1e}",
                    self.name,
                )

    def _solved(self, block: nn.Module) -> list[Tensor]:
        return [getattr(block.get_submodule(layer), key) for layer, key in self.roles.solved]

    @torch.enable_grad()
    def _differentiable(self, dtype: torch.dtype) -> tuple[ConvKernel, list[Tensor]]:
        """Return the kernel of a copy of the block, and the copies of what is solved for."""
        copy = deepcopy(self.block).to(dtype).requires_grad_(False)
        leaves = [leaf.requires_grad_() for leaf in self._solved(copy)]
        return kernel_of(copy, self.conv.in_channels), leaves


@torch.no_grad()
def transfer_kernels(
    model: nn.Module, transfers: list[KernelTransfer], batches: list[Any] | None
) -> None:
    """Give every block the kernel of its convolution in `model`.

    Args:
        model: is not changed.
        transfers: one for each block.
        batches: inputs of the model, from which the norms learn their statistics, unless None.
    """
    norms: list[Any]
    if batches is not None:
        modules = (m for transfer in transfers for m in transfer.block.modules())
        norms = [m for m in modules if isinstance(m, _BatchNorm)]
        _learn_statistics(norms, model, transfers, batches, training=True)
    for transfer in transfers:
        transfer.start()
        transfer.solve()
    if batches is not None:
        # The norms behind a main convolution receive what its new weight gives them. They observe
        # it in evaluation mode, in which the norms in front of them compute their final maps.
        norms = [norm for transfer in transfers for norm in transfer.path]
        _learn_statistics(norms, model, transfers, batches, training=False)
        for norm in norms:  # keep the map that it was with the statistics 0 and 1
            factor = norm.weight / (1 + norm.eps) ** 0.5
            norm.weight.copy_(factor * (norm.running_var + norm.eps).sqrt())
            norm.bias.add_(factor * norm.running_mean)
        for transfer in transfers:
            transfer.solve()
    for transfer in transfers:
        transfer.check()


def _learn_statistics(
    norms: list[Any],
    model: nn.Module,
    transfers: list[KernelTransfer],
    batches: list[Any],
    *,
    training: bool,
) -> None:
    """Give norms the average statistics of what they receive.

    The model runs in evaluation mode. Each block is called on the inputs of its convolution.
    """
    receivers: dict[nn.Module, nn.Module] = {t.conv: t.block.train(training) for t in transfers}
    for norm in norms:
        observer = nn.BatchNorm2d(norm.num_features, momentum=None, affine=False)
        receivers[norm] = observer.to(norm.running_mean)

    def pass_on(module: nn.Module, args: Any, kwargs: Any) -> None:
        receivers[module](*args, **kwargs)

    handles = [m.register_forward_pre_hook(pass_on, with_kwargs=True) for m in receivers]
    try:
        with evaluating(model):
            for batch in batches:
                Inputs.of(batch)(model)
    finally:
        for handle in handles:
            handle.remove()
    for norm in norms:
        norm.load_state_dict(receivers[norm].state_dict(), strict=False)
    for transfer in transfers:
        transfer.block.train(transfer.conv.training)


@torch.enable_grad()
def find_roles(block: nn.Module, conv: nn.Conv2d) -> Roles:
    """Find the layers of a block that can take over the weight and the bias of a convolution."""
    copy: nn.Module = deepcopy(block).double().requires_grad_()
    layers: dict[str, Any] = dict(copy.named_modules())
    norms: dict[str, Any] = {
        name: m for name, m in layers.items() if isinstance(m, _BatchNorm) and m.affine
    }
    convs = {n: m for n, m in layers.items() if type(m) is nn.Conv2d}
    statistics = (s for norm in norms.values() for s in (norm.running_mean, norm.running_var))
    with torch.no_grad():  # without zeros and ones by which branches only happen to be alike
        for tensor in (*copy.parameters(), *statistics):
            tensor.uniform_(0.5, 1.5)
    weight, bias = _tensors(kernel_of(copy, conv.in_channels))
    mains = (name for name, m in convs.items() if _is_scaled(weight, m.weight))
    if (main := next(mains, None)) is None:
        raise ValueError("no branch of the block has a convolution that can take its weight")
    scale = _slope(weight, convs[main].weight)  # the norms behind it multiply it
    path = [name for name, norm in norms.items() if _gradient(scale, norm.weight).any()]
    candidates = dict.fromkeys((*reversed(path), main, *reversed(norms), *convs))
    biased = [name for name in candidates if layers[name].bias is not None]
    biases = [name for name in biased if _is_scaled(bias, layers[name].bias)]
    if not biases and conv.bias is not None:
        raise ValueError("no branch of the block has a bias")
    solved = [(main, "weight"), *((name, "bias") for name in biases[:1])]
    return Roles(solved, path, [name for name in biases if name in norms and name not in path])


def _tensors(kernel: ConvKernel) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a kernel, zero if it has none."""
    zero = kernel.weight.new_zeros(kernel.out_channels)
    return kernel.weight, zero if kernel.bias is None else kernel.bias


def _is_scaled(output: Tensor, leaf: Tensor) -> bool:
    """Return whether `output` is `a * leaf + constant`, one nonzero number a per channel."""
    if output.shape != leaf.shape:
        return False
    direction = torch.rand_like(output)
    slope = _slope(output, leaf)
    error = _gradient(output * direction, leaf) - slope * direction
    tolerance = 1e-9 * slope.abs().max()
    return bool(slope.abs().min() > tolerance and error.abs().max() <= 9 * tolerance)


def _slope(output: Tensor, leaf: Tensor) -> Tensor:
    """Return the a of `output = a * leaf + constant`, one number per channel, to multiply with."""
    first = (slice(0, 1),) * (leaf.ndim - 1)
    return _gradient(output, leaf)[:, *first]


@torch.enable_grad()
def _gradient(output: Tensor, leaf: Tensor) -> Tensor:
    """Return the gradient of the sum of `output`, which can be differentiated again."""
    if not output.requires_grad:
        return torch.zeros_like(leaf)
    total = output.sum()
    return torch.autograd.grad(total, leaf, create_graph=True, materialize_grads=True)[0]
