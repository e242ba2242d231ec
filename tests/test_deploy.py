"""`python deploy.py` and the pipeline behind it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import repnet
from repnet.deploy.evaluation import evaluate
from repnet.deploy.pipeline import Settings, VerificationError, deploy
from repnet.errors import InputError
from repnet.files import write_text
from repnet.hub import write_model_card
from tests.commands import ROOT, environment, run
from tests.kills import KILLED, killed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deploy") / "run"
    run("train.py", f"hydra.run.dir={directory}", "trainer.max_epochs=2", "pictures=false",
        cwd=directory.parent)  # fmt: skip
    return directory


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    shutil.copy(trained / "checkpoints" / "best.ckpt", path)
    return path


def test_the_command_writes_a_verified_model(checkpoint: Path) -> None:
    result = run("deploy.py", f"ckpt={checkpoint}", cwd=checkpoint.parent)
    directory = checkpoint.parent.parent / "deploy"
    assert {path.name for path in directory.iterdir()} == {
        "model.safetensors", "model.json", "report.json", "report.html",
    }  # fmt: skip
    report = json.loads((directory / "report.json").read_text())
    assert report["verified"] is True
    assert report["refusal"] is None
    assert report["samples"] == 360
    assert report["agreement"] == 1
    assert report["max_relative_error"] < 1e-12
    assert report["metrics"]["train_form"]["top1"] == report["metrics"]["deploy_form"]["top1"]
    for key in ("parameters", "macs"):
        assert report[key]["deploy_form"] < report[key]["train_form"]
    assert min(report["latency_ms"].values()) > 0
    assert len(report["blocks"]) == 8
    assert {"name", "relative_error"} <= report["blocks"][0].keys()
    assert report["exports"] == []
    page = (directory / "report.html").read_text()
    assert "Verified" in page
    assert all(block["name"] in page for block in report["blocks"])
    assert "http://" not in page
    assert "https://" not in page
    assert "360 of 360" in result.stdout

    train_form, config = repnet.load_checkpoint(checkpoint)
    assert config["data"]["_target_"] == "repnet.data.Digits"
    deployed = repnet.load_deployed(directory)
    images = torch.randn(16, 1, 8, 8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    torch.testing.assert_close(deployed(images), train_form.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_block_that_grows_says_so_and_deploys_as_one_convolution(tmp_path: Path) -> None:
    branch = "{_target_: repnet.layers.conv_bn, _partial_: true, kernel_size: 3, dilation: %d}"
    trained = run(
        "train.py", f"hydra.run.dir={tmp_path / 'run'}", "trainer=debug", "pictures=false",
        "block=composed", f"block.branches=[{branch % 1},{branch % 2}]", cwd=tmp_path,
    )  # fmt: skip
    assert "will deploy as one 5x5 convolution" in trained.stdout
    report = deploy(tmp_path / "run", tmp_path / "deploy")
    assert report["verified"]
    assert any("grew: one convolution is larger" in line for line in report["warnings"])
    deployed = repnet.load_deployed(tmp_path / "deploy")
    convolutions = [m for m in deployed.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.kernel_size for conv in convolutions} == {(5, 5)}


def test_nothing_is_overwritten_unasked(checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    deploy(checkpoint, directory)
    before = (directory / "report.json").read_bytes()
    with pytest.raises(InputError, match="deploy.overwrite=true"):
        deploy(checkpoint, directory)
    assert (directory / "report.json").read_bytes() == before
    deploy(checkpoint, directory, Settings(overwrite=True, split="val"))
    assert json.loads((directory / "report.json").read_text())["samples"] == 180
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_deployment_that_was_killed_loses_nothing(checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    deploy(checkpoint, directory, Settings(latency_runs=1))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    # Between two renames: of the old directory, and of the new one.
    run("tests/kills.py", "whole", "out", ROOT / "deploy.py", f"ckpt={checkpoint}",
        f"hydra.run.dir={directory}", "deploy.overwrite=true", cwd=tmp_path,
        code=KILLED)  # fmt: skip
    assert not directory.exists()
    directory.mkdir()  # as Hydra does before a job
    with pytest.raises(InputError, match="deploy.overwrite=true"):
        deploy(checkpoint, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert killed("half", directory / "README.md", lambda path: write_text(path, "some")) == KILLED
    deploy(checkpoint, directory, Settings(latency_runs=1, overwrite=True))
    assert {path.name for path in directory.iterdir()} == set(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_link_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk")
    deploy(checkpoint, link, Settings(latency_runs=1))
    deploy(checkpoint, link, Settings(latency_runs=1, overwrite=True))
    assert link.is_symlink()
    assert repnet.load_deployed(tmp_path / "disk")
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link", "run"}


def test_a_directory_that_cannot_be_made_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        result = run("deploy.py", f"ckpt={checkpoint}", f"hydra.run.dir={place}", cwd=tmp_path,
                     code=2)  # fmt: skip
        (line,) = result.stderr.strip().splitlines()
        assert "the output directory cannot be made" in line
        assert place in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("head.bias", float("inf"), "'head.bias' holds NaN or infinity"),
        ("running_mean", float("nan"), "running_mean' holds NaN or infinity"),
        ("running_var", -1.0, "running_var' is negative"),
    ],
)
def test_weights_that_are_no_numbers_are_named(
    checkpoint: Path, tmp_path: Path, key: str, value: float, reason: str
) -> None:
    def spoil(contents: dict[str, Any]) -> None:
        state = contents["state_dict"]
        name = next(name for name in state if name.endswith(key))
        state[name].view(-1)[0] = value

    edit(checkpoint, spoil)
    with pytest.raises(InputError, match=reason) as error:
        deploy(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ("recalibrate=N" in str(error.value)) == ("running" in key)
    if "running" in key:
        deploy(checkpoint, tmp_path / "out", Settings(recalibrate=2, latency_runs=1))


def test_weights_that_cannot_be_written_leave_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("repnet.deploy.artifact.save_file", full)
    with pytest.raises(InputError, match=r"cannot write '.*model\.safetensors': .*No space left"):
        deploy(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_no_deployment_wrote_is_never_replaced(checkpoint: Path) -> None:
    run_directory = checkpoint.parent.parent
    with pytest.raises(InputError, match="holds 'checkpoints'"):
        deploy(checkpoint, run_directory, Settings(overwrite=True))
    assert checkpoint.exists()


def test_a_refusal_keeps_the_model_that_was_verified(checkpoint: Path, tmp_path: Path) -> None:
    deploy(checkpoint, tmp_path / "out")
    with pytest.raises(VerificationError, match=r"out\.refused"):
        deploy(checkpoint, tmp_path / "out", Settings(overwrite=True, tolerance=0))
    repnet.load_deployed(tmp_path / "out")
    assert json.loads((tmp_path / "out.refused" / "report.json").read_text())["refusal"]
    assert not (tmp_path / "out.refused" / "model.json").exists()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(split="train"),
        Settings(latency_runs=0),
        Settings(latency_batch=0),
        Settings(tolerance=-1),
        Settings(tolerance=float("nan")),
        Settings(device="cuda:99"),
        Settings(data={"batch_size": 0}),
    ],
)
def test_settings_that_make_no_sense_are_bad_input(
    checkpoint: Path, tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(InputError):
        deploy(checkpoint, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


WRONG_KERNEL = """
import dataclasses, sys
import repnet.fold.core
from repnet.cli.deploy import main

