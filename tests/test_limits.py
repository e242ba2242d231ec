"""The limits that a deployment is held to, what the report claims, and when speeds are compared."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repnet.cli.deploy import _summarize
from repnet.deploy.evaluation import evaluate
from repnet.deploy.gate import Comparison, Gate, VerificationError
from repnet.deploy.latency import Latency, busy, measure_latency, unlike
from repnet.deploy.limits import Limit, limits
from repnet.deploy.report import claims, write_html
from repnet.deploy.report.verdict import verdict
from repnet.deploy.settings import Int8, Settings
from repnet.errors import InputError
from tests.test_report import complete, page

NAN = float("nan")
DROPS = {
    "deploy.tolerance": lambda value: Settings(tolerance=value),
    "export.tolerance": lambda value: Settings(export_tolerance=value),
    "export.max_drop": lambda value: Settings(export_max_drop=value),
    "int8.max_drop": lambda value: Settings(int8=Int8(max_drop=value)),
}
AGREEMENTS = {
    "export.min_agreement": lambda value: Settings(export_min_agreement=value),
    "int8.min_agreement": lambda value: Settings(int8=Int8(min_agreement=value)),
}


@pytest.mark.parametrize("value", [1, 5, 1.1, math.inf, -0.1, NAN, True, "much", None])
@pytest.mark.parametrize("key", DROPS)
def test_a_limit_that_means_nothing_is_refused(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{key}={value} must be a fraction.*such as"):
        DROPS[key](value).check()


@pytest.mark.parametrize("value", [0, 1.1, 98, math.inf, -1, NAN, True, "much", None])
@pytest.mark.parametrize("key", AGREEMENTS)
def test_an_agreement_that_means_nothing_is_refused(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{key}={value} must be a fraction.*such as"):
        AGREEMENTS[key](value).check()


def test_a_limit_that_means_something_is_accepted() -> None:
    for settings in (*DROPS.values(), *AGREEMENTS.values()):
        for value in (0.5, 1e-9, 0.99):
            settings(value).check()
    assert Settings().limits.keys() == DROPS.keys() | AGREEMENTS.keys()


@pytest.mark.parametrize(
    ("least", "found", "partial", "worst", "passed"),
    [
        (False, [("a", 0.1), ("b", 0.3)], [], ("b", 0.3), True),
        (False, [("a", 0.1), ("b", 0.6)], [], ("b", 0.6), False),
        (False, [("a", NAN), ("b", 0.9)], [], ("a", NAN), False),
        (False, [("a", 0.1)], [("c", 0.9)], ("c", 0.9), False),
        (False, [("a", 0.1)], [("c", 0.3)], ("a", 0.1), True),
        (False, [], [("c", 0.3)], (None, None), None),
        (True, [("a", 0.9), ("b", 0.5)], [], ("b", 0.5), True),
        (True, [("a", 0.9), ("b", 0.4)], [], ("b", 0.4), False),
    ],
)
def test_a_limit_keeps_the_worst_value(
    least: bool, found: Any, partial: Any, worst: Any, passed: bool | None
) -> None:
    limit = Limit("what", "key", 0.5, 0.5, least=least)
    limit.hold(found, partial)
    assert (limit.where, limit.passed) == (worst[0], passed)
    assert limit.measured == pytest.approx(worst[1], nan_ok=True)


def test_a_limit_is_loosened_in_its_own_direction() -> None:
    assert Limit("drop", "key", 0.02, 0.01).loosened
    assert not Limit("drop", "key", 0.01, 0.01).loosened
    assert not Limit("drop", "key", 0.005, 0.01).loosened
    assert Limit("agreement", "key", 0.8, 0.9, least=True).loosened
    assert not Limit("agreement", "key", 0.95, 0.9, least=True).loosened
    assert Limit("norms", "deploy.allow_norms", None, 0).loosened


def of(report: dict[str, Any], key: str | None, begin: str = "") -> dict[str, Any]:
    (found,) = [
        limit
        for limit in report["limits"]
        if limit["key"] == key and limit["limits"].startswith(begin)
    ]
    return found


def test_every_limit_is_listed_with_what_was_measured() -> None:
    report = complete()
    keys = [limit["key"] for limit in report["limits"] if limit["key"]]
    assert {*keys} == Settings().limits.keys() | {"deploy.allow_norms"}
    drop = of(report, "int8.max_drop")
    assert (drop["value"], drop["default"], drop["loosened"]) == (0.06, 0.01, True)
    assert (drop["measured"], drop["where"], drop["passed"]) == (0.051, "onnx int8", True)
    same = of(report, "int8.min_agreement")
    assert same["measured"] == pytest.approx(1 - 31 / 120)
    assert (same["where"], same["passed"], same["loosened"]) == ("onnx int8", False, False)
    block = of(report, None, "error of a block")
    assert block["measured"] == max(b["relative_error"] for b in report["blocks"])
    assert block["passed"] is True


def test_limits_of_what_was_not_asked_for_are_not_in_force() -> None:
    report = complete() | {"exports": []}
    assert not [x for x in limits(report, Settings()) if str(x["key"]).startswith(("ex", "int8"))]
    asked = limits(report, Settings(exports={"onnx": ["fp32"]}))
    (tolerance,) = [limit for limit in asked if limit["key"] == "export.tolerance"]
    assert (tolerance["measured"], tolerance["passed"]) == (None, None)


def test_a_file_that_stopped_early_keeps_no_limit() -> None:
    report = complete()
    (file,) = [e for e in report["exports"] if e["format"] == "onnx" and e["precision"] == "int8"]
    short = {**file, "samples": report["samples"] - 1, "drop": 0.0, "agreement": 1.0}
    settings = Settings(exports={"onnx": ["int8"]})
    report["limits"] = limits(report | {"exports": [short]}, settings)
    for key in ("int8.max_drop", "int8.min_agreement"):
        assert (of(report, key)["measured"], of(report, key)["passed"]) == (None, None)
    worse = {**short, "batch_difference": 0.5}
    report["limits"] = limits(report | {"exports": [worse]}, settings)
    assert of(report, None, "difference of logits in another batch")["passed"] is False


def test_a_refused_fold_leaves_the_limits_behind_it_open() -> None:
    short = {key: complete()[key] for key in ("blocks", "tolerance", "rest_error", "exports")}
    short["blocks"][1]["relative_error"] = 3e-5
    found = limits(short, Settings())
    assert [limit["passed"] for limit in found] == [False, True, None, None, None]
    assert found[0]["where"] == short["blocks"][1]["name"]


def test_a_norm_that_may_stay_is_a_loosened_limit() -> None:
    report = complete()
    report["limits"] = limits(report, Settings(allow_norms=True))
    assert claims.loosened(report) == ["deploy.allow_norms=true"]


def test_the_page_shows_limits_and_marks_loosened_ones(tmp_path: Path) -> None:
    text = page(complete(), tmp_path)
    head, _, body = text.partition("<main>")
    assert "Loosened limits: int8.max_drop=0.06 instead of 0.01." in head
    assert "12 of 13" in head
    assert "loosened, usually 1.00%" in body
    assert "at least 98.00%" in body
    assert "at most 1e\N{MINUS SIGN}4" in body


def test_a_prediction_may_change_between_classes_within_twice_the_tolerance() -> None:
    gate = Gate(0.01, 0, 1)
    before = torch.tensor([[1.0, 0.98], [1.0, 0.97]])
    after = before.flip(1)  # by 0.02 and 0.03, of a largest logit of 1
    comparison = Comparison(gate, scale=1.0)
    comparison.add(after, before, torch.zeros(2, dtype=torch.int64))
    assert (comparison.agreeing, comparison.ties, comparison.correct) == (0, 1, 0)
    assert comparison.refusal(2, 1.0) == "1 of 2 predictions changed"


@pytest.mark.parametrize(
    ("tolerance", "difference", "passes"),
    [(1e-3, 1e-4, True), (1e-3, 1e-2, False), (math.inf, 0.05, True), (math.inf, 0.2, False)],
)
def test_another_batch_changes_logits_by_the_tolerance_or_a_tenth(
    tolerance: float, difference: float, passes: bool
) -> None:
    comparison = Comparison(Gate(tolerance, 0, 1), scale=2.0)
    logits = torch.tensor([2.0, 1.0])
    again = logits + torch.tensor([2 * difference, 0])
    with nullcontext() if passes else pytest.raises(VerificationError, match="it comes alone"):
        comparison.add_other_batch(again, logits, "alone")
    assert comparison.other_batch == pytest.approx(difference, rel=1e-3)


def test_the_head_of_the_page_counts_limits_and_loosened_ones() -> None:
    report = complete()
    held = [limit["passed"] for limit in report["limits"] if limit["passed"] is not None]
    facts = {label: (value, note) for label, value, note in verdict(report)["facts"]}
    assert facts["limits held"] == (f"{sum(held)} of {len(held)}", "1 of them loosened")
    report["limits"] = limits(report, Settings(exports={"onnx": ["int8"]}))
    facts = {label: (value, note) for label, value, note in verdict(report)["facts"]}
    assert facts["limits held"][1] == "none of them loosened"


def test_not_a_number_breaks_limits() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * NAN

    images, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    found = evaluate(nn.Identity(), Broken(), [(images, labels)] * 2, torch.device("cpu"))
    assert math.isnan(found.relative_difference)
    comparison = Comparison(Gate(1e-3, 0, 1), scale=1.0)
    comparison.add(images * NAN, images, labels)
    comparison.add(images, images, labels)
    assert math.isnan(comparison.difference)


@pytest.mark.parametrize(
    ("ties", "changed", "lines"),
    [
        (0, [], ["Folded model: 10,000 of 10,000 unchanged."]),
        (2, [0], ["Folded model: 9,998 of 10,000 unchanged, 2 are ties.", "1 file: none changed."]),
        (1, [93], ["Folded model: 9,999 of 10,000 unchanged, 1 is a tie.", "1 file: 93 changed."]),
        (0, [0, 93, 0, 7, 12],
         ["Folded model: 10,000 of 10,000 unchanged.", "5 files: at most 93 changed."]),
        (0, [0, 0], ["Folded model: 10,000 of 10,000 unchanged.", "2 files: none changed."]),
    ],
)  # fmt: skip
def test_each_claim_has_its_own_headline(ties: int, changed: list[int], lines: list[str]) -> None:
    report = {
        "samples": 10_000,
        "agreement": 1 - ties / 10_000,
        "changed": [{"tie": True}] * ties,
        "exports": [{"verified": True, "changed": n} for n in changed]
        + [{"verified": False, "changed": 5_000}],
    }
    assert claims.headline(report) == lines


def test_the_largest_error_is_that_of_the_worst_block(tmp_path: Path) -> None:
    report = complete()
    report["max_relative_error"] = 2.8e-16
    report["blocks"][2]["relative_error"] = 9.8e-16
    for number, block in enumerate(report["blocks"]):
        if number != 2:
            block["relative_error"] = 1e-16
    assert claims.largest_error(report) == 9.8e-16
    facts = {label: value for label, value, _ in verdict(report)["facts"]}
    assert facts["largest error"] == "9.8e\N{MINUS SIGN}16"
    report["blocks"][1]["relative_error"] = None  # as JSON writes NaN
    assert math.isnan(claims.largest_error(report) or 0)
    assert claims.largest_error({"blocks": [], "max_relative_error": 1e-16}) == 1e-16


def test_the_command_says_the_same_as_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = complete()
    report["exports"] = [e for e in report["exports"] if e["status"] != "refused"]
    report["exports"][0]["file"] = "model_bf16.mlpackage"
    _summarize(report, Path("deploy"))
    output = capsys.readouterr().out
    assert "\n".join(claims.headline(report)) in output
    assert "Loosened limits: int8.max_drop=0.06 instead of 0.01" in output
    assert f"in float64: {claims.largest_error(report):.1e}" in output
    for export in report["exports"]:
        assert export["file"] in output  # not broken over lines
    table = [line for line in output.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80


STEADY = [10.0, 10.4, 9.8, 10.1, 10.2, 9.9, 10.0, 10.3, 9.7, 10.0]


def test_medians_are_compared_where_the_spread_allows() -> None:
    assert unlike(STEADY, [value / 5 for value in STEADY]) is None
    # Both are slowed down in the same rounds: that says nothing about their ratio.
    bumpy = [value * (1 + 8 * (index % 3 == 0)) for index, value in enumerate(STEADY)]
    assert unlike(bumpy, [value / 5 for value in bumpy]) is None
    assert "spread too much" in str(unlike(bumpy, STEADY))
    assert "9 timed passes are too few" in str(unlike(STEADY[:9], STEADY[:9]))


def test_a_machine_is_busy_if_pytorch_lacks_a_core() -> None:
    assert busy([]) is None
    assert busy([0.75, 3.0]) is None
    assert "PyTorch had 0.40 of a core" in str(busy([0.98, 0.4]))


class Clock:
    """Stands in for `time`: each pass takes a while, of which a share is the CPU's."""

    def __init__(self, share: float) -> None:
        self.share, self.now, self.used = share, 0.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.used += self.share * seconds


