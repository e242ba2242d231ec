"""Training from weights of one's own or of others, on a folder of images."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning import Trainer
from torch import nn

from repnet import create_model
from repnet.checkpoint import read_checkpoint
from repnet.data import FakeImages
from repnet.errors import InputError
from repnet.spec import CONFIGS
from repnet.training import Classifier
from repnet.training.freezing import freeze, refuse_frozen_noise
from repnet.training.pretrained import load_pretrained
from repnet.training.run import _build_callbacks, train
from repnet.weights import convert_weights
from tests.commands import ROOT, TINY, run

SMALL = {"strides": [1, 1, 2, 2, 1], "widths": [0.25] * 4, "depths": [1] * 4}
SETTINGS = [f"model.{key}={value}" for key, value in SMALL.items()]


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        config = compose("train", list(overrides))
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint holds weights of an objective beside the network."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    train(composed(*TINY, *SETTINGS, "objective=auxiliary_heads"), directory)
    return directory


def network(**options: Any) -> nn.Module:
    return create_model("repvgg_tiny", **SMALL, **options)


# What to start from.


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/best.ckpt"])
def test_a_run_and_its_checkpoint_are_loaded(trained: Path, name: str) -> None:
    model = network(num_classes=3, in_channels=1)
    said = load_pretrained(model, trained / name, [torch.zeros(2, 1, 16, 16)])
    saved = read_checkpoint(trained)["state_dict"]
    for key, value in model.stages.state_dict().items():
        torch.testing.assert_close(value, saved[f"model.stages.{key}"], rtol=0, atol=0)
    assert any(key.startswith("objective.") for key in saved)
    path = trained / "checkpoints" / "best.ckpt"
    assert f"new, not taken from '{path}': head.weight, head.bias" in said
    assert "fitted to the image's channels: stem.conv.0.conv.weight, stem.conv.1.conv.wei" in said


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint: there is no"):
        load_pretrained(network(), tmp_path, [])


def test_a_network_of_torchvision_takes_its_own_file(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = torchvision.models.resnet18(num_classes=3)
    said = load_pretrained(model, tmp_path / "weights.pth", [])
    assert "new, not taken from" in said
    assert "fc.weight, fc.bias" in said
    torch.testing.assert_close(model.layer4.state_dict(), theirs.layer4.state_dict())


def test_branches_are_folded_with_images_of_their_own_channels_only(trained: Path) -> None:
    model = network(block="plain", in_channels=1)
    with pytest.raises(InputError, match="does not take the images of these data"):
        load_pretrained(model, trained, [torch.zeros(2, 1, 16, 16)])


# Parts that are not trained.


def fit(module: Classifier, tmp_path: Path) -> None:
    Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    ).fit(module, FakeImages(image_size=16, classes=3, train_size=16, batch_size=8))  # fmt: skip


def test_frozen_parts_keep_weights_and_statistics(tmp_path: Path) -> None:
    model = network(num_classes=3, dropout=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module = Classifier(
        model, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.1), freeze=["stem", "stages"]
    )
    fit(module, tmp_path)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}
    assert {n for n, m in model.named_children() if m.training} == {"pool", "head"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["stem", "stages"], ["stem", "stages"]),
        (["stages.*", "st?m"], ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]),
        (["*.0.conv.1"], [f"stages.{n}.0.conv.1" for n in range(4)]),
        ([], []),
    ],
)
def test_globs_choose_what_is_frozen(patterns: list[str], expected: list[str]) -> None:
    model = network()
    assert freeze(model, patterns) == expected
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != any(name.startswith(f"{part}.") for part in expected)


def test_a_model_of_ones_own_may_bring_the_weights_that_are_frozen() -> None:
    config = {"pretrained": None, "callbacks": {}, "freeze": ["stem"],
              "model": {"_target_": "torchvision.models.resnet18"}}  # fmt: skip
    refuse_frozen_noise(config)
    with pytest.raises(InputError, match=r"freeze=\['stem'\] holds random weights"):
        refuse_frozen_noise(config | {"model": MODEL_OF_REPNET})


MODEL_OF_REPNET = {"_target_": "repnet.models.RepVGG"}


def test_globs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"'stem\.\*\.conf' is no part of RepVGG, .* stem, stages"):
        freeze(network(), ["stem", "stem.*.conf"])
    with pytest.raises(InputError, match=r"freeze=\['\*'\] leaves nothing to train"):
        freeze(network(), ["*"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=finetune"], "fine-tunes trained weights; add pretrained=PATH"),
        (["experiment=finetune", "pretrained=null"], "freeze_norms holds norms that have not"),
        (["callbacks=[freeze_norms]"], "freeze_norms holds norms that have not seen an image"),
        (["freeze=[stem]"], r"freeze=\['stem'\] holds random weights; add pretrained=PATH"),
    ],
)
def test_frozen_random_weights_are_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    small = [f"++{o}" if o.startswith(("data.t", "data.i")) else o for o in TINY]
    result = run("train.py", *overrides, *small, f"hydra.run.dir={out}", cwd=tmp_path, code=2)
    assert re.search(message, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_model_of_ones_own_may_bring_its_weights(tmp_path: Path) -> None:
    config = composed(*TINY, "freeze=['0']")
    layers = [{"_target_": "torch.nn.BatchNorm2d", "num_features": 3},
              {"_target_": "torch.nn.Flatten"},
              {"_target_": "torch.nn.Linear", "in_features": 768, "out_features": 10}]  # fmt: skip
    config["model"] = {"_target_": "torch.nn.Sequential", "_args_": layers}
    train(config, tmp_path / "run")
    state = read_checkpoint(tmp_path / "run")["state_dict"]
    assert state["model.0.num_batches_tracked"] == 0


def test_what_is_frozen_cannot_change_in_a_resumed_run(trained: Path, tmp_path: Path) -> None:
    config = composed(*TINY, *SETTINGS, f"pretrained={trained}", "freeze=[stem]")
    train(config, tmp_path / "run")
    changed = {**config, "freeze": ["stages"], "trainer": {**config["trainer"], "max_epochs": 2}}
    with pytest.raises(InputError, match="freeze cannot be changed in a resumed run"):
        train(changed, tmp_path / "run", resume=True)
    assert train({**changed, "freeze": ["stem"]}, tmp_path / "run", resume=True)["epochs"] == 2


def test_a_training_that_does_not_improve_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(
        *TINY, *SETTINGS, "callbacks=[early_stopping]", "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.min_delta=1", "checkpoint.monitor=val/f1", "trainer.max_epochs=9",
    )  # fmt: skip
    assert train(config, tmp_path / "run")["epochs"] == 3
    assert "stopped after epoch 3: val/f1 did not improve 2 times" in capsys.readouterr().out
    (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    assert train(config, tmp_path / "run", resume=True)["best_checkpoint"]  # needs no trust


def test_settings_of_a_callback_that_was_not_chosen_do_nothing() -> None:
    config = composed("experiment=finetune", "data.root=x", "callbacks=[early_stopping]")
    assert list(_build_callbacks(config["callbacks"])) == ["early_stopping"]


# The documentation, as it is written.


def documented() -> list[str]:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.partition("## Fine-tune on your folder")[2].partition("\n## ")[0]
    return re.findall(r"^python train\.py (.+)$", section, re.M)


def test_there_is_something_to_try() -> None:
    assert sum("freeze=" in line for line in documented()) == 1
    assert len(documented()) >= 4


@pytest.mark.parametrize("line", documented())
def test_fine_tuning_on_a_folder(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for shade, (name, count) in enumerate({"cat": 8, "dog": 4, "owl": 2}.items()):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for index in range(count):
            color = (100 * shade, 10 * index, 0)
            Image.new("RGB", (40, 36), color).save(folder / f"{index}.png")
    narrow = create_model("resnet18", width=4)
    names = convert_weights(narrow.state_dict(), to="torchvision")
    (name,) = re.findall(r"pretrained=(\S+)", line)
    torch.save(names, tmp_path / name)
    small = ["model.width=4", "data.image_size=32", "data.batch_size=4", "data.num_workers=0",
             "trainer=cpu", "trainer.max_epochs=2", "pictures=false"]  # fmt: skip
    result = train(composed(*shlex.split(line), *small), tmp_path / "run")
    output = capsys.readouterr().out
    assert f"new, not taken from '{name}': head.weight, head.bias" in output
    assert "11 / 3 / 3 images to train / validate / test" in output
    assert "warning: 3 of the training images, 10% of each class, validate" in output
    assert "warning: the test images are the validation images" in output
    assert result["recall"].keys() == {"cat", "dog", "owl"}
    assert result["test"].keys() == {"loss", "top1", "f1"}
    state = read_checkpoint(tmp_path / "run")["state_dict"]
    kept = torch.equal(state["model.stem.0.conv.weight"], narrow.stem[0].conv.weight)
    assert kept == ("freeze=" in line)
