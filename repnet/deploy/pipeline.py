"""`deploy`: load, fold, verify, evaluate both forms, save; or refuse, and say why."""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repnet import __version__
from repnet.checkpoint import choose_weights, find_checkpoint, model_from, read_checkpoint
from repnet.complexity import count_macs, count_parameters
from repnet.data import ImageDataModule
from repnet.deploy.artifact import save_deployed
from repnet.deploy.evaluation import Evaluation, evaluate
from repnet.deploy.latency import measure_latency
from repnet.deploy.report import write_html
from repnet.equivalence import TOLERANCES, Equivalence, FoldMismatchError
from repnet.errors import InputError
from repnet.files import sha256, write_json
from repnet.folding import reparameterize
from repnet.proof import FoldReport
from repnet.spec import DATA_PACKAGES, build

PROOF_SAMPLES = 8  # real images on which every block is compared in float64


class VerificationError(RuntimeError):
    """The deploy form is not equal to the train form; nothing but the report was saved."""


@dataclass(frozen=True)
class Settings:
    """How to deploy.

    Args:
        trust: packages that may be imported to build the network.
        split: `test` or `val`.
        device: torch device; `auto` for a GPU where there is one.
        data: values of the checkpoint's data config to change, for instance `root`.
        tolerance: largest difference of the two forms' logits in the stored dtype, relative to the
            largest logit.
        latency_runs: timed forward passes of each form.
        latency_batch: images of each.
        overwrite: replace what the directory holds.
        weights: "ema" or "raw" of a checkpoint that holds both; None for those that it validated.
    """

    trust: Sequence[str] = ()
    split: str = "test"
    device: str = "auto"
    data: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-3
    latency_runs: int = 50
    latency_batch: int = 1
    overwrite: bool = False
    weights: str | None = None


def deploy(
    checkpoint: str | Path, directory: str | Path, settings: Settings | None = None
) -> dict[str, Any]:
    """Fold a checkpoint's network, prove it equal, and write it with its report to `directory`.

    Args:
        checkpoint: a `.ckpt` file, or a run directory.
        directory: receives `model.safetensors`, `model.json`, `report.json` and `report.html`, all
            at once at the end.
        settings: None for the defaults.

    Returns:
        The report, as in `report.json`.

    Raises:
        InputError: the checkpoint, the data or a setting is wrong; nothing was written.
        VerificationError: the two forms differ; only the report was written.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    directory = Path(directory)
    _check_settings(settings)
    _check_target(directory, settings.overwrite)
    path = find_checkpoint(checkpoint)
    contents = choose_weights(read_checkpoint(path), path, settings.weights)
    entry = contents["repnet"]
    device = _device(settings.device)
    train_form = model_from(contents, path, trust=settings.trust).eval()
    input_shape = tuple((entry.get("data") or {}).get("input_shape") or ())
    data = _data(entry["config"], settings, path, input_shape)
    try:
        loader = data.val_dataloader() if settings.split == "val" else data.test_dataloader()
    except (ValueError, TypeError) as error:
        raise InputError(f"the data cannot be loaded: {error}") from error
    report: dict[str, Any] = {
        "verified": False,
        "refusal": None,
        "exports": [],
        "provenance": _provenance(contents, path, device, data, settings),
    }
    artifact = None
    try:
        artifact = _verify(train_form.to(device), loader, input_shape, settings, report)
        report["verified"] = True
    except (FoldMismatchError, VerificationError) as error:
        report["refusal"] = str(error)
        if isinstance(error, FoldMismatchError) and error.equivalence is not None:
            _report_proof(report, error.equivalence)
    if report["refusal"] and (directory / "model.json").exists():
        directory = directory.with_name(f"{directory.name}.refused")  # the verified model stays
    with _staged(directory) as stage:
        if artifact is not None:
            save_deployed(
                artifact,
                stage,
                architecture=entry["config"]["model"],
                data=entry["data"],
                provenance=report["provenance"],
                equivalence={
                    key: report[key]
                    for key in ("samples", "agreement", "max_relative_error", "metrics")
                },
            )
        report["wall_seconds"] = time.perf_counter() - started
        write_json(stage / "report.json", report)
        write_html(report, stage / "report.html")
    if report["refusal"]:
        raise VerificationError(
            f"not deployed: {report['refusal']}. No model was saved; see "
            f"{directory / 'report.html'}"
        )
    return report


def _verify(
    train_form: nn.Module,
    loader: Iterable[Any],
    input_shape: tuple[int, ...],
    settings: Settings,
    report: dict[str, Any],
) -> nn.Module:
    """Return the deploy form, on the device of `train_form`; fill in the report on the way.

    Raises:
        FoldMismatchError: a block differs in float64.
        VerificationError: predictions differ.
    """
    device = next(train_form.parameters()).device
    example = next(iter(loader))[0][:PROOF_SAMPLES].to(device)
    deploy_form, fold_report = reparameterize(train_form, example, return_report=True)
    _report_fold(report, fold_report)
    assert fold_report.proof is not None
    _report_proof(report, fold_report.proof)

    evaluation = evaluate(
        train_form, deploy_form, _progress(loader, "evaluating both forms"), device
    )
    _report_evaluation(report, evaluation)
    forms = {"train_form": train_form, "deploy_form": deploy_form}
    report["parameters"] = {name: count_parameters(form) for name, form in forms.items()}
    report["macs"] = {name: count_macs(form, input_shape) for name, form in forms.items()}
    batch = torch.zeros(settings.latency_batch, *input_shape, device=device) + example[:1]
    latency = measure_latency(forms, batch, runs=settings.latency_runs)
    report["latency_ms"] = {name: value["median"] for name, value in latency.items()}
    report["latency"] = {
        "batch": settings.latency_batch,
        "runs": settings.latency_runs,
        "device": report["provenance"]["device"],
        "forms": latency,
    }
    _judge(evaluation, settings)
    return deploy_form


def _judge(evaluation: Evaluation, settings: Settings) -> None:
    if evaluation.samples == 0:
        raise VerificationError("the evaluation split is empty")
    if not evaluation.finite:
        raise VerificationError("a form returns NaN or infinity on the evaluation split")
    changed = [sample for sample in evaluation.changed if not sample.is_tie]
    if changed:
        first = changed[0]
        raise VerificationError(
            f"{len(changed)} of {evaluation.samples:,} predictions changed; the first is sample "
            f"{first.index}, class {first.train_form} -> {first.deploy_form}, where the train form "
            f"prefers its class by {first.margin:.2e} and rounding explains {first.rounding:.2e}"
        )
    if not evaluation.relative_difference <= settings.tolerance:
        raise VerificationError(
            f"the logits differ by {evaluation.relative_difference:.1e} of the largest, allowed "
            f"deploy.tolerance={settings.tolerance:.0e}"
        )


def _report_fold(report: dict[str, Any], fold: FoldReport) -> None:
    report["fold"] = {
        "folded": [{"name": f.name, "replaced": list(f.replaced)} for f in fold.folded],
        "skipped": fold.skipped,
        "left": fold.left,
    }
    report["warnings"] = fold.health
    report["cast_error"] = None if fold.cast is None else fold.cast.max_relative_error


def _report_proof(report: dict[str, Any], proof: Equivalence) -> None:
    report["max_relative_error"] = proof.max_relative_error
    report["blocks"] = [asdict(block) for block in proof.blocks]
    block, output = TOLERANCES[torch.float64]
    report["tolerance"] = {"block": block, "output": output}


def _report_evaluation(report: dict[str, Any], evaluation: Evaluation) -> None:
    report["samples"] = evaluation.samples
    report["agreement"] = evaluation.agreement
    report["metrics"] = evaluation.metrics
    report["logit_difference"] = evaluation.relative_difference
    report["changed"] = [{**asdict(s), "tie": s.is_tie} for s in evaluation.changed]


def _data(
    config: dict[str, Any], settings: Settings, path: Path, shape: Sequence[int]
) -> ImageDataModule:
    """Return the data module of the run; only repnet's own data sets are built from a file."""
    spec = dict(config["data"]) if isinstance(config.get("data"), dict) else {}
    for unneeded in (
        "augment",
        "cache",
        "download",
    ):  # training only; nothing is fetched on a file's word
        spec.pop(unneeded, None)
    spec |= {key: value for key, value in settings.data.items() if value is not None}
    try:
        data = build(spec, allowed=(*DATA_PACKAGES, *settings.trust))
    except Exception as error:  # the arguments came out of the file too, and may be anything
        raise InputError(f"{path}: {error}") from error
    if not isinstance(data, ImageDataModule):
        raise InputError(f"{path}: its 'data' entry does not describe a data set")
    data.setup()
    if list(data.input_shape) != list(shape):
        raise InputError(
            f"{path}: the network was trained on images of {list(shape)}, the data "
            f"set has {list(data.input_shape)}"
        )
    return data


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device={name} cannot be used: {reason}; use device=cpu") from error
    return torch.device(name)


