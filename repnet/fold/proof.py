"""`prove`: compares a folded copy with its model, and says which folds have to be put back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn

from repnet.equivalence import (
    TOLERANCES,
    Equivalence,
    FoldMismatchError,
    Inputs,
    compare,
)
from repnet.fold.core import Built
from repnet.precision import InFloat64
from repnet.symbolic import twin


class Proof:
    """What is known of a model, to compare folded copies with.

    Args:
        source: the model.
        inputs: of it.
        has_state: whether a run may leave something behind, so that copies have to run.
    """

    def __init__(self, source: nn.Module, inputs: Inputs, *, has_state: bool = True) -> None:
        self.source, self.inputs, self.has_state = source, inputs, has_state
        self.exact: list[Any] = []  # what the model returned last
        self.has_values = not any(t.is_meta for t in (*source.parameters(), *source.buffers()))
        self.in_float64 = True

    def measure(self, built: Built) -> Equivalence | None:
        """Return how far a folded copy is from the model; None where nothing can be compared.

        In float64, and in the dtype of the model only if that refuses float64.

        Raises:
            FoldMismatchError: the copy does not run.
            ValueError: the model does not run.
        """
        if not self.has_values:
            return None
        reference = self._runnable(self.source)
        keep = reference.register_forward_hook(lambda m, args, output: self.exact.append(output))
        names = list(dict.fromkeys(name for _, name in built.folds))
        try:
            if self.in_float64:
                inputs = self.inputs.to(torch.float64)
                self.exact.clear()
                try:
                    with InFloat64():
                        return compare(
                            reference, self._runnable(built.model), [inputs], names=names
                        )
                except FoldMismatchError:
                    raise
                except Exception:  # forward is anyone's code
                    self.in_float64 = False
            self.exact.clear()
            return compare(reference, _cast(built), [self.inputs], names=names)
        except FoldMismatchError:
            raise
        except Exception as error:
            if self.exact:
                return None  # it returns nothing that could be compared
            raise ValueError(f"the model cannot run on example_input: {error}") from error
        finally:
            keep.remove()

    def _runnable(self, model: nn.Module) -> nn.Module:
        return twin(model) if self.has_state else model

    def tolerances(self, found: Equivalence) -> tuple[float, float]:
        """Return the largest relative error of a block, and of the outputs."""
        return TOLERANCES[torch.float64 if self.in_float64 else found.dtype]

    def culprits(
        self, built: Built, rebuild: Callable[[set[str]], Built]
    ) -> tuple[Equivalence | None, dict[str, str]]:
        """Return what was measured, and the folds that are wrong, by name with the reason.

        Args:
            built: a folded copy.
            rebuild: returns a copy with the named folds alone.
        """
        message = "something outside of it reads what was folded"
        found: Equivalence | None = None
        try:
            found = self.measure(built)
        except FoldMismatchError as error:
            message = str(error.__cause__ or error)
        else:
            if found is None:
                return None, {}
            block, outputs = self.tolerances(found)
            errors = {b.name: b.relative_error for b in found.blocks}
            root = type(self.source).__name__
            wrong = {
                fold.name: f"its convolution differs from it by {errors[name or root]:.1e}, "
                f"allowed {block:.0e}"
                for fold, name in built.folds
                if not errors.get(name or root, 0.0) <= block
            }
            homes = {fold.name: name for fold, name in built.folds}
            together = [n for n in wrong if list(homes.values()).count(homes[n]) > 1]
            if together:  # folds of one graph are compared together
                others = [n for n in homes if n not in wrong]
                first = self._first_wrong([*others, *together], rebuild)
                return found, {first: wrong.get(first, "its convolution differs from it")}
            if wrong:
                return found, wrong
            if found.rest_error <= outputs:
                return found, {}
        names = list(dict.fromkeys([*(fold.name for fold, _ in built.folds), *built.graphs]))
        if not names:
            return found, {}
        return found, {self._first_wrong(names, rebuild): f"put back: {message}"}

    def _first_wrong(self, names: list[str], rebuild: Callable[[set[str]], Built]) -> str:
        """Return the first fold with which the copy is wrong, given those before it."""
        right, wrong = 0, len(names)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if self._holds(rebuild(set(names[:middle]))):
                right = middle
            else:
                wrong = middle
        return names[wrong - 1]

    def _holds(self, built: Built) -> bool:
        try:
            found = self.measure(built)
        except FoldMismatchError:
            return False
        if found is None:
            return True
        block, outputs = self.tolerances(found)
        return found.first_difference(block) is None and found.rest_error <= outputs

    def stored(self, built: Built) -> Equivalence | None:
        """Compare the copy as it is stored and runs with the exact outputs of the model."""
        if not self.exact:
            return None
        stored = _Stored(self._runnable(built.model), [dtype for _, _, dtype in built.made])
        try:
            return compare(_Recalled(self.exact), stored, [self.inputs], names=[])
        except ValueError:  # it returns nothing that could be compared
            return None


def _cast(built: Built) -> nn.Module:
    """Return a copy in which the new layers are in the dtypes that they are stored in."""
    dtypes = {id(layer): dtype for _, layer, dtype in built.made}
    copies = {key: deepcopy(layer).to(dtypes[key]) for _, layer, _ in built.made
              for key in [id(layer)]}  # fmt: skip
    return twin(built.model, replaced=copies)


class _Recalled(nn.Module):
    """Returns what a model returned before."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs[0]


class _Stored(nn.Module):
    """Runs a model in the dtype in which it is stored, or else with its weights in float64."""

    def __init__(self, model: nn.Module, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.model = model
        tensors = chain(model.parameters(), model.buffers())
        floating = (t.dtype for t in tensors if t.is_floating_point())
        self.dtype = next(iter(dtypes), next(floating, torch.get_default_dtype()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = Inputs(args, kwargs)
        try:
            return inputs.to(self.dtype)(self.model)
        except Exception:  # not every function knows half precision on every device
            with InFloat64():
                return inputs(self.model)
