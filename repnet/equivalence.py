"""`compare`: do two models compute the same function, and if not, where do they part?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from repnet.symbolic import evaluating


class FoldMismatchError(RuntimeError):
    """A folded model differs from its original.

    Args:
        message: what differs, by how much.
        block: name of the first block that differs, None where no single block does.
        equivalence: all that was measured.
    """

    def __init__(
        self, message: str, block: str | None = None, equivalence: Equivalence | None = None
    ) -> None:
        super().__init__(message)
        self.block = block
        self.equivalence = equivalence


# Largest relative error of a block, and of the outputs, by the dtype in which both models ran. In
# float64 a fold adds about 1e-15, in the others as much as any other order of summation does. The
# errors of all blocks add up in deep nets, so that the outputs get more room.
TOLERANCES = {
    torch.float64: (1e-9, 1e-6),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (2e-2, 5e-2),
    torch.bfloat16: (1e-1, 2e-1),
}


@dataclass(frozen=True)
class BlockError:
    """The relative error that one replaced module adds, given the reference's own input."""

    name: str
    relative_error: float


@dataclass(frozen=True)
class Equivalence:
    """How far a candidate's outputs are from a reference's.

    Args:
        samples: batch elements compared.
        max_error: largest absolute difference of an output.
        max_relative_error: largest over batches of `max |difference| / max |reference|`.
        agreement: fraction of the samples with the same argmax over dimension 1.
        blocks: one entry per module that the candidate replaced, in order of execution.
        rest_error: `max_relative_error` where every replaced module returns what its original did,
            that is, the error that the rest adds; the same as `max_relative_error` without blocks.
            It is the proof where outputs jump, as the order of detections with equal scores does.
        dtype: of the outputs, the least precise one.
    """

    samples: int
    max_error: float
    max_relative_error: float
    agreement: float
    blocks: tuple[BlockError, ...]
    rest_error: float = 0.0
    dtype: torch.dtype = torch.float64

    def first_difference(self, tolerance: float) -> BlockError | None:
        """Return the first block in execution order with an error above `tolerance` (or NaN)."""
        return next((b for b in self.blocks if not b.relative_error <= tolerance), None)

    def check(
        self, block_tolerance: float | None = None, output_tolerance: float | None = None
    ) -> None:
        """Do nothing if all errors are within tolerance.

        Args:
            block_tolerance: largest relative error of a block; None for that of the dtype.
            output_tolerance: largest relative error of the outputs; None for that of the dtype.

        Raises:
            FoldMismatchError: an error is larger; it names the first block that differs.
        """
        usual = TOLERANCES.get(self.dtype, TOLERANCES[torch.bfloat16])
        block_tolerance = usual[0] if block_tolerance is None else block_tolerance
        output_tolerance = usual[1] if output_tolerance is None else output_tolerance
        block = self.first_difference(block_tolerance)
        if block is not None:
            raise FoldMismatchError(
                f"block '{block.name}' differs from its original: relative error "
                f"{block.relative_error:.1e}, allowed {block_tolerance:.0e}; it is the first of "
                f"{len(self.blocks)} replaced blocks that does",
                block.name,
                self,
            )
        if not self.rest_error <= output_tolerance:
            raise FoldMismatchError(
                f"the outputs differ: relative error {self.rest_error:.1e}, allowed "
                f"{output_tolerance:.0e}, although every one of the {len(self.blocks)} replaced "
                "blocks agrees; something outside them changed",
                equivalence=self,
            )


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    batches: Iterable[Any] | Tensor,
    *,
    names: list[str] | None = None,
) -> Equivalence:
    """Run both models on the same inputs, in evaluation mode, and measure the difference.

    A block is a module that has the same name and another class in both models. Each block of the
    candidate receives what its original received (the reference's outputs stand in for those of
    earlier blocks), so that a block's error is its own. Training flags are as before at the end.

    Args:
        reference: the model that is right.
        candidate: the model that should equal it.
        batches: inputs on the models' device and of their dtype: tensors, `(input, target)` pairs
            (the target is not used), `Inputs`, or one tensor.
        names: of the blocks; None for those that differ in class.

    Raises:
        FoldMismatchError: the reference runs, the candidate does not.
        ValueError: there is nothing to compare.
    """
    names = _replaced_modules(reference, candidate) if names is None else names
    errors: dict[str, list[float]] = {name: [] for name in names}
    order: dict[str, None] = {}
    absolute, relative, rest = [0.0], [0.0], [0.0]
    dtypes = {torch.float64}
    samples = agreeing = 0
    with torch.no_grad(), evaluating(reference), evaluating(candidate):
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            inputs = Inputs.of(batch)
            outputs: dict[str, list[Any]] = defaultdict(list)
            with _hooked(reference, names, partial(_record, outputs)):
                expected = _seeded(inputs, reference)
            order |= dict.fromkeys(outputs)
            try:
                with _hooked(candidate, names, partial(_replay, outputs, errors)):
                    replayed = _seeded(inputs, candidate)
                actual = _seeded(inputs, candidate) if names else replayed
            except Exception as error:  # forward is anyone's code
                raise FoldMismatchError(
                    f"the candidate does not run: {error}; it replaces {', '.join(names)}"
                ) from error
            for name in names:
                if outputs[name]:  # called less often than its original
                    errors[name].append(inf)
            rest.append(_difference(expected, replayed)[1])
            tensors = (*_tensors(expected), *_tensors(actual))
            dtypes |= {t.dtype for t in tensors if t.is_floating_point()}
            difference, ratio = _difference(expected, actual)
            absolute.append(difference)
            relative.append(ratio)
            n, same = _agreement(expected, actual)
            samples, agreeing = samples + n, agreeing + same
    if samples == 0:
        raise ValueError("there is nothing to compare: no batch, or no tensor in the outputs")
    return Equivalence(
        samples,
        max_error=_worst(absolute),
        max_relative_error=_worst(relative),
        agreement=agreeing / samples,
        blocks=tuple(
            BlockError(name or type(reference).__name__, _worst(errors[name])) for name in order
        ),
        rest_error=_worst(rest),
        dtype=max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Wrap a batch of a data loader; of an `(input, target)` pair the input is taken."""
        if isinstance(batch, Inputs):
            return batch
        return cls((batch[0] if isinstance(batch, tuple | list) else batch,))

    @classmethod
    def of_example(cls, example_input: Any) -> Inputs:
        """Wrap a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
        if isinstance(example_input, dict):
            return cls(kwargs=example_input)
        return cls(example_input if isinstance(example_input, tuple) else (example_input,))

    def __call__(self, model: nn.Module) -> Any:
        # A forward may work in place.
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (self.args, self.kwargs or {}))
        return model(*args, **kwargs)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same with every floating-point tensor in `dtype`."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return Inputs(*tree_map_only(Tensor, cast, (self.args, self.kwargs)))


