"""Exports of `deploy.py`: every file is run before it is shipped."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import repnet
from repnet.data import Digits
from repnet.deploy.formats import ExportError
from repnet.deploy.formats.onnx import Onnx
from repnet.deploy.formats.openvino import OpenVino
from repnet.deploy.gate import Comparison, Gate, VerificationError
from repnet.deploy.pipeline import Int8, Settings, deploy
from repnet.deploy.report import write_html
from repnet.errors import InputError
from repnet.predict import Predictor
from tests.commands import environment, run

EXACT = Gate(tolerance=1e-3, max_drop=0, min_agreement=1)
COARSE = Gate(tolerance=float("inf"), max_drop=0.1, min_agreement=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exporting") / "run"
    run("train.py", f"hydra.run.dir={directory}", "trainer.max_epochs=4", "pictures=false",
        "model.widths=[0.25,0.25,0.25,0.25]", cwd=directory.parent)  # fmt: skip
    return directory / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def deployed(checkpoint: Path) -> Path:
    """All precisions of two formats, and one that cannot be run here."""
    run("deploy.py", f"ckpt={checkpoint}", "export=[onnx,openvino,coreml]",
        "export.onnx.precisions=[fp32,int8]", "export.openvino.precisions=[fp32,bf16,int8]",
        "int8.max_drop=0.05", "int8.samples=32", "latency.runs=3",
        "export.min_agreement=0.9", "export.max_drop=0.02", cwd=checkpoint.parent)  # fmt: skip
    return checkpoint.parent.parent / "deploy"


def images() -> Tensor:
    data = Digits()
    data.setup()
    return next(iter(data.test_dataloader()))[0]


def test_all_that_is_shipped_was_run_on_every_sample(deployed: Path) -> None:
    report = json.loads((deployed / "report.json").read_text())
    entries = {(e["format"], e["precision"]): e for e in report["exports"]}
    skipped = entries.pop(("coreml", "fp16"))
    assert skipped["status"] == "skipped"
    assert skipped["reason"]
    assert set(entries) == {
        ("onnx", "fp32"), ("onnx", "int8"),
        ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"),
    }  # fmt: skip
    for entry in entries.values():
        assert entry["status"] == "verified", entry["reason"]
        assert entry["samples"] == 360
        assert entry["latency_ms"] > 0
        assert entry["bytes"] > 1000
        assert entry["drop"] == pytest.approx(
            report["metrics"]["train_form"]["top1"] - entry["top1"]
        )
        name = f"{entry['format']} {entry['precision']}"
        assert report["latency"]["forms"][name]["median"] == entry["latency_ms"]
    assert entries["onnx", "fp32"]["agreement"] == 1
    assert entries["openvino", "fp32"]["agreement"] == 1
    held = {limit["key"]: limit for limit in report["limits"] if limit["key"]}
    assert held.keys() == {"deploy.allow_norms", *Settings().limits}
    assert all(limit["passed"] for limit in report["limits"])
    drops = {f"{format} {kind}": entry["drop"] for (format, kind), entry in entries.items()}
    worst = held["int8.max_drop"]
    assert worst["measured"] == drops[worst["where"]]
    assert worst["measured"] == max(drops["onnx int8"], drops["openvino int8"])
    loosened = {key for key, limit in held.items() if limit["loosened"]}
    assert loosened == {"int8.max_drop", "export.max_drop", "export.min_agreement"}
    assert "int8.max_drop=0.05 instead of 0.01" in (deployed / "report.html").read_text()
    described = json.loads((deployed / "model.json").read_text())
    written = {path.relative_to(deployed).as_posix() for path in deployed.rglob("*")}
    assert written == {"model.json", "report.json", "report.html", *described["hashes"]}
    assert len(report["int8"]["layers"]) == 9  # eight blocks and the head
    assert set(report["int8"]["attempts"]) == {"onnx", "openvino"}
    assert report["int8"]["samples"] == 32


@pytest.mark.parametrize(
    ("file", "error"),
    [("model.onnx", 1e-5), ("model.xml", 1e-5), ("model_bf16.xml", 0.1), ("model_int8.onnx", 0.5),
     ("model_int8.xml", 0.5)],
)  # fmt: skip
def test_files_are_loaded_as_functions(deployed: Path, file: str, error: float) -> None:
    expected = repnet.load_deployed(deployed)(images())
    model = repnet.load_deployed(deployed / file)
    assert model.input_is_uint8 is False
    difference = (model(images()) - expected).abs().max() / expected.abs().max()
    assert difference < error
    assert torch.equal(model(images()[:1]).argmax(1), expected[:1].argmax(1))


@pytest.mark.parametrize("file", ["model.onnx", "model.bin", "model.xml", "model.safetensors"])
def test_a_changed_byte_is_named(deployed: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(deployed, tmp_path / "copy")
    path = tmp_path / "copy" / file
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(InputError, match=f"{file}' was changed after it was verified"):
        repnet.load_deployed(path)


def test_only_verified_files_are_loaded(deployed: Path, tmp_path: Path) -> None:
    shutil.copytree(deployed, tmp_path / "copy")
    stranger = tmp_path / "copy" / "other.onnx"
    shutil.copy(deployed / "model.onnx", stranger)
    with pytest.raises(InputError, match="does not list 'other.onnx'"):
        repnet.load_deployed(stranger)
    (tmp_path / "copy" / "model.bin").unlink()
    with pytest.raises(InputError, match=r"has no model\.bin"):
        repnet.load_deployed(tmp_path / "copy" / "model.xml")


def test_exports_are_replaced_as_a_whole(deployed: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(deployed, tmp_path / "out")
    deploy(checkpoint, tmp_path / "out", Settings(overwrite=True, latency_runs=1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "model.json", "report.json", "report.html",
    }  # fmt: skip


def tampering(change: Any) -> Any:
    """Return `Onnx.export` with the weights changed after the export."""
    original = Onnx.export

    def export(self: Onnx, model: nn.Module, example: Tensor, path: Path, **options: Any) -> None:
        import onnx
        from onnx import numpy_helper

        original(self, model, example, path, **options)
        file = onnx.load(path)
        weight = max(file.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        array = numpy_helper.to_array(weight).copy()
        weight.CopyFrom(numpy_helper.from_array(change(array), weight.name))
        onnx.save(file, path)

    return export


@pytest.mark.parametrize("factor", [1.5, 1.01, float("nan")])
def test_weights_changed_after_the_export_are_caught(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(Onnx, "export", tampering(lambda array: array * factor))
    with pytest.raises(VerificationError, match="onnx fp32: "):
        deploy(checkpoint, tmp_path / "out", Settings(exports={"onnx": ["fp32"]}, latency_runs=1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.html"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["exports"][0]["status"] == "refused"
    assert report["verified"] is False


@pytest.mark.parametrize(
    ("batch_size", "wrong", "how", "precision"),
    [(64, 1, "alone", "fp32"), (64, 1, "alone", "bf16"), (1, 2, "twice", "bf16")],
)
def test_a_file_that_is_wrong_for_another_batch_size_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    batch_size: int, wrong: int, how: str, precision: str,
) -> None:  # fmt: skip
    load = OpenVino.load

    def load_wrong(self: OpenVino, path: Path, **options: Any) -> Any:
        runner = load(self, path, **options)
        return lambda images: runner(images) * (len(images) != wrong)

    monkeypatch.setattr(OpenVino, "load", load_wrong)
    settings = Settings(
        exports={"openvino": [precision]}, data={"batch_size": batch_size}, latency_runs=1
    )
    with pytest.raises(VerificationError, match=f"openvino {precision}: .* where it comes {how}"):
        deploy(checkpoint, tmp_path / "out", settings)


def test_what_a_runtime_prints_stays_out(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    load = Onnx.load

    def talkative(self: Onnx, *arguments: Any, **options: Any) -> Any:
        os.write(2, b"[runtime.cpp:1] reading a file\n")
        run = load(self, *arguments, **options)

        def runner(images: Tensor) -> Tensor:
            os.write(1, b"[runtime.cpp:2] running\n")
            return run(images)

        return runner

    monkeypatch.setattr(Onnx, "load", talkative)
    deploy(checkpoint, tmp_path / "out", Settings(exports={"onnx": ["fp32"]}, latency_runs=1))
    assert "runtime.cpp" not in "".join(capfd.readouterr())


def test_one_export_that_cannot_be_made_does_not_stop_the_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Onnx, *arguments: Any, **options: Any) -> None:
        raise ExportError("ONNX has no operator 'aten::strange'")

    monkeypatch.setattr(Onnx, "export", fail)
    exports: Mapping[str, list[str]] = {"onnx": ["fp32", "int8"], "openvino": ["fp32"]}
    report = deploy(checkpoint, tmp_path / "out", Settings(exports=exports, latency_runs=1))
    statuses = [(e["format"], e["precision"], e["status"]) for e in report["exports"]]
    assert statuses == [
        ("onnx", "fp32", "failed"), ("openvino", "fp32", "verified"), ("onnx", "int8", "failed"),
    ]  # fmt: skip
    assert report["exports"][0]["reason"] == "ONNX has no operator 'aten::strange'"
    assert repnet.load_deployed(tmp_path / "out" / "model.xml")(images()).shape[1] == 10


FAILING = """
import sys
from repnet.deploy.formats import ExportError
from repnet.deploy.formats.onnx import Onnx
from repnet.cli.deploy import main

