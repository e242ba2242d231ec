"""`reparameterize_graph`: what no module holds by itself folds too."""

from __future__ import annotations

from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from repnet.convolution import Layer
from repnet.equivalence import TOLERANCES, Inputs, compare
from repnet.modulewise import copy_with, why_left
from repnet.precision import InFloat64
from repnet.proof import FoldReport, prove
from repnet.regions import GraphFolding, Results
from repnet.shapes import observe
from repnet.surroundings import has_hooks, prepared
from repnet.symbolic import twin
from repnet.tracing import RecordingError, record, same_as_recorded


@overload
def reparameterize_graph(
    model: nn.Module, example_input: Any, *, return_report: Literal[False] = False
) -> nn.Module: ...


@overload
def reparameterize_graph(
    model: nn.Module, example_input: Any, *, return_report: Literal[True]
) -> tuple[nn.Module, FoldReport]: ...


@torch.inference_mode(False)  # the result is to be trained, where it is wanted
def reparameterize_graph(
    model: nn.Module, example_input: Any, *, return_report: bool = False
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """Return the graph of `model`, in which every region that is one convolution is one.

    A run on the example is recorded as a `torch.fx.GraphModule`; every value in it that is a
    convolution of an earlier one, however `forward` writes that, becomes this convolution. So
    functional batch norms, branches and residual sums inside a forward, and norms of linear layers
    fold, which replacing modules cannot reach. Nothing grows, and a value with another user stays.
    Sizes stay variable, except where forward branches on them: there the graph checks that later
    inputs take the same branch. A module that depends on the values of tensors is called as it is,
    with graphs in the place of its parts; if that is the model itself, it keeps its class.

    Args:
        model: any module; not changed.
        example_input: as for `reparameterize`.
        return_report: also return the `FoldReport`.

    Returns:
        The folded graph in evaluation mode, or `(graph, report)`.

    Raises:
        FoldMismatchError: the graph differs from the model; names the first convolution that does.
        NotFoldableError: a part of the model is quantized already.
        ValueError: the model cannot run on `example_input`.

    Example:
        >>> folded = reparameterize_graph(timm.create_model("repvgg_a0"), torch.randn(1, 3, 64, 64))
    """
    folded, report = fold_graph(prepared(model), Inputs.of_example(example_input))
    report.was_training = model.training
    return (folded, report) if return_report else folded


def fold_graph(source: nn.Module, inputs: Inputs) -> tuple[nn.Module, FoldReport]:
    """Return a folded graph of `source`, with proof; see `reparameterize_graph`.

    Args:
        source: not changed.
        inputs: of its forward.
    """
    inputs = inputs.to(torch.float64)
    conversion = _Conversion(source, inputs)
    model = conversion.convert("")
    results = conversion.results
    prove(results.report, source, model, inputs, [], results.made, results.errors)
    return model, results.report


class _Conversion:
    """Turns modules into folded graphs, outermost first; `results` has what else is found."""

    def __init__(self, source: nn.Module, inputs: Inputs) -> None:
        self.source, self.inputs = source, inputs
        self.calls = observe(source, inputs)
        self.results = Results(FoldReport(method="graph"))

    def convert(self, name: str) -> nn.Module:
        """Return a graph of the module, or a copy with graphs in it where it has none."""
        module = self.source.get_submodule(name)
        if name not in self.calls:
            return self._unchanged(module, name)
        if name and not any(isinstance(m, Layer) for m in module.modules()):
            return self._unchanged(module, name)
        if has_hooks(module):
            self.results.report.skipped[name] = "it has a forward hook, and so stays a module"
            return self._with_parts(module, name)
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        inputs = self.inputs if name == "" else _with_values(self.calls[name].inputs, like)
        try:
            recording = record(_evaluated(module), inputs.to(like.dtype), _is_leaf)
            graph = fx.GraphModule(recording.root, recording.graph, type(module).__name__)
            checks = sum(node.target is same_as_recorded for node in graph.graph.nodes)
            _check_recording(_evaluated(module), graph, inputs)
        except RecordingError as error:
            self._fail(name, str(error))
            return self._with_parts(module, name)
        self.results.report.checks += checks
        _guard_dimensions(graph.graph)
        prefix = f"{name}." if name else ""
        for inner in {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}:
            if inner in recording.opaque or _holds_modules(module.get_submodule(inner)):
                if reason := recording.opaque.get(inner):
                    self._fail(prefix + inner, reason)
                parts = self._with_parts(module.get_submodule(inner), prefix + inner)
                graph.set_submodule(inner, parts)
        return GraphFolding(graph, prefix, inputs, self.results).fold()

    def _fail(self, name: str, reason: str) -> None:
        self.results.failures[name] = reason
        self.results.report.skipped[name] = f"its forward cannot be recorded: {reason}"

    def _with_parts(self, module: nn.Module, name: str) -> nn.Module:
        children = {
            id(child): self.convert(f"{name}.{child_name}" if name else child_name)
            for child_name, child in module.named_children()
        }
        if isinstance(module, _BatchNorm):
            return self._unchanged(module, name)
        return copy_with(module, children)

    def _unchanged(self, module: nn.Module, name: str) -> nn.Module:
        for inner, m in module.named_modules(prefix=name):
            if isinstance(m, _BatchNorm):
                self.results.leave(
                    inner, why_left(m, inner, inner in self.calls, self.results.failures)
                )
        return copy_with(module, {})


def _check_recording(module: nn.Module, graph: nn.Module, inputs: Inputs) -> None:
    """Raise `RecordingError` unless a recorded graph computes what its module does.

    A forward that asks whether its input is a tensor takes another way when it is recorded.
    """
    if any(t.is_meta for t in chain(module.parameters(), module.buffers())):
        return
    try:
        with InFloat64():
            result = compare(module, twin(graph), [inputs], names=[])
    except Exception as error:  # forward is anyone's code
        raise RecordingError(f"what was recorded does not run: {error}") from error
    if not result.max_relative_error <= TOLERANCES[torch.float64][0]:
        raise RecordingError("what was recorded computes something else")


def _guard_dimensions(graph: fx.Graph) -> None:
    """Let the graph check that its inputs have as many dimensions as those of the recorded run."""
    for node in [n for n in graph.nodes if n.op == "placeholder" and "shape" in n.meta]:
        with graph.inserting_after(node):
            dimensions = graph.call_function(getattr, (node, "ndim"))
        with graph.inserting_after(dimensions):
            graph.call_function(same_as_recorded, (dimensions, len(node.meta["shape"])))


def _is_leaf(module: nn.Module) -> bool:
    """Return whether the graph calls a module rather than look into it."""
    container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    own = type(module).__module__.startswith("torch.nn.")
    return has_hooks(module) or (own and not container)


def _holds_modules(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.nn.modules")
    return next(module.children(), None) is not None and (
        not own or isinstance(module, nn.Sequential)
    )


def _evaluated(module: nn.Module) -> nn.Module:
    return twin(module).eval()


def _with_values(inputs: Inputs, like: Tensor) -> Inputs:
    """Return random inputs of the same shapes."""

    def filled(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, dtype=like.dtype, device=like.device)
        return torch.zeros(value.shape, dtype=value.dtype, device=like.device)

    return Inputs(*tree_map(filled, (inputs.args, inputs.kwargs)))
