"""The report of a deployment: the page, its pictures, and the schema of its facts."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import repnet
from repnet.complexity import count_macs, count_parameters
from repnet.deploy import png
from repnet.deploy.evaluation import evaluate
from repnet.deploy.kernel_pictures import kernel_pictures, pictured_blocks
from repnet.deploy.latency import measure_latency
from repnet.deploy.limits import limits
from repnet.deploy.report import SECTIONS, words, write_html
from repnet.deploy.report.charts import NUMBERED
from repnet.deploy.report.forms import _Axis
from repnet.deploy.settings import Int8, Settings
from repnet.deploy.where import REST, parts, where
from repnet.equivalence import TOLERANCES
from repnet.kernel import ConvKernel
from repnet.layers import Scale, Sum, conv_bn
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot"]  # fmt: skip
SHAPE = (3, 16, 16)


@cache
def _complete() -> dict[str, Any]:
    """Return the report of a real deployment of a tiny network, with invented exports and int8."""
    torch.manual_seed(0)
    model = repnet.create_model("repvgg_tiny", num_classes=10, widths=[0.125] * 4)
    randomize_batch_norm(model)
    images = torch.rand(120, *SHAPE)
    labels = torch.cat([model(images[:60]).argmax(1), torch.randint(10, (60,))]).detach()
    folded, fold = repnet.reparameterize(model, images[:8], return_report=True)
    assert fold.proof is not None
    batches = list(zip(images.split(40), labels.split(40), strict=True))
    evaluation = evaluate(model, folded, batches, torch.device("cpu"))
    logits = folded(images).detach()
    forms = {"train_form": model, "deploy_form": folded}
    latency: dict[str, Any] = dict(measure_latency(forms, images[:1], runs=5, warmup=1))
    blocks = [asdict(block) for block in fold.proof.blocks]
    names = [block["name"] for block in blocks]
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    matrix.index_put_((labels, logits.argmax(1)), torch.tensor(1), accumulate=True)
    best, ranked = logits.topk(2)
    margins = best[:, 0] - best[:, 1]
    closest = [
        {
            "index": index,
            "label": int(labels[index]),
            "predicted": int(ranked[index, 0]),
            "runner_up": int(ranked[index, 1]),
            "margin": margins[index].item(),
            "image": png.encode((images[index].movedim(0, -1) * 255).byte().numpy()),
        }
        for index in margins.argsort()[:12].tolist()
    ]
    top1 = evaluation.metrics["train_form"]["top1"]
    exports = [_export(*settings, top1=top1) for settings in EXPORTS]
    latency = {name: asdict(found) for name, found in latency.items()}
    latency["deploy_form"] |= {"speed_up": 1.5, "withheld": None}
    latency |= {f"{e['format']} {e['precision']}": e["latency"] for e in exports if e["latency"]}
    kept = names[:2]
    report = {
        "verified": True,
        "refusal": None,
        "exports": exports,
        "provenance": {
            "checkpoint": "/runs/2026-11-20/checkpoints/best.ckpt",
            "checkpoint_sha256": hashlib.sha256(b"checkpoint").hexdigest(),
            "weights": "ema",
            "recalibrated_batches": 0,
            "epoch": 99,
            "step": 43000,
            "model": model.architecture,
            "data": "FashionMNIST",
            "split": "test",
            "device": "AMD EPYC 9B14, 2 threads",
            "created": "2026-11-22T08:00:00+00:00",
            "versions": {"repnet": "0.1.0", "torch": "2.14.1", "python": "3.11.2"},
        },
        "fold": {
            "folded": [{"name": f.name, "replaced": list(f.replaced)} for f in fold.folded],
            "skipped": fold.skipped,
            "left": fold.left,
        },
        "warnings": ["stages.2.1: a running variance of 1e-12"],
        "cast_error": 1e-7,
        "max_relative_error": fold.proof.max_relative_error,
        "rest_error": fold.proof.rest_error,
        "blocks": blocks,
        "tolerance": dict(zip(("block", "output"), TOLERANCES[torch.float64], strict=True)),
        "samples": evaluation.samples,
        "unreadable": ["test/dog/4.png"],
        "agreement": evaluation.agreement,
        "metrics": evaluation.metrics,
        "logit_difference": evaluation.relative_difference,
        "changed": [asdict(sample) | {"tie": sample.is_tie} for sample in evaluation.changed],
        "parameters": {name: count_parameters(form) for name, form in forms.items()},
        "macs": {name: count_macs(form, SHAPE) for name, form in forms.items()},
        "latency_ms": {name: latency[name]["median"] for name in forms},
        "latency": {"batch": 1, "runs": 5, "device": "AMD EPYC 9B14, 2 threads", "forms": latency},
        "int8": {
            "samples": 300,
            "seed": 0,
            "split": "train",
            "indices_sha256": hashlib.sha256(b"indices").hexdigest(),
            "max_drop": 0.01,
            "layers": [
                {
                    "name": name,
                    "sqnr_db": 18.0 + 2.3 * index,
                    "weight_min": -0.4 - 0.1 * index,
                    "weight_max": 0.5,
                    "weight_spread": 7.5,
                    "activation_min": 0.0,
                    "activation_max": 3.0 + index,
                    "kept_float": name in kept,
                }
                for index, name in enumerate(names)
            ],
            "attempts": {
                "openvino": [
                    {"kept": [], "accepted": False, "top1": top1 - 0.031, "drop": 0.031,
                     "agreement": 0.94},
                    {"kept": kept, "accepted": True, "top1": top1 - 0.004, "drop": 0.004,
                     "agreement": 0.985},
                ]
            },
        },
        "confusion": {"class_names": CLASSES, "matrix": matrix.tolist()},
        "closest": closest,
        "where": where(model, folded, SHAPE),
        "kernels": kernel_pictures(model, folded, pictured_blocks(model, folded, names)),
        "wall_seconds": 12.3,
        "seconds": {"load": 0.4, "fold": 0.9, "evaluate": 6.5, "exports": 3.1, "latency": 1.2},
    }  # fmt: skip
    asked: dict[str, list[str]] = {}
    for format, precision, *_ in EXPORTS:
        asked.setdefault(format, []).append(precision)
    return report | {"limits": limits(report, Settings(exports=asked, int8=Int8(max_drop=0.06)))}


EXPORTS = (
    ("onnx", "fp32", "model.onnx", "verified", None, 4.1),
    ("onnx", "int8", "model_int8.onnx", "refused", "its top-1 accuracy is 88.10% instead of 93.21%,"
     " a drop of more than 1.00%", 3.2),
    ("openvino", "fp32", "model.xml", "verified", None, 3.9),
    ("openvino", "bf16", "model_bf16.xml", "verified", None, 1.6),
    ("openvino", "int8", "model_int8.xml", "verified", None, 1.2),
    ("torch_export", "fp32", "model.pt2", "verified", None, 6.9),
    ("executorch", "fp32", "model.pte", "failed", "ExportError: operator aten.grid_sampler_2d"
     " has no kernel in XNNPACK", None),
    ("tensorrt", "fp16", "model.engine", "skipped", "the package tensorrt is not installed", None),
)  # fmt: skip


def _export(
    format: str, precision: str, file: str, status: str, reason: str | None, ms: float | None,
    *, top1: float,
) -> dict[str, Any]:  # fmt: skip
    """Return an invented entry of `exports`."""
    ran, verified = ms is not None, status == "verified"
    drop = {"bf16": 0.0005, "int8": 0.004 if verified else 0.051}.get(precision, 0.0)
    changed = {"bf16": 2, "int8": 9 if verified else 31}.get(precision, 0)
    files = [file, file.replace(".xml", ".bin")] if file.endswith(".xml") else [file]
    return {
        "format": format,
        "precision": precision,
        "file": file,
        "files": files if verified else [],
        "bytes": {"int8": 7_061_000, "bf16": 14_084_000}.get(precision, 28_160_000)
        if verified
        else None,
        "sha256": hashlib.sha256(file.encode()).hexdigest() if verified else None,
        "preprocess": format == "openvino",
        "status": status,
        "verified": verified,
        "reason": reason,
        "samples": 120 if ran else None,
        "agreement": 1 - changed / 120 if ran else None,
        "top1": top1 - drop if ran else None,
        "drop": drop if ran else None,
        "logit_difference": {"bf16": 4e-3, "int8": 6e-2}.get(precision, 6.1e-7) if ran else None,
        "batch_difference": 1e-7 if ran else None,
        "changed": changed if ran else None,
        "ties": min(changed, 1) if ran else None,
        "latency_ms": ms,
        "latency": None
        if ms is None
        else {
            "median": ms,
            "p10": 0.93 * ms,
            "p90": 1.21 * ms,
            "cores": 1.0,
            "speed_up": 8.0 / ms,
            "withheld": None,
        },
    }


def complete() -> dict[str, Any]:
    return deepcopy(_complete())


def page(report: dict[str, Any], directory: Path, name: str = "report.html") -> str:
    write_html(report, directory / name)
    return (directory / name).read_text(encoding="utf-8")


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


def test_a_complete_report_has_every_section(tmp_path: Path) -> None:
    text = page(complete(), tmp_path)
    assert sections(text) == [name for name, *_ in SECTIONS]
    assert "Verified" in text
    assert "Folded model: 120 of 120 unchanged." in text
    for export in complete()["exports"]:
        assert export["file"] in text
        assert html.escape(export["reason"] or "") in text
    for status in ("verified", "refused", "failed", "skipped"):
        assert f'class="chip {status}"' in text


def test_a_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = page(complete(), tmp_path)
    assert "default-src 'none'" in text
    assert not re.search(r"<script|<link|<iframe|@import|https?://|\bon\w+=|url\(", text)
    assert all(png.size(source) for source in re.findall(r'src="([^"]*)"', text))


KEYS = [key for key in _complete() if key not in ("verified", "refusal")]


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("key", KEYS)
def test_what_is_missing_is_left_out(key: str, value: str | None, tmp_path: Path) -> None:
    report = complete()
    if value == "absent":
        del report[key]
    else:
        report[key] = None
    text = page(report, tmp_path)
    whole = [name for name, *_ in SECTIONS]
    gone = {"blocks": "errors", "metrics": "", "where": "", "samples": "", "exports": "exports",
            "limits": "limits", "int8": "int8", "kernels": "kernels", "confusion": "confusion",
            "closest": "closest",
            "warnings": "warnings", "fold": "fold", "provenance": "provenance"}  # fmt: skip
    assert sections(text) == [name for name in whole if name != gone.get(key)]


def test_a_report_may_hold_nothing_but_a_verdict(tmp_path: Path) -> None:
    text = page({"verified": False, "refusal": "the evaluation split is empty"}, tmp_path)
    assert sections(text) == []
    assert "Not deployed" in text
    assert "the evaluation split is empty" in text
    assert "Verified" not in text


def test_values_that_were_not_measured_are_dashes(tmp_path: Path) -> None:
    report = complete()
    for export in report["exports"]:
        export |= dict.fromkeys(export.keys() - {"format", "precision", "status", "reason"})
    for layer in report["int8"]["layers"]:
        layer |= dict.fromkeys(layer.keys() - {"name", "kept_float"})
    assert words.MISSING in page(report, tmp_path)


def numbers(value: Any, into: Any) -> Any:
    """Return plain data with every float replaced."""
    if isinstance(value, dict):
        return {key: numbers(inner, into) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner, into) for inner in value]
    return into if isinstance(value, float) else value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e300])
def test_no_number_breaks_the_page(value: float, tmp_path: Path) -> None:
    text = page(numbers(complete(), value), tmp_path)
    assert not re.search(r"(?:left|width|flex-grow):(?:nan|inf|-)", text)


def test_an_error_that_is_no_number_is_beyond_the_limit(tmp_path: Path) -> None:
    report = complete()
    assert "beyond" not in page(report, tmp_path).partition("</style>")[2]
    report["blocks"][1]["relative_error"] = float("nan")
    report["blocks"][2]["relative_error"] = 1e-3
    text = page(report, tmp_path)
    assert text.count('class="beyond"') == 2
    assert "NaN" in text


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"


def texts(value: Any, into: Callable[[str], str]) -> Any:
    """Return plain data with every text replaced, that of a status excepted."""
    if isinstance(value, dict):
        return {
            key: inner if key in ("status", "image", "folded") and isinstance(inner, str)
            else texts(inner, into)
            for key, inner in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [texts(inner, into) for inner in value]
    return into(value) if isinstance(value, str) else value


def test_every_text_is_escaped(tmp_path: Path) -> None:
    text = page(texts(complete(), lambda _: HOSTILE), tmp_path)
    assert sections(text) == [name for name, *_ in SECTIONS]
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "49&amp;" not in text
    assert (
        text.count(html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")) > 50
    )


PNG = png.encode(numpy.zeros((2, 3), numpy.uint8))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "javascript:alert(1)",
        "https://example.org/x.png",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/svg+xml;base64,PHN2Zz4=",
        png.PREFIX,
        png.PREFIX + "PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==",
        PNG + '" onerror="alert(1)',
        PNG + "\n",
        " " + PNG,
        PNG[:30],
        None,
        7,
    ],
)
def test_what_is_no_picture_is_not_shown(address: Any, tmp_path: Path) -> None:
    assert png.size(address) is None
    report = complete()
    for card in report["closest"]:
        card["image"] = address
    for block in report["kernels"]:
        block["folded"] = address
    text = page(report, tmp_path)
    assert "<img" not in text
    assert "closest" in sections(text)
    assert "kernels" not in sections(text)


def test_a_picture_has_a_size() -> None:
    assert png.size(PNG) == (3, 2)
    assert png.size(png.encode(numpy.zeros((300, 200, 3), numpy.uint8), largest=60)) == (40, 60)
    assert png.size(png.encode(numpy.zeros((5, 4, 1), numpy.uint8), largest=60)) == (4, 5)


@pytest.mark.parametrize("classes", [1, 2, NUMBERED, NUMBERED + 1, 200])
def test_a_confusion_matrix_of_any_size(classes: int, tmp_path: Path) -> None:
    matrix = numpy.arange(classes**2).reshape(classes, classes) % 7 * 1000
    names = [f"class number {i}" for i in range(classes)]
    report = complete() | {"confusion": {"class_names": names, "matrix": matrix.tolist()}}
    text = page(report, tmp_path)
    assert ("Confusion matrix of" in text) == (classes > NUMBERED)
    assert ('class="matrix"' in text) == (classes <= NUMBERED)
    assert text.count('class="hit"') - 1 == (classes if classes <= NUMBERED else 0)


def test_the_most_frequent_mistakes_come_first(tmp_path: Path) -> None:
    matrix = [[90, 3, 7], [0, 100, 0], [12, 0, 88]]
    report = complete() | {"confusion": {"class_names": ["ant", "bee", "cat"], "matrix": matrix}}
    found = re.findall(
        r'<tr><td>(\w+)</td><td>(\w+)</td><td class="number">(\d+)', page(report, tmp_path)
    )
    assert found == [("cat", "ant", "12"), ("ant", "cat", "7"), ("ant", "bee", "3")]


def test_many_classes_have_pairs_instead_of_a_matrix(tmp_path: Path) -> None:
    pairs = [{"true": f"c{i}", "predicted": f"c{i + 1}", "count": 90 - i} for i in range(50)]
    text = page(complete() | {"confusion": None, "worst_pairs": pairs}, tmp_path)
    assert "<td>c0</td><td>c1</td>" in text
    assert 'class="matrix"' not in text


def test_the_fastest_form_is_one_that_may_be_used(tmp_path: Path) -> None:
    report = complete()
    report["exports"][4]["status"] = "refused"  # OpenVINO int8, the fastest
    report["latency"]["forms"] |= {
        "train_form": {"median": 8.0, "p10": 7.0, "p90": 9.0},
        "deploy_form": {"median": 4.0, "p10": 3.0, "p90": 5.0},
    }
    text = page(report, tmp_path)
    assert f"<b>OpenVINO bf16 takes 1.60 ms</b>, 5.00{words.TIMES}" in text


def test_forms_that_were_timed_elsewhere_are_named(tmp_path: Path) -> None:
    report = complete()
    assert "On AMD" not in page(report, tmp_path)
    report["latency"]["device"] = "NVIDIA H100"
    report["latency"]["devices"] = {
        "train_form": "NVIDIA H100", "onnx fp32": "AMD EPYC", "openvino bf16": "AMD EPYC",
    }  # fmt: skip
    assert "On AMD EPYC: ONNX fp32, OpenVINO bf16." in page(report, tmp_path)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.percent, 0.83391, "83.39%"),
        (words.points, -0.0512, f"{words.MINUS}5.12"),
        (words.points, -0.000001, "±0"),
        (words.points, None, words.MISSING),
        (words.scientific, 1.23e-09, f"1.2e{words.MINUS}9"),
        (words.scientific, 0, "0"),
        (words.scientific, float("inf"), "∞"),
        (words.milliseconds, 0.0873, "0.087 ms"),
        (words.milliseconds, 24.93, "24.93 ms"),
        (words.times, 14.61, f"14.6{words.TIMES}"),
        (words.amount, 7_838_282, "7.84 M"),
        (words.amount, 999, "999"),
        (words.amount, 123_456, "123 k"),
        (words.size, 28_160_000, "28.2 MB"),
        (words.size, 512, "512 B"),
        (words.count, 10_000, "10,000"),
        (words.count, "text", words.MISSING),
        (words.count, True, words.MISSING),
        (words.form, "openvino bf16", "OpenVINO bf16"),
        (words.form, "train_form", "train form"),
        (words.short, 9_999, "9999"),
        (words.short, 12_345, "12k"),
        (words.short, 999_700, "1M"),
    ],
)
def test_numbers_are_written_for_people(
    function: Callable[[Any], str], value: Any, text: str
) -> None:
    assert function(value) == text


def block(*branches: nn.Module, norm: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return a network of one sum, with random norms in float64, and its deploy form."""
    layer: nn.Module = Sum(*branches)
    if norm:
        layer = nn.Sequential(layer, nn.BatchNorm2d(6))
    network = nn.Sequential(OrderedDict(conv=layer, activation=nn.ReLU())).double()
    randomize_batch_norm(network)
    return network, repnet.reparameterize(network, torch.randn(1, 6, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("norm", [False, True])
def test_the_branches_of_a_picture_add_up_to_the_folded_kernel(norm: bool) -> None:
    model, folded = block(
        conv_bn(6, 6, 3), conv_bn(6, 6, 1), conv_bn(6, 6, (1, 3)), nn.Identity(), norm=norm
    )
    (picture,) = kernel_pictures(model, folded, ["conv"])
    assert picture["kernel_size"] == [3, 3]
    assert picture["difference"] < 1e-12
    assert len(picture["branches"]) == 4
    shares = [branch["share"] for branch in picture["branches"]]
    torch.testing.assert_close(sum(shares), 1.0, rtol=1e-9, atol=0)
    total = kernel_of(folded.conv, 6).weight
    first: Any = model.conv[0][0] if norm else model.conv[0]  # type: ignore[index]
    branch = kernel_of(nn.Sequential(first, model.conv[1]) if norm else first, 6)  # type: ignore[index]
    assert isinstance(branch, ConvKernel)
    expected = (branch.weight * total).sum() / total.square().sum()
    torch.testing.assert_close(shares[0], expected.item(), rtol=1e-9, atol=0)
    norms = branch.weight.norm() / total.norm()
    torch.testing.assert_close(picture["branches"][0]["norm"], norms.item(), rtol=1e-9, atol=0)


def pixels(address: str) -> numpy.ndarray:
    from io import BytesIO

    from PIL import Image

    data = base64.b64decode(address.removeprefix(png.PREFIX))
    return numpy.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)


def test_a_small_kernel_stands_where_it_acts_in_the_large_one() -> None:
    model, folded = block(conv_bn(6, 6, 5), conv_bn(6, 6, 1), conv_bn(6, 6, (1, 3)))
    (picture,) = kernel_pictures(model, folded, ["conv"])
    dark = png.ramp(numpy.zeros(()))
    small, flat = (pixels(branch["image"]) for branch in picture["branches"][1:])
    assert small.shape == (5, 5, 3)
    lit = (small != dark).any(-1)
    assert lit.nonzero()[0].tolist() == [2]
    assert lit.nonzero()[1].tolist() == [2]
    assert (flat != dark).any(-1).nonzero()[1].tolist() == [1, 2, 3]
    brightest = png.ramp(numpy.ones(()))
    images = [branch["image"] for branch in picture["branches"]] + [picture["folded"]]
    assert any((pixels(image) == brightest).all(-1).any() for image in images)


def test_the_pictures_of_a_block_have_one_scale() -> None:
    model, folded = block(conv_bn(6, 6, 3), nn.Sequential(conv_bn(6, 6, 3), Scale(1e-4)))
    (picture,) = kernel_pictures(model, folded, ["conv"])
    large, small = (pixels(branch["image"]) for branch in picture["branches"])
    assert (large != pixels(picture["branches"][1]["image"])).any()
    assert (abs(small - png.ramp(numpy.zeros(())).astype(int)) <= 1).all()


def test_a_block_without_branches_has_no_picture() -> None:
    model = nn.Sequential(conv_bn(6, 6, 3))
    randomize_batch_norm(model)
    folded = repnet.reparameterize(model, torch.randn(1, 6, 9, 9))
    assert kernel_pictures(model, folded, ["0", "gone"]) == []
    assert pictured_blocks(model, folded, ["0", "gone"]) == []


@pytest.mark.parametrize("name", ["ac", "dbb", "mobileone", "qarepvgg", "repvgg", "unireplk"])
def test_shares_of_the_blocks_of_papers_add_up(name: str) -> None:
    model = repnet.create_model("repvgg_tiny", num_classes=3, widths=[0.125] * 4, block=name)
    randomize_batch_norm(model)
    folded, report = repnet.reparameterize(model, torch.randn(1, *SHAPE), return_report=True)
    names = pictured_blocks(model, folded, [fold.name for fold in report.folded])
    assert len(names) == 2
    for picture in kernel_pictures(model, folded, names):
        shares = sum(branch["share"] for branch in picture["branches"])
        torch.testing.assert_close(shares, 1.0, rtol=1e-5, atol=0)
        assert picture["difference"] < 1e-6
        assert all(png.size(branch["image"]) for branch in picture["branches"])


@pytest.mark.parametrize("name", ["repvgg_tiny", "mobileone_tiny", "resnet20"])
def test_the_parts_add_up_to_the_whole(name: str) -> None:
    model = randomize_batch_norm(repnet.create_model(name, num_classes=10))
    folded = repnet.reparameterize(model, torch.randn(1, 3, 32, 32))
    rows = where(model, folded, (3, 32, 32))
    assert [row["name"] for row in rows][:2] == ["stem", "stages.0"]
    assert rows[-1]["name"] == "head"
    for form, network in (("train_form", model), ("deploy_form", folded)):
        assert sum(row["parameters"][form] for row in rows) == count_parameters(network)
        assert sum(row["macs"][form] for row in rows) == count_macs(network, (3, 32, 32))
        head = rows[-1]["parameters"][form]
        assert head == sum(p.numel() for p in network.head.parameters())  # type: ignore[union-attr]


class Odd(nn.Module):
    """Shares a layer, has weights of its own, and works outside of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4, 1, 1))
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second = nn.Sequential(nn.ReLU(), self.first)
        self.unused = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv2d(self.first(self.first(x)), self.scale)
        return self.second(x).mean((2, 3))


def test_what_lies_outside_of_the_parts_has_its_own_row() -> None:
    rows = {row["name"]: row for row in where(Odd(), Odd(), (4, 5, 5))}
    assert list(rows) == ["first", "second", "unused", REST]
    one = 4 * 4 * 9 * 25
    assert rows[REST]["parameters"]["train_form"] == 16
    assert rows["first"]["parameters"]["train_form"] == 144
    assert rows["second"]["parameters"]["train_form"] == 0
    macs = {name: row["macs"]["train_form"] for name, row in rows.items()}
    assert macs == {"first": 2 * one, "second": one, "unused": 0, REST: 16 * 25}
    assert sum(macs.values()) == count_macs(Odd(), (4, 5, 5))


def test_a_wrapper_is_looked_into() -> None:
    model = repnet.create_model("repvgg_tiny", num_classes=3)
    assert parts(nn.ModuleDict({"network": model}))[:2] == ["network.stem", "network.stages.0"]
    assert parts(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())) == ["0", "1"]


def test_a_part_that_the_deploy_form_lacks_counts_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    rows = where(model, nn.Sequential(nn.Conv2d(3, 4, 1)), (3, 2, 2))
    assert [row["parameters"]["deploy_form"] for row in rows] == [16, 0, 0]


SCHEMA = json.loads(
    (Path(repnet.__file__).parent / "deploy" / "report.schema.json").read_text(encoding="utf-8")
)
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,),
    "integer": (int,), "number": (int, float), "null": (type(None),),
}  # fmt: skip


def mistakes(value: Any, schema: dict[str, Any], path: str = "report") -> Iterator[str]:
    """Yield where plain data breaks a schema, of which keys may not be more than it documents."""
    if "$ref" in schema:
        referred = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
        schema = {**referred, **{key: rule for key, rule in schema.items() if key != "$ref"}}
    assert schema.keys() <= {"$schema", "$defs", "title", "description", "type", "required",
                             "properties", "additionalProperties", "items", "enum", "oneOf",
                             "minimum", "maximum", "pattern"}  # fmt: skip
    if "oneOf" in schema:
        if sum(not list(mistakes(value, choice, path)) for choice in schema["oneOf"]) != 1:
            yield f"{path}: none of the choices"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is not one of {schema['enum']}"
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [
        kind for kind in kinds
        if isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    ]  # fmt: skip
    if not fits:
        yield f"{path}: {value!r} is no {' or '.join(kinds)}"
        return
    if isinstance(value, dict):
        yield from (f"{path}: no {key}" for key in schema.get("required", ()) if key not in value)
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, inner in value.items():
            if key in known:
                yield from mistakes(inner, known[key], f"{path}.{key}")
            elif others is not None:
                yield from mistakes(inner, others, f"{path}.{key}")
            elif known:
                yield f"{path}: {key} is not documented"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from mistakes(inner, schema.get("items", {}), f"{path}[{index}]")
    elif isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            yield f"{path}: {value[:40]!r} is not like {schema['pattern']}"
    elif value is not None:
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not low <= value <= high:
            yield f"{path}: {value} is out of range"


def through_json(report: dict[str, Any]) -> Any:
    return json.loads(json.dumps(report))


def test_a_complete_report_is_as_its_schema_says() -> None:
    assert list(mistakes(through_json(complete()), SCHEMA)) == []


def test_the_schema_documents_nothing_that_no_report_has() -> None:
    assert SCHEMA["properties"].keys() - {"worst_pairs"} == complete().keys()


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (lambda r: r.pop("verified"), "report: no verified"),
        (lambda r: r.update(agreement=1.1), "report.agreement: 1.1 is out of range"),
        (lambda r: r.update(samples=1.5), "report.samples: 1.5 is no integer or null"),
        (lambda r: r.update(novel=1), "report: novel is not documented"),
        (lambda r: r["exports"][0].update(status="fine"), "exports[0].status"),
        (lambda r: r["exports"][0].update(latency={}), "none of the choices"),
        (lambda r: r["closest"][0].update(image="http://x"), "closest[0].image"),
        (lambda r: r["int8"]["layers"][0].update(kept_float=1), "kept_float: 1 is no boolean"),
        (lambda r: r["metrics"]["train_form"].pop("top1"), "metrics.train_form: no top1"),
        (lambda r: r["confusion"]["matrix"][0].append(-1), "-1 is out of range"),
    ],
)
def test_the_schema_rejects_what_is_wrong(
    change: Callable[[dict[str, Any]], Any], mistake: str
) -> None:
    report = through_json(complete())
    change(report)
    assert any(mistake in found for found in mistakes(report, SCHEMA)), list(
        mistakes(report, SCHEMA)
    )


@pytest.mark.skipif(importlib.util.find_spec("jsonschema") is None, reason="no jsonschema")
def test_the_schema_is_one_for_other_programs() -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(through_json(complete()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**through_json(complete()), "agreement": 2})


def test_the_documentation_names_every_key() -> None:
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    missing = [key for key in SCHEMA["properties"] if f"`{key}`" not in text]
    assert missing == []


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome"
)  # fmt: skip
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
         "--window-size=1400,1000", "--virtual-time-budget=8000", "--dump-dom"]  # fmt: skip
# Frames, because a page has the width of its frame, and a script outside needs none within.
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><body>{frames}
<pre id="found"></pre><script>addEventListener("load", () => {{
const found = [], range = document.createRange();
for (const frame of document.querySelectorAll("iframe")) {{
  const page = frame.contentDocument, root = page.documentElement;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const wide = root.scrollWidth, cut = [];
  for (const element of page.querySelectorAll("main *, header *")) {{
    if (element.closest(".scroll, .hidden, .name, .track, .axis, .matrix")) continue;
    const box = element.getBoundingClientRect();
    if (box.right > frame.clientWidth + 0.5) cut.push(element.tagName + "." + element.className);
  }}
  const texts = [], over = [], walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    const node = walker.currentNode, cropped = ".hidden, .name, .matrix th, style";
    if (!node.data.trim() || node.parentElement.closest(cropped)) continue;
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) texts.push([box, node]);
  }}
  texts.sort((a, b) => a[0].top - b[0].top);
  texts.forEach(([a, node], index) => {{
    for (const [b, other] of texts.slice(index + 1)) {{
      if (b.top > a.bottom - 3) break;
      if (node !== other && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1)
        over.push(node.data.trim().slice(0, 30) + " | " + other.data.trim().slice(0, 30));
    }}
  }});
  const styled = element => page.defaultView.getComputedStyle(element);
  const whiskers = [...page.querySelectorAll(".whisker")].map(line =>
    [styled(line).borderTopColor, styled(line.parentElement).backgroundColor]);
  const cell = page.querySelector(".matrix td")?.getBoundingClientRect();
  const matrix = cell && [cell.width, cell.height,
    page.querySelector(".matrix thead").getBoundingClientRect().height];
  const apart = [...page.querySelectorAll("figure.whole")].filter(figure =>
    Math.abs(figure.getBoundingClientRect().top -
             figure.previousElementSibling.getBoundingClientRect().top) > 2).length;
  const image = [...page.images].filter(image => !image.naturalWidth).length;
  const style = page.defaultView.getComputedStyle(page.body);
  const colors = [style.backgroundColor, style.color];
  const spoiled = page.defaultView.spoiled === true;
  found.push({{name: frame.title, width: frame.clientWidth, wide, cut, image, colors, spoiled,
    over, apart, whiskers, matrix, sections: page.querySelectorAll("section").length}});
}}
document.getElementById("found").textContent = JSON.stringify(found);
}});</script>"""


def browse(
    pages: dict[str, str], directory: Path, *, widths: tuple[int, ...], dark: bool = False
) -> list[dict[str, Any]]:
    """Return what each page is like at each width, in pixels."""
    assert CHROMIUM is not None
    frames = "".join(
        f'<iframe title="{name}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in widths
    )
    (directory / "frames.html").write_text(FRAMES.format(frames=frames), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    result = subprocess.run(
        [CHROMIUM, *FLAGS, scheme, f"--user-data-dir={directory / 'profile'}",
         (directory / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    messages = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert messages == []
    text = re.search(r'<pre id="found">(.+?)</pre>', result.stdout, re.DOTALL)
    assert text is not None, result.stderr[-2000:]
    found = json.loads(html.unescape(text[1]))
    assert len(found) == len(pages) * len(widths)
    return found


def refused() -> dict[str, Any]:
    report = complete()
    keep = ("exports", "provenance", "blocks", "tolerance", "max_relative_error", "rest_error")
    reason = "block 'stages.0.0.conv' differs from its original: relative error 3.1e-05"
    (block,) = [block for block in report["blocks"] if block["name"] == "stages.0.0.conv"]
    block["relative_error"] = 3.1e-5
    short = {key: report[key] for key in keep} | {
        "verified": False,
        "refusal": reason,
        "exports": [],
    }
    return short | {"limits": limits(short, Settings())}


def long_names() -> dict[str, Any]:
    return texts(complete(), lambda text: text * 12 if text not in ("train_form",) else text)


def many_classes() -> dict[str, Any]:
    names = [f"a class with quite a long name {i}" for i in range(200)]
    matrix = numpy.eye(200, dtype=int) * 40 + (numpy.arange(40_000).reshape(200, 200) % 97 == 0)
    return complete() | {"confusion": {"class_names": names, "matrix": matrix.tolist()}}


browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@browser
def test_nothing_is_wider_than_the_screen(tmp_path: Path) -> None:
    large = complete() | {"confusion": {"class_names": CLASSES, "matrix": [[12345] * 10] * 10}}
    reports = {"complete": complete(), "refused": refused(), "long": long_names(),
               "many": many_classes(), "large": large}  # fmt: skip
    pages = {name: page(report, tmp_path) for name, report in reports.items()}
    for found in browse(pages, tmp_path, widths=(360, 390, 1280)):
        assert found["cut"] == [], found["name"]
        assert found["over"] == [], found["name"]
        assert found["apart"] == 0, found["name"]  # the resulting kernel from its "="
        assert found["wide"] <= found["width"], found["name"]
        assert found["image"] == 0
        assert found["sections"] == len(sections(pages[found["name"]]))


@browser
def test_hostile_texts_do_nothing_in_a_browser(tmp_path: Path) -> None:
    attack = "<script>window.spoiled = true</script><img src=x onerror='window.spoiled = true'>"
    pages = {"hostile": page(texts(complete(), lambda text: text + attack), tmp_path)}
    # Even what is not escaped runs nothing and fetches nothing; the console says so.
    (found,) = browse(pages, tmp_path, widths=(390,))
    assert found["spoiled"] is False
    assert found["sections"] == len(SECTIONS)
    unescaped = {"raw": pages["hostile"].replace("<main>", f"<main>{attack}")}
    with pytest.raises(AssertionError, match="Executing inline script violates"):
        browse(unescaped, tmp_path, widths=(390,))


def luminance(color: str) -> float:
    values = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_color_scheme(dark: bool, tmp_path: Path) -> None:
    (found,) = browse({"page": page(complete(), tmp_path)}, tmp_path, widths=(1280,), dark=dark)
    background, ink = (luminance(color) for color in found["colors"])
    assert (background < 0.05) == dark
    assert (max(background, ink) + 0.05) / (min(background, ink) + 0.05) > 12


def test_every_pair_of_colors_is_readable() -> None:
    style = (Path(repnet.__file__).parent / "deploy/report/templates/style.css").read_text()
    light, dark = re.findall(r":root \{([^}]*--page[^}]*--tie[^}]*)\}", style)
    assert light != dark
    for scheme in (light, dark):
        colors = dict(re.findall(r"--([\w-]+): (#\w+)", scheme))
        values = {key: luminance(_rgb(color)) for key, color in colors.items()}
        pairs = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"),
                 ("link", "card"), ("soft", "good-back"), ("soft", "bad-back"),
                 *((name, f"{name}-back") for name in ("good", "bad", "warn", "idle")),
                 ("good", "card"), ("bad", "card")]  # fmt: skip
        for front, back in pairs:
            ratio = sorted((values[front] + 0.05, values[back] + 0.05))
            assert ratio[1] / ratio[0] >= 4.5, (front, back)
        for mark in ("train", "deploy", "single", "half", "int8", "hit", "miss", "tie"):
            ratio = sorted((values[mark] + 0.05, values["card"] + 0.05))
            assert ratio[1] / ratio[0] >= 3, mark


def _rgb(color: str) -> str:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    return " ".join(str(int(digits[i : i + 2], 16)) for i in (0, 2, 4))


def test_the_title_names_model_date_and_checkpoint(tmp_path: Path) -> None:
    named = "repvgg on FashionMNIST · 2026-11-22 · 2026-11-20/checkpoints/best.ckpt"
    model = {"_target_": "repnet.models.repvgg"}
    for report in (complete(), refused()):
        report["provenance"]["model"] = model
        text = page(report, tmp_path)
        stamp = "Verified" if report["verified"] else "Not deployed"
        assert f"<title>{stamp}: {named} · repnet</title>" in text
        assert f"<span>{named}</span>" in text


def test_a_refused_page_begins_with_the_cause(tmp_path: Path) -> None:
    head, _, body = page(refused(), tmp_path).partition("<main>")
    words_of = re.sub(r"<[^>]+>", " ", head.partition("<h1>")[2])
    text = " ".join(words_of.split())
    assert text.startswith(
        "Not deployed block &#39;stages.0.0.conv&#39; differs from its original: relative error "
        "3.1e-05 value 3.1e\N{MINUS SIGN}5 error of a block, float64 limit at most "
        "1e\N{MINUS SIGN}9 fixed block stages.0.0.conv What to try. If the block is a class"
    )
    assert "top-1" not in head
    assert "unchanged" not in head
    assert '<span class="chip refused">failed</span>' in body


def test_a_refused_file_has_its_limit_and_what_to_try(tmp_path: Path) -> None:
    report = complete() | {"verified": False, "refusal": "onnx int8: it answers differently"}
    head = page(report, tmp_path).partition("<main>")[0]
    for text in ("74.17%", "at least 90.00%", "int8.min_agreement", "ONNX int8",
                 "int8.samples=1000"):  # fmt: skip
        assert text in head


@pytest.mark.parametrize("broken", complete()["limits"], ids=lambda limit: limit["limits"])
def test_there_is_advice_for_every_limit(broken: dict[str, Any], tmp_path: Path) -> None:
    report = complete() | {"verified": False}
    for limit in report["limits"]:
        limit["passed"] = limit["limits"] != broken["limits"]
    assert "What to try." in page(report, tmp_path)


def row_of(text: str, name: str) -> str:
    """Return the row of a form in the table of all forms."""
    (row,) = re.findall(rf'<tr role="row"[^>]*><th[^>]*><b>{re.escape(name)}</b>.*?</tr>', text,
                        re.DOTALL)  # fmt: skip
    return str(row)


def test_each_form_has_one_row(tmp_path: Path) -> None:
    text = page(complete(), tmp_path)
    for name in ("train form", "deploy form", "ONNX fp32", "OpenVINO int8"):
        assert len(re.findall(rf'<th scope="row"[^>]*>\W*(?:<b>)?{name}\b', text)) == (
            2 if name == "OpenVINO int8" else 1  # it differs: a closer look
        )
    row = row_of(text, "OpenVINO int8")
    for value in ("model_int8.xml", "verified", "7.06 MB", "1.20 ms", "6.67", "takes uint8"):
        assert value in row


def test_what_agrees_is_one_line_and_what_differs_is_shown(tmp_path: Path) -> None:
    text = page(complete(), tmp_path).partition('id="agreement"')[2].partition("</section>")[0]
    assert "4 forms predict the same for all 120 images</summary>" in text
    assert "<p>deploy form, ONNX fp32, OpenVINO fp32, torch.export fp32</p>" in text
    shown = re.findall(r'<th scope="row">([^<]+)</th>', text)
    assert shown == ["ONNX int8", "OpenVINO bf16", "OpenVINO int8"]
    widths = [float(width) for width in re.findall(r'"other" style="width:([\d.]+)%', text)]
    assert max(widths) > 90  # of what differs most, not of all images
    assert min(widths) > 1


def headings(text: str) -> list[str]:
    table = text.partition('<table class="files')[2].partition("</thead>")[0]
    return re.findall(r'<th scope="col"[^>]*>([^<\n]*)', table)


def test_columns_that_say_nothing_are_dropped(tmp_path: Path) -> None:
    assert headings(page(complete(), tmp_path)) == [
        "form", "status", "top-1", "change", "changed", "ties", "logits differ by", "size", "",
        "median", "speed",
    ]  # fmt: skip
    report = complete() | {"exports": []}
    report["latency"]["forms"] = {
        name: report["latency"]["forms"][name] for name in ("train_form", "deploy_form")
    }
    assert headings(page(report, tmp_path)) == [
        "form", "top-1", "changed", "logits differ by", "", "median", "speed",
    ]  # fmt: skip
    del report["latency"]
    assert headings(page(report, tmp_path)) == ["form", "top-1", "changed", "logits differ by"]


def test_times_lie_on_a_logarithmic_axis_with_its_unit(tmp_path: Path) -> None:
    report = complete()
    for name, median in (("train_form", 100.0), ("deploy_form", 10.0), ("onnx fp32", 1.0)):
        report["latency"]["forms"][name] |= {"median": median, "p10": median, "p90": median}
    text = page(report, tmp_path)
    assert '<span class="unit">milliseconds, logarithmic</span>' in text
    places = [
        float(re.findall(r'class="dot \w+" style="left:([\d.]+)%', row_of(text, name))[0])
        for name in ("train form", "deploy form", "ONNX fp32")
    ]
    assert places[0] - places[1] == pytest.approx(places[1] - places[2], abs=0.02)
    assert places[0] == 100
    (axis,) = re.findall(r'class="unit">.*?</span>\s*<span class="axis.*?</th>', text, re.DOTALL)
    assert re.findall(r">(\d[^<]*)</span>", axis)[-1] == "100"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.48, 7.0], ["0.2", "0.5", "1", "2", "5", "10"]),
        ([1.0, 1.0], ["1", "2"]),
        ([0.9e-3, 3000.0], ["0.001", "0.1", "10", "1000"]),
        ([], ["1", "2"]),
    ],
)
def test_an_axis_has_few_round_numbers(values: list[float], ticks: list[str]) -> None:
    axis = _Axis(values)
    assert [text for text, _ in axis.ticks] == ticks
    assert all(0 <= axis.position(value) <= 100 for value in (*values, 0.0, -1.0, 1e300))


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_whiskers_are_seen(dark: bool, tmp_path: Path) -> None:
    (found,) = browse({"page": page(complete(), tmp_path)}, tmp_path, widths=(1280,), dark=dark)
    assert len(found["whiskers"]) > 5
    for line, track in found["whiskers"]:
        low, high = sorted(luminance(color) for color in (line, track))
        assert (high + 0.05) / (low + 0.05) > 7


@browser
def test_a_small_confusion_matrix_uses_its_space(tmp_path: Path) -> None:
    matrices = {n: (numpy.eye(n, dtype=int) * 9).tolist() for n in (2, 10)}
    pages = {
        str(n): page(
            complete() | {"confusion": {"class_names": list("abcdefghij")[:n], "matrix": matrix}},
            tmp_path,
        )
        for n, matrix in matrices.items()
    }
    for found in browse(pages, tmp_path, widths=(1280,)):
        width, height, head = found["matrix"]
        assert head < 40  # no room for names that need none
        assert (height > 70) == (found["name"] == "2")
        assert width >= 40