original, count = repnet.fold.core.as_module, 0

def as_module(kernel, *, like):
    global count
    count += not kernel.weight.is_meta
    if count == 2:
        count += 1
        weight = kernel.weight.clone()
        weight[0, 0, 1, 1] += 1e-4
        kernel = dataclasses.replace(kernel, weight=weight)
    return original(kernel, like=like)

repnet.fold.core.as_module = as_module
sys.argv = ["deploy.py", "ckpt={checkpoint}"]
main()
"""


def test_a_wrong_kernel_is_refused_and_its_block_named(checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "sabotage.py"
    script.write_text(WRONG_KERNEL.format(checkpoint=checkpoint))
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert "'stages.0.0.conv'" in result.stderr
    directory = checkpoint.parent.parent / "deploy"
    assert {path.name for path in directory.iterdir()} == {"report.json", "report.html"}
    report = json.loads((directory / "report.json").read_text())
    assert report["verified"] is False
    assert "'stages.0.0.conv'" in report["refusal"]
    broken = report["limits"][0]
    assert (broken["value"], broken["where"]) == (1e-9, "stages.0.0.conv")
    assert broken["passed"] is False
    assert broken["measured"] > 1e-9
    head = (directory / "report.html").read_text().partition("<main>")[0]
    assert "Not deployed" in head
    assert "What to try." in head
    assert "<b>stages.0.0.conv</b>" in head


def test_a_busy_machine_has_no_speed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repnet.deploy.latency.time.process_time", lambda: 0.0)
    report = deploy(checkpoint, tmp_path / "out", Settings(latency_runs=10))
    found = report["latency"]["forms"]["deploy_form"]
    assert found["speed_up"] is None
    assert found["withheld"].startswith("PyTorch had 0.00 of a core")
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "Speeds are not compared: PyTorch had" in (tmp_path / "out/report.html").read_text()
    assert "Latency is not given" in write_model_card(tmp_path / "out").read_text()


def test_a_change_after_the_proof_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last gate: predictions of what would be saved, on every sample."""
    import repnet.deploy.pipeline as pipeline

    def tampered(train_form: nn.Module, deploy_form: nn.Module, *rest: Any) -> Any:
        with torch.no_grad():
            deploy_form.head.bias[3] += 5  # type: ignore[index,operator,union-attr]
        return evaluate(train_form, deploy_form, *rest)

    monkeypatch.setattr(pipeline, "evaluate", tampered)
    with pytest.raises(VerificationError, match="predictions changed"):
        deploy(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["agreement"] < 1
    assert not any(sample["tie"] for sample in report["changed"])


def test_what_is_evaluated_is_what_was_saved(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network whose saved weights do not make it again is refused, though its fold is right."""
    import repnet.deploy.pipeline as pipeline

    def forgetful(model: nn.Module, directory: Path, **entries: Any) -> None:
        saved = deepcopy(model)
        with torch.no_grad():
            saved.head.bias[3] += 5  # type: ignore[index,operator,union-attr]
        repnet.save_deployed(saved, directory, **entries)

    monkeypatch.setattr(pipeline, "save_deployed", forgetful)
    with pytest.raises(VerificationError, match="predictions changed"):
        deploy(checkpoint, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.html"}


def test_every_failure_of_several_deployments_is_told(checkpoint: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.ckpt") for name in ("one", "two")]
    for path in paths:
        Path(path).write_bytes(b"no checkpoint")
    jobs = ",".join([paths[0], str(checkpoint), paths[1]])
    result = run("deploy.py", "-m", f"ckpt={jobs}", f"hydra.sweep.dir={tmp_path / 'out'}",
                 cwd=tmp_path, code=2)  # fmt: skip
    first, second = result.stderr.strip().splitlines()
    assert first.startswith(f"error: ckpt={paths[0]}: ")
    assert second.startswith(f"error: ckpt={paths[1]}: ")
    assert (tmp_path / "out" / "1" / "model.safetensors").exists()


INTERRUPTED = """
import torch
from repnet.cli import command
from repnet.errors import InputError

def job(cfg):
    if cfg.ckpt == "b":
        raise KeyboardInterrupt
    if cfg.ckpt == "e":
        raise torch.OutOfMemoryError("out of memory")
    raise RuntimeError("broken") if cfg.ckpt == "d" else InputError("no good")

if __name__ == "__main__":
    from omegaconf import OmegaConf
    OmegaConf.register_new_resolver("repnet.deploy_directory", lambda checkpoint: "out")
    command.run("deploy", job)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "errors"),
    [
        (["ckpt=a,b"], 130, ["error: ckpt=a: no good", "interrupted"]),
        (["ckpt=a,d"], 2,
         ["error: ckpt=a: no good", "error: ckpt=d: unexpected RuntimeError: broken"]),
        (["ckpt=a,c", "hydra/launcher=joblib"], 2,
         ["error: ckpt=a: no good", "error: ckpt=c: no good"]),
    ],
)  # fmt: skip
def test_failures_are_told_once_whatever_else_happens(
    tmp_path: Path, arguments: list[str], code: int, errors: list[str]
) -> None:
    if "hydra/launcher=joblib" in arguments:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    script = tmp_path / "job.py"
    script.write_text(INTERRUPTED)
    sweep = f"hydra.sweep.dir={tmp_path / 'out'}"
    result = run(str(script), "-m", *arguments, sweep, cwd=tmp_path, code=code)
    told = [line for line in result.stderr.splitlines() if line.startswith(("error", "inter"))]
    assert sorted(told) == errors


