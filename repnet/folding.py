"""`reparameterize`: every affine block of any model becomes its one convolution, with proof."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import nn

from repnet.equivalence import Inputs
from repnet.graph import fold_graph
from repnet.kernel import NotFoldableError
from repnet.modulewise import Norms, fold_modules
from repnet.proof import FoldReport
from repnet.surroundings import prepared

Method = Literal["modules", "graph", "auto"]


@overload
def reparameterize(
    model: nn.Module,
    example_input: Any,
    *,
    norms: Norms = "absorb",
    method: Method = "modules",
    return_report: Literal[False] = False,
) -> nn.Module: ...


@overload
def reparameterize(
    model: nn.Module,
    example_input: Any,
    *,
    norms: Norms = "absorb",
    method: Method = "modules",
    return_report: Literal[True],
) -> tuple[nn.Module, FoldReport]: ...


@torch.inference_mode(False)  # the result is to be trained, where it is wanted
def reparameterize(
    model: nn.Module,
    example_input: Any,
    *,
    norms: Norms = "absorb",
    method: Method = "modules",
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """Return a copy of `model` in which every block that is one convolution is one.

    Outermost first, each submodule that is affine in evaluation and holds at least two layers, one
    of them a convolution, is replaced under its own name; then each norm that alone consumes a
    convolution or linear layer is folded into it (a recorded run finds them). Nothing grows: a
    block whose kernel would need more parameters or multiplications than its layers stays.
    Everything is computed in float64 from the stored weights, compared with the original on
    `example_input`, and cast last; dtype, device, memory format, class and other names stay. The
    argument is not changed. The result is in evaluation mode; to reparameterize it again changes
    nothing.

    Args:
        model: any module; a compiled one is unwrapped.
        example_input: what `forward` takes: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments, on the model's device.
        norms: "absorb" folds all; "keep" makes each multi-branch block a convolution and leaves
            the norms that follow convolutions, so that the result has the keys of the plain
            architecture and can be trained or quantized. There, the bias of a folded block moves
            into the norm that alone follows it.
        method: "modules" replaces modules as said; "graph" is `reparameterize_graph`; "auto" takes
            the graph if it leaves fewer norms, and says so in the report.
        return_report: also return the `FoldReport`.

    Returns:
        The folded model, or `(model, report)`.

    Raises:
        FoldMismatchError: the folded copy differs from the model; names the first block that does.
        NotFoldableError: a part of the model is quantized, or the norms that `norms="keep"` would
            keep were absorbed before.
        ValueError: the model cannot run on `example_input`.

    Example:
        >>> folded = reparameterize(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    """
    if norms not in ("absorb", "keep") or method not in ("modules", "graph", "auto"):
        raise ValueError(f"there is no norms={norms!r} with method={method!r}")
    if norms == "keep" and method != "modules":
        raise ValueError("norms='keep' needs method='modules': a graph has no plain architecture")
    source, inputs = prepared(model), Inputs.of_example(example_input).to(torch.float64)
    if norms == "keep" and getattr(source, "reparameterized", None) == "absorb":
        raise NotFoldableError(
            f"the norms of this {type(source).__name__} were absorbed already, so that "
            "norms='keep' has none to keep; fold the train form"
        )
    if method == "graph":
        folded, report = fold_graph(source, inputs)
    else:
        folded, report = fold_modules(source, inputs, norms)
    if method == "auto":
        folded, report = _better(folded, report, source, inputs)
    folded.reparameterized = norms  # type: ignore[assignment]
    report.was_training = model.training
    return (folded, report) if return_report else folded


def _better(
    folded: nn.Module, report: FoldReport, source: nn.Module, inputs: Inputs
) -> tuple[nn.Module, FoldReport]:
    """Return the folded graph instead, if that leaves fewer norms; say why."""
    if not report.left:
        report.reason = "it keeps the class, and leaves no norm"
        return folded, report
    graph, graph_report = fold_graph(source, inputs)
    ours, theirs = len(report.left), len(graph_report.left)
    if theirs < ours:
        graph_report.reason = f"it leaves {theirs} norms, and 'modules' {ours}"
        return graph, graph_report
    report.reason = f"it keeps the class, and 'graph' leaves {theirs} norms, not fewer than {ours}"
    return folded, report
