"""`python -m repnet.bench`: what it measures, what it refuses to time, and what it writes."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import repnet
from repnet.bench.__main__ import main
from repnet.bench.environment import environment
from repnet.bench.forms import (
    FORMS,
    TOLERANCES,
    Kitchen,
    Skip,
    difference,
    forms_of,
    reference,
    tolerance,
)
from repnet.bench.measure import Options, Row, benchmark
from repnet.bench.plot import draw, pareto
from repnet.bench.recipe import Recipe
from repnet.bench.subjects import Subject, find_subject
from repnet.bench.table import (
    Result,
    number,
    print_tables,
    read_results,
    write_markdown,
    write_results,
)
from repnet.bench.worker import InPrecision, Worker, WorkerError, _Held, cores
from repnet.checkpoint import describe, save_checkpoint
from repnet.deploy.formats.torch_export import TorchExport
from repnet.deploy.latency import percentile, take_turns, time_passes
from repnet.errors import InputError
from repnet.spec import load_choice
from tests.artefacts import COLORS, write_artefact
from tests.commands import ROOT
from tests.commands import environment as variables
from tests.models import randomize_batch_norm

PNG = b"\x89PNG\r\n"
FEW = Options(batches=[2], threads=1, runs=2)


def tiny(classes: int = 4) -> nn.Module:
    return randomize_batch_norm(
        repnet.create_model("repvgg_tiny", num_classes=classes, widths=[0.125] * 4)
    )


@pytest.fixture
def subject() -> Subject:
    shape, train_form = (3, 16, 16), tiny()
    return Subject(
        "tiny", shape, train_form, repnet.reparameterize(train_form, torch.randn(2, *shape))
    )


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("bench") / "fashion" / "deploy"
    report = {
        "metrics": {"train_form": {"top1": 0.93}, "deploy_form": {"top1": 0.93}},
        "exports": [{"format": "torch_export", "precision": "fp32", "top1": 0.92}],
    }
    write_artefact(directory, formats=["torch_export"], report=report)
    return directory


def bench(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "repnet.bench", *map(str, arguments)],
        cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
    return result


def test_an_artefact_in_all_its_forms(artefact: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "markdown", "png")}
    done = bench(
        artefact, "--forms", "train,deploy,torch_export,executorch,tensorrt,cudagraphs",
        "--batch", "2", "1", "--runs", "3", "--device", "cpu", "--threads", "1",
        "--csv", files["csv"], "--json", files["json"], "--markdown", files["markdown"],
        "--plot", files["png"], "--trust", "native",
    )  # fmt: skip
    with files["csv"].open() as file:
        rows = {(row["form"], int(row["batch"])): row for row in csv.DictReader(file)}
    assert len(rows) == 12
    for batch in (1, 2):
        for form in ("train", "deploy", "torch_export"):
            row = rows[form, batch]
            assert (row["subject"], row["status"], row["reason"]) == ("fashion", "timed", "")
            assert (row["image"], row["threads"], row["passes"]) == ("3x16x16", "1", "3")
            times = [float(row[f"{key}_ms"]) for key in ("p10", "p25", "median", "p75", "p90")]
            assert times[0] > 0
            assert times == sorted(times)
            assert row["p95_ms"] == row["p99_ms"] == ""  # of three passes
            rate = batch / float(row["median_ms"]) * 1e3
            assert float(row["images_per_second"]) == pytest.approx(rate)
            for other in ("train", "deploy"):
                speed = float(rows[other, batch]["median_ms"]) / float(row["median_ms"])
                assert float(row[f"times_{other}"]) == pytest.approx(speed)
            assert 0 <= int(row["memory_bytes"]) < 2e9
            assert float(row["cores"]) > 0
            assert "torch=" in row["versions"]
            assert 0 < float(row["difference"]) < TOLERANCES["fp32"]
        for form, reason in {
            "executorch": "not among the files",
            "tensorrt": "only with --device cuda",
            "cudagraphs": "only with --device cuda",
        }.items():
            assert rows[form, batch]["status"] == "skipped"
            assert reason in rows[form, batch]["reason"]
            assert rows[form, batch]["median_ms"] == ""
    assert int(rows["train", 1]["parameters"]) > int(rows["deploy", 1]["parameters"])
    assert int(rows["train", 1]["macs"]) > int(rows["deploy", 1]["macs"])
    assert rows["train", 1]["note"] == "random weights"  # an artefact has none of the train form
    assert [rows[form, 1]["top1"] for form in ("train", "deploy", "torch_export")] == [
        "0.93", "0.93", "0.92"
    ]  # fmt: skip
    (result,) = read_results(files["json"])
    assert {(row.form, row.batch) for row in result.rows} == set(rows)
    assert result.environment["threads"] == 1
    assert result.environment["hardware"]
    assert files["png"].read_bytes().startswith(PNG)
    for text in (done.stdout, files["markdown"].read_text()):
        assert "fashion, 3x16x16, batch 2" in text
        assert "skipped executorch: not among the files of this artefact" in text
        assert "[1] random weights" in text
        assert "M multiply-adds" in text
        assert "93.00%" in text
    assert "W1" not in done.stderr


def test_a_named_model_in_int8_is_marked(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    file = tmp_path / "out.json"
    done = bench("repvgg_tiny", "--forms", "openvino_int8", "--size", "32", "--batch", "1",
                 "--runs", "2", "--device", "cpu", "--json", file)  # fmt: skip
    rows = {row.form: row for row in read_results(file)[0].rows}
    assert rows["openvino_int8"].status == "timed", rows["openvino_int8"].reason
    assert rows["openvino_int8"].note == "timing only: calibrated on noise"
    assert 1e-3 < (rows["openvino_int8"].difference or 0) < TOLERANCES["int8"]
    assert "openvino_int8 [1]" in done.stdout


def test_a_form_that_computes_something_else_is_not_timed(
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = TorchExport.export

    def tampered(self: TorchExport, model: nn.Module, *rest: Any, **options: Any) -> None:
        original(self, changed(model, float("nan")), *rest, **options)

    def changed(model: nn.Module, by: float = 0.1) -> nn.Module:
        model = deepcopy(model)
        with torch.no_grad():
            model.head.bias[1] += by  # type: ignore[index,operator,union-attr]
        return model

    monkeypatch.setattr(TorchExport, "export", tampered)
    wrong = replace(subject, train_form=changed(subject.train_form))
    monkeypatch.setattr("repnet.bench.subjects.find_subject", lambda *_, **options: wrong)
    arguments = ["bench", "tiny", "--forms", "train,torch_export", "--batch", "2",
                 "--runs", "2", "--device", "cpu", "--plot", str(tmp_path / "x.png")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    output = capsys.readouterr().out
    assert "refused train: its output differs by" in output
    assert "refused torch_export: its output differs by nan" in output
    assert "allowed 1e-03: it was not timed" in output
    assert "images/s" not in output  # no row in the table
    assert not (tmp_path / "x.png").exists()


def test_files_that_take_pixels_are_checked_against_normalized_images(tmp_path: Path) -> None:
    write_artefact(tmp_path / "pixels", formats=["torch_export"], preprocess=True)
    subject = find_subject(str(tmp_path / "pixels"), trust=["native"])
    assert [export.preprocess for export in subject.exports] == [True]
    (row,) = benchmark(subject, ["torch_export"], FEW)
    assert (row.status, row.reason) == ("timed", None)
    assert row.difference is not None
    assert row.difference < 1e-4
    pixels = torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8)
    expected = reference(subject, FORMS["deploy"], pixels, preprocess=True)
    subject.preprocessing["mean"] = [0.9, 0.5, 0.1]
    other = reference(subject, FORMS["deploy"], pixels, preprocess=True)
    assert difference(other, expected) > TOLERANCES["fp32"]


def test_a_compiled_form(subject: Subject) -> None:
    (row,) = benchmark(subject, ["compiled"], FEW)
    assert (row.status, row.reason) == ("timed", None)
    assert row.times_deploy is None  # which was not asked for


BAD = {
    "an unknown form": (["repvgg_tiny", "--forms", "deploy,cmopiled"], "'compiled'"),
    "an unknown name": (["repvgg_a9"], "repvgg_a0"),
    "a missing file": (["somewhere/best.ckpt"], "there is no model, artefact or checkpoint"),
    "a missing result": (["somewhere.json"], "there is no model, artefact or checkpoint"),
    "no batch": (["repvgg_tiny", "--batch", "0"], "--batch 0 must be at least 1"),
    "no threads": (["repvgg_tiny", "--threads", "0"], "--threads 0 must be at least 1"),
    "no runs": (["repvgg_tiny", "--runs", "0"], "--runs 0 must be at least 1"),
    "no time": (["repvgg_tiny", "--seconds", "nan"], "--seconds nan must be above 0"),
    "no size": (["repvgg_tiny", "--size", "-1"], "--size -1 must be at least 1"),
    "no picture": (["repvgg_tiny", "--plot", "x.pdf"], "must end in .png"),
    "nowhere": (["repvgg_tiny", "--csv", "nowhere/x.csv"], "there is no directory 'nowhere'"),
    "a directory": (["repvgg_tiny", "--json", "."], "is a directory"),
    "an empty directory": (["."], "holds no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_form_lists_the_choices() -> None:
    done = bench("repvgg_tiny", "--forms", "onxx", code=2)
    assert all(name in done.stderr for name in FORMS)
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "repvgg_tiny", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "finds no GPU here; use --device cpu" in capsys.readouterr().err


def test_changed_and_wrong_artefacts_are_refused(artefact: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in artefact.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    directory = copy("changed")
    file = directory / "model.pt2"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"model\.pt2' was changed after it was verified"):
        find_subject(str(directory))
    with pytest.raises(InputError, match="is a file of an artefact; pass its directory"):
        find_subject(str(file))
    directory = copy("wrong")
    description = json.loads((directory / "model.json").read_text())
    del description["sha256"]  # by one who knows of its sum
    description["exports"] = [{"file": 5}]
    (directory / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="lists its exports wrongly"):
        find_subject(str(directory))
    description["exports"] = [  # whose hash would not be looked at
        {"file": "model.pt2", "files": [], "format": "torch_export", "precision": "fp32",
         "preprocess": False}
    ]  # fmt: skip
    (directory / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="lists its exports wrongly"):
        find_subject(str(directory))
    directory = copy("shapeless")
    description["exports"], description["data"] = [], {}
    (directory / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="does not say the shape of its images"):
        find_subject(str(directory))


def test_runs_of_the_same_name_are_told_apart(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for name in "ab":
        shutil.copytree(artefact, tmp_path / name / "best" / "deploy")
        texts.append(str(tmp_path / name / "best" / "deploy"))
    timed: list[str] = []
    monkeypatch.setattr(
        "repnet.bench.measure.benchmark", lambda subject, *_, **options: timed.append(subject.name)
        or []
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench", *texts, "repvgg_tiny", texts[0], "--device", "cpu"])
    with pytest.raises(SystemExit):
        main()
    assert timed == [*texts, "repvgg_tiny"]


def test_a_run_and_its_checkpoint(tmp_path: Path) -> None:
    spec = load_choice("model", "repvgg_tiny") | {"num_classes": 4, "in_channels": 3}
    model = randomize_batch_norm(repnet.create_model("repvgg_tiny", num_classes=4))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    entry = describe({"model": spec}, COLORS)
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    save_checkpoint({"state_dict": state, "repnet": entry}, path)
    images = torch.randn(2, 3, 16, 16)
    for text in (path, path.parent.parent):
        subject = find_subject(str(text))
        assert (subject.name, subject.input_shape) == ("run", (3, 16, 16))
        torch.testing.assert_close(subject.train_form(images), model(images))
        torch.testing.assert_close(subject.deploy_form(images), model(images), rtol=1e-3, atol=1e-3)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in subject.deploy_form.modules())


def test_a_named_model_has_statistics_that_must_be_folded() -> None:
    subject = find_subject("mobileone_tiny", size=16)
    norms = [m for m in subject.train_form.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.running_mean.abs().max() > 0 for norm in norms)  # type: ignore[union-attr]
    images = torch.randn(2, 3, 16, 16)
    expected = reference(subject, FORMS["train"], images)
    allowed = [tolerance(subject, FORMS[name], "cpu", images)
               for name in ("deploy", "fp16", "bf16", "openvino_int8")]  # fmt: skip
    assert allowed == sorted(allowed)
    assert allowed[0] == 1e-3
    assert allowed[-1] < 1
    assert expected.dtype == torch.float64
    assert difference(subject.train_form(images), expected) < TOLERANCES["fp32"]
    other = find_subject("mobileone_tiny", size=16).deploy_form
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
    assert difference(other(images), expected) > allowed[-1]


def test_timm_gets_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    subject = find_subject("mobileone_s0", size=32)
    recipe = Kitchen(subject, tmp_path, "cpu").make(FORMS["timm"])
    twin = torch.load(recipe.path, weights_only=False)
    assert type(twin).__module__.startswith("timm")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        actual = twin(images)
    assert difference(actual, reference(subject, FORMS["timm"], images)) < TOLERANCES["fp32"]
    stranger = replace(subject, name="fashion")
    with pytest.raises(Skip, match="timm has no model 'fashion'"):
        Kitchen(stranger, tmp_path / "other", "cpu").make(FORMS["timm"])


def test_what_cannot_be_made_is_skipped_with_the_reason(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kitchen = Kitchen(subject, tmp_path, "cpu")

    def fails(*_: Any, **options: Any) -> None:
        raise RuntimeError("no operator for that\nand more")

    monkeypatch.setattr(TorchExport, "export", fails)
    with pytest.raises(Skip, match="^RuntimeError: no operator for that$"):
        kitchen.make(FORMS["torch_export"])
    monkeypatch.setattr(TorchExport, "packages", ("a_package_that_is_not_there",))
    monkeypatch.setattr(TorchExport, "extra", "onnx")
    with pytest.raises(Skip, match=r'a_package_that_is_not_there: pip install "repnet\[onnx\]"'):
        kitchen.make(FORMS["torch_export"])


def test_the_forms_of_an_artefact_are_its_files(artefact: Path, subject: Subject) -> None:
    for trust, files in (["native"], {"torch_export"}), ([], set()):
        own = forms_of(find_subject(str(artefact), trust=trust), [], "cpu")
        assert {name for name, form in own.items() if form.runtime} == files
    assert {"onnx", "openvino_int8", "aot"} <= forms_of(subject, [], "cpu").keys()
    assert {"cudagraphs_fp16", "tensorrt"} <= forms_of(subject, [], "cuda").keys()
    assert not {"openvino_int8"} & forms_of(subject, [], "cuda").keys()


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    worker = Worker(Recipe(tmp_path / "missing.pt", "cpu", FORMS["deploy"]), 1)
    with pytest.raises(WorkerError, match="FileNotFoundError"):
        worker.load()
    worker.process.kill()
    with pytest.raises(WorkerError, match="its process ended by SIGKILL"):
        worker.turn(1)
    worker.close()


def test_a_process_that_dies_while_it_is_timed_loses_its_own_row_only(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, turns = Worker.turn, 0

    def dying(self: Worker, passes: int) -> tuple[list[float], float]:
        nonlocal turns
        turns += 1
        if turns == 3:  # the second round begins with another form
            self.process.kill()
            self.process.join()
        return turn(self, passes)

    monkeypatch.setattr(Worker, "turn", dying)
    rows = benchmark(subject, ["train", "deploy"], Options(batches=[1], runs=4))
    lost, timed = sorted(rows, key=lambda row: row.median_ms is not None)
    assert (lost.status, timed.status, timed.passes) == ("skipped", "timed", 4)
    assert lost.reason == "its process ended by SIGKILL"


def test_a_process_that_dies_after_it_was_timed_loses_its_own_row_only(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, deaths = Worker.memory, 1

    def dying(self: Worker) -> int | None:
        nonlocal deaths
        if deaths:
            deaths -= 1
            self.process.kill()
            self.process.join()
        return memory(self)

    monkeypatch.setattr(Worker, "memory", dying)
    rows = benchmark(subject, ["train", "deploy"], Options(batches=[1], runs=2))
    assert sorted(row.status for row in rows) == ["skipped", "timed"]


def test_the_only_pass_of_a_slow_turn_counts_with_its_cpu_time(tmp_path: Path) -> None:
    def busy() -> None:
        start = time.process_time()
        while time.process_time() - start < 0.15:  # more than WAKE
            pass

    held = _Held(Recipe(tmp_path, "cpu", FORMS["deploy"]))
    held.call = busy
    times, seconds = held.turn(1)
    assert len(times) == 1
    assert seconds >= 0.15


def test_a_fast_form_is_woken_by_a_pass_that_does_not_count(tmp_path: Path) -> None:
    passes: list[int] = []
    held = _Held(Recipe(tmp_path, "cpu", FORMS["deploy"]))
    held.call = lambda: passes.append(1)
    times, _ = held.turn(3)
    assert (len(times), len(passes)) == (3, 4)


def test_precisions_return_float32() -> None:
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    seen: list[torch.Tensor] = []
    short = InPrecision(deepcopy(model), "bf16", channels_last=True).eval()
    short.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        logits = short(images)
    assert logits.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(p.dtype == torch.bfloat16 for p in short.parameters())
    assert 0 < difference(logits, model.double()(images.double())) < 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    values = torch.randn(count, dtype=torch.float64).tolist()
    for percent in (0, 10, 25, 50, 75, 90, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))


def test_percentiles_of_a_known_series() -> None:
    values = list(range(100, -1, -1))
    assert [percentile(values, p) for p in (0, 10, 50, 95, 99, 100)] == [0, 10, 50, 95, 99, 100]
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([7.0], 99) == 7


def test_turns_rotate() -> None:
    order: list[str] = []

    def turn(name: str, passes: int) -> list[float]:
        order.append(name)
        return [float(passes)] * passes

    turns = {name: lambda passes, name=name: turn(name, passes) for name in "abc"}
    passes = {"a": [2, 2, 2], "b": [1, 1, 1], "c": [3]}
    times = take_turns(turns, passes, rotate=True)
    assert "".join(order) == "abc" + "ba" + "ab"
    assert times == {"a": [2.0] * 6, "b": [1.0] * 3, "c": [3.0] * 3}
    order.clear()
    take_turns(turns, passes)
    assert "".join(order) == "abc" + "ab" + "ab"


def test_each_pass_is_timed() -> None:
    calls: list[int] = []
    times = time_passes(lambda: calls.append(1), 5, device=torch.device("cpu"))
    assert len(times) == len(calls) == 5


def test_the_passes_of_a_form() -> None:
    for runs in (1, 7, 10, 23):
        passes = Options(runs=runs).passes(5.0)
        assert sum(passes) == runs
        assert min(passes) >= 1
        assert len(passes) <= 10
    assert Options(seconds=2).passes(10.0) == [20] * 10
    assert Options(seconds=1).passes(5_000) == [1] * 10


def test_a_difference_is_never_overlooked() -> None:
    expected = torch.tensor([[1.0, -4.0], [2.0, 3.0]], dtype=torch.float64)
    assert difference(expected.repeat(2, 1)[:3], expected) == 0
    output = expected.clone()
    output[1, 0] = 1.0
    assert difference(output, expected) == 0.25
    assert difference(expected.flip(0), expected) > 1
    assert difference(expected[:, :1], expected) == math.inf
    assert math.isnan(difference(output * float("nan"), expected))


def rows_of(subject: str, batch: int, forms: dict[str, tuple[float, float | None]]) -> list[Row]:
    return [
        Row(
            subject, name, "", batch, "3x32x32", status="timed", passes=30, median_ms=median,
            p10_ms=0.9 * median, p90_ms=1.2 * median, images_per_second=batch / median * 1e3,
            difference=1e-6, top1=top1, top1_is_own=name != "compiled", cores=0.99,
        )
        for name, (median, top1) in forms.items()
    ]  # fmt: skip


KNOWN = {"train": (8.0, 0.931), "deploy": (3.2, 0.931), "compiled": (2.4, 0.931),
         "onnx": (1.2, 0.931), "openvino_int8": (0.4, 0.921)}  # fmt: skip


@pytest.mark.parametrize("accuracy", [True, False])
def test_the_names_of_forms_cover_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: bool
) -> None:
    from matplotlib.figure import Figure

    forms = KNOWN if accuracy else {name: (ms, None) for name, (ms, _) in KNOWN.items()}
    rows = [row for batch in (1, 8) for name in "ab" for row in rows_of(name, batch, forms)]
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    draw([Result(environment("cpu", 1), rows)], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert len(drawn[0].axes) == (2 if accuracy else 4)
    if not accuracy:
        labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
        assert labels == list(KNOWN)
        return
    for axes in drawn[0].axes:
        assert axes.get_xscale() == "log"
        boxes = [text.get_bbox_patch() or text.get_window_extent() for text in axes.texts]
        assert [text.get_text() for text in axes.texts].count("onnx") == 2
        assert len(boxes) == 10


def test_the_front() -> None:
    points = [(3.0, 0.9), (1.0, 0.8), (2.0, 0.7), (4.0, 0.9), (0.5, 0.6), (1.0, 0.75)]
    assert pareto(points) == [4, 1, 0]


def test_results_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result(environment("cpu", 1), rows_of("[a]", 1, KNOWN))]
    write_results(results, tmp_path / "x.json")
    assert read_results(tmp_path / "x.json") == results
    print_tables(results)
    text = capsys.readouterr().out
    assert "[a], 3x32x32, batch 1" in text
    assert "(93.10%)" in text  # not its own
    assert "busy" not in text
    results[0].rows[0].cores = 0.4
    print_tables(results)
    assert "PyTorch had 0.40 of a core" in capsys.readouterr().out
    write_markdown(results, tmp_path / "x.md")
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert lines[2].startswith("| form | ms | p10 - p90 |")
    assert lines[4].startswith("| train | 8.00 | 7.20 - 9.60 |")
    for text in ("{}", "[]", "no", '{"format": "repnet-bench", "version": 99, "results": []}'):
        (tmp_path / "y.json").write_text(text)
        with pytest.raises(InputError, match="y.json"):
            read_results(tmp_path / "y.json")


def test_numbers_have_three_digits() -> None:
    values = [0.1234, 1.234, 12.34, 123.4, 12345.0, None]
    assert [number(value) for value in values] == ["0.123", "1.23", "12.3", "123", "12,345", "-"]


def test_cores_come_before_their_twins() -> None:
    found = cores()
    assert len(found) == len(set(found)) >= 1