@pytest.mark.parametrize(
    ("arguments", "full", "code", "error"),
    [
        (["ckpt=a"], "", 2, "error: no good"),
        (["ckpt=a"], "1", 2, "error: no good"),
        (["ckpt=e"], "", 1, "error: out of memory"),
        (["ckpt=d"], "", 1, "error: unexpected RuntimeError: broken"),
        (["ckpt=[a"], "", 2, "error: no viable alternative at input '[a' See "),  # two lines
        (["ckp=a"], "1", 2, "error: unknown key 'ckp'"),
    ],
)
def test_an_error_is_one_line_and_comes_before_its_traceback(
    tmp_path: Path, arguments: list[str], full: str, code: int, error: str
) -> None:
    script = tmp_path / "job.py"
    script.write_text(INTERRUPTED)
    done = run(str(script), *arguments, "hydra.run.dir=out", cwd=tmp_path, code=code,
               HYDRA_FULL_ERROR=full)  # fmt: skip
    first, *rest = done.stderr.splitlines()
    assert first.startswith(error)
    if full or "unexpected" in error:
        assert rest[0] == "Traceback (most recent call last):"
    else:
        assert not rest


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def spec(path: str, value: Any) -> Callable[[Path, Path], None]:
    return lambda file, marker: edit(
        file, lambda c: c["repnet"]["config"].__setitem__(path, value(marker))
    )


