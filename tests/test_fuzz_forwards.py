from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import repnet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import fuzz_forwards as fuzz  # noqa: E402
from draw_forwards import MARK, Case, Draw, Step  # noqa: E402
from forward_idioms import IDIOMS, LAYERS  # noqa: E402


def case_of(line: str, *parts: str, **changes: Any) -> Case:
    """Return a case whose forward is one line."""
    case = Draw(0).case()
    step = Step((line,), parts)
    return replace(case, nodes=(step,), takes="x", gives="x", dtype=torch.float64, **changes)


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_random_forwards_fold_exactly_at_every_call(start: int) -> None:
    outcomes = [fuzz.check(Draw(seed).case()) for seed in range(start, start + 50)]
    assert [(o.seed, o.kind, o.detail) for o in outcomes if o.failed] == []
    assert sum(o.kind == "not run" for o in outcomes) <= 1
    assert 0 < max(o.error for o in outcomes) < 1e-9
    marked, left = (sum(o.marked[n] for o in outcomes) for n in range(2))
    assert left < 0.2 * marked


def test_the_same_seed_draws_the_same_model() -> None:
    assert Draw(3).case() == Draw(3).case() != Draw(4).case()


def test_every_idiom_and_layer_is_drawn_and_runs() -> None:
    draw = Draw(0)
    variants = [*(v for group in IDIOMS.values() for v in group), *LAYERS]
    for text in variants:
        node = draw.layer_of(text) if text in LAYERS else draw.idiom_of(text)
        case = replace(draw.case(), nodes=(node,), takes="x", gives="x")
        with fuzz.surroundings(case.dtype):
            runner = fuzz.Runner(case)
            assert any(runner.runs(runner.build(), call) for call in case.calls), text


CONV_NORM = ("self.conv = nn.Conv2d(4, 4, 3)", f"self.norm = nn.BatchNorm2d(4, eps={MARK})")


def test_marked_norms_are_counted() -> None:
    outcome = fuzz.check(case_of("x = F.relu(self.norm(self.conv(x)))", *CONV_NORM))
    assert (outcome.kind, outcome.norms, outcome.marked) == ("right", (1, 0), (1, 0))


def broken(fold: Any) -> Any:
    def reparameterize(model: nn.Module, example: Any, **options: Any) -> Any:
        folded, report = fold(model, example, **options)
        with torch.no_grad():
            for parameter in folded.parameters():
                parameter.mul_(1.001)
        return folded, report

    return reparameterize


def test_a_wrong_fold_is_found_and_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repnet, "reparameterize", broken(repnet.reparameterize))
    case = case_of("x = F.relu(self.norm(self.conv(x)))", *CONV_NORM)
    case = replace(case, nodes=(Step(("x = x + 1",)), *case.nodes), gives="x, taps")
    outcome = fuzz.check(case)
    assert outcome.kind == "wrong"
    assert "output differs by" in outcome.detail
    short, again = fuzz.shortest(case, outcome)
    assert (short.nodes, short.gives, again.kind) == (case.nodes[1:], "x", "wrong")


def test_a_crash_of_the_fold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **options: Any) -> Any:
        raise IndexError("of the fold itself")

    monkeypatch.setattr(repnet, "reparameterize", crash)
    outcome = fuzz.check(Draw(0).case())
    assert (outcome.kind, outcome.detail) == ("raised", "IndexError: of the fold itself")


def test_a_lost_attribute_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = repnet.reparameterize
    monkeypatch.setattr(
        repnet, "reparameterize", lambda m, *a, **k: (nn.Identity(), fold(m, *a, **k)[1])
    )
    outcome = fuzz.check(case_of("self.seen = x"))
    assert (outcome.kind, outcome.detail[:10]) == ("wrong", "kept aside")


def test_a_printed_case_is_a_script_of_its_own() -> None:
    case = case_of("x = F.relu(self.norm(self.conv(x)))", *CONV_NORM)
    text = fuzz.script(case, fuzz.check(case))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("tensor(")[1].split(",")[0].rstrip(")\n")) < 1e-12
