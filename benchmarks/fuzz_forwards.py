"""Random small models whose forwards are ordinary Python, folded at one example, tried at others.

    python benchmarks/fuzz_forwards.py --models 10000 --seed 0 --jobs 2
    python benchmarks/fuzz_forwards.py --show 12

A model is drawn from forward_idioms.py, written down as Python source and executed, so that its
`if`, `for` and `+=` are real. The fold must not raise; wherever the model runs (other batches,
sizes, arguments, values, with and without gradients, in float32) the folded model must run too,
return the same structure with the same values, and leave the same values in the attributes called
`seen`. Norms marked by their eps alone consume a convolution, so that they are foldable by
construction: the share that is gone is the figure. A failure is printed as the shortest script
that still fails. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch
from draw_forwards import MARK, Call, Case, Draw, Nest, Node
from forward_idioms import CALLS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repnet

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SMALL = 1e-2  # errors of smaller tensors are relative to it: the mean of a normalized map is 0
METHODS = ("default", "modules", "graph")


class NormCalls(TorchDispatchMode):
    """Counts the calls of batch norm with given statistics, and those that are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.marked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "batch_norm" in func._schema.name:
            given: dict[str, Any] = dict(
                zip((a.name for a in func._schema.arguments), args, strict=False)
            )
            if not given.get("training"):
                self.all += 1
                self.marked += abs(given.get("eps", 0.0) - MARK) < 1e-9
        return func(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """What became of one model.

    Args:
        seed: of the model.
        method: of folding.
        kind: "right", "wrong", "raised" (the fold), "broken" (the folded model), or "not run".
        detail: of a failure.
        calls: the calls that showed the failure, the example first.
        dtype: of both models when they failed.
        error: the largest relative one in float64.
        norms: calls of batch norm on the example, before and after.
        marked: those foldable by construction, before and after.
        reasons: for marked norms that are left.
        seconds: of the fold.
    """

    seed: int
    method: str = "default"
    kind: str = "right"
    detail: str = ""
    calls: tuple[Call, ...] = ()
    dtype: torch.dtype = torch.float64
    error: float = 0.0
    norms: tuple[int, int] = (0, 0)
    marked: tuple[int, int] = (0, 0)
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "raised", "broken")

    @property
    def fault(self) -> str:
        """The failure without its figures."""
        return f"{self.kind}: {re.split(r':| differs ', self.detail)[0]}"


class Runner:
    """Builds the model of a case, any number of times, and calls it."""

    def __init__(self, case: Case) -> None:
        self.case, (source, self.names) = case, case.written()
        module = ModuleType("fuzzed")
        sys.modules["fuzzed"] = module  # where dataclasses look
        self.space = module.__dict__
        exec(compile(source, f"<model {case.seed}>", "exec"), self.space)

    def build(self) -> nn.Module:
        torch.default_generator.manual_seed(self.case.seed)
        return self.space["randomize"](self.space["Net"]()).to(self.case.dtype)

    def x(self, call: Call, noise: float = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.case.seed)
        x = torch.randn(call.shape, generator=generator) + call.offset
        return x * (1 + noise * torch.randn(call.shape, generator=generator))

    def example(self, call: Call) -> Any:
        text = call.example(self.case.takes, self.names)
        return eval(text, {**self.space, "x": self.x(call)})

    def run(self, model: nn.Module, call: Call, noise: float = 0.0) -> Any:
        """Return the output, the inputs after the call, and what is kept aside."""
        text = call.source(self.case.takes, self.names)
        space = {"x": self.x(call, noise), "bound": lambda *args, **kwargs: (args, kwargs)}
        args, kwargs = eval(f"bound({text})", {**self.space, **space})
        with torch.set_grad_enabled(call.grad):
            output = model(*args, **kwargs)
        kept = {
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key.startswith("seen")
        }
        return output, (args, kwargs), kept

    def runs(self, model: nn.Module, call: Call) -> bool:
        try:
            self.run(model, call)
        except Exception:
            return False
        return True


