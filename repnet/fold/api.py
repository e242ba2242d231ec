"""`reparameterize`: every affine block of any model becomes its one convolution, with proof."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import Layer
from repnet.equivalence import Inputs
from repnet.fold.core import Built, Folding, Norms, Plan, RefusedError
from repnet.fold.frame import Frame
from repnet.fold.norm_chains import UNFED
from repnet.fold.observe import observe
from repnet.fold.proof import Proof
from repnet.fold.record import VALUES, RecordingError
from repnet.fold.report import FoldReport
from repnet.fold.survey import Survey, users_of, within
from repnet.health import norm_health, weight_health
from repnet.kernel import NotFoldableError
from repnet.surroundings import prepared
from repnet.symbolic import twin

Method = Literal["auto", "modules", "graph"]
MOST_ATTEMPTS = 20  # at a fold that holds
_WANTED = (
    "a norm goes into a convolution that feeds it alone, or into one without padding that it "
    "alone feeds"
)


@overload
def reparameterize(
    model: nn.Module,
    example_input: Any,
    *,
    norms: Norms = "absorb",
    method: Method = "auto",
    grow: str | Sequence[str] = (),
    return_report: Literal[False] = False,
) -> nn.Module: ...


@overload
def reparameterize(
    model: nn.Module,
    example_input: Any,
    *,
    norms: Norms = "absorb",
    method: Method = "auto",
    grow: str | Sequence[str] = (),
    return_report: Literal[True],
) -> tuple[nn.Module, FoldReport]: ...


@torch.inference_mode(False)  # the result is to be trained, where it is wanted
def reparameterize(
    model: nn.Module,
    example_input: Any,
    *,
    norms: Norms = "absorb",
    method: Method = "auto",
    grow: str | Sequence[str] = (),
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """Return a copy of `model` in which every block that is one convolution is one.

    A module whose whole forward is one convolution is replaced under its own name. A convolution
    takes in the batch norm behind it, wherever in the model the two are. A forward that adds
    branches itself becomes a small `torch.fx` graph in the place of this one module. Everything
    else keeps its class, forward and names. Nothing grows unless `grow` asks for it: a part whose
    convolution would need more parameters or multiplications than its layers stays. Only the blocks
    of `repnet.blocks` always fold.

    A fold holds for every input that the model takes. Everything is computed in float64 from the
    stored weights, compared block by block with the original on `example_input`, and converted to
    the model's dtype last. A part that fails the comparison is put back and named in the report.
    The argument is not changed. The result is in evaluation mode; to fold it again changes nothing.

    Args:
        model: any module; a compiled one is unwrapped.
        example_input: what `forward` takes: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments, on the model's device.
        norms: "absorb" folds all norms; "keep" makes each multi-branch block a convolution and
            leaves the norms that follow convolutions, so that the result has the keys of the plain
            architecture and can be trained or quantized. There, the bias of a folded block moves
            into the norm that alone follows it.
        method: "auto" as described; "modules" writes no graphs; "graph" is `reparameterize_graph`.
        grow: globs for the names of modules that become one convolution even if it is larger than
            their layers, as of two branches with different dilations; "*" for all.
        return_report: also return the `FoldReport`, which says what was folded, what was left, and
            why.

    Returns:
        The folded model, or `(model, report)`.

    Raises:
        NotFoldableError: a part of the model is quantized, or the norms that `norms="keep"` would
            keep were absorbed before.
        ValueError: the model cannot run on `example_input`.

    Example:
        >>> folded = reparameterize(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    """
    if norms not in ("absorb", "keep") or method not in ("modules", "graph", "auto"):
        raise ValueError(f"there is no norms={norms!r} with method={method!r}")
    if norms == "keep" and method == "graph":
        raise ValueError("norms='keep' needs modules: a graph has no plain architecture")
    source, inputs = prepared(model), Inputs.of_example(example_input)
    if any(m.training for m in source.modules()):
        source = twin(source)  # a run may change statistics
        if model.training:
            source.eval()
    if norms == "keep" and getattr(source, "reparameterized", None) == "absorb":
        raise NotFoldableError(
            f"the norms of this {type(source).__name__} were absorbed already, so that "
            "norms='keep' has none to keep; fold the train form"
        )
    globs = [grow] if isinstance(grow, str) else [*grow]

    def may_grow(name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    with _without_collections():
        if method == "graph":
            folded, report = _fold_graph(source, inputs, may_grow)
        else:
            survey = _observed(source, inputs)
            edit_only = method == "modules"
            folding = Folding(source, survey, norms, may_grow=may_grow, edit_only=edit_only)
            folded, report = _fold(folding, inputs)
    report.method = method
    folded.reparameterized = norms  # type: ignore[assignment]
    report.was_training = model.training
    return (folded, report) if return_report else folded


@contextmanager
def _without_collections() -> Iterator[None]:
    """Put off Python's garbage collection: one pass over all that torch imports takes 0.2 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@overload
def reparameterize_graph(
    model: nn.Module, example_input: Any, *, return_report: Literal[False] = False
) -> nn.Module: ...


@overload
def reparameterize_graph(
    model: nn.Module, example_input: Any, *, return_report: Literal[True]
) -> tuple[nn.Module, FoldReport]: ...


def reparameterize_graph(
    model: nn.Module, example_input: Any, *, return_report: bool = False
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """Return the graph of `model`, in which every region that is one convolution is one.

    The same as `reparameterize` over one recording of the whole model, as a `torch.fx.GraphModule`:
    all its modules are looked into, so that residual sums between modules fold, too. Sizes stay
    variable. Where forward branches on a size or an argument, the graph checks that later inputs
    take the same branch. A module whose forward depends on the values of tensors is called as it
    is, with graphs in the place of its parts; if that is the model itself, it keeps its class.

    Args:
        model: any module; not changed.
        example_input: as for `reparameterize`.
        return_report: also return the `FoldReport`.

    Returns:
        The folded graph in evaluation mode, or `(graph, report)`.

    Raises:
        NotFoldableError: a part of the model is quantized already.
        ValueError: the model cannot run on `example_input`.

    Example:
        >>> folded = reparameterize_graph(timm.create_model("repvgg_a0"), torch.randn(1, 3, 64, 64))
    """
    return reparameterize(model, example_input, method="graph", return_report=return_report)  # type: ignore[call-overload]


def _observed(source: nn.Module, inputs: Inputs, inlined: Any = None) -> Survey:
    """Return what runs of the model say; nothing, if it runs but cannot be observed."""
    try:
        return observe(source, inputs, inlined)
    except RecordingError as error:
        return Survey(source, [], nn.Module(), reason=str(error))


def _fold_graph(
    source: nn.Module, inputs: Inputs, may_grow: Callable[[str], bool]
) -> tuple[nn.Module, FoldReport]:
    """Record the model as few graphs as possible, and fold these."""
    survey = _observed(source, inputs)
    stay = {
        name: reason
        for name, frames in survey.frames.items()
        if (reason := next((r for f in frames if (r := _stays(f))), ""))
    }
    for name in survey.hooked & survey.frames.keys():
        stay[name] = "it has a forward hook, and so stays a module"

    def is_inlined(name: str) -> bool:
        return name not in stay and _home(name, survey) not in stay

    while True:
        deep = _observed(source, inputs, is_inlined)
        graphs = [name for name in deep.frames if name not in stay]
        folding = Folding(source, deep, may_grow=may_grow, graphs=graphs)
        wrong = {n: r for n in graphs if (r := _differs(deep.frames[n]))}
        if not wrong:
            folded, report = _fold(folding, inputs)
            wrong = {n: r for n, r in folding.excluded.items() if n in graphs}
        if not wrong:
            break
        stay.update(wrong)
    for name, reason in stay.items():
        report.skipped.setdefault(name, f"its forward cannot be recorded: {reason}")
    report.checks = sum(len(deep.frames[n][0].decisions) for n in graphs)
    return folded, report


def _home(name: str, survey: Survey) -> str:
    """Return the innermost module around another one that was called."""
    while name:
        name = name.rpartition(".")[0]
        if name in survey.frames:
            break
    return name


def _differs(frames: Sequence[Frame]) -> str:
    """Return why no graph can stand for the calls of a module; "" if one can."""
    if reason := next((r for f in frames if (r := _stays(f))), ""):
        return reason
    same = frames[1:2]  # on the same sizes
    if same and same[0].signature() != frames[0].signature():
        return "it does something else where gradients or another dtype are wanted"
    return ""


def _stays(frame: Frame) -> str:
    """Return why no graph can stand for a forward, whatever it decides on sizes."""
    if frame.unclear:
        return str(frame.unclear)
    nodes = [d.node for d in frame.decisions]
    if any(getattr(n.target, "__name__", n.target) in VALUES for n in nodes):
        return "forward depends on values of its input"
    if frame.keeps or not frame.rewritable:
        return "it keeps something aside, or takes or returns what a graph cannot"
    return ""


def _fold(folding: Folding, inputs: Inputs) -> tuple[nn.Module, FoldReport]:
    """Plan, build and prove until everything that is folded holds."""
    source, survey = folding.source, folding.survey
    proof = Proof(source, inputs, has_state=survey.has_state)
    report = FoldReport()
    for _ in range(MOST_ATTEMPTS):
        plan = folding.plan()
        try:
            built = folding.build(plan)
        except RefusedError as error:
            folding.excluded[error.name] = str(error)
            continue
        report.proof, wrong = proof.culprits(built, partial(_subset, folding, plan))
        report.put_back |= wrong
        if wrong and report.failed is None:
            report.failed = report.proof
        wrong = wrong or _cast(built)
        if not wrong:
            break
        folding.excluded |= wrong
    else:
        plan = Plan(skipped={"": "it could not be folded so that it stays the same"})
        built = folding.build(plan)
        report.proof = proof.measure(built)
    report.folded = [fold for fold, _ in built.folds]
    report.graphs = list(plan.graphs)
    report.skipped = plan.skipped
    if survey.reason:
        report.skipped[""] = f"it runs, but not under observation: {survey.reason}"
    report.cast = proof.stored(built)
    if proof.has_values:
        report.health = [
            *norm_health(source),
            *weight_health(built.model, [m for _, m, _ in built.made]),
        ]
    report.health += [f"'{name}' grew: {reason}" for name, reason in plan.grown.items()]
    _report_norms(report, survey, built.model, plan)
    if folding.norms == "keep":
        report.skipped |= dict.fromkeys((n for n in report.left if survey.ran(n)), "norms='keep'")
    return built.model, report


def _subset(folding: Folding, plan: Plan, names: set[str]) -> Built:
    """Build some folds of a plan alone."""
    return folding.build(
        Plan(
            {n: f for n, f in plan.whole.items() if n in names},
            {
                g: [r for r in regions if r.name in names]
                for g, regions in plan.graphs.items()
                if g in names or any(r.name in names for r in regions)
            },
            [r for r in plan.rows if r.name in names],
            {n: c for n, c in plan.chains.items() if n in names},
            {n: f for n, f in plan.fronts.items() if n in names},
        )
    )


def _cast(built: Built) -> dict[str, str]:
    """Store the new layers in their dtypes; return those that do not fit, with the reason."""
    wrong: dict[str, str] = {}
    for name, layer, dtype in built.made:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if dtype != torch.float16 or not tensor.is_floating_point() or tensor.is_meta:
                continue
            if tensor.isfinite().all() and not tensor.to(dtype).isfinite().all():
                wrong[name] = f"{dtype} cannot hold its folded weights; fold it in float32"
                warnings.warn(f"'{name}' is not folded: {wrong[name]}", stacklevel=4)
                break
    if not wrong:
        for _, layer, dtype in built.made:
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return wrong


def _report_norms(report: FoldReport, survey: Survey, folded: nn.Module, plan: Plan) -> None:
    """Name the norms that remain, those that are called as functions as well."""
    report.left = [n for n, m in folded.named_modules() if isinstance(m, _BatchNorm)]
    regions = [*plan.rows, *(r for found in plan.graphs.values() for r in found)]
    gone = {node for region in regions for node in region.nodes}
    folded_away = [*plan.whole, *(str(n.target) for n in gone if n.op == "call_module")]
    heads = {link.head.name for links in plan.chains.values() for link in links}
    for name, frames in survey.frames.items():
        if name in heads or any(within(name, outer) for outer in folded_away):
            continue
        for node in frames[0].graph.nodes:
            called = "batch_norm" in getattr(node.target, "__name__", "")
            if not called or node in gone or node.meta.get("constant"):
                continue
            sources = [str(i.target) for i in node.all_input_nodes if i.op == "get_attr"]
            owner = next((s.rpartition(".")[0] for s in sources if "mean" in s), "")
            if sources and owner not in report.left:
                report.left.append(owner or node.name)
    for name in report.left:
        if report.skipped.get(name, UNFED) == UNFED:
            report.skipped[name] = _why_left(survey, name)


def _why_left(survey: Survey, name: str) -> str:
    """Return why a batch norm remains that nothing took in."""
    if survey.reason:
        return "the model runs, but not under observation"
    if name in survey.modules and not survey.ran(name):
        return "it was not run on the example input"
    if name in survey.hooked:
        return f"'{name}' has a forward hook; remove it first"
    reason = ""
    for frame, node in survey.leaves.get(name, ()):
        before = node.args[0] if node.args else None
        beside = [before, *before.users] if isinstance(before, fx.Node) else []
        hooked = next((str(n.target) for n in beside if str(n.target) in survey.hooked), None)
        if hooked is not None:
            reason = f"'{hooked}' has a forward hook; remove it first"
        reason = reason or survey.distrust(frame) or _what_feeds(survey, frame, node)
    return reason or UNFED


def _what_feeds(survey: Survey, frame: Frame, norm: fx.Node) -> str:
    """Return what stands before a norm, where that is no convolution that feeds it alone."""
    caller, node, given = frame, norm, norm.args[0]
    while given is survey.tensor_argument(caller) and caller.parent is not None:
        node = next(n for n in caller.parent.graph.nodes if n.meta.get("frame") is caller)
        caller = caller.parent
        given = node.args[0] if node.args else None
    if not isinstance(given, fx.Node):
        return ""
    others = [str(n.target) for n in users_of(given) if n is not node and n.op != "output"]
    what = f"'{given.target}'" if given.op == "call_module" else f"`{given.name}`"
    if given.op == "placeholder":
        what = "the input of the model" if caller.parent is None else f"'{given.name}'"
    elif given.op == "call_module":
        what += f" ({type(survey.modules[str(given.target)]).__name__})"
        if others:
            return f"{what}, which comes before it, also feeds '{others[0]}'; {_WANTED}"
        if isinstance(survey.modules[str(given.target)], Layer):
            return f"{what} comes before it, but is not known to feed it alone at every call"
    return f"it comes after {what}; {_WANTED}"
