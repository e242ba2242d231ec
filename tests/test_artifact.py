"""The deploy model as files: it comes back exactly, or is refused with a reason."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repnet.checkpoint import save_checkpoint
from repnet.deploy import folded_layers
from repnet.deploy.artifact import load_deployed, save_deployed
from repnet.deploy.description import read_description
from repnet.errors import InputError
from repnet.files import sha256
from repnet.fold import reparameterize
from repnet.models import create_model
from repnet.spec import build, choices
from tests.models import randomize_batch_norm, relative_error

ROOT = Path(__file__).parents[1]


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def folded_model(name: str = "repvgg_tiny", **options: Any) -> nn.Module:
    model = randomize_batch_norm(create_model(name, num_classes=5, **options))
    return reparameterize(model, torch.randn(1, 3, 16, 16))


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the directory of a saved deploy model."""
    save_deployed(folded_model(), tmp_path / "deploy")
    return tmp_path / "deploy"


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description in `directory` by `change`, as one who knows of its sum."""
    path = directory / "model.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    change(description)
    description.pop("sha256", None)
    path.write_text(json.dumps(description), encoding="utf-8")


# Round trips


@pytest.mark.parametrize("block", [name for name in choices("block") if name != "transposed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg_tiny", {}),
        ("repvgg_b1g4", {"depths": [1, 2, 1, 1], "widths": [0.25] * 4}),
        ("repvgg_d2se", {"depths": [1, 1, 1, 1], "widths": [0.25] * 4}),
    ],
)
def test_a_model_comes_back_exactly(
    name: str, options: dict[str, Any], block: str, tmp_path: Path, image: Tensor
) -> None:
    model = folded_model(name, block=block, **options)
    save_deployed(model, tmp_path)
    loaded = load_deployed(tmp_path)
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        same(value, loaded.state_dict()[key])
    # The last bit depends on the alignment of the weights in memory, too.
    same(model(image), loaded(image))


def test_what_was_loaded_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    save_deployed(load_deployed(saved), tmp_path / "again")
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(saved / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_comes_back(dtype: torch.dtype, tmp_path: Path, image: Tensor) -> None:
    model = folded_model().to(dtype)
    save_deployed(model, tmp_path)
    loaded = load_deployed(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    same(model(image.to(dtype)), loaded(image.to(dtype)))


def test_a_channels_last_model_comes_back(tmp_path: Path, image: Tensor) -> None:
    model = folded_model().to(memory_format=torch.channels_last)
    save_deployed(model, tmp_path)
    loaded = load_deployed(tmp_path)
    for key, value in model.state_dict().items():
        same(value.contiguous(), loaded.state_dict()[key])
    assert relative_error(model(image), loaded(image)) < 1e-5  # another layout rounds differently


def test_a_root_that_became_a_convolution_comes_back(tmp_path: Path, image: Tensor) -> None:
    spec = {
        "_target_": "repnet.blocks.RepVGGBlock",
        "in_channels": 3,
        "out_channels": 4,
        "activation": None,
    }
    folded = reparameterize(randomize_batch_norm(build(spec)), image)
    assert type(folded) is nn.Conv2d
    save_deployed(folded, tmp_path, architecture=spec)
    loaded = load_deployed(tmp_path)
    assert type(loaded) is nn.Conv2d
    same(folded(image), loaded(image))


OUTSIDER = """
import torch
from torch import nn
from repnet.layers import conv_bn

class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers, nn.ReLU())

    def forward(self, x):
        return self.layers(x)

def norm(*layers):
    return nn.Sequential(*layers, nn.BatchNorm2d(4))

def asymmetric():
    return Net(norm(nn.ZeroPad2d((2, 0, 0, 1)), nn.Conv2d(3, 4, 3)))

def even():
    return Net(norm(nn.Conv2d(3, 4, 2, padding="same")))

def transposed():
    return Net(norm(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)))

def siblings():
    return Net(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))

def left():
    return Net(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))

def reflected():
    return Net(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4))

def shared():
    block = conv_bn(3, 3)
    return Net(block, nn.ReLU(), block)

