"""What is special about `torch.export`, AOTInductor, ExecuTorch, TensorRT and Core ML files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import repnet
from repnet.deploy.formats import ExportError, Format, format_named
from repnet.deploy.formats.base import ImageSpec
from repnet.deploy.formats.torch_export import exported_program
from repnet.deploy.preprocess import Preprocessed
from repnet.errors import InputError
from tests.models import randomize_batch_norm, relative_error

METADATA = {"class_names": '["Zürich", "a \\"b\\"\\n%s"]', "producer": "repnet"}


@torch.library.custom_op("repnet_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.ops.repnet_tests.doubled(images).mean((2, 3))


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Erfinv(nn.Module):
    """An operator of torch that ExecuTorch has no kernel for."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.erfinv(images.tanh()).mean((2, 3))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = repnet.create_model("repvgg_tiny", num_classes=10, widths=[0.125] * 4)
    model = repnet.reparameterize(randomize_batch_norm(model), torch.randn(2, 3, 16, 16))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pt2(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    format_named("torch_export").export(network, images, path, metadata=METADATA)
    return path


@pytest.fixture(scope="module")
def aot(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The smallest network, as a compiler of C++ takes seconds."""
    chosen = format_named("aot_inductor")
    if reason := chosen.skip_reason():
        pytest.skip(reason)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Linear(8, 10)).eval()  # fmt: skip
    pixels = Preprocessed(network, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], size=(16, 16)).eval()
    path = tmp_path_factory.mktemp("aot") / "model.aot.pt2"
    chosen.export(pixels, as_uint8(images), path, precision="bf16", metadata=METADATA)
    return path, pixels


@pytest.fixture(scope="module")
def pte(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch")
    path = tmp_path_factory.mktemp("pte") / "model.pte"
    format_named("executorch").export(network, images, path, metadata=METADATA)
    return path


def as_uint8(images: Tensor) -> Tensor:
    return (images * 64 + 128).clamp(0, 255).to(torch.uint8)


def without_repnet(code: str, cwd: Path) -> None:
    """Run Python that cannot import repnet."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    guard = "import sys; sys.modules['repnet'] = None\nimport torch\n"
    result = subprocess.run(
        [sys.executable, "-I", "-c", guard + code],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_process_without_repnet_runs_an_exported_graph(
    pt2: Path, network: nn.Module, images: Tensor
) -> None:
    torch.save({"images": images, "logits": network(images)}, pt2.parent / "expected.pt")
    without_repnet(
        "stored = {'metadata.json': ''}\n"
        "model = torch.export.load('model.pt2', extra_files=stored).module()\n"
        "expected = torch.load('expected.pt')\n"
        "for n in (3, 1):\n"
        "    torch.testing.assert_close(model(expected['images'][:n]), expected['logits'][:n])\n"
        f"import json; assert json.loads(stored['metadata.json']) == {METADATA!r}\n",
        pt2.parent,
    )


def test_a_process_without_repnet_runs_a_compiled_package(
    aot: tuple[Path, nn.Module], images: Tensor
) -> None:
    path, network = aot
    pixels = as_uint8(images)
    with torch.no_grad():
        torch.save({"images": pixels, "logits": network(pixels)}, path.parent / "expected.pt")
    without_repnet(
        "import torch._inductor\n"
        "model = torch._inductor.aoti_load_package('model.aot.pt2')\n"
        "expected = torch.load('expected.pt')\n"
        "for n in (3, 1):\n"
        "    logits = model(expected['images'][:n])\n"
        "    assert logits.dtype == torch.float32\n"
        "    torch.testing.assert_close(logits, expected['logits'][:n], rtol=0.02, atol=0.02)\n"
        f"assert {METADATA!r}.items() <= model.get_metadata().items()\n",
        path.parent,
    )


def test_a_package_computes_in_bfloat16_and_preprocesses_in_float32(
    aot: tuple[Path, nn.Module], images: Tensor
) -> None:
    path, network = aot
    pixels = as_uint8(images)
    run = format_named("aot_inductor").load(path, precision="bf16")
    error = relative_error(network(pixels), run(pixels))
    assert 1e-5 < error < 0.02


def test_compiled_code_is_not_given_what_it_would_misread(
    aot: tuple[Path, nn.Module], images: Tensor
) -> None:
    path, network = aot
    run = format_named("aot_inductor").load(path, precision="bf16")
    pixels = as_uint8(images)
    for wrong in (images, pixels[:, :2], pixels[..., :8], pixels[0]):
        with pytest.raises(InputError, match=r"the file takes uint8 \(any, 3, 16, 16\)"):
            run(wrong)
    turned = pixels.transpose(2, 3)
    torch.testing.assert_close(run(turned), network(turned), rtol=0.02, atol=0.02)


def test_a_package_for_another_machine_is_refused(
    aot: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.codecache as codecache

    path, _ = aot
    here = codecache.get_device_information("cpu")
    for key, value in (("AOTI_CPU_ISA", "NEON"), ("AOTI_MACHINE", "aarch64")):
        changed = {**here, key: value}
        monkeypatch.setattr(codecache, "get_device_information", lambda _, changed=changed: changed)
        with pytest.raises(ExportError, match="compiled for another machine"):
            format_named("aot_inductor").load(path)
    monkeypatch.undo()
    with pytest.raises(ExportError, match="compiled for cpu, not for cuda"):
        format_named("aot_inductor").load(path, device="cuda")


def test_executorch_takes_any_batch_and_stores_the_metadata(
    pte: Path, network: nn.Module, images: Tensor
) -> None:
    from executorch.runtime import Runtime

    run = format_named("executorch").load(pte)
    for batch in (images, images[:1], images.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(run(batch), network(batch), rtol=1e-4, atol=1e-5)
    (text,) = Runtime.get().load_program(pte).load_method("metadata").execute([])
    assert json.loads(text) == METADATA
    with pytest.raises(InputError, match=r"the file takes float32 \(any, 3, 16, 16\)"):
        run(images[..., :8])


def test_executorch_has_xnnpack_do_the_convolutions(pte: Path) -> None:
    contents = pte.read_bytes()
    assert b"XnnpackBackend" in contents
    assert b"aten::convolution" not in contents


@pytest.mark.parametrize("name", ["torch_export", "aot_inductor", "executorch", "coreml"])
def test_an_operator_of_another_library_is_named(name: str, images: Tensor, tmp_path: Path) -> None:
    chosen = format_named(name)
    skip_without_packages(chosen)
    with pytest.raises(ExportError, match=r"uses repnet_tests\.doubled\.default, which only runs"):
        chosen.export(Foreign(), images, tmp_path / f"model{chosen.suffix}")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_a_kernel_in_executorch_is_named(
    images: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("executorch")
    with pytest.raises(ExportError, match="erfinv"):
        format_named("executorch").export(Erfinv(), images, tmp_path / "model.pte")


def test_a_network_that_branches_on_values_is_an_export_error(
    images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"torch\.export cannot take this network: .*data-depend"):
        format_named("torch_export").export(Branching(), images, tmp_path / "model.pt2")


def test_an_export_tells_nothing_of_this_machine(pt2: Path) -> None:
    with zipfile.ZipFile(pt2) as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    for private in (b".py", b"site-packages", str(Path.home()).encode(), b"repnet.models"):
        assert private not in contents


def test_an_export_leaves_the_network_alone(network: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    training = nn.Sequential(copy.deepcopy(network), nn.Dropout(0.5)).train()
    exported = exported_program(training, images).module()
    assert training.training
    torch.testing.assert_close(exported(images), network(images))
    program = exported_program(network, images, precision="bf16")
    assert {v.dtype for v in program.state_dict.values()} == {torch.bfloat16}
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_images_of_any_size_go_through_a_graph_that_resizes(
    network: nn.Module, tmp_path: Path
) -> None:
    model = Preprocessed(
        network, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], size=(16, 16), resize=20
    )
    path = tmp_path / "model.pt2"
    chosen = format_named("torch_export")
    chosen.export(model, torch.zeros(2, 3, 20, 20, dtype=torch.uint8), path)
    run = chosen.load(path)
    for shape in ((1, 3, 20, 20), (2, 3, 33, 25), (1, 3, 17, 48)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        torch.testing.assert_close(run(pixels), model(pixels))
    for name in ("executorch", "coreml"):
        other = format_named(name)
        skip_without_packages(other)
        with pytest.raises(ExportError, match="export.preprocess=false"):
            other.export(model, pixels, tmp_path / f"model{other.suffix}")


def test_a_core_ml_package_holds_the_network_and_the_metadata(
    network: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools")
    chosen = format_named("coreml")
    path = tmp_path / "model.mlpackage"
    chosen.export(network, images, path, precision="fp16", metadata=METADATA)
    from coremltools.models import MLModel

    description = MLModel(str(path), skip_model_load=True).get_spec().description
    assert METADATA.items() <= dict(description.metadata.userDefined).items()
    assert list(description.input[0].type.multiArrayType.shape) == [1, 3, 16, 16]
    assert [value.name for value in (*description.input, *description.output)] == [
        "images", "logits",
    ]  # fmt: skip
    weights = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    expected = sum(v.numel() for v in network.state_dict().values() if v.ndim > 1)
    assert 2 * expected <= weights.stat().st_size < 3 * expected
    if chosen.skip_reason():
        with pytest.raises(ExportError, match="macOS only"):
            chosen.load(path)
    else:
        logits = chosen.load(path, precision="fp16")(images)
        assert relative_error(network(images), logits) < 0.02


def test_formats_that_cannot_run_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert "macOS" in str(format_named("coreml").skip_reason())
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert format_named("coreml").skip_reason() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "NVIDIA GPU" in str(format_named("tensorrt").skip_reason())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("repnet.deploy.formats.tensorrt.find_spec", lambda _: None)
    assert 'pip install "repnet[tensorrt]"' in str(format_named("tensorrt").skip_reason())
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    assert "C++ compiler" in str(format_named("aot_inductor").skip_reason())


@pytest.mark.parametrize("name", ["torch_export", "aot_inductor", "executorch"])
@pytest.mark.parametrize("contents", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_a_damaged_file_is_an_export_error(name: str, contents: bytes, tmp_path: Path) -> None:
    chosen = format_named(name)
    skip_without_packages(chosen)
    path = tmp_path / f"model{chosen.suffix}"
    path.write_bytes(contents)
    with pytest.raises(ExportError, match="model"):
        chosen.load(path)


def skip_without_packages(chosen: Format) -> None:
    for package in chosen.packages:
        pytest.importorskip(package)


def test_image_specs_survive_text() -> None:
    spec = ImageSpec("uint8", (None, 3, 224, 224))
    assert ImageSpec.loads(spec.dumps()) == spec
