"""`deploy`: load, fold, verify, evaluate every form, save; or refuse, and say why."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from repnet import __version__
from repnet.callbacks.recalibration import recalibrate_batch_norm
from repnet.checkpoint import choose_weights, find_checkpoint, model_from, read_checkpoint
from repnet.data import ImageDataModule, as_image_data
from repnet.deploy import findings
from repnet.deploy.artifact import DESCRIPTION, PAGE, REPORT, load_deployed, save_deployed
from repnet.deploy.device import hardware, usable_device
from repnet.deploy.evaluation import evaluate
from repnet.deploy.exporting import Export, Exporting
from repnet.deploy.gate import VerificationError, judge
from repnet.deploy.latency import FEWEST, Latency, measure_latency
from repnet.deploy.limits import limits
from repnet.deploy.native_output import native_output_hidden
from repnet.deploy.preprocess import preprocessed
from repnet.deploy.report import write_html
from repnet.deploy.settings import Int8, Settings
from repnet.deploy.staging import Stage, check_target, sweep_target
from repnet.deploy.structure import check_structure
from repnet.equivalence import FoldMismatchError
from repnet.errors import InputError
from repnet.files import sha256, write_json
from repnet.fold import reparameterize
from repnet.spec import DATA_PACKAGES, build
from repnet.text import printable

PROOF_SAMPLES = 4  # real images on which every block is compared in float64
LATENCY_SECONDS = 3.0  # that slow networks are timed for, about; at least FEWEST rounds

__all__ = ["Int8", "Settings", "VerificationError", "deploy"]


def deploy(
    checkpoint: str | Path, directory: str | Path, settings: Settings | None = None
) -> dict[str, Any]:
    """Fold a checkpoint's network, prove it equal, and write it with its report to `directory`.

    Every exported file is run in its own runtime over the whole split. One that a gate refuses
    refuses the deployment; one that cannot be made does not keep the others from being saved.

    Args:
        checkpoint: a `.ckpt` file, or a run directory.
        directory: receives `model.safetensors`, `model.json`, `report.json`, `report.html` and the
            exports, all at once at the end.
        settings: None for the defaults.

    Returns:
        The report, as in `report.json`.

    Raises:
        InputError: the checkpoint, the data or a setting is wrong; nothing was written.
        VerificationError: a form differs; only the report was written.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    directory = Path(directory)
    settings.check()
    sweep_target(directory)
    check_target(directory, settings.overwrite)
    path = find_checkpoint(checkpoint)
    contents = choose_weights(read_checkpoint(path), path, settings.weights)
    entry = contents["repnet"]
    device = _device(settings.device)
    train_form = model_from(contents, path, trust=settings.trust).eval()
    input_shape = tuple((entry.get("data") or {}).get("input_shape") or ())
    data = _data(entry, settings, path, input_shape)
    if settings.exports and settings.preprocess:
        preprocessed(nn.Identity(), data)  # refused now, and not after the evaluation
    report: dict[str, Any] = {
        "verified": False,
        "refusal": None,
        "exports": [],
        "provenance": _provenance(contents, path, device, data, settings),
        "seconds": {"load": time.perf_counter() - started},
    }
    train_form.to(device)
    _recalibrate(train_form, data, settings.recalibrate, device)
    _check_numbers(train_form, path)
    with Stage(directory, overwrite=settings.overwrite) as stage:
        try:
            deploy_form = _verify(
                train_form, data, entry["config"]["model"], stage.path, settings, report
            )
            report["verified"] = True
        except (FoldMismatchError, VerificationError) as error:
            report["refusal"] = str(error)
            if isinstance(error, FoldMismatchError) and error.equivalence is not None:
                report |= findings.of_proof(error.equivalence)
            stage.keep(())
            for export in report["exports"]:
                export |= {"files": [], "bytes": None, "sha256": None}
            if (directory / DESCRIPTION).exists():  # the verified model stays
                stage.directory = stage.directory.with_name(f"{stage.directory.name}.refused")
        else:
            exports = [export for export in report["exports"] if export["verified"]]
            stage.keep([file for export in exports for file in export["files"]])
        report["limits"] = limits(report, settings)
        report["wall_seconds"] = time.perf_counter() - started
        write_json(stage.path / REPORT, report)
        write_html(report, stage.path / PAGE)
        if report["verified"]:
            save_deployed(
                deploy_form,
                stage.path,
                architecture=entry["config"]["model"],
                data=data.describe(),  # by which it was evaluated, not the checkpoint's
                provenance=report["provenance"],
                equivalence={
                    key: report[key]
                    for key in ("samples", "agreement", "max_relative_error", "metrics")
                },
                exports=exports,
                reports=[REPORT, PAGE],
            )
    if report["refusal"]:
        raise VerificationError(
            f"not deployed: {report['refusal']}. No model was saved; see {stage.directory / PAGE}"
        )
    if stage.directory.resolve() != directory.resolve():
        raise InputError(
            f"'{directory}' was filled by something else meanwhile; the verified model is in "
            f"'{stage.directory}'"
        )
    return report


