"""Exported files: all formats by one contract, and what is particular to ONNX and OpenVINO."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import repnet
from repnet.deploy.formats import FORMATS, ExportError, Format, format_named
from repnet.deploy.int8 import quantize
from repnet.errors import InputError
from tests.commands import ROOT, environment
from tests.models import randomize_batch_norm, relative_error

METADATA = {
    "class_names": json.dumps(["größe <&>", '犬 "dog"'], ensure_ascii=False),
    "mean": "[0.5]",
}
RUNTIMES = ["onnx", "openvino"]
SMALL = {"widths": [0.25] * 4, "depths": [1, 2, 1, 1], "num_classes": 10}


@cache
def folded(name: str, in_channels: int = 3) -> nn.Module:
    """Return a small model in deploy form, whose every weight matters."""
    torch.manual_seed(0)
    model = repnet.create_model(name, in_channels=in_channels, **SMALL)
    images = torch.randn(2, in_channels, 32, 32)
    return repnet.reparameterize(randomize_batch_norm(model), images).requires_grad_(False)


def usable(name: str) -> Format:
    """Return a format, or skip the test where this machine cannot make or run its files."""
    format = format_named(name)
    try:
        format.require()
    except InputError as error:
        pytest.skip(str(error))
    if reason := format.skip_reason():
        pytest.skip(reason)
    return format


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return fp32 files of a MobileOne for gray images, by format."""
    directory = tmp_path_factory.mktemp("files")
    paths = {}
    for name in RUNTIMES:
        format = usable(name)
        paths[name] = directory / format.file_name()
        images = torch.zeros(1, 1, 32, 32)
        format.export(folded("mobileone_s0", 1), images, paths[name], metadata=METADATA)
    return paths


