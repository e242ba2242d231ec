"""`repnet.hub`: model cards, and artefacts to and from a folder or (in place of it) the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

import repnet
from repnet.checkpoint import describe, save_checkpoint
from repnet.data import Digits
from repnet.deploy.pipeline import Settings, deploy
from repnet.errors import InputError
from repnet.files import sha256
from repnet.hub import from_hub, pull, push_to_hub, write_model_card
from repnet.hub.__main__ import main
from tests.artefacts import rewrite, write_artefact
from tests.commands import environment
from tests.models import randomize_batch_norm

hub = pytest.importorskip("huggingface_hub")

REPORT = {
    "verified": True,
    "refusal": None,
    "samples": 1234,
    "agreement": 1.0,
    "max_relative_error": 3e-16,
    "metrics": {"train_form": {"top1": 0.9125}, "deploy_form": {"top1": 0.9125}},
    "latency_ms": {"train_form": 4.5, "deploy_form": 2.5, "torch_export fp32": 1.25},
    "provenance": {
        "checkpoint": "/home/somebody/secret/best.ckpt",
        "checkpoint_sha256": "ab" * 32,
        "data": "FashionMNIST",
        "split": "test",
        "epoch": 7,
        "weights": "ema",
        "device": "A | B <processor>",
        "created": "2030-01-02T03:04:05+00:00",
        "versions": {"repnet": "0.1.0", "torch": "2.14.1"},
    },
    "exports": [
        {"format": "torch_export", "precision": "fp32", "file": "model.pt2", "verified": True,
         "bytes": 2_500_000, "top1": 0.911, "drop": 0.0015, "agreement": 0.998,
         "latency_ms": 1.25, "status": "verified", "reason": None},
        {"format": "onnx", "precision": "int8", "file": "model_int8.onnx", "verified": False,
         "bytes": None, "top1": 0.1, "drop": 0.8, "agreement": 0.2, "latency_ms": None,
         "status": "refused", "reason": "too low"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("hub") / "deploy"
    write_artefact(directory, formats=["torch_export"], report=REPORT)
    return directory


@pytest.fixture
def artefact(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "deploy")
    return tmp_path / "deploy"


def same_outputs(a: Path, b: torch.nn.Module) -> None:
    images = torch.randn(3, 3, 16, 16)
    assert_close(b(images), repnet.load_deployed(a)(images), rtol=1e-4, atol=1e-4)


def header(path: Path) -> tuple[dict[str, Any], str]:
    empty, head, body = path.read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def test_the_card_tells_what_was_measured(artefact: Path) -> None:
    path = write_model_card(artefact, repo_id="somebody/clothes", license="apache-2.0")
    head, body = header(path)
    assert path == artefact / "README.md"
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "repnet"
    assert "torch_export" in head["tags"]
    assert "onnx" not in head["tags"]
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert result["dataset"] == {
        "name": "FashionMNIST", "type": "fashion_mnist", "split": "test",
    }  # fmt: skip
    assert result["metrics"] == [{"type": "accuracy", "name": "top-1", "value": 0.9125}]
    assert "# RepVGG on FashionMNIST" in body
    rows = [[c.strip() for c in line.split(" | ")] for line in body.splitlines() if "|" in line]
    assert [
        "| torch_export fp32",
        "model.pt2",
        "91.10%",
        "0.15%",
        "99.80%",
        "1.25",
        "2.5 |",
    ] in rows
    assert ["| deploy form", "model.safetensors", "91.25%", "0.00%", "100.00%", "2.5", "|"] in rows
    assert "1,234 predictions of the test split" in body
    assert "from_hub('somebody/clothes', file='model.pt2', trust=['native'])" in body
    assert "int8" not in body
    for file, digest in json.loads((artefact / "model.json").read_text())["hashes"].items():
        assert f"| {file} | `{digest}` |" in body
    assert "secret" not in path.read_text()
    assert "A \\| B &lt;processor>" in body
    assert "license" not in header(write_model_card(artefact))[0]


def test_the_card_says_what_files_need_and_where_they_were_timed(artefact: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        other = report["exports"][0] | {"format": "onnx", "file": "model.onnx"}
        report["exports"] += [other | {"preprocess": True}]
        report["latency"] = {"batch": 8, "device": "GPU", "devices": {"a": "GPU", "b": "CPU"}}

    rewrite(artefact, "report.json", change)
    body = write_model_card(artefact).read_text()
    assert "file='model.pt2', trust=['native'])\n" in body
    assert "file='model.onnx')  # uint8 images\n" in body
    assert "Latency: 8 images, GPU; files on the CPU: CPU. Drop" in body


def test_the_card_gives_no_latency_that_cannot_be_compared(artefact: Path) -> None:
    report = json.loads((artefact / "report.json").read_text())
    forms = {"train_form": None, "deploy_form": None, "torch_export fp32": "too noisy"}
    report["latency"] = {"forms": {name: {"withheld": reason} for name, reason in forms.items()}}
    rewrite(artefact, "report.json", lambda r: r.update(report))
    body = write_model_card(artefact).read_text()
    assert "where it cannot be compared: torch.export fp32: too noisy." in body
    assert "| 2.5 |" in body
    assert "| 99.80% |  | 2.5 |" in body  # megabytes
    report["latency"]["forms"]["deploy_form"]["withheld"] = "too noisy"
    rewrite(artefact, "report.json", lambda r: r.update(report))
    body = write_model_card(artefact).read_text()
    assert "where it cannot be compared: too noisy." in body
    assert "| 4.5 |" not in body


def test_the_card_claims_what_the_report_does(artefact: Path) -> None:
    report = json.loads((artefact / "report.json").read_text())
    report["blocks"] = [{"name": "a", "relative_error": e} for e in (3e-16, 9.8e-16, 1e-16)]
    report["exports"][0]["changed"] = 7
    report["limits"] = [
        {"key": "int8.max_drop", "value": 0.05, "default": 0.01, "loosened": True},
        {"key": "deploy.tolerance", "value": 1e-3, "default": 1e-3, "loosened": False},
    ]
    rewrite(artefact, "report.json", lambda r: r.update(report))
    body = write_model_card(artefact).read_text()
    assert "Folded model: 1,234 of 1,234 unchanged. 1 file: 7 changed." in body
    assert "| largest error of a block, float64 | 9.8e-16 |" in body
    assert "| loosened limits | int8.max_drop=0.05 instead of 0.01 |" in body


def test_the_card_is_one_that_the_hub_reads(artefact: Path) -> None:
    card = hub.ModelCard.load(write_model_card(artefact))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9125)
    assert (result.dataset_name, result.dataset_split) == ("FashionMNIST", "test")
    assert result.task_type == "image-classification"
    assert card.data.library_name == "repnet"


def test_to_a_folder_and_back(artefact: Path, tmp_path: Path) -> None:
    (artefact / "notes.txt").write_text("private")
    before = sorted(artefact.iterdir())
    url = (tmp_path / "a folder").as_uri()
    assert push_to_hub(artefact, url) == str(tmp_path / "a folder")
    assert sorted(artefact.iterdir()) == before
    names = {"model.safetensors", "model.json", "model.pt2", "report.json", "report.html"}
    assert {p.name for p in (tmp_path / "a folder").iterdir()} == names | {"README.md"}
    same_outputs(artefact, from_hub(url))
    same_outputs(artefact, from_hub(tmp_path / "a folder", file="model.pt2", trust=["native"]))
    assert pull(url, tmp_path / "pulled") == tmp_path / "pulled"
    for name in names:
        assert (tmp_path / "pulled" / name).read_bytes() == (artefact / name).read_bytes()
    with pytest.raises(InputError, match="not an empty directory"):
        push_to_hub(artefact, url)
    with pytest.raises(InputError, match="not an empty directory"):
        pull(url, tmp_path / "pulled")


def test_a_card_of_the_owner_is_kept(artefact: Path, tmp_path: Path) -> None:
    (artefact / "README.md").write_text("mine")
    push_to_hub(artefact, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_card_of_another_artefact_is_not_pushed(artefact: Path, tmp_path: Path) -> None:
    card = write_model_card(artefact)
    push_to_hub(artefact, tmp_path / "right")
    digest = sha256(artefact / "model.safetensors")
    card.write_text(card.read_text().replace(digest, digest[::-1]))
    with pytest.raises(InputError, match=r"lists another hash of 'model\.safetensors'.*hub card"):
        push_to_hub(artefact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewritten(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda directory: rewrite(directory, name, change)


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (lambda d: flip(d / "model.safetensors"), r"deploy/model\.safetensors' was changed"),
    "export": (lambda d: flip(d / "model.pt2"), r"deploy/model\.pt2' was changed"),
    "a missing file": (lambda d: (d / "model.pt2").unlink(), "has no model.pt2"),
    "no report": (lambda d: (d / "report.json").unlink(), "has no report.json"),
    "refused": (rewritten("report.json", lambda r: r.update(verified=False)), "not verified"),
    "words": (rewritten("report.json", lambda r: r.update(verified="yes")), "not verified"),
    "another report": (lambda d: flip(d / "report.json"), r"report\.json' was changed"),
    "a script": (lambda d: (d / "report.html").write_text("<script>"), r"html' was changed"),
    "an unlisted report": (
        rewritten("model.json", lambda m: m["hashes"].pop("report.json")), "nobody verified it",
    ),
    "no accuracy": (rewritten("report.json", lambda r: r.pop("metrics")), "incomplete"),
    "an export that failed": (
        rewritten("report.json", lambda r: r["exports"][0].update(verified=False)),
        "does not say that 'model.pt2' is verified",
    ),
    "no export": (rewritten("report.json", lambda r: r.update(exports=[])), "'model.pt2'"),
    "a malformed export": (rewritten("report.json", lambda r: r.update(exports=[3])), "malformed"),
    "a file elsewhere": (
        rewritten("model.json", lambda m: m["hashes"].update({"../secret": "0"})), "outside",
    ),
    "no artefact": (lambda d: (d / "model.json").unlink(), "not a deploy model"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_not_verified_is_not_pushed(artefact: Path, tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(artefact)
    with pytest.raises(InputError, match=reason):
        push_to_hub(artefact, tmp_path / "out")
    if name != "no accuracy":  # which only the card needs
        (artefact / "README.md").write_text("mine")
        with pytest.raises(InputError, match=reason):
            push_to_hub(artefact, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deploy"]


def test_what_was_changed_on_the_way_is_not_pulled(artefact: Path, tmp_path: Path) -> None:
    push_to_hub(artefact, tmp_path / "hub")
    flip(tmp_path / "hub" / "model.pt2")
    with pytest.raises(InputError, match=r"hub/model\.pt2' was changed"):
        pull(tmp_path / "hub", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    with pytest.raises(InputError, match="was changed"):
        from_hub(tmp_path / "hub", file="model.pt2", trust=["native"])


class FakeApi:
    """The two calls of `HfApi`, kept in a folder."""

    root: Path
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, *, token: str | None) -> None:
        self.calls.append(("HfApi", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    api = type("Api", (FakeApi,), {"root": tmp_path / "server", "calls": []})

    def snapshot_download(repo_id: str, **options: Any) -> str:
        """Return links to files of other names, as the real one does."""
        api.calls.append(("snapshot_download", {"repo_id": repo_id, **options}))
        cache = Path(tempfile.mkdtemp(dir=tmp_path))
        (cache / "snapshot").mkdir()
        for index, path in enumerate((api.root / repo_id).iterdir()):
            shutil.copy(path, cache / f"blob{index}")
            (cache / "snapshot" / path.name).symlink_to(Path("..") / f"blob{index}")
        return str(cache / "snapshot")

    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return api


def test_to_the_hub_and_back(artefact: Path, tmp_path: Path, fake: type[FakeApi]) -> None:
    url = push_to_hub(
        artefact, "somebody/clothes", private=True, token="t", revision="dev", license="mit"
    )
    assert url == "https://hub/somebody/clothes/commit/1"
    assert [name for name, _ in fake.calls] == ["HfApi", "create_repo", "upload_folder"]
    calls = dict(fake.calls)
    assert calls["HfApi"] == {"token": "t"}
    assert calls["create_repo"] == {
        "repo_id": "somebody/clothes", "private": True, "exist_ok": True,
    }  # fmt: skip
    assert calls["upload_folder"]["revision"] == "dev"
    head, body = header(fake.root / "somebody/clothes" / "README.md")
    assert head["license"] == "mit"
    assert "from_hub('somebody/clothes')" in body
    model = from_hub("somebody/clothes", revision="dev", cache_dir=tmp_path, token="t")
    same_outputs(artefact, model)
    same_outputs(artefact, from_hub("somebody/clothes", file="model.pt2", trust=["native"]))
    assert fake.calls[-2] == (
        "snapshot_download",
        {"repo_id": "somebody/clothes", "revision": "dev", "cache_dir": tmp_path, "token": "t"},
    )
    pull("somebody/clothes", tmp_path / "pulled")
    assert not any(path.is_symlink() for path in (tmp_path / "pulled").iterdir())
    same_outputs(artefact, repnet.load_deployed(tmp_path / "pulled"))
    flip(artefact / "model.safetensors")
    before = len(fake.calls)
    with pytest.raises(InputError, match="was changed"):
        push_to_hub(artefact, "somebody/clothes")
    assert len(fake.calls) == before  # nothing was made on the Hub


@pytest.mark.parametrize("name", ["../secret", "inside/../../secret", "/TMP/secret"])
def test_a_file_outside_of_the_artefact_is_not_taken(
    artefact: Path, tmp_path: Path, fake: type[FakeApi], name: str
) -> None:
    name = name.replace("/TMP", str(tmp_path))
    (tmp_path / "secret").write_text("mine")
    shutil.copytree(artefact, fake.root / "somebody" / "shapes")
    lies = fake.root / "somebody" / "shapes"
    rewrite(lies, "model.json", lambda model: model["hashes"].update({name: "0" * 64}))
    for source in ("somebody/shapes", lies):  # the Hub, whose files are links, and a folder
        with pytest.raises(InputError, match=r"lists '.*secret', outside of the artefact"):
            pull(source, tmp_path / "pulled")
    with pytest.raises(InputError, match=r"outside of the artefact"):
        from_hub(lies)
    assert (tmp_path / "secret").read_text() == "mine"
    assert not (tmp_path / "pulled").exists()


def test_the_calls_are_those_of_the_real_package(artefact: Path, fake: type[FakeApi]) -> None:
    import inspect

    from huggingface_hub._snapshot_download import snapshot_download
    from huggingface_hub.hf_api import HfApi

    push_to_hub(artefact, "somebody/clothes")
    from_hub("somebody/clothes")
    real = {
        "HfApi": HfApi.__init__, "create_repo": HfApi.create_repo,
        "upload_folder": HfApi.upload_folder, "snapshot_download": snapshot_download,
    }  # fmt: skip
    assert {name for name, _ in fake.calls} == real.keys()
    for name, options in fake.calls:
        assert options.keys() <= inspect.signature(real[name]).parameters.keys()


def test_a_hub_that_cannot_be_reached_is_one_line(artefact: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "repnet.hub", "push", str(artefact), "somebody/clothes"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home")),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: cannot push to 'somebody/clothes': ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_download_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise hub.errors.LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"cannot pull 'somebody/clothes': no network$"):
        pull("somebody/clothes", tmp_path / "out")
    with pytest.raises(InputError, match="cannot pull"):
        from_hub("somebody/clothes")
    assert not (tmp_path / "out").exists()


def test_the_package_is_named_where_it_is_missing(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r'pip install "repnet\[hub\]"'):
        push_to_hub(artefact, "somebody/clothes")
    with pytest.raises(InputError, match=r'pip install "repnet\[hub\]"'):
        from_hub("somebody/clothes")


def test_the_commands(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["hub", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert command("card", artefact, "--license", "mit") == 0
    assert header(artefact / "README.md")[0]["license"] == "mit"
    assert command("card", artefact, "--license", "bsd") == 2
    assert capsys.readouterr().err.endswith("is there already; replace it with --overwrite\n")
    assert command("card", artefact, "--license", "mit", "--overwrite") == 0
    assert command("push", artefact, "./shelf", "--license", "bsd") == 2
    assert "write the license there" in capsys.readouterr().err
    assert command("push", artefact, "./shelf") == 0
    assert capsys.readouterr().out.splitlines() == ["shelf"]
    assert command("pull", "./shelf", "back", "--revision", "v1") == 2
    assert "'shelf' is a folder, which has no revisions such as 'v1'" in capsys.readouterr().err
    assert command("push", artefact, "file://shelf/there") == 2
    assert "names the host 'shelf'" in capsys.readouterr().err
    assert command("pull", "./shelf", "back") == 0
    repnet.load_deployed("back")
    assert command("pull", "./shelf", "back") == 2
    assert capsys.readouterr().err == "error: 'back' is not an empty directory; choose another\n"


def test_a_real_deployment_is_pushed(tmp_path: Path) -> None:
    """What the pipeline writes is what the card reads."""
    data = Digits()
    data.setup()
    model = randomize_batch_norm(repnet.create_model("repvgg_tiny", num_classes=10, in_channels=1))
    config = {"model": model.architecture, "data": {"_target_": "repnet.data.Digits"}}
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    contents = {"state_dict": state, "repnet": describe(config, data.describe())}
    save_checkpoint(contents, tmp_path / "private" / "best.ckpt")
    settings = Settings(latency_runs=1, exports={"torch_export": ["fp32"]})
    report = deploy(tmp_path / "private" / "best.ckpt", tmp_path / "deploy", settings)
    push_to_hub(tmp_path / "deploy", tmp_path / "hub")
    head, body = header(tmp_path / "hub" / "README.md")
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == report["metrics"]["deploy_form"]["top1"]
    assert "# RepVGG on Digits" in body
    assert "360 predictions of the test split" in body
    assert "| torch_export fp32 | model.pt2 |" in body
    assert "private" not in body
    from_hub(tmp_path / "hub", file="model.pt2", trust=["native"])
