"""Inference needs no training stack, and files of other runtimes need no torch."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.testing import assert_close

import repnet
from repnet.errors import InputError
from repnet.predict import Predictor
from tests.artefacts import COLORS, rewrite, write_artefact
from tests.commands import ROOT, environment

FILES = ["model.onnx", "model.xml"]
TRAINING = ["pytorch_lightning", "lightning", "hydra", "omegaconf", "sklearn", "matplotlib",
            "torchmetrics"]  # fmt: skip

PROGRAM = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in sys.argv[2].split()
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import io
import numpy as np
from PIL import Image
from repnet.predict import Predictor

pixels = np.arange(3 * 20 * 30, dtype=np.uint8).reshape(20, 30, 3)
(prediction,) = Predictor(sys.argv[1]).predict([Image.fromarray(pixels)], top=1)
print(prediction.scores[0].name)
if "torch" not in sys.argv[2].split():
    import repnet, torch
    model = repnet.load_deployed(sys.argv[1])
    print(model.class_names[model(torch.zeros(1, 3, 16, 16)).argmax()])
from repnet.predict.__main__ import main as predict
file = io.BytesIO()
Image.fromarray(pixels).save(file, "PNG")
open(sys.argv[3], "wb").write(file.getvalue())
sys.argv[1:] = [sys.argv[1], sys.argv[3], "--csv", "-", "--top", "1"]
predict()
from starlette.testclient import TestClient
from repnet.serve.app import create_app
with TestClient(create_app(Predictor(sys.argv[1]))) as client:
    answer = client.post("/predict", files={"image": ("a.png", file.getvalue())})
print(answer.json()["predictions"][0]["scores"][0]["name"])
"""


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("inference") / "deploy"
    write_artefact(directory, formats=["onnx", "openvino"])
    return directory


@pytest.mark.parametrize(
    ("file", "absent"),
    [("", TRAINING), *((file, absent) for file in FILES for absent in (TRAINING, ["torch"]))],
    ids=lambda value: value or "directory" if isinstance(value, str) else f"no {value[0]}",
)
def test_artefacts_are_used_without(
    file: str, absent: list[str], artefact: Path, tmp_path: Path
) -> None:
    pytest.importorskip("prometheus_client")
    if absent == ["torch"]:
        absent = [*TRAINING, "torch", "torchvision", "safetensors", "onnx", "onnxscript", "nncf"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, artefact / file, " ".join(absent),
         tmp_path / "a.png"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predicted, *of_zeros, _, row, served = done.stdout.split()
    assert predicted in COLORS["class_names"]
    assert (row.split(",")[2], served) == (predicted, predicted)
    assert len(of_zeros) == ("torch" not in absent)


@pytest.mark.parametrize("file", ["", *FILES])
def test_what_is_loaded_knows_its_classes_and_can_be_pickled(file: str, artefact: Path) -> None:
    model = repnet.load_deployed(artefact / file)
    assert model.class_names == COLORS["class_names"]
    images = torch.randn(2, 3, 16, 16)
    again = pickle.loads(pickle.dumps(model))
    assert again.class_names == model.class_names
    assert again.description == model.description
    assert_close(again(images), model(images), rtol=0, atol=0)
    predictor = Predictor(artefact / file)
    pixels = torch.randint(256, (3, 30, 40), dtype=torch.uint8)
    assert pickle.loads(pickle.dumps(predictor)).predict([pixels]) == predictor.predict([pixels])


def test_a_pickle_is_checked_again_where_it_is_loaded(artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, tmp_path / "deploy")
    stored = pickle.dumps(repnet.load_deployed(tmp_path / "deploy" / "model.onnx"))
    with (tmp_path / "deploy" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="was changed"):
        pickle.loads(stored)


def test_an_artefact_without_names_has_none(artefact: Path, tmp_path: Path) -> None:
    shutil.copytree(artefact, tmp_path / "deploy")
    rewrite(tmp_path / "deploy", "model.json", lambda model: model.pop("data"))
    for file in ("", *FILES):
        assert repnet.load_deployed(tmp_path / "deploy" / file).class_names is None


def image_modules() -> list[str]:
    """Return the installed top-level modules that the server's image lacks."""
    text = (ROOT / "examples" / "serve" / "Dockerfile").read_text()
    (command,) = re.findall(r"pip install --no-cache-dir -c constraints.txt ([^&]+)&&", text)
    wanted = re.findall(r"[\w-]+", command.replace("$RUNTIME", "onnxruntime"))
    installed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if canonicalize_name(name) not in installed:
            installed.add(canonicalize_name(name))
            needs = map(Requirement, requires(name) or [])
            wanted += [r.name for r in needs if r.marker is None or r.marker.evaluate()]
    return [
        module
        for module, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*installed, "repnet"}
    ]


def test_the_image_of_the_server_has_all_that_its_command_imports(artefact: Path) -> None:
    pytest.importorskip("prometheus_client")
    text = (ROOT / "examples" / "serve" / "Dockerfile").read_text()
    entry = json.loads(re.findall("^ENTRYPOINT (.+)", text, re.M)[0])
    (shown,) = json.loads(re.findall("^CMD (.+)", text, re.M)[0])
    (probe,) = re.findall(r"^HEALTHCHECK CMD .*http://localhost:8000(/\w+)", text, re.M)
    assert entry[0] == "repnet"
    absent = image_modules()
    assert {"torch", "hydra", "rich", "matplotlib"} <= set(absent)
    main = "from repnet.__main__ import main\nsys.argv[0:3] = ['repnet']\nmain()\n"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.partition("import io")[0] + main, "",
         " ".join(absent), *entry[1:], shown.replace("/model", str(artefact), 1), "--port", "0"],
        env=environment(), cwd=artefact, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert line.startswith(f"serving {artefact}/model.onnx at http://0.0.0.0:"), line
        with urlopen(f"http://localhost:{line.rpartition(':')[2].strip()}{probe}") as answer:
            assert answer.status == 200
    finally:
        process.terminate()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