def difference(expected: Any, actual: Any) -> float:
    """Return the largest relative error of the tensors inside; infinite where the rest differs."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return float("inf")
        a, b = expected.detach().double().nan_to_num(), actual.detach().double().nan_to_num()
        if not a.numel() or not torch.equal(expected.isfinite(), actual.isfinite()):
            return float("inf") if a.numel() else 0.0
        return float((a - b).abs().max()) / max(float(a.abs().max()), SMALL)
    if type(expected) is not type(actual):
        return float("inf")
    if is_dataclass(expected) and not isinstance(expected, type):
        expected, actual = vars(expected), vars(actual)
    if isinstance(expected, Mapping):
        if list(expected) != list(actual):
            return float("inf")
        expected, actual = list(expected.values()), list(actual.values())
    if isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            return float("inf")
        return max(map(difference, expected, actual), default=0.0)
    return 0.0 if expected == actual else float("inf")


@contextmanager
def surroundings(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype, and let other people's code warn of what it likes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def check(case: Case, method: str = "default") -> Outcome:
    """Fold the model at its example, and compare both at all calls that the model takes."""
    outcome = Outcome(case.seed, method)
    with surroundings(case.dtype):
        try:
            runner = Runner(case)
            scratch = runner.build()
            calls = [call for call in case.calls if runner.runs(scratch, call)]
        except Exception as error:  # a case that lost a line
            calls, outcome.detail = [], one_line(error)
        if not calls:
            outcome.kind = "not run"
            return outcome
        outcome.calls = (calls[0],)
        model, reference = runner.build(), runner.build()
        if case.warm:
            runner.run(model, calls[0])
            runner.run(reference, calls[0])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        options: dict[str, Any] = {} if method == "default" else {"method": method}
        start = time.perf_counter()
        try:
            folded, report = repnet.reparameterize(
                model.train(case.training), runner.example(calls[0]), return_report=True, **options
            )
        except Exception as error:
            outcome.kind, outcome.detail = "raised", one_line(error)
            return outcome
        outcome.seconds = time.perf_counter() - start
        if difference(before, dict(model.state_dict())) > 0:
            outcome.kind, outcome.detail = "wrong", "the argument was changed"
            return outcome
        outcome.reasons = tuple(
            report.skipped.get(name, "(no reason given)")
            for name, module in folded.named_modules()
            if getattr(module, "eps", None) == MARK and not isinstance(module, nn.Identity)
        )
        counts = []
        for form in (reference, folded):
            with NormCalls() as norms:
                runner.runs(form, calls[0])
            counts.append((norms.all, norms.marked))
        outcome.norms, outcome.marked = zip(*counts, strict=True)
        for call in calls:
            if not agree(runner, call, reference, folded, outcome):
                return outcome
    if case.dtype == torch.float64:
        with surroundings(torch.float32):
            for call in calls[:2]:
                if not agree(runner, call, reference.float(), folded.float(), outcome):
                    break
    return outcome


def agree(
    runner: Runner, call: Call, reference: nn.Module, folded: nn.Module, outcome: Outcome
) -> bool:
    """Return whether both do the same at this call; say in the outcome what they do not."""
    dtype, first = torch.get_default_dtype(), call == outcome.calls[0]
    try:
        expected = runner.run(reference, call)
    except Exception:  # in float32
        return True
    where = f"at {call.source(runner.case.takes, runner.names)} of {call.shape} in {dtype}"
    try:
        actual = runner.run(folded, call)
    except Exception as error:
        if outcome.method == "graph" and isinstance(error, ValueError) and not first:
            return True
        outcome.kind, outcome.detail = "broken", f"{one_line(error)} {where}"
    else:
        kept = {} if outcome.method == "graph" else expected[2]
        parts = {
            "output": difference(expected[0], actual[0]),
            "inputs after the call": difference(expected[1], actual[1]),
            "kept aside": difference(kept, {key: actual[2].get(key) for key in kept}),
        }
        part, worst = max(parts.items(), key=lambda item: item[1])
        # What float64 shows is 2^29 times as large in float32.
        limit = max(TOLERANCE[dtype], 2**30 * outcome.error if dtype == torch.float32 else 0.0)
        if worst <= limit or worst <= 100 * rounding(runner, call):
            outcome.error = max(outcome.error, worst if dtype == torch.float64 else 0.0)
            return True
        outcome.kind, outcome.detail = "wrong", f"{part} differs by {worst:.1e} {where}"
    outcome.calls, outcome.dtype = tuple(dict.fromkeys([*outcome.calls, call])), dtype
    return False


def rounding(runner: Runner, call: Call) -> float:
    """Return by how much rounding of the input changes the output; zero if nothing but shapes."""
    noise = 1e-13 if torch.get_default_dtype() == torch.float64 else 1e-6
    model = runner.build().to(torch.get_default_dtype())
    try:
        outputs = [runner.run(model, call, noise=n)[0] for n in (0.0, noise)]
    except Exception:
        return 0.0
    error = difference(*outputs)
    return error if error < 1e-3 else 0.0


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def simpler_nodes(nodes: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
    """Yield the nodes with one of them left out, shortened or opened."""
    for n, node in enumerate(nodes):
        before, after = nodes[:n], nodes[n + 1 :]
        if len(nodes) > 1:
            yield before + after
        if isinstance(node, Nest):
            yield before + node.children + after
            if (node.holder, node.call) != ("BLOCK", CALLS[0]):
                yield (*before, replace(node, holder="BLOCK", call=CALLS[0]), *after)
            for children in simpler_nodes(node.children):
                yield (*before, replace(node, children=children), *after)
        else:
            for lost in range(len(node.forward) if len(node.forward) > 1 else 0):
                lines = node.forward[:lost] + node.forward[lost + 1 :]
                yield (*before, replace(node, forward=lines), *after)


def simpler(case: Case) -> Iterator[Case]:
    """Yield simpler cases, the much simpler ones first."""
    plain: dict[str, Any] = {
        "takes": "x",
        "gives": "x",
        "dtype": torch.float64,
        "warm": False,
        "training": False,
    }
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})
    for nodes in simpler_nodes(case.nodes):
        yield replace(case, nodes=nodes)
    for n, call in enumerate(case.calls):
        for new in (replace(call, grad=False), replace(call, offset=0.0), replace(call, values=())):
            if new != call:
                yield replace(case, calls=(*case.calls[:n], new, *case.calls[n + 1 :]))


def shortest(case: Case, outcome: Outcome) -> tuple[Case, Outcome]:
    """Return the simplest case found that fails in the same way, and its outcome."""
    case = replace(case, calls=outcome.calls)
    found = True
    while found:
        found = False
        for other in simpler(case):
            now = check(other, outcome.method)
            if now.fault == outcome.fault:
                case, outcome, found = other, now, True
                break
    return case, outcome


def script(case: Case, outcome: Outcome) -> str:
    """Return a program that folds the model, and compares both at the last call of the outcome."""
    source, names = case.written()
    calls = outcome.calls or case.calls[:1]
    first, last = (call.source(case.takes, names) for call in (calls[0], calls[-1]))
    options = "" if outcome.method == "default" else f', method="{outcome.method}"'
    lines = [
        f"# seed {case.seed}, method {outcome.method!r}: {outcome.kind} {outcome.detail}",
        source,
        "",
        "import repnet",
        "from torch.utils._pytree import tree_leaves",
        "",
        f"torch.set_default_dtype({case.dtype})",
        f"torch.manual_seed({case.seed})",
        "model = randomize(Net())",
        f"x = torch.randn{calls[0].shape} + {calls[0].offset}",
        *([f"model({first})"] if case.warm else []),
        *(["model.train()"] if case.training else []),
        f"folded = repnet.reparameterize(model, {calls[0].example(case.takes, names)}{options})",
        f"x = (torch.randn{calls[-1].shape} + {calls[-1].offset}).to({outcome.dtype})",
        f"with torch.set_grad_enabled({calls[-1].grad}):",
        f"    pair = [m.eval().to({outcome.dtype})({last}) for m in (model, folded)]",
        "for a, b in zip(*map(tree_leaves, pair)):",
        "    print((a - b).abs().max() / a.abs().max() if isinstance(a, Tensor) else (a, b))",
        "print([(type(a), list(vars(a))[-2:]) for a in (model, folded)])",
    ]
    return "\n".join(lines)


def check_range(start: int, stop: int, methods: list[str]) -> list[Outcome]:
    torch.set_num_threads(1)
    return [check(Draw(seed).case(), m) for seed in range(start, stop) for m in methods]


def shrink(outcome: Outcome) -> tuple[Case, Outcome]:
    return shortest(Draw(outcome.seed).case(), outcome)


def print_outcomes(console: Console, outcomes: list[Outcome], seconds: float) -> None:
    columns = ["method", "models", "not run", "norm calls", "removed", "foldable", "folded"]
    columns += ["wrong", "broken", "raised", "worst error", "seconds of folding"]
    table = Table(*columns, title=f"{len(outcomes)} folds in {seconds:.0f} s")
    for method in dict.fromkeys(o.method for o in outcomes):
        own = [o for o in outcomes if o.method == method]
        kinds = Counter(o.kind for o in own)
        (norms, norms_left), (marked, marked_left) = (
            [sum(pair[n] for pair in pairs) for n in range(2)]
            for pairs in ([o.norms for o in own], [o.marked for o in own])
        )
        table.add_row(
            method,
            f"{len(own):,}",
            str(kinds["not run"]),
            f"{norms:,}",
            f"{1 - norms_left / max(norms, 1):.1%}",
            f"{marked:,}",
            f"{1 - marked_left / max(marked, 1):.1%}",
            *(str(kinds[kind]) for kind in ("wrong", "broken", "raised")),
            f"{max(o.error for o in own):.1e}",
            f"{sum(o.seconds for o in own):.0f}",
        )
    console.print(table)
    left = Table("calls", "method", "why a foldable norm is left", "for example")
    groups: dict[tuple[str, str], list[int]] = {}
    for o in outcomes:
        for reason in o.reasons:
            groups.setdefault((o.method, re.sub(r"'[^']*'|\d+", "#", reason)[:120]), []).append(
                o.seed
            )
    for (method, reason), seeds in sorted(groups.items(), key=lambda item: -len(item[1]))[:20]:
        left.add_row(str(len(seeds)), method, reason, str(seeds[0]))
    console.print(left)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first model; counts up")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["default"])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--shrink", type=int, default=20, help="failures to print as short scripts")
    parser.add_argument("--show", type=int, metavar="SEED", help="print one model and its outcome")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if arguments.show is not None:
        case = Draw(arguments.show).case()
        outcomes = [check(case, method) for method in arguments.methods]
        print("\n".join([script(case, outcomes[0]), *map(str, outcomes)]))
        return int(any(o.failed for o in outcomes))
    start, step = time.perf_counter(), 50
    starts = range(arguments.seed, arguments.seed + arguments.models, step)
    stops = [min(s + step, starts.stop) for s in starts]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(check_range, starts, stops, [arguments.methods] * len(starts))
        outcomes = [outcome for part in parts for outcome in part]
        seconds = time.perf_counter() - start
        failures = [o for o in outcomes if o.failed]
        for case, outcome in pool.map(shrink, failures[: arguments.shrink]):
            console.rule()
            print(script(case, outcome))
    print_outcomes(console, outcomes, seconds)
    faults = Counter((o.method, o.fault) for o in failures)
    for (method, fault), number in faults.most_common():
        seeds = [o.seed for o in failures if (o.method, o.fault) == (method, fault)][:8]
        console.print(f"{number} {method}: {fault}, for example {seeds}", markup=False)
    console.print(f"torch {torch.__version__}, first seed {arguments.seed}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