def _verify(
    train_form: nn.Module,
    data: ImageDataModule,
    architecture: dict[str, Any],
    directory: Path,
    settings: Settings,
    report: dict[str, Any],
) -> nn.Module:
    """Return the deploy form, on the device of `train_form`; fill in the report on the way.

    Raises:
        FoldMismatchError: a block differs in float64.
        VerificationError: a form or an exported file does not hold to its gate.
    """
    device = next(train_form.parameters()).device
    seconds = report["seconds"]
    loader = data.evaluation_dataloader(settings.split_index)
    first = next(iter(loader), None)
    if first is None:
        raise InputError(f"the {settings.split} split is empty")
    example = first[0][:PROOF_SAMPLES].to(device)
    with _timed(seconds, "fold"):
        # A graph has no description that `model.json` could hold.
        folded, folds = reparameterize(train_form, example, method="modules", return_report=True)
        for name, reason in folds.put_back.items():
            raise FoldMismatchError(
                f"block '{name}' differs from its original: {reason}", name, folds.failed
            )
    report |= findings.of_fold(folds)
    check_structure(train_form, folded, allow_norms=settings.allow_norms)
    deploy_form = _reloaded(folded, architecture, settings.trust).to(device)
    # TF32 would hide what the gates look for.
    with _timed(seconds, "evaluate"), cudnn.flags(enabled=True, allow_tf32=False):
        evaluation = evaluate(
            train_form, deploy_form, _progress(loader, "evaluating both forms"), device
        )
    report |= findings.of_evaluation(evaluation, data)
    report["unreadable"] = _unreadable(data, settings, evaluation.samples)
    judge(evaluation, settings.tolerance)
    exports: list[Export] = []
    if settings.exports:
        exporting = Exporting(
            deepcopy(deploy_form).cpu(), data, evaluation, settings, directory, _progress
        )
        with _timed(seconds, "exports"), native_output_hidden():
            exports = exporting.run()
        if exporting.int8 is not None:
            report["int8"] = exporting.int8
    with _timed(seconds, "latency"), native_output_hidden():
        batch = torch.zeros(settings.latency_batch, *data.input_shape, device=device) + example[:1]
        forms = {"train_form": train_form, "deploy_form": deploy_form}
        latency, runs = _latency(forms, exports, batch, settings)
    report["latency_ms"] = {name: latency[name].median for name in latency}
    on_gpu = {
        "train_form",
        "deploy_form",
        *(e.name for e in exports if e.format.name == "tensorrt"),
    }
    report["latency"] = {
        "batch": settings.latency_batch,
        "runs": runs,
        "device": report["provenance"]["device"],
        "devices": {
            name: hardware(device if name in on_gpu else torch.device("cpu")) for name in latency
        },
        "forms": {name: asdict(latency[name]) for name in latency},
    }
    top1 = evaluation.metrics["train_form"]["top1"]
    report["exports"] = [export.describe(top1, settings.preprocess) for export in exports]
    with _timed(seconds, "describe"):
        blocks = [fold.name for fold in folds.folded]
        report |= findings.of_network(train_form, deploy_form, data.input_shape, blocks)
    refused = [export for export in exports if export.status == "refused"]
    if refused:
        others = ", ".join(export.name for export in refused[1:])
        too = f" ({others} {'is' if len(refused) == 2 else 'are'} refused, too)" * bool(others)
        raise VerificationError(f"{refused[0].name}: {refused[0].reason}{too}")
    return deploy_form


def _unreadable(data: ImageDataModule, settings: Settings, samples: int) -> list[str]:
    """Return the images that `skip_corrupt` left out.

    Raises:
        InputError: other images were counted twice in their place.
    """
    names = data.corrupt_images(settings.split_index)
    assert data.splits is not None
    split: Any = data.splits[settings.split_index]
    if names and samples != len(split) - int(getattr(split, "corrupt", torch.zeros(0)).sum()):
        raise InputError(
            f"{len(names)} images of the {settings.split} split cannot be read, '{names[0]}' and "
            "others, among them all of one batch; replace or remove them, or raise data.batch_size"
        )
    return names


def _reloaded(folded: nn.Module, architecture: dict[str, Any], trust: Sequence[str]) -> nn.Module:
    """Return the folded network as `load_deployed` gives it back: what is evaluated is the file."""
    with tempfile.TemporaryDirectory() as directory:
        save_deployed(folded, directory, architecture=architecture)
        return load_deployed(directory, trust=trust)