HOSTILE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "missing": (lambda file, marker: file.unlink(), "there is no checkpoint"),
    "empty": (lambda file, marker: file.write_bytes(b""), "damaged"),
    "text": (lambda file, marker: file.write_text("hello"), "damaged"),
    "truncated": (
        lambda file, marker: file.write_bytes(file.read_bytes()[:100_000]),
        "damaged, truncated",
    ),
    "pickle": (
        lambda file, marker: file.write_bytes(pickle.dumps(Attack(marker))),
        "could run code",
    ),
    "torch pickle": (
        lambda file, marker: torch.save({"state_dict": {}, "repnet": Attack(marker)}, file),
        "posix.system",
    ),
    "another format": (
        lambda file, marker: torch.save({"state_dict": {}, "epoch": 3}, file),
        "has the keys state_dict, epoch",
    ),
    "newer": (
        lambda file, marker: edit(file, lambda c: c["repnet"].update(version=99)),
        "format version 99",
    ),
    "deploy form": (
        lambda file, marker: edit(file, lambda c: c["repnet"].update(form="deploy")),
        "in deploy form",
    ),
    "target": (
        spec("model", lambda m: {"_target_": "os.system", "command": f"touch {m}"}),
        "'os.system' may not be built",
    ),
    "hidden target": (
        spec("model", lambda m: {
            "_target_": "repnet.models.RepVGG", "depths": [1, 1, 1, 1], "widths": [1, 1, 1, 1],
            "block": {"_target_": "repnet.layers.torch.load", "f": str(m)},
        }),
        "torch.serialization.load",
    ),
    "data target": (
        spec("data", lambda m: {"_target_": "subprocess.run", "args": ["touch", str(m)]}),
        "'subprocess.run' may not be built",
    ),
    "no arguments": (
        spec("model", lambda m: {"_target_": "repnet.models.RepVGG", "depths": [1, 1, 1, 1],
                                 "widths": [float("inf")] * 4, "block": 5}),
        "best.ckpt",
    ),
    "no data set": (spec("data", lambda m: [1]), "does not describe a data set"),
    "an abstract data set": (
        spec("data", lambda m: {"_target_": "repnet.data.ImageDataModule", "mean": [], "std": []}),
        "may not be built from a file",
    ),
    "a function for data": (
        spec("data", lambda m: {"_target_": "repnet.data.base.split_indices", "n": 4,
                                "held_out": 2}),
        "may not be built from a file",
    ),
    "an augmentation for data": (
        spec("data", lambda m: {"_target_": "repnet.data.batch_augment.RandomHorizontalFlip"}),
        "does not describe a data set",
    ),
    "other images": (
        lambda file, marker: edit(file, lambda c: c["repnet"]["data"].update(
            input_shape=[3, 8, 8])),
        r"images of \[3, 8, 8\]",
    ),
    "no model": (spec("model", lambda m: None), "does not describe a network"),
    "other weights": (
        lambda file, marker: edit(file, lambda c: c["state_dict"].pop("model.head.bias")),
        "head.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_run_nothing_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    damage, reason = HOSTILE[name]
    marker = tmp_path / "executed"
    damage(checkpoint, marker)
    with pytest.raises(InputError, match=reason):
        deploy(checkpoint, tmp_path / "out")
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["missing", "truncated", "torch pickle"])
def test_the_command_ends_with_2_on_bad_input(checkpoint: Path, tmp_path: Path, name: str) -> None:
    HOSTILE[name][0](checkpoint, tmp_path / "executed")
    result = run("deploy.py", f"ckpt={checkpoint}", cwd=tmp_path, code=2)
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (checkpoint.parent.parent / "deploy").exists()