def check_logits(format: Format, path: Path, model: nn.Module, channels: int) -> None:
    run = format.load(path)
    for batch in (1, 3, 8, 1):
        images = torch.randn(batch, channels, 32, 32)
        logits = run(images)
        assert logits.dtype == torch.float32
        assert logits.device.type == "cpu"
        assert relative_error(model(images), logits) < 5e-6


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_gives_the_logits_of_its_model(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    format, model = usable(name), folded("repvgg_d2se")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / format.file_name()
    format.export(model, torch.zeros(2, 3, 32, 32), path, metadata=METADATA)
    check_logits(format, path, model, channels=3)
    assert sorted(format.files(path)) == sorted(tmp_path.iterdir())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    if name in RUNTIMES:
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", RUNTIMES)
def test_mobileone_for_gray_images(name: str, files: dict[str, Path]) -> None:
    check_logits(format_named(name), files[name], folded("mobileone_s0", 1), channels=1)


@pytest.mark.parametrize(
    ("name", "precision", "limit"),
    [("onnx", "fp16", 2e-3), ("openvino", "fp16", 2e-3), ("openvino", "bf16", 3e-2)],
)
def test_other_precisions_are_near(name: str, precision: str, limit: float, tmp_path: Path) -> None:
    format, model = usable(name), folded("repvgg_tiny")
    path = tmp_path / format.file_name(precision)
    format.export(model, torch.zeros(1, 3, 32, 32), path, precision=precision)
    run = format.load(path, precision=precision)
    size = sum(file.stat().st_size for file in format.files(path))
    weights = sum(4 * value.numel() for value in model.state_dict().values())
    assert (size < 0.75 * weights) == (precision == "fp16")
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        error = relative_error(model(images), run(images))
        assert error < limit
        if precision == "fp16" or has_bfloat16():
            assert error > 1e-5  # it is that precision


def has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_onnx_files_describe_themselves(files: dict[str, Path]) -> None:
    import onnx

    file = onnx.load(files["onnx"], load_external_data=False)
    assert {entry.key: entry.value for entry in file.metadata_props} == METADATA
    assert (file.producer_name, file.producer_version) == ("repnet", repnet.__version__)
    assert [entry.version for entry in file.opset_import] == [18]
    assert not any(tensor.external_data for tensor in file.graph.initializer)
    (images,), (logits,) = file.graph.input, file.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert logits.type.tensor_type.shape.dim[0].dim_param == "batch"
    layers = {node.name for node in file.graph.node if node.op_type in ("Conv", "Gemm")}
    kinds = (nn.Conv2d, nn.Linear)
    model = folded("mobileone_s0", 1)
    assert layers == {name for name, module in model.named_modules() if isinstance(module, kinds)}


def test_openvino_files_describe_themselves(files: dict[str, Path]) -> None:
    import openvino

    model = openvino.Core().read_model(files["openvino"])
    stored = {key: model.get_rt_info(["model_info", key]).astype(str) for key in METADATA}
    assert stored == METADATA
    assert model.get_rt_info(["model_info", "producer"]).astype(str).startswith("repnet ")
    assert model.input().any_name == "images"
    assert model.output().any_name == "logits"
    assert str(model.input().partial_shape) == "[?,1,32,32]"
    # Quantization needs biases that are constants.
    assert not any(node.get_type_name() == "ShapeOf" for node in model.get_ops())


@pytest.mark.parametrize("name", RUNTIMES)
def test_files_tell_nothing_of_this_machine(name: str, files: dict[str, Path]) -> None:
    for file in format_named(name).files(files[name]):
        contents = file.read_bytes()
        for place in (ROOT, Path(repnet.__file__).parent, Path(torch.__file__).parent):
            assert str(place).encode() not in contents


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    format = usable("openvino")  # made from that of ONNX
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    contents = []
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
        path = directory / format.file_name()
        format.export(model, torch.zeros(1, 3, 8, 8), path, metadata=METADATA)
        contents.append([file.read_bytes() for file in format.files(path)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", RUNTIMES)
def test_changed_weights_change_the_logits(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    format, images = format_named(name), torch.randn(4, 1, 32, 32)
    path = tmp_path / files[name].name
    for file in format.files(files[name]):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = format.load(path)(images)
    torch.testing.assert_close(before, format.load(files[name])(images), rtol=0, atol=0)
    if name == "onnx":
        negate_onnx_weight(path, "head.weight")
    else:
        weights = np.fromfile(path.with_suffix(".bin"), np.float32)
        weights[: len(weights) // 2] *= -1
        weights.tofile(path.with_suffix(".bin"))
    assert relative_error(before, format.load(path)(images)) > 0.1


def negate_onnx_weight(path: Path, name: str) -> None:
    import onnx

    file = onnx.load(path)
    (tensor,) = (tensor for tensor in file.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-values, name))
    onnx.save(file, path)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 1, 32, 32, dtype=torch.uint8),  # OpenVINO alone would convert it
        torch.zeros(1, 3, 32, 32),
        torch.zeros(1, 1, 16, 32),
        torch.zeros(1, 32, 32),
    ],
)
def test_other_images_are_refused(name: str, images: Tensor, files: dict[str, Path]) -> None:
    with pytest.raises(InputError):
        format_named(name).load(files[name])(images)


@pytest.mark.parametrize("name", RUNTIMES)
def test_threads_share_a_file(name: str, files: dict[str, Path]) -> None:
    run = format_named(name).load(files[name])
    batches = [torch.randn(1 + index % 3, 1, 32, 32) for index in range(24)]
    expected = [run(images) for images in batches]
    with ThreadPoolExecutor(4) as threads:
        for actual, wanted in zip(threads.map(run, batches), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_int8_on_cpus_with_amx_sees_single_images_only(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path = torch.rand(5, 1, 32, 32), tmp_path / "int8.xml"
    quantize("openvino", files["openvino"], path, images)
    expected = format_named("openvino").load(path, precision="int8")(images)
    monkeypatch.setattr("repnet.deploy.formats.openvino.has_amx", lambda: True)
    runner = format_named("openvino").load(path, precision="int8")
    torch.testing.assert_close(runner(images), expected)
    assert list(runner.compiled) == [True]  # type: ignore[attr-defined]


SIGNALS = """
import gc, signal, subprocess, sys, threading
from pathlib import Path
import torch
from repnet.deploy.formats import format_named
from repnet.deploy.int8 import quantize

path, images = Path(sys.argv[1]), torch.rand(8, 1, 32, 32)
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does for the processes of a data loader
load = format_named("openvino").load

def child():
    subprocess.run(["true"])
    gc.collect()

first, second = load(path), load(path)
del first; child()
del second; child()  # its core puts back what the first one's was
held = [load(path)]
thread = threading.Thread(target=held.clear)
thread.start(); thread.join(); child()
model = load(path)
quantize("openvino", path, Path("int8.xml"), images)
del model; child()
print("alive")
"""


def test_signals_do_no_harm_after_openvino_models_are_gone(
    files: dict[str, Path], tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SIGNALS, str(files["openvino"])],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.stdout.endswith("alive\n"), (result.returncode, result.stderr)


@pytest.mark.parametrize("name", RUNTIMES)
def test_damaged_files_are_an_export_error(name: str, tmp_path: Path) -> None:
    format = usable(name)
    path = tmp_path / format.file_name()
    with pytest.raises(ExportError, match=path.name):
        format.load(path)
    path.write_bytes(b"<?xml version='1.0'?><net")
    with pytest.raises(ExportError, match=path.name):
        format.load(path)


@torch.library.custom_op("repnet_test::wrap", mutates_args=())
def wrap(images: Tensor) -> Tensor:
    return images.remainder(1)


@wrap.register_fake
def _(images: Tensor) -> Tensor:
    return torch.empty_like(images)


class Wrap(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return wrap(images).flatten(1)


class Bessel(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.special.bessel_j0(images).flatten(1)


@pytest.mark.parametrize(
    ("name", "module", "operator"),
    [
        ("onnx", Wrap, "repnet_test"),
        ("openvino", Wrap, "repnet_test"),
        ("onnx", Bessel, "no operator for prims.bessel_j0"),
    ],
)
def test_unknown_operators_are_named(
    name: str, module: type[nn.Module], operator: str, tmp_path: Path
) -> None:
    format = usable(name)
    with pytest.raises(ExportError, match=operator) as caught:
        format.export(module().eval(), torch.zeros(1, 3, 8, 8), tmp_path / format.file_name())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RUNTIMES)
def test_weights_beyond_float16_are_refused(name: str, tmp_path: Path) -> None:
    format, model = usable(name), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 1e5
    path = tmp_path / format.file_name("fp16")
    with pytest.raises(ExportError, match=r"'0\.weight' holds 1e\+05"):
        format.export(model, torch.zeros(1, 3, 8, 8), path, precision="fp16")


def test_runtimes_report_to_nobody(files: dict[str, Path], tmp_path: Path) -> None:
    script = f"""
import sys, torch
from pathlib import Path
from repnet.deploy.formats import format_named
for name, path in {[(name, str(path)) for name, path in files.items()]!r}:
    format_named(name).load(Path(path))(torch.zeros(1, 1, 32, 32))
print(sys.modules["openvino_telemetry"])
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (result.stdout, result.stderr) == ("None\n", "")
    assert not list(tmp_path.iterdir())
