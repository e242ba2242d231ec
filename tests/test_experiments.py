"""Every recipe composes, and two steps of it run on generated images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from repnet import create_model
from repnet.spec import CONFIGS, choices
from repnet.training.run import train

EXPERIMENTS = choices("experiment")
# What a machine without a GPU and without the data needs, and small images of few classes.
SMALL = [
    "data=fake",
    "data.num_workers=0",
    "data.batch_size=4",
    "++data.train_size=20",
    "++data.classes=10",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
    "++trainer.limit_train_batches=2",
    "++trainer.limit_val_batches=1",
    "++trainer.limit_test_batches=1",
    "channels_last=false",
]


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        config = compose("train", [f"experiment={name}", *overrides])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_steps(name: str, tmp_path: Path) -> None:
    size = 32 if re.search("cifar|mnist", name) else 48
    overrides = [*SMALL, f"++data.image_size={size}"]
    if name == "finetune":
        torch.manual_seed(0)
        torch.save(create_model("repvgg_a0").state_dict(), tmp_path / "published.pth")
        overrides.append(f"pretrained={tmp_path / 'published.pth'}")
    else:
        model = composed(name)["model"]
        small = {"depths": [1] * len(model["depths"]), "widths": [0.25] * 4}
        overrides += [f"model.{key}={value}" for key, value in small.items() if key in model]
    result = train(composed(name, *overrides), tmp_path / "run")
    assert result["steps"] == 2
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_says_what_one_has_to_know(name: str) -> None:
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    header = "\n".join(line for line in lines if line.startswith("#"))
    commands = re.findall(r"python train\.py experiment=(\w+)", header)
    assert commands
    assert set(commands) == {name}
    assert "Hardware:" in header
    if name not in ("finetune", "fashion_mnist"):
        assert re.search(r"top-1: |[Ee]xpected: |published figure", header)


def test_recipes_of_imagenet_say_what_the_papers_say() -> None:
    recipe = composed("repvgg_imagenet_120", "data.root=x")
    assert recipe["optimizer"]["lr"] == 0.1
    assert recipe["trainer"]["max_epochs"] == 120
    assert recipe["lr_scaling"] == {"rule": "linear", "base_batch": 256}
    assert composed("repvgg_imagenet_200", "data.root=x")["loss"]["label_smoothing"] == 0.1
    mobileone = composed("mobileone_s1_imagenet", "data.root=x")
    assert mobileone["callbacks"]["ema"]["decay"] == 0.9995
    assert mobileone["callbacks"]["weight_decay"]["final"] == 1e-5
    assert dict(mobileone["callbacks"]["progressive"]["sizes"]) == {0: 160, 37: 192, 112: 224}
    names = {path.stem for path in (CONFIGS / "model").glob("*.yaml")}
    for name in EXPERIMENTS:
        header = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        assert set(re.findall(r"model=(\w+)", header)) <= names
        yaml.safe_load(header)


def test_without_a_test_there_is_a_result(tmp_path: Path) -> None:
    overrides = [o for o in SMALL if "limit_test_batches" not in o]
    config = composed("fashion_mnist", *overrides, "++trainer.limit_test_batches=0")
    result = train(config, tmp_path / "run")
    assert result["test"] == {"top1": None}
    assert result["steps"] == 2