def test_the_forms_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    deploy(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match="holds a deploy model"):
        deploy(tmp_path / "out", tmp_path / "again")
    with pytest.raises(InputError, match="belongs to a deploy model"):
        deploy(tmp_path / "out" / "model.safetensors", tmp_path / "again")
    refused = run("train.py", f"resume={tmp_path / 'out'}", cwd=tmp_path, code=2)
    assert "holds a deploy model, which is not trained" in refused.stderr
    with pytest.raises(InputError, match="deploy it first"):
        repnet.load_deployed(checkpoint.parent.parent)


def test_the_data_may_have_moved(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint, lambda c: c["repnet"]["config"].update(
        data={"_target_": "repnet.data.MNIST", "root": "gone", "download": True}))  # fmt: skip
    with pytest.raises(InputError, match=r"data\.root='gone'"):
        deploy(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match=r"data\.root='elsewhere'"):
        deploy(checkpoint, tmp_path / "out", Settings(data={"root": "elsewhere"}))


class Shifted(nn.Module):
    """Logits are the pixels; a shift is added and taken away, which rounds them in float32."""

    def __init__(self, shift: float, bias: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.bias = nn.Parameter(torch.tensor([bias, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) + self.shift) - self.shift + self.bias


IMAGES = torch.tensor([[1.0, 5.0], [1.003, 1.0035]])[:, :, None, None]
LABELS = torch.tensor([1, 1])


def test_a_sample_within_rounding_error_is_a_tie() -> None:
    forms = Shifted(0.0), Shifted(65536.0)  # the step of float32 there is 1 / 128
    result = evaluate(*forms, [(IMAGES, LABELS)], torch.device("cpu"))
    assert [(sample.index, sample.is_tie) for sample in result.changed] == [(1, True)]
    assert result.agreement == 0.5
    assert result.metrics["train_form"]["top1"] == 1
    assert result.metrics["deploy_form"]["top1"] == 0.5


def test_a_wrong_bias_is_not_a_tie() -> None:
    forms = Shifted(0.0), Shifted(0.0, bias=0.001)
    result = evaluate(*forms, [(IMAGES, LABELS)], torch.device("cpu"))
    assert [(sample.index, sample.is_tie) for sample in result.changed] == [(1, False)]


def test_not_a_number_is_never_agreement() -> None:
    forms = Shifted(0.0), Shifted(0.0)
    result = evaluate(*forms, [(IMAGES * float("nan"), LABELS)], torch.device("cpu"))
    assert not result.finite
