"""`FoldReport`: what a fold did, what it left, and the proof."""

from __future__ import annotations

from dataclasses import dataclass, field

from repnet.equivalence import Equivalence


@dataclass(frozen=True)
class Fold:
    """The layers named in `replaced` became one convolution called `name`.

    Args:
        name: name of the convolution.
        replaced: names of the layers.
        end: name of the last layer of a chain, after which both forms have the same tensor.
    """

    name: str
    replaced: tuple[str, ...]
    end: str | None = None


@dataclass
class FoldReport:
    """What a fold did.

    Args:
        method: "auto", "modules" or "graph".
        folded: the new convolutions, in the order of the module tree.
        graphs: names of the modules that became graphs, because their forward wrote branches.
        skipped: reason by module name, for blocks that are not one convolution and for every batch
            norm that remains.
        put_back: the part of `skipped` that was folded and failed its proof.
        failed: the first proof that did not hold; None where the first one did.
        left: names of the batch norms that remain.
        checks: number of values on which forward branches, and which a graph compares with those
            of the recorded run, so that it may refuse an input of another size.
        was_training: whether the model came in training mode; the copy is in evaluation mode.
        proof: comparison in float64 on the example input; None on the meta device.
        cast: outputs of the folded model as it is stored and runs, beside the exact ones.
        health: what looks wrong in the norms of the model or in the folded weights.
    """

    method: str = "auto"
    folded: list[Fold] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    put_back: dict[str, str] = field(default_factory=dict)
    failed: Equivalence | None = None
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
        if self.checks:
            lines.append(
                f"forward branches on {self.checks} values: an input on which it would take "
                "another way is refused"
            )
        if self.was_training:
            lines.append("the model was in training mode; its evaluation was folded")
        if self.graphs:
            named = ", ".join(_quoted(name) for name in self.graphs)
            lines.append(f"became graphs, because their forward adds branches: {named}")
        for name, reason in self.skipped.items():
            lines.append(f"skipped {_quoted(name)}: {reason}")
        if self.left:
            lines.append(f"batch norms left: {', '.join(self.left)}")
        lines += [f"warning: {warning}" for warning in self.health]
        return "\n".join(lines)


def _quoted(name: str) -> str:
    return f"'{name}'" if name else "the model"
