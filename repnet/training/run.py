"""`train`: from a config as plain data to a tested checkpoint in a directory."""

from __future__ import annotations

import inspect
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from repnet import __version__
from repnet.callbacks import (
    CheckpointEntry,
    History,
    SafeCheckpointIO,
    SaveOnInterrupt,
    StopOnNonFiniteLoss,
)
from repnet.checkpoint import describe, load_network, read_checkpoint
from repnet.complexity import count_parameters
from repnet.errors import InputError
from repnet.files import write_text
from repnet.spec import MODEL_PACKAGES, build
from repnet.training.classifier import Classifier
from repnet.training.parameter_groups import repvgg_parameter_groups

# What the config of a run directory may name when a run is resumed from it.
RESUME_PACKAGES = (
    *MODEL_PACKAGES,
    "repnet.data",
    "repnet.training.mix",
    "repnet.training.objectives",
    "repnet.training.parameter_groups",
    "repnet.training.schedules",
    "repnet.callbacks.ema",
    "repnet.callbacks.frozen_norms",
    "repnet.callbacks.kernel_decay",
    "repnet.callbacks.norm_health",
    "repnet.callbacks.pictures",
    "repnet.callbacks.progressive",
    "repnet.callbacks.prune",
    "repnet.callbacks.recalibration",
    "repnet.callbacks.weight_decay",
    "torch.optim",
    "torch.nn.modules.loss",
    "torchvision.transforms.v2",
    "pytorch_lightning.trainer",
    "pytorch_lightning.loggers.csv_logs",
    "pytorch_lightning.loggers.tensorboard",
)


