"""`examples/foreign_project`: a script of someone else's runs with the callbacks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet

from tests.commands import ROOT, run

SCRIPT = "examples/foreign_project/fit.py"


def test_it_trains_and_gives_the_plain_network_back(tmp_path: Path) -> None:
    done = run(SCRIPT, "--epochs", "2", "--samples", "240", "--directory", "out", cwd=tmp_path)
    assert "'raw/val/accuracy'" in done.stdout
    checkpoint = torch.load(tmp_path / "out" / "best.ckpt", weights_only=True)
    assert checkpoint["ema"]["saved"] == "ema"
    key = "model.layer4.0.conv1.weight"
    assert not torch.equal(checkpoint["state_dict"][key], checkpoint["state_dict_raw"][key])
    plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    plain.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verified"] is True
    assert "layer1.0.conv1" in report["folded"]


def test_it_stays_short() -> None:
    assert len((ROOT / SCRIPT).read_text().splitlines()) < 90