def timed(monkeypatch: pytest.MonkeyPatch, share: float) -> dict[str, Latency]:
    clock = Clock(share)
    monkeypatch.setattr("repnet.deploy.latency.time", clock)
    models = {"slow": lambda x: clock.sleep(0.01), "fast": lambda x: clock.sleep(0.002)}
    return measure_latency(models, torch.zeros(1), runs=10, warmup=1, watched=["slow", "fast"])


def test_a_quiet_machine_gives_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(monkeypatch, 1.0)
    assert found["fast"].speed_up == pytest.approx(5)
    assert found["fast"].cores == pytest.approx(1)
    assert found["fast"].withheld is found["slow"].withheld is found["slow"].speed_up is None


def test_a_busy_machine_gives_none_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(monkeypatch, 0.3)
    assert found["fast"].speed_up is None
    assert "PyTorch had 0.30 of a core" in str(found["fast"].withheld)
    assert found["fast"].median == pytest.approx(2)


def withheld(*names: str) -> dict[str, Any]:
    report = complete()
    for name, form in report["latency"]["forms"].items():
        if name != "train_form" and (name in names or not names):
            form |= {"speed_up": None, "withheld": "the machine was busy"}
    return report


def test_a_speed_that_is_withheld_is_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = withheld()
    text = page(report, tmp_path).partition("</style>")[2]
    head, _, body = text.partition("<main>")
    assert "not compared" in head
    assert "the machine was busy" in head
    assert "Speeds are not compared: the machine was busy." in body
    assert "\N{MULTIPLICATION SIGN}</" not in head + body
    assert "as fast as" not in text
    report["exports"] = [e for e in report["exports"] if e["status"] != "refused"]
    _summarize(report, Path("deploy"))
    output = capsys.readouterr().out
    assert "speeds are not compared: the machine was busy" in output
    (line,) = [line for line in output.splitlines() if "latency, ms" in line]
    assert line.split("│")[4].strip() == ""


def test_only_the_form_that_cannot_be_compared_is_left_out(tmp_path: Path) -> None:
    report = withheld("openvino int8")  # the fastest
    assert claims.withheld(report) == ["OpenVINO int8: the machine was busy"]
    write_html(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>OpenVINO bf16 takes 1.60 ms</b>" in text
    assert "Speeds are not compared: OpenVINO int8: the machine was busy." in text
