"""`observe`: runs a model under observation, and once more with other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from repnet.equivalence import Inputs
from repnet.fold.record import Recorder, RecordingError
from repnet.fold.survey import Survey, is_opaque
from repnet.precision import InFloat64
from repnet.symbolic import twin


def observe(
    model: nn.Module, inputs: Inputs, inlined: Callable[[str], bool] | None = None
) -> Survey:
    """Return what runs of a model say about its modules.

    The model runs without values where that is possible, and else as it is.

    Args:
        model: not changed.
        inputs: of `forward`, in the dtype of the model.
        inlined: names of modules that are written into the frame of their caller, for a graph.

    Raises:
        RecordingError: the model cannot run on these inputs, or not under observation.
    """
    observer = _Observer(model, inlined)
    without = Inputs(*tree_map(without_values, (inputs.args, inputs.kwargs or {})))
    sketch = twin(model, device="meta")
    try:
        runs = [observer.run(sketch, without), *observer.second(sketch, without)]
        return Survey(model, runs, sketch)
    except Exception:  # forward reads values, or a function is not implemented without them
        sketch = twin(model, device="meta")
    copy = twin(model)
    try:
        return Survey(model, [observer.run(copy, inputs), *observer.second(copy, inputs)], sketch)
    except Exception:
        pass
    try:
        with InFloat64():
            return Survey(model, [observer.run(twin(model), inputs)], sketch)
    except Exception as error:  # forward is anyone's code
        raise RecordingError(str(error)) from error


def without_values(value: Any) -> Any:
    """Return a tensor of the same shape and dtype on the meta device; anything else unchanged."""
    return value.detach().to("meta") if isinstance(value, Tensor) else value


class _Observer:
    """Runs copies of a model under observation.

    Args:
        model: the model itself.
        inlined: as for `observe`.
    """

    def __init__(self, model: nn.Module, inlined: Callable[[str], bool] | None) -> None:
        self.inlined = inlined
        self.device = next((t.device for t in chain(model.parameters(), model.buffers())), None)

    def run(self, copy: nn.Module, inputs: Inputs, *, gradients: bool = False) -> Recorder:
        """Return the frames of a run."""
        recorder = Recorder(
            copy,
            is_opaque,
            self.inlined or (lambda name: False),
            follow_numbers=self.inlined is None,
            device=self.device,
        )
        meta = any(t.is_meta for t in chain(copy.parameters(), copy.buffers()))
        given: Any = tree_map(_clone, (inputs.args, inputs.kwargs or {}))
        device = torch.device("meta") if meta else nullcontext()
        with device, torch.random.fork_rng(devices=[]):
            recorder.run(*given, gradients=gradients)
        return recorder

    def second(self, copy: nn.Module, inputs: Inputs) -> list[Recorder]:
        """Return a run on other sizes, in another dtype and with gradients, as far as possible."""
        if self.inlined is None:
            return self._first(copy, _varied(inputs))
        # A graph may be of one size: what else it depends on is seen with this size.
        return [*self._first(copy, [(inputs, True)]), *self._first(copy, _varied(inputs))]

    def _first(self, copy: nn.Module, varied: Iterable[tuple[Inputs, bool]]) -> list[Recorder]:
        """Return the first runs that are possible: together, or else one by one."""
        meta = any(t.is_meta for t in chain(copy.parameters(), copy.buffers()))
        floating = {t.dtype for t in copy.parameters() if t.is_floating_point()}
        own = next(iter(floating), torch.get_default_dtype())
        dtype = torch.float32 if torch.float64 in floating else torch.float64
        ways = [(dtype, True)], [(dtype, False), (own, True)], [(own, False)]  # dtype, gradients
        for other, complete in varied:
            for way in ways if meta else ways[2:]:
                runs = []
                for wanted, gradients in way:
                    with suppress(Exception):  # not every model takes all of this
                        if meta:
                            copy, other = copy.to(wanted), other.to(wanted)
                        run = self.run(copy, other, gradients=gradients)
                        runs.append(_marked(run, complete))
                if runs:
                    return runs
        return []


def _marked(run: Recorder, complete: bool) -> Recorder:
    """Return a run in which numbers that were given are frozen if they were not varied."""
    if not complete:
        run.calls[""][0].frozen["a number"] = None
    return run


def _varied(inputs: Inputs) -> Iterator[tuple[Inputs, bool]]:
    """Yield inputs of other sizes: all of them, the batch, the image; and other numbers, too."""
    given = tree_leaves((inputs.args, inputs.kwargs))
    has_numbers = any(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
    for numbers, batch, space in (
        *(((True, True, True), (True, True, False)) if has_numbers else ()),
        *((False, True, True), (False, True, False), (False, False, True)),
    ):

        def vary(
            value: Any,
            nested: bool = False,
            numbers: bool = numbers,
            batch: bool = batch,
            space: bool = space,
        ) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(vary(v, True) for v in value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return value + 1 if numbers else value
            if isinstance(value, dict):
                return {k: vary(v) for k, v in value.items()}
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            shape = list(value.shape)
            image = nested and value.ndim == 3
            if batch and not image:
                shape[0] += 2
            if space:
                first = 1 if image else 2 if value.ndim > 3 else 1 if value.ndim == 3 else 9
                for axis in range(first, value.ndim - (value.ndim == 3 and not image)):
                    shape[axis] += 32 * (axis if value.ndim > 3 or image else 1)
            if value.is_meta:
                return value.new_empty(shape)
            random = value.is_floating_point()
            return value.new_empty(shape).normal_() if random else value.new_zeros(shape)

        other = Inputs(
            tuple(vary(v) for v in inputs.args),
            {k: vary(v) for k, v in (inputs.kwargs or {}).items()},
        )
        yield other, numbers or not has_numbers


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
