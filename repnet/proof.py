"""What a folding did, and the proof that it changed nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from repnet.equivalence import BlockError, Equivalence, FoldMismatchError, Inputs, compare
from repnet.health import norm_health, weight_health
from repnet.precision import InFloat64
from repnet.symbolic import twin


@dataclass(frozen=True)
class Fold:
    """The layers named in `replaced` became one convolution called `name`.

    Args:
        name: of the convolution.
        replaced: names of the layers.
        end: of a chain, its last layer, after which both forms have the same tensor.
    """

    name: str
    replaced: tuple[str, ...]
    end: str | None = None


@dataclass
class FoldReport:
    """What a folding did.

    Args:
        method: "modules" or "graph", and `reason`, why this one where it was chosen.
        reason: see `method`.
        folded: in the order of the module tree.
        skipped: reason by module name, for affine blocks that are not one convolution and for
            every batch norm that remains.
        left: names of the batch norms that remain.
        checks: values on which forward branches, and which a graph compares with those of the
            recorded run before it goes on, so that an input of another size may be refused.
        was_training: the model came in training mode; the returned copy is in evaluation mode.
        proof: comparison in float64 on the example input; None on the meta device.
        cast: the outputs of the folded model as it is stored and runs, in its dtype, beside the
            exact ones.
        health: what looks wrong in the norms of the model or in the folded weights.
    """

    method: str = "modules"
    reason: str = ""
    folded: list[Fold] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    checks: int = 0
    was_training: bool = False
    proof: Equivalence | None = None
    cast: Equivalence | None = None
    health: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"folded {sum(len(f.replaced) for f in self.folded)} layers into "
            f"{len(self.folded)} convolutions"
        ]
        if self.proof is not None:
            lines[0] += f", relative error {self.proof.max_relative_error:.1e} in float64"
        if self.cast is not None:
            lines[0] += f", {self.cast.max_relative_error:.1e} as it is stored"
        if self.reason:
            lines.append(f"method '{self.method}': {self.reason}")
        if self.checks:
            lines.append(
                f"forward branches on {self.checks} values: an input of another size, on which it "
                "would take another way, is refused"
            )
        if self.was_training:
            lines.append("the model was in training mode; its evaluation was folded")
        lines += [f"skipped '{name}': {reason}" for name, reason in self.skipped.items()]
        if self.left:
            lines.append(f"batch norms left: {', '.join(self.left)}")
        lines += [f"warning: {warning}" for warning in self.health]
        return "\n".join(lines)


def prove(
    report: FoldReport,
    source: nn.Module,
    folded: nn.Module,
    inputs: Inputs,
    compared: Sequence[str],
    made: Sequence[tuple[nn.Module, torch.dtype]],
    blocks: Sequence[BlockError] = (),
) -> None:
    """Compare `folded` with `source`, cast what was made, compare again; fill in the report.

    Args:
        report: receives the results.
        source: the model.
        folded: whose new layers are in float64; they are cast in place.
        inputs: of both, in float64.
        compared: names of the modules after which both have the same tensor.
        made: the new layers, and the dtype that each is stored in.
        blocks: errors that were measured already, in place of those of `compared`.

    Raises:
        FoldMismatchError: they differ; names the first block that does.
        ValueError: the source cannot run on the inputs.
    """
    without_values = any(t.is_meta for t in (*source.parameters(), *source.buffers()))
    exact: list[Any] = []
    if not without_values:
        reference = twin(source)  # a run may keep things aside, which must not stay in the model
        reference.register_forward_hook(lambda module, args, output: exact.append(output))
        try:
            with InFloat64():
                proof = compare(reference, twin(folded), [inputs], names=list(compared))
        except FoldMismatchError:
            raise
        except Exception as error:  # forward is anyone's code
            raise ValueError(f"the model cannot run on example_input: {error}") from error
        report.proof = replace(proof, blocks=tuple(blocks)) if blocks else proof
        report.proof.check()
        report.health = [*norm_health(source), *weight_health(folded, [m for m, _ in made])]
    for layer, dtype in made:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    if not without_values:
        report.cast = compare(_Recalled(exact), _Stored(twin(folded), made), [inputs], names=[])


class _Recalled(nn.Module):
    """Returns what a model returned before."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs[0]


class _Stored(nn.Module):
    """Runs a model in the dtype in which it is stored, or else with its weights in float64."""

    def __init__(self, model: nn.Module, made: Sequence[tuple[nn.Module, torch.dtype]]) -> None:
        super().__init__()
        self.model = model
        tensors = chain(model.parameters(), model.buffers())
        floating = (t.dtype for t in tensors if t.is_floating_point())
        self.dtype = next((dtype for _, dtype in made), next(floating, torch.get_default_dtype()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = Inputs(args, kwargs)
        try:
            return inputs.to(self.dtype)(self.model)
        except Exception:  # not every function knows half precision on every device
            with InFloat64():
                return inputs(self.model)