def tied():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    return Net(first, nn.ReLU(), second)
"""


@pytest.fixture
def outsider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put a package with models of someone else on the path; return its name."""
    (tmp_path / "outsider.py").write_text(OUTSIDER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "outsider"
    sys.modules.pop("outsider", None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "name",
    ["asymmetric", "even", "transposed", "siblings", "left", "reflected", "shared", "tied"],
)
def test_a_model_of_a_trusted_package_comes_back(
    name: str, outsider: str, tmp_path: Path, image: Tensor
) -> None:
    model = randomize_batch_norm(build({"_target_": f"{outsider}.{name}"}))
    folded = reparameterize(model, image)
    save_deployed(folded, tmp_path / "deploy")
    loaded = load_deployed(tmp_path / "deploy", trust=[outsider])
    same(folded(image), loaded(image))
    with pytest.raises(InputError, match=r"trust=\[outsider\]"):
        load_deployed(tmp_path / "deploy")


def test_the_description_says_what_it_is(tmp_path: Path) -> None:
    data = {"classes": ["größer", "<b>"], "shape": [3, 16, 16]}
    save_deployed(folded_model(), tmp_path, data=data, provenance={"seed": 1})
    description = read_description(tmp_path)
    assert description["format"] == "repnet-deploy"
    assert description["form"] == "deploy"
    assert description["data"] == data
    assert description["provenance"] == {"seed": 1}
    assert "equivalence" not in description
    assert description["hashes"] == {"model.safetensors": sha256(tmp_path / "model.safetensors")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_loading_needs_neither_the_training_code_nor_lightning(saved: Path, image: Tensor) -> None:
    torch.save(image, saved / "image.pt")
    code = f"""
import sys, torch, repnet
model = repnet.load_deployed({str(saved)!r})
torch.save(model(torch.load({str(saved / "image.pt")!r})), {str(saved / "output.pt")!r})
print(sorted({{"repnet.training", "pytorch_lightning", "hydra", "omegaconf"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    same(load_deployed(saved)(image), torch.load(saved / "output.pt"))


# Refusals when saving


def test_a_model_of_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs architecture="):
        save_deployed(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["architecture", "data", "provenance", "equivalence"])
def test_what_is_not_plain_data_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{key} must be plain data"):
        save_deployed(folded_model(), tmp_path, **{key: {"value": Path()}})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_its_architecture_does_not_build_is_refused(tmp_path: Path) -> None:
    model = folded_model()
    model.stages.append(nn.ReLU())
    with pytest.raises(InputError, match=r"has no 'stages\.4'"):
        save_deployed(model, tmp_path)
    model = folded_model()
    model.stages[0] = nn.GELU()
    with pytest.raises(InputError, match=r"'stages\.0' is a GELU, which folding does not make"):
        save_deployed(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_with_more_than_the_model_is_refused(tmp_path: Path) -> None:
    model = folded_model()
    model.architecture = {**model.architecture, "depths": [2, 2, 2, 3]}
    with pytest.raises(InputError):
        save_deployed(model, tmp_path)


# Refusals when loading


@pytest.mark.parametrize("position", [0.1, 0.5, -1])
def test_one_changed_byte_is_refused(position: float, saved: Path) -> None:
    path = saved / "model.safetensors"
    contents = bytearray(path.read_bytes())
    contents[int(position * len(contents)) if position > 0 else -1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(InputError, match="was changed after it was verified"):
        load_deployed(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        load_deployed(saved)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a deploy model"):
        load_deployed(tmp_path / "nothing")


@pytest.mark.parametrize("path", ["", "checkpoints/last.ckpt"], ids=["run", "file"])
def test_a_training_checkpoint_is_recognized(path: str, tmp_path: Path) -> None:
    save_checkpoint({"state_dict": {}}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(InputError, match="train form; deploy it first"):
        load_deployed(tmp_path / path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99, this repnet reads up to 1"),
        ({"version": "1"}, "format version 1"),
        ({"version": None}, "format version None"),
        ({"format": "repnet-checkpoint"}, "is not the description of a repnet deploy model"),
        ({"format": None}, "is not the description of a repnet deploy model"),
        ({"hashes": {}}, "was changed after it was verified"),
        ({"hashes": None}, "is incomplete"),
        ({"architecture": {}}, "is incomplete"),
        ({"architecture": {"train_form": {}}}, "is incomplete"),
        ({"architecture": {"train_form": {}, "layers": {}}}, "does not describe a network"),
        ({"architecture": {"train_form": 3, "layers": []}}, "does not describe a network"),
    ],
    ids=str,
)
def test_another_description_is_refused(change: dict[str, Any], message: str, saved: Path) -> None:
    edit(saved, lambda description: description.update(change))
    with pytest.raises(InputError, match=message):
        load_deployed(saved)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '{"format": "repnet-deploy"}', "\x00\x01", "[" * 100_000],
    ids=["empty", "open", "null", "list", "number", "partial", "binary", "deep"],
)
def test_a_damaged_description_is_refused(text: str, saved: Path) -> None:
    (saved / "model.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"model\.json"):
        load_deployed(saved)


def test_bytes_that_are_not_text_are_refused(saved: Path) -> None:
    (saved / "model.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="is damaged"):
        load_deployed(saved)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.load", "repnet.layers.torch.load", "repnet.models.build"],
)
def test_a_hostile_train_form_runs_nothing(target: str, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hostile = {"_target_": target, "_args_": [f"touch {marker}"]}
    for form in (hostile, {"_target_": "repnet.models.RepVGG", "block": hostile}):
        edit(saved, lambda description: description["architecture"].update(train_form=form))  # noqa: B023
        with pytest.raises(InputError, match="may not be built from a file"):
            load_deployed(saved)
    assert not marker.exists()


def nested(depth: int) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for _ in range(depth):
        spec = {"type": "Sequential", "layers": [spec]}
    return spec


@pytest.mark.parametrize(
    "layer",
    [
        {},
        3,
        [],
        {"type": "Linear", "in_features": 1, "out_features": 1},
        {"type": "os.system"},
        {"type": "Conv2d"},
        {"type": "Conv2d", "in_channels": 3, "out_channels": 16, "kernel_size": 3, "evil": 1},
        {"type": "Conv2d", "in_channels": -3, "out_channels": 16, "kernel_size": 3},
        {"type": "Conv2d", "in_channels": 3, "out_channels": 16, "kernel_size": 5, "bias": True},
        {"type": "Conv2d", "in_channels": "3", "out_channels": 16, "kernel_size": 3},
        {"type": "Sequential", "layers": 3},
        nested(400),
    ],
    ids=lambda layer: str(layer)[:60],
)
def test_a_layer_that_does_not_fit_is_refused(layer: Any, saved: Path) -> None:
    edit(saved, lambda d: d["architecture"]["layers"].update({"stem.conv": layer}))
    with pytest.raises(InputError):
        load_deployed(saved)


def test_a_train_form_nested_too_deeply_is_refused(saved: Path) -> None:
    edit(saved, lambda d: d["architecture"]["train_form"].update(block=nested(400)))
    with pytest.raises(InputError):
        load_deployed(saved)


@pytest.mark.parametrize("name", ["stem.nothing.conv", "..", "head.weight"])
def test_a_layer_at_an_unknown_place_is_refused(name: str, saved: Path) -> None:
    layer = {"type": "Identity"}
    edit(saved, lambda d: d["architecture"]["layers"].update({name: layer}))
    with pytest.raises(InputError):
        load_deployed(saved)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(change: str, saved: Path) -> None:
    path = saved / "model.safetensors"
    state = load_file(path)
    if change == "missing":
        del state["head.bias"]
    elif change == "extra":
        state["another"] = torch.zeros(1)
    else:
        state["head.bias"] = torch.zeros(6)
    save_file(state, path)
    edit(saved, lambda d: d["hashes"].update({"model.safetensors": sha256(path)}))
    with pytest.raises(InputError, match="does not describe its own weights"):
        load_deployed(saved)


def test_a_partially_folded_model_says_so_and_comes_back(tmp_path: Path) -> None:
    model = randomize_batch_norm(create_model("repvgg_tiny", block="qarepvgg")).eval()
    x = torch.randn(2, 3, 32, 32)
    partial = reparameterize(model, x, norms="keep")
    save_deployed(partial, tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["form"] == "partial"
    loaded = load_deployed(tmp_path)
    assert any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    assert torch.equal(loaded(x), partial(x))
    folded = reparameterize(loaded, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize("key", ["architecture", "data", "hashes", "form"])
def test_a_changed_description_is_noticed(saved: Path, key: str) -> None:
    path = saved / "model.json"
    description = json.loads(path.read_text())
    description[key] = {"other": 1}
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="was changed after it was written"):
        load_deployed(saved)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(InputError, match="version 99"):
        load_deployed(saved)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(4)],
         (2, 3, 8, 8)),
        ([nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)], (2, 6)),
        ([nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)], (2, 3, 8)),
        ([nn.ConvTranspose3d(3, 4, 2, bias=False), nn.BatchNorm3d(4)], (2, 3, 4, 4, 4)),
    ],
)  # fmt: skip
def test_folded_layers_of_every_kind_come_back(
    layers: list[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(spec: Any) -> nn.Module:
        return copy.deepcopy(train_form)

    train_form = randomize_batch_norm(nn.Sequential(*layers, nn.ReLU()))
    monkeypatch.setattr(folded_layers, "build", build)
    x = torch.randn(shape)
    folded = reparameterize(train_form, x)
    described = json.loads(json.dumps(folded_layers.changed_layers({}, folded)))
    rebuilt = folded_layers.with_layers(build({}), described)
    rebuilt.load_state_dict(folded.state_dict())
    assert torch.equal(rebuilt.eval()(x), folded(x))