def train(
    config: dict[str, Any],
    directory: Path,
    *,
    resume: bool = False,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, and test the best checkpoint; `directory` receives all that is written.

    Args:
        config: the composed config, resolved, as plain data.
        directory: of the run; made if it is not there.
        resume: continue from `directory/checkpoints/last.ckpt`; `config` came out of a file then,
            and may name only what `RESUME_PACKAGES` and `trust` hold.
        trust: packages.

    Returns:
        Metrics, checkpoint, speed, time and versions: what `result.json` holds.

    Raises:
        InputError: something in the config or the data is wrong.
        NonFiniteLossError: the training diverged.
        KeyboardInterrupt: Ctrl-C, after the state was saved.
    """
    started = time.perf_counter()
    _quiet()
    allowed = (*RESUME_PACKAGES, *trust) if resume else None
    checkpoints = directory / "checkpoints"
    last = checkpoints / "last.ckpt"
    main_process = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if resume and not last.exists():
        raise InputError(f"there is nothing to resume: '{last}' does not exist")
    if not resume and main_process and checkpoints.exists():
        raise InputError(
            f"'{directory}' already holds a run; continue it with resume={directory}, or choose "
            "another hydra.run.dir"
        )
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    if resume:
        config = _confined(config, directory)
    data = build(config["data"], allowed=allowed)
    data.setup()
    config = {**config, "model": complete_model(config, data, allowed)}
    model = build(config["model"], allowed=allowed)
    previous_seconds = 0.0
    if resume:  # before anything is written: the checkpoint is whole, and fits the config
        load_network(model, read_checkpoint(last), last)
        previous_seconds = _previous_seconds(directory)
    trainer_options = {**config["trainer"], "_partial_": True}
    if _on_cpu(config):
        trainer_options.pop("sync_batchnorm", None)  # torch has it for GPUs only
    _refuse_crashing_layout(config)

    history = History(directory)
    save: dict[str, Any] = {
        "dirpath": checkpoints,
        "save_top_k": 1,
        "enable_version_counter": False,
    }
    best = _MovableCheckpoint(**save, filename="best", monitor="val/top1", mode="max")
    callbacks: list[pl.Callback] = [
        CheckpointEntry(describe(config, data.describe())),
        StopOnNonFiniteLoss(),
        history,
        best,
        _MovableCheckpoint(**save, filename="last"),
        SaveOnInterrupt(last),
        *(
            build(spec, allowed=allowed)
            for spec in (config.get("callbacks") or {}).values()
            if spec
        ),
    ]
    if sys.stdout.isatty():
        callbacks.append(RichProgressBar())
    logger = build(config["logger"], allowed=allowed) if config.get("logger") else False
    try:
        trainer: pl.Trainer = build(trainer_options, allowed=allowed)(
            callbacks=callbacks,
            logger=logger,
            plugins=[SafeCheckpointIO()],
            default_root_dir=directory,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).rstrip("!.")
        raise InputError(
            f"the trainer cannot be set up: {reason}. Without a GPU, use trainer=cpu"
        ) from error
    classifier = Classifier(
        model,
        data.num_classes,
        optimizer=build({**config["optimizer"], "_partial_": True}, allowed=allowed),
        scheduler=build({**config["scheduler"], "_partial_": True}, allowed=allowed)
        if config.get("scheduler")
        else None,
        objective=_objective(config, model, data, allowed),
        mix=build(
            _completed(config["mix"], {"num_classes": data.num_classes}, allowed), allowed=allowed
        )
        if config.get("mix")
        else None,
        parameter_groups=build({**config["parameter_groups"], "_partial_": True}, allowed=allowed)
        if config.get("parameter_groups")
        else repvgg_parameter_groups,
        channels_last=config["channels_last"],
    )
    if main_process:
        write_text(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        _announce(config, data, model, trainer, directory)
    _uninterrupted(
        trainer,
        lambda: trainer.fit(
            classifier, data, ckpt_path=str(last) if resume else None, weights_only=True
        ),
    )
    chosen = best.best_model_path or str(last)
    tested = _uninterrupted(
        trainer,
        lambda: trainer.test(classifier, data, ckpt_path=chosen, weights_only=True, verbose=False),
    )
    score = best.best_model_score
    return {
        # torchmetrics counts in float32
        "test": {key.removeprefix("test/"): round(value, 6) for key, value in tested[0].items()},
        "val": {"top1": None if score is None else round(float(score), 6)},
        "best_checkpoint": chosen,
        "images_per_second": history.images_per_second,
        "wall_seconds": previous_seconds + time.perf_counter() - started,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seed": config["seed"],
        "parameters": count_parameters(model),
        "device": _device(trainer),
        "versions": versions(),
    }


def complete_model(
    config: dict[str, Any], data: Any, allowed: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the model's description with what the data and the block group decide.

    `num_classes`, `in_channels` and `block` are added where the model's target takes them by name
    and the config is silent, or where the config says null.

    Args:
        config: with the entries `model` and `block`.
        data: an `ImageDataModule` after `setup`.
        allowed: packages that the target must be defined in; None for the user's own config.

    Raises:
        InputError: a block was chosen for a model that takes none, or the target is not allowed.
    """
    spec = dict(config["model"])
    known = {"num_classes": data.num_classes, "in_channels": data.input_shape[0]}
    if config.get("block"):
        if "block" not in _parameters_of(spec, allowed):
            raise InputError(f"{spec['_target_']} takes no block; remove the block=... override")
        known["block"] = config["block"]
        spec.pop("block", None)
    return _completed(spec, known, allowed)


def _completed(
    spec: dict[str, Any], known: dict[str, Any], allowed: Sequence[str] | None
) -> dict[str, Any]:
    """Return `spec` with those of the known arguments that its target takes and that it lacks."""
    accepted = _parameters_of(spec, allowed)
    missing = {k: v for k, v in known.items() if k in accepted or k in spec}
    return {**spec, **{k: v for k, v in missing.items() if spec.get(k) is None}}


def _parameters_of(spec: dict[str, Any], allowed: Sequence[str] | None) -> Collection[str]:
    target = build({**spec, "_partial_": True}, allowed=allowed).func
    return inspect.signature(target).parameters


def _objective(
    config: dict[str, Any], model: torch.nn.Module, data: Any, allowed: Sequence[str] | None
) -> Any:
    """Return what is minimized, with the loss, and the model and its sizes where it takes them."""
    spec = config.get("objective") or {"_target_": "repnet.training.Supervised"}
    known = {"num_classes": data.num_classes, "input_shape": list(data.input_shape)}
    make = build({**_completed(spec, known, allowed), "_partial_": True}, allowed=allowed)
    given = {"model": model} if "model" in _parameters_of(spec, allowed) else {}
    return make(loss=build(config["loss"], allowed=allowed), **given)


def _confined(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a config that came out of a file so that it writes to `directory` only."""
    data = {key: value for key, value in config["data"].items() if key != "download"}
    logger = config.get("logger")
    if logger:
        names = {key: Path(str(logger.get(key) or "")).name for key in ("name", "version")}
        logger = {"_target_": logger.get("_target_"), "save_dir": str(directory), **names}
    trainer = {k: v for k, v in config["trainer"].items() if k != "default_root_dir"}
    return {**config, "data": data, "logger": logger, "trainer": trainer}


def _previous_seconds(directory: Path) -> float:
    """Return the wall time of a run that had finished before it is resumed, else 0."""
    path = directory / "result.json"
    if not path.exists():
        return 0.0
    return float(json.loads(path.read_text(encoding="utf-8")).get("wall_seconds") or 0)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core")
    return {
        "python": platform.python_version(),
        "repnet": __version__,
        **{package: version(package) for package in packages},
    }


_PATHS = ("best_model_path", "kth_best_model_path")


class _MovableCheckpoint(ModelCheckpoint):
    """Takes scores from a checkpoint, but never a path: the files are those of this directory.

    So a run that was moved keeps its best score, and a crafted one cannot have files deleted.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        kept = {key: own if state_dict.get(key) else "" for key in _PATHS}
        scores = list(state_dict["best_k_models"].values())
        best = {own: scores[0]} if scores else {}
        moved = {**state_dict, **kept, "dirpath": self.dirpath, "best_k_models": best}
        super().load_state_dict({**moved, "last_model_path": ""})


def _uninterrupted(trainer: pl.Trainer, call: Any) -> Any:
    """Return `call()`; Lightning answers Ctrl-C with SystemExit, which becomes what it was."""
    try:
        return call()
    except SystemExit as error:
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise


def _on_cpu(config: dict[str, Any]) -> bool:
    accelerator = config["trainer"].get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def _refuse_crashing_layout(config: dict[str, Any]) -> None:
    """Refuse float32 channels_last training on CPU.

    torch 2.13 and 2.14 end in a segmentation fault in the backward pass of a 1x1 stride-2
    convolution of 3 or 4 channels, the stem of these networks (oneDNN).
    """
    precision = str(config["trainer"].get("precision", "32"))
    if config["channels_last"] and _on_cpu(config) and "bf16" not in precision:
        raise InputError(
            "channels_last=true in float32 on the CPU crashes torch in the stem's backward pass; "
            "use trainer.precision=bf16-mixed, or channels_last=false"
        )


def _announce(
    config: dict[str, Any], data: Any, model: torch.nn.Module, trainer: pl.Trainer, directory: Path
) -> None:
    block = (config["model"].get("block") or {}).get("_target_", "the model's own block")
    sizes = " / ".join(f"{len(split):,}" for split in data.splits)
    shape = "x".join(str(side) for side in data.input_shape)
    print(
        f"{type(model).__name__} of {block.rpartition('.')[2]}, "
        f"{count_parameters(model) / 1e6:.3f} M parameters\n"
        f"{type(data).__name__}: {sizes} images to train / validate / test, {shape}, "
        f"{data.num_classes} classes\n"
        f"{_device(trainer)}, precision {trainer.precision}, writing to {directory}",
        flush=True,
    )


def _device(trainer: pl.Trainer) -> str:
    if trainer.strategy.root_device.type == "cuda":
        return f"{trainer.world_size} x {torch.cuda.get_device_name(trainer.strategy.root_device)}"
    return f"{trainer.world_size} x {trainer.strategy.root_device.type}"


def _quiet() -> None:
    """Silence what Lightning says at every start and what our users cannot act upon."""
    for name in ("pytorch_lightning", "lightning_fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*Consider setting `persistent_workers=True`.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Starting from v1.9.0, `tensorboardX` has been removed.*",
    ):
        warnings.filterwarnings("ignore", message)