def _provenance(
    contents: dict[str, Any], path: Path, device: torch.device, data: Any, settings: Settings
) -> dict[str, Any]:
    return {
        "checkpoint": str(path.resolve()),
        "checkpoint_sha256": sha256(path),
        "weights": settings.weights or (contents.get("ema") or {}).get("saved", "raw"),
        "epoch": contents.get("epoch"),
        "step": contents.get("global_step"),
        "model": contents["repnet"]["config"]["model"],
        "data": type(data).__name__,
        "split": settings.split,
        "device": _hardware(device),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "repnet": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _hardware(device: torch.device) -> str:
    """Return what a latency was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def _check_settings(settings: Settings) -> None:
    if settings.split not in ("test", "val"):
        raise InputError(f"split='{settings.split}' is unknown; choose test or val")
    if min(settings.latency_runs, settings.latency_batch) < 1:
        raise InputError("latency.runs and latency.batch must be at least 1")
    if not settings.tolerance >= 0:
        raise InputError(f"deploy.tolerance={settings.tolerance} must be 0 or more")


def _check_target(directory: Path, overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"'{directory}' is a file; choose another hydra.run.dir")
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    reports = {"report.json", "report.html"}  # of an earlier refusal: nothing to lose
    if foreign := sorted(held - reports - {"model.safetensors", "model.json"}):
        raise InputError(
            f"'{directory}' holds '{foreign[0]}', which no deployment wrote and none may replace; "
            "choose another hydra.run.dir"
        )
    if held - reports and not overwrite:
        raise InputError(
            f"'{directory}' is not empty; replace it with deploy.overwrite=true, or choose another "
            "hydra.run.dir"
        )


class _staged:
    """A temporary directory beside `directory` that takes its place when all went well."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Path:
        parent = self.directory.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.stage = Path(tempfile.mkdtemp(prefix=f".{self.directory.name}.", dir=parent))
        except OSError as error:
            raise InputError(f"cannot write to '{parent}': {error}") from error
        self.stage.chmod(0o755)  # mkdtemp makes it private
        return self.stage

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.stage, ignore_errors=True)
            return
        old = None
        if self.directory.exists():
            old = self.stage.with_name(f"{self.stage.name}.old")
            self.directory.rename(old)
        self.stage.rename(self.directory)
        if old is not None:
            shutil.rmtree(old)


def _progress(loader: Iterable[Any], description: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    # Standard output keeps the result; the bar needs a terminal.
    return track(loader, description, console=Console(stderr=True), transient=True)