def fail(self, *arguments, **options):
    raise ExportError("ONNX has no operator 'aten::strange'")

Onnx.export = fail
sys.argv = ["deploy.py", "ckpt={checkpoint}", "export=onnx", "hydra.run.dir=out", "latency.runs=1"]
main()
"""


def test_a_failed_export_is_in_the_exit_code(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(checkpoint=checkpoint))
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: 1 of 1 exports failed")
    assert "aten::strange" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_int8_that_loses_accuracy_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantizer that ruins the file, whatever is left in float."""
    import repnet.deploy.int8 as int8

    def ruin(path: Path) -> None:
        constants = [
            data for data in ElementTree.parse(path).iter("data") if "offset" in data.attrib
        ]
        largest = max(constants, key=lambda data: int(data.attrib["size"])).attrib
        begin, size = int(largest["offset"]), int(largest["size"])
        contents = bytearray(path.with_suffix(".bin").read_bytes())
        contents[begin : begin + size] = contents[begin : begin + size][::-1]
        path.with_suffix(".bin").write_bytes(contents)

    original = int8.quantize_until

    def quantize_until(name: str, source: Path, target: Path, *rest: Any) -> Any:
        *arguments, accept = rest

        def accept_ruined(path: Path) -> Any:
            ruin(path)
            return accept(path)

        return original(name, source, target, *arguments, accept_ruined)

    monkeypatch.setattr(int8, "quantize_until", quantize_until)
    settings = Settings(exports={"openvino": ["int8"]}, int8=Int8(samples=8), latency_runs=1)
    with pytest.raises(VerificationError, match="openvino int8: "):
        deploy(checkpoint, tmp_path / "out", settings)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.html"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    attempts = report["int8"]["attempts"]["openvino"]
    assert len(attempts) > 1
    assert not any(attempt["accepted"] for attempt in attempts)