def _latency(
    forms: dict[str, nn.Module], exports: Sequence[Export], batch: Tensor, settings: Settings
) -> tuple[dict[str, Latency], int]:
    """Return the latencies of both forms and all verified exports by name, and the runs of each."""
    subjects: dict[str, Callable[[Tensor], Any]] = dict(forms)
    images = batch.cpu()
    if settings.preprocess:
        images = images.mul(64).add(128).clamp(0, 255).to(torch.uint8)
    verified = [export for export in exports if export.status == "verified"]
    for export in verified:
        assert export.runner is not None
        subjects[export.name] = partial(_call, export.runner, images)
    measure_latency(subjects, batch, runs=1, warmup=1)
    once = measure_latency(subjects, batch, runs=1, warmup=0)
    round_trip = sum(latency.median for latency in once.values()) / 1e3
    runs = min(settings.latency_runs, max(FEWEST, int(LATENCY_SECONDS / round_trip)))
    warmup = min(10, runs // 2)
    times = measure_latency(subjects, batch, runs=runs, warmup=warmup, watched=list(forms))
    for export in verified:
        export.latency = times[export.name]
    return times, runs


def _call(runner: Callable[[Tensor], Tensor], images: Tensor, batch: Tensor) -> Tensor:
    return runner(images)


def _recalibrate(
    model: nn.Module, data: ImageDataModule, batches: int, device: torch.device
) -> None:
    """Compute the statistics of the norms anew, on training images without augmentation."""
    if not batches:
        return
    loader, _ = data.sample(batches * data.batch_size)
    images = (images.to(device) for images, _ in _progress(loader, "statistics of batch norms"))
    recalibrate_batch_norm(model, images)


def _check_numbers(model: nn.Module, path: Path) -> None:
    """Refuse weights and statistics that are no numbers, and variances below zero."""
    statistics = {n: b for n, b in model.named_buffers() if ".running_" in f".{n}"}
    for name, value in {**dict(model.named_parameters()), **statistics}.items():
        remedy = "deploy another checkpoint" + (", or pass recalibrate=N" * (name in statistics))
        if not value.isfinite().all():
            raise InputError(f"{path}: '{name}' holds NaN or infinity; {remedy}")
        if name.endswith("running_var") and (value < 0).any():
            raise InputError(f"{path}: '{name}' is negative; {remedy}")


def _data(
    entry: dict[str, Any], settings: Settings, path: Path, shape: Sequence[int]
) -> ImageDataModule:
    """Return the data module of the run; only repnet's own data sets are built from a file."""
    saved = entry["config"].get("data")
    spec = dict(saved) if isinstance(saved, dict) else {}
    for unneeded in ("augment", "cache", "download"):  # no archive is fetched on a file's word
        spec.pop(unneeded, None)
    spec |= {key: value for key, value in settings.data.items() if value is not None}
    try:
        data = as_image_data(build(spec, allowed=(*DATA_PACKAGES, *settings.trust)))
    except Exception as error:  # the arguments came out of the file too, and may be anything
        raise InputError(f"{path}: {error}") from error
    data.setup()
    if list(data.input_shape) != list(shape):
        raise InputError(
            f"{path}: the network was trained on images of {list(shape)}, the data "
            f"set has {list(data.input_shape)}"
        )
    names = (entry.get("data") or {}).get("class_names")
    if names and list(names) != list(data.class_names):
        raise InputError(
            f"{path}: the network was trained on {len(names)} classes ({_some(names)}), the data "
            f"set has {len(data.class_names)} others, or in another order "
            f"({_some(data.class_names)})"
        )
    try:
        data.val_dataloader()
    except (ValueError, TypeError) as error:
        raise InputError(f"the data cannot be loaded: {error}") from error
    return data


def _some(names: Sequence[Any]) -> str:
    return ", ".join(printable(str(name)) for name in names[:3]) + (
        ", ..." if len(names) > 3 else ""
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(name)


def _provenance(
    contents: dict[str, Any], path: Path, device: torch.device, data: Any, settings: Settings
) -> dict[str, Any]:
    return {
        "checkpoint": str(path.resolve()),
        "checkpoint_sha256": sha256(path),
        "weights": settings.weights or (contents.get("ema") or {}).get("saved", "raw"),
        "recalibrated_batches": settings.recalibrate,
        "epoch": contents.get("epoch"),
        "step": contents.get("global_step"),
        "model": contents["repnet"]["config"]["model"],
        "data": type(data).__name__,
        "split": settings.split,
        "device": hardware(device),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "repnet": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - start


def _progress(loader: Iterable[Any], description: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    # Standard output keeps the result; the bar needs a terminal.
    console = Console(stderr=True)
    return track(
        loader, description, console=console, transient=True, disable=not console.is_terminal
    )