def _replaced_modules(reference: nn.Module, candidate: nn.Module) -> list[str]:
    """Return the names of modules that differ in class, outermost only; '' is the model itself."""
    theirs = dict(candidate.named_modules())
    names: list[str] = []
    for name, module in reference.named_modules():
        if any(not n or name.startswith(f"{n}.") for n in names):
            continue
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            continue  # the norm behind it was folded into it, and is the end of the block
        other = theirs.get(name, module)
        # A block may keep its padding layer in front of the convolution.
        resized = type(module) is nn.Sequential and len(list(other.children())) != len(module)
        if type(other) is not type(module) or resized:
            names.append(name)
    return names


def _seeded(inputs: Inputs, model: nn.Module) -> Any:
    """Run the model with the same random numbers every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return inputs(model)


@contextmanager
def _hooked(model: nn.Module, names: list[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(name, module, args, output)` whenever a named module has run."""
    handles = [model.get_submodule(n).register_forward_hook(partial(hook, n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(
    outputs: dict[str, list[Any]], name: str, module: nn.Module, args: Any, output: Any
) -> None:
    outputs[name].append(tree_map_only(Tensor, Tensor.clone, output))  # in-place ReLU follows


def _replay(
    outputs: dict[str, list[Any]],
    errors: dict[str, list[float]],
    name: str,
    module: nn.Module,
    args: Any,
    output: Any,
) -> Any:
    """Note the error of a module, and let it return what its original did."""
    if not outputs[name]:  # called more often than its original
        errors[name].append(inf)
        return output
    expected = outputs[name].pop(0)
    errors[name].append(_difference(expected, output)[1])
    both_tensors = isinstance(expected, Tensor) and isinstance(output, Tensor)
    return expected.to(output) if both_tensors else expected


def _difference(expected: Any, actual: Any) -> tuple[float, float]:
    """Return the largest absolute and the largest relative difference of all tensors.

    Both are infinite for other shapes, and for a tensor in the place of a container. The relative
    one is `max |difference| / max |expected|`.
    """
    theirs, ours = _tensors(expected), _tensors(actual)
    kinds = [[(t.shape, t.is_floating_point()) for t in tensors] for tensors in (theirs, ours)]
    if kinds[0] != kinds[1] or isinstance(expected, Tensor) != isinstance(actual, Tensor):
        return inf, inf
    measured = [_differ(a, b.to(a.device)) for a, b in zip(theirs, ours, strict=True) if a.numel()]
    # A tensor that is zero but for rounding has no scale of its own.
    floor = 1e-7 * max((scale for _, scale in measured), default=0.0)
    ratios = (_ratio(error, max(scale, floor)) for error, scale in measured)
    return _worst(error for error, _ in measured), _worst(ratios)


def _differ(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference of two tensors, and the largest finite entry.

    Masked entries, infinite in both, are equal. The difference is NaN if no entry is finite. For
    integers and booleans it is the fraction of the entries that differ, and the entry is 1.
    """
    if not expected.is_floating_point():
        return (expected != actual).double().mean().item(), 1.0
    a, b = expected.double(), actual.double()
    difference = torch.where(a == b, 0.0, (a - b).abs())  # infinities may be equal
    scale = torch.where(a.isfinite(), a.abs(), 0.0)
    if not a.isfinite().any():
        return nan, 0.0
    return difference.max().item(), scale.max().item()


def _ratio(error: float, scale: float) -> float:
    if error == 0.0 or isnan(error):
        return error
    return error / scale if scale else inf


def _worst(errors: Iterable[float]) -> float:
    """Return the largest, or 0 if there is none; NaN counts as larger than all numbers."""
    return max(errors, key=lambda error: (isnan(error), error), default=0.0)


def _agreement(expected: Any, actual: Any) -> tuple[int, int]:
    """Return the batch size, and how many samples have the same argmax.

    Outputs that are not one tensor count as one sample.
    """
    theirs, ours = _tensors(expected), _tensors(actual)
    if not theirs:
        return 0, 0
    samples = len(theirs[0]) if isinstance(expected, Tensor) and theirs[0].ndim else 1
    if [t.shape for t in theirs] != [t.shape for t in ours]:
        return samples, 0
    a, b = theirs[0], ours[0].to(theirs[0].device)
    if a.dtype == torch.bool:
        a, b = a.int(), b.int()
    if not isinstance(expected, Tensor) or a.ndim < 2 or not a.numel():
        return samples, samples  # no classes to choose from, such as boxes of a detector
    same = (a.argmax(1) == b.argmax(1)).reshape(len(a), -1).all(1)
    return len(a), int(same.sum())


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in an output, complex ones as pairs of numbers."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors_in(output)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in the attributes of an object."""
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | set | frozenset):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name, None) for field in fields(value)]
    elif not isinstance(value, int | float | str | bool | type | nn.Module | None):
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield leaf
            elif isinstance(getattr(leaf, "__dict__", None), dict) and not callable(leaf):
                yield from (v for v in vars(leaf).values() if isinstance(v, Tensor))
    for part in parts:
        yield from tensors_in(part)