def test_attempts_are_told_though_a_later_one_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import repnet.deploy.int8.mixed as mixed

    quantize, calls = mixed.quantize, list[Any]()

    def fail_third(*arguments: Any, keep: Any) -> None:
        calls.append(keep)
        if len(calls) == 3:
            raise ExportError("no third one")
        quantize(*arguments, keep=keep)

    monkeypatch.setattr(mixed, "quantize", fail_third)
    options = Int8(samples=8, max_drop=0.0, min_agreement=1.0)
    monkeypatch.setattr(Comparison, "refusal", lambda *_: "not good enough")
    settings = Settings(exports={"openvino": ["int8"]}, int8=options, latency_runs=1)
    report = deploy(checkpoint, tmp_path / "out", settings)
    assert [e["status"] for e in report["exports"]] == ["failed"]
    first, second = report["int8"]["attempts"]["openvino"]
    assert (first["kept"], second["kept"]) == ([], calls[1])
    assert len(calls[1]) == 1


def test_int8_needs_its_own_package(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import repnet.deploy.formats.base as base

    find_spec = base.find_spec
    monkeypatch.setattr(base, "find_spec", lambda n: None if n == "nncf" else find_spec(n))
    with pytest.raises(InputError, match=r'nncf.*pip install "repnet\[openvino\]"'):
        deploy(checkpoint, tmp_path / "out", Settings(exports={"openvino": ["int8"]}))
    Settings(exports={"openvino": ["fp32"]}).check()


def test_files_with_preprocessing_take_pixels(checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(
        exports={"onnx": ["fp32"], "openvino": ["int8"]},
        preprocess=True,
        int8=Int8(samples=32, max_drop=0.05),
        latency_runs=1,
    )
    report = deploy(checkpoint, tmp_path / "out", settings)
    assert [e["preprocess"] for e in report["exports"]] == [True, True]
    data = Digits()
    data.setup()
    assert data.splits is not None
    pixels = data.splits[2].images[:64]  # type: ignore[attr-defined]
    model = repnet.load_deployed(tmp_path / "out" / "model.onnx")
    assert model.input_is_uint8 is True
    expected = repnet.load_deployed(tmp_path / "out")(images())
    torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on an image folder, whose last test images are then damaged."""
    directory = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 8), ("val", 4), ("test", 6)):
        for shade, name in enumerate(("cat", "dog")):
            folder = directory / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                color = (90 * shade + index, 50, 10 * index)
                Image.new("RGB", (30 + index, 24), color).save(folder / f"{index}.png")
    run("train.py", "data=imagefolder", f"data.root={directory / 'images'}", "data.image_size=16",
        "data.batch_size=8", "data.num_workers=0", "trainer.max_epochs=1", "pictures=false",
        "model.widths=[0.125,0.125,0.125,0.125]", f"hydra.run.dir={directory / 'run'}",
        cwd=directory)  # fmt: skip
    for name in ("4", "5"):
        (directory / "images" / "test" / "dog" / f"{name}.png").write_bytes(b"damaged")
    return directory


@pytest.mark.parametrize("preprocess", [False, True])
def test_images_that_cannot_be_read_are_left_out_and_named(
    photographs: Path, tmp_path: Path, preprocess: bool
) -> None:
    settings = Settings(
        exports={"onnx": ["fp32"]},
        preprocess=preprocess,
        latency_runs=1,
        data={"skip_corrupt": True, "batch_size": 4},
    )
    report = deploy(photographs / "run", tmp_path / "out", settings)
    assert report["samples"] == report["exports"][0]["samples"] == 10
    dogs = photographs / "images" / "test" / "dog"
    assert report["unreadable"] == [str(dogs / "4.png"), str(dogs / "5.png")]
    assert "2 more could not be" in (tmp_path / "out" / "report.html").read_text()


def test_images_are_prepared_by_the_rule_of_the_deployment(
    photographs: Path, tmp_path: Path
) -> None:
    settings = Settings(
        exports={"onnx": ["fp32"]},
        preprocess=True,
        latency_runs=1,
        data={"resize": 20, "skip_corrupt": True, "batch_size": 4},
    )
    deploy(photographs / "run", tmp_path / "out", settings)
    pixels = torch.randint(256, (3, 40, 31), dtype=torch.uint8)
    a, b = (Predictor(tmp_path / "out" / file) for file in ("model.safetensors", "model.onnx"))
    assert a.resize == b.resize == 20
    one, other = (p.predict([pixels])[0].scores[0].probability for p in (a, b))
    assert one == pytest.approx(other, abs=1e-6)


def test_nothing_is_counted_twice(photographs: Path, tmp_path: Path) -> None:
    settings = Settings(data={"skip_corrupt": True, "batch_size": 2})  # the last two are one batch
    with pytest.raises(InputError, match=r"2 images of the test split.*4\.png.*data\.batch_size"):
        deploy(photographs / "run", tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_preprocessing_that_cannot_be_exported_is_refused_at_once(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repnet.deploy.pipeline.evaluate", None)  # it does not come to that
    settings = Settings(exports={"onnx": ["fp32"]}, preprocess=True, data={"resize": 12})
    with pytest.raises(InputError, match=r"resize the shorter side to 12 pixels and crop 16 x 16"):
        deploy(photographs / "run", tmp_path / "out", settings)


def test_a_missing_extra_is_named_before_anything_is_done(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repnet.deploy.formats.base.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "repnet\[openvino\]"'):
        deploy(checkpoint, tmp_path / "out", Settings(exports={"openvino": ["fp32"]}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(exports={"onnxx": ["fp32"]}), "did you mean 'onnx'"),
        (Settings(exports={"openvino": ["fp8"]}), "not one of fp32, .*int8"),
        (Settings(exports={"torch_export": ["int8"]}), "'int8' is not one of"),
        (Settings(exports={"onnx": "fp32"}), "must be a list"),
        (Settings(exports={"onnx": []}), "must be a list"),
        (Settings(exports={"onnx": ["fp32", "fp32"]}), "different precisions"),
        (Settings(overwrite="no"), "deploy.overwrite=no"),  # type: ignore[arg-type]
        (Settings(latency_runs=2.5), "latency.runs=2.5"),  # type: ignore[arg-type]
        (Settings(recalibrate=-1), "recalibrate=-1"),
        (Settings(int8=Int8(samples=0)), "int8.samples=0"),
        (Settings(int8=Int8(max_drop=float("nan"))), "int8.max_drop"),
    ],
)
def test_settings_that_make_no_sense(
    checkpoint: Path, tmp_path: Path, settings: Settings, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        deploy(checkpoint, tmp_path / "out", settings)


def test_other_classes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ckpt"
    contents = torch.load(checkpoint, weights_only=True)
    names = contents["repnet"]["data"]["class_names"]
    contents["repnet"]["data"]["class_names"] = [*names[1:], names[0]]
    torch.save(contents, other)
    with pytest.raises(InputError, match="in another order"):
        deploy(other, tmp_path / "out")


def test_what_lies_in_the_way_of_a_refusal_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(overwrite=True, latency_runs=1)
    deploy(checkpoint, tmp_path / "out", settings)
    (tmp_path / "out.refused").mkdir()
    (tmp_path / "out.refused" / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError, match=r"out\.refused\.2"):
        deploy(checkpoint, tmp_path / "out", dataclasses.replace(settings, tolerance=0))
    assert (tmp_path / "out.refused" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out.refused.2" / "report.json").exists()


def test_an_artefact_that_came_meanwhile_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(report: dict[str, Any], path: Path) -> None:
        write_html(report, path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.json").write_text("another")

    monkeypatch.setattr("repnet.deploy.pipeline.write_html", another)
    with pytest.raises(InputError, match=r"out' was filled .* model is in '.*out\.2'"):
        deploy(checkpoint, tmp_path / "out", Settings(latency_runs=1))
    assert (tmp_path / "out" / "model.json").read_text() == "another"
    assert repnet.load_deployed(tmp_path / "out.2")


def test_statistics_may_be_computed_anew(checkpoint: Path, tmp_path: Path) -> None:
    report = deploy(checkpoint, tmp_path / "out", Settings(recalibrate=4, latency_runs=1))
    assert report["provenance"]["recalibrated_batches"] == 4
    assert report["agreement"] == 1
    trained, _ = repnet.load_checkpoint(checkpoint)
    before = trained.eval()(images())
    after = repnet.load_deployed(tmp_path / "out")(images())
    assert (before - after).abs().max() > 1e-3  # other statistics, another function


def compared(gate: Gate, actual: Tensor, expected: Tensor, labels: Tensor) -> Comparison:
    comparison = Comparison(gate, expected.abs().max().item())
    for part in (slice(0, 1), slice(1, None)):
        comparison.add(actual[part], expected[part], labels[part])
    return comparison


EXPECTED = torch.tensor([[4.0, 0.0, 1.0], [0.0, 2.0, 1.999], [1.0, 0.0, 3.0]])
LABELS = torch.tensor([0, 1, 2])


def test_a_change_within_the_tolerance_is_a_tie() -> None:
    actual = EXPECTED.clone()
    actual[1, 2] += 0.002
    result = compared(EXACT, actual, EXPECTED, LABELS)
    assert (result.samples, result.agreeing, result.ties, result.correct) == (3, 2, 1, 2)
    assert result.difference == pytest.approx(0.002 / 4, rel=1e-3)
    assert result.refusal(3, 1.0) is None
    assert result.refusal(4, 1.0) == "it answered for 3 of 4 samples"


def test_a_change_beyond_it_is_not() -> None:
    actual = EXPECTED.clone()
    actual[2, 0] = 3.5
    assert compared(EXACT, actual, EXPECTED, LABELS).refusal(3, 1.0) == (
        "1 of 3 predictions changed"
    )
    actual = EXPECTED * 1.01
    reason = compared(EXACT, actual, EXPECTED, LABELS).refusal(3, 1.0)
    assert reason is not None
    assert "logits differ by 1.0e-02" in reason


def test_coarse_arithmetic_is_held_to_accuracy_and_agreement() -> None:
    actual = EXPECTED.clone()
    actual[2, 0] = 3.5
    result = compared(COARSE, actual, EXPECTED, LABELS)
    assert result.refusal(3, 0.7) is None
    reason = result.refusal(3, 1.0)
    assert reason is not None
    assert "a drop of more than 10.00%" in reason
    exactly = Gate(float("inf"), 0.01, 0.0)
    result = Comparison(exactly, 1.0, samples=100, correct=89)
    assert 0.9 - result.top1 > 0.01  # in floating-point numbers
    assert result.refusal(100, 0.9) is None
    assert result.refusal(100, 0.91) is not None
    strict = Gate(float("inf"), 1.0, 0.7)
    assert "66.67%" in str(compared(strict, actual, EXPECTED, LABELS).refusal(3, 1.0))


@pytest.mark.parametrize("gate", [EXACT, COARSE])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(gate: Gate, value: float) -> None:
    actual = EXPECTED.clone()
    actual[0, 1] = value
    assert compared(gate, actual, EXPECTED, LABELS).refusal(3, 0.0) == "it returns NaN or infinity"


def test_another_shape_is_refused() -> None:
    with pytest.raises(VerificationError, match="returns"):
        compared(EXACT, EXPECTED[:, :2], EXPECTED, LABELS)
