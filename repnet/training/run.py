"""`train`: from a config as plain data to a tested checkpoint in a directory."""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from repnet import __version__
from repnet.callbacks import (
    CheckpointEntry,
    CorruptImages,
    History,
    LastCheckpoint,
    Pictures,
    RandomState,
    SafeCheckpointIO,
    SaveOnInterrupt,
    SkipNonFiniteSteps,
    StepMetrics,
    StopOnNonFiniteLoss,
    ThroughputBar,
)
from repnet.checkpoint import (
    describe,
    find_valid_checkpoint,
    load_network,
    problem_of,
    read_checkpoint,
)
from repnet.complexity import count_parameters
from repnet.config import validated
from repnet.data import as_image_data
from repnet.errors import InputError
from repnet.files import sweep_leftovers
from repnet.processes import is_main_process
from repnet.records import read_metrics, read_result
from repnet.spec import build, unknown_name, within
from repnet.training.announcement import ParameterTable, RunConfig
from repnet.training.assembly import (
    build_classifier,
    build_model,
    build_trainer,
    images_per_step,
)
from repnet.training.classifier import Classifier
from repnet.training.find_lr import find_learning_rate
from repnet.training.freezing import refuse_frozen_noise
from repnet.training.loggers import build_loggers, close_loggers, confined_loggers
from repnet.training.pretrained import load_pretrained
from repnet.training.profiling import build_profiler

STATISTICS_BATCHES = 10  # that give the norms of a partially folded network their statistics


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
        resume: continue from the last valid checkpoint in `directory/checkpoints`, else from the
            beginning; `config` came out of a file then, and may name only what
            `repnet.config.allowed_in` and `trust` hold.
        trust: packages.

    Returns:
        Metrics, checkpoint, speed, time and versions: what `result.json` holds.

    Raises:
        InputError: something in the config or the data is wrong.
        NonFiniteLossError: the training diverged.
        CheckpointWriteError: the disk took no checkpoint; the one before it is whole.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGUSR1, after the state was saved.
    """
    _quiet()
    config = validated(config, trust=trust if resume else None)
    _refuse_impossible(config)
    with _only_one(directory):
        return _train(config, directory, resume=resume, trust=trust)


def _train(
    config: dict[str, Any], directory: Path, *, resume: bool, trust: Sequence[str]
) -> dict[str, Any]:
    started = time.perf_counter()
    checkpoints = directory / "checkpoints"
    last = checkpoints / "last.ckpt"
    main_process = is_main_process()
    if main_process:
        sweep_leftovers(directory)
    start: Path | None = None  # the checkpoint to continue from
    contents: dict[str, Any] = {}  # of it
    if resume and any(checkpoints.glob("*.ckpt")):
        start, problem = find_valid_checkpoint(checkpoints)
        if problem and main_process:
            print(f"continuing from '{start}': {problem}", flush=True)
        contents = read_checkpoint(start)
        _refuse_ineffective(config, contents)
    elif resume and main_process:
        print(f"'{directory}' holds no checkpoint yet: the run starts from its beginning")
    if not resume and main_process and checkpoints.exists():
        raise InputError(
            f"'{directory}' already holds a run; continue it with resume={directory}, or choose "
            "another hydra.run.dir"
        )
    if not resume:
        refuse_frozen_noise(config)
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    record = config  # what the run is known by
    if resume:
        config = _confined(config, directory)
    data = as_image_data(build(config["data"]))
    data.setup()
    data.train_dataloader()  # refuses batches that the data cannot fill, before anything is written
    config, model = build_model(config, data)
    record = {**record, "model": config["model"]}
    if config["pretrained"] and not start:
        head = config["pretrained_head"]
        batches = (images for images, _ in islice(data.train_dataloader(), STATISTICS_BATCHES))
        said = load_pretrained(model, config["pretrained"], batches, head=head, trust=trust)
        if main_process:
            print(said, flush=True)
    steps_before = contents.get("global_step", 0)
    if start:  # before anything is written: the checkpoint fits the config
        load_network(model, contents, start)
    contents.clear()
    previous_seconds = 0.0
    if resume:
        previous_seconds = _previous_seconds(directory)
        read_metrics(directory)  # refuses a damaged table, before anything is written
    trainer_options = {**config["trainer"], "_partial_": True}
    if _on_cpu(config):
        trainer_options.pop("sync_batchnorm", None)  # torch has it for GPUs only
    trainer_options["profiler"] = build_profiler(trainer_options.get("profiler"), directory)
    if config["lr_find"] and not resume:
        unscheduled = {**config, "scheduler": None}  # its epochs are not those of the test
        classifier = build_classifier(unscheduled, model, data, data.batch_size)
        make_trainer = build(trainer_options)
        found = find_learning_rate(make_trainer, classifier, data, path=directory / "lr_find.png")
        return {"lr_find": {"suggestion": found.suggestion, "lowest": found.lowest}}

    history = History(directory)
    save: dict[str, Any] = {
        "dirpath": checkpoints,
        "save_top_k": 1,
        "enable_version_counter": False,
    }
    keep = config["checkpoint"]
    best = _MovableCheckpoint(**save, filename="best", monitor=keep["monitor"], mode=keep["mode"])
    on_nan = {"stop": StopOnNonFiniteLoss, "skip": SkipNonFiniteSteps}
    nan_policy = on_nan[config["on_nan"]](path=directory / "nan_batch.pt")
    chosen_callbacks = _build_callbacks(config["callbacks"])
    loggers = build_loggers(config["logger"])
    callbacks: list[pl.Callback] = [
        CheckpointEntry(describe(record, data.describe())),
        ParameterTable(),
        RunConfig(record, directory),
        history,
        *([StepMetrics(), LearningRateMonitor("step")] if loggers else []),
        CorruptImages(),
        best,
        *chosen_callbacks.values(),
        nan_policy,  # after what changes gradients
        LastCheckpoint(
            last, every_n_steps=keep["every_n_steps"], every_minutes=keep["every_minutes"]
        ),
        RandomState(),
        SaveOnInterrupt(last),
    ]
    if resume:
        for callback in callbacks:
            if isinstance(callback, Pictures):
                callback.directory = None  # the run's own
    if config["pictures"]:
        callbacks.append(Pictures())
    if sys.stdout.isatty():
        callbacks.append(ThroughputBar())
    trainer = build_trainer(
        trainer_options,
        callbacks=callbacks,
        logger=loggers,
        plugins=[SafeCheckpointIO()],
        default_root_dir=directory,
        enable_progress_bar=sys.stdout.isatty(),
    )
    classifier = build_classifier(config, model, data, images_per_step(trainer, data))
    _check_monitors(keep["monitor"], chosen_callbacks, classifier)
    if main_process:
        _announce(config, data, model, trainer, directory)
    try:
        _uninterrupted(
            trainer,
            lambda: trainer.fit(
                classifier, data, ckpt_path=str(start) if start else None, weights_only=True
            ),
        )
        _tell_early_stop(trainer)
        chosen = best.best_model_path or str(last)
        tested = _uninterrupted(
            trainer,
            lambda: trainer.test(
                classifier, data, ckpt_path=chosen, weights_only=True, verbose=False
            ),
        )
    finally:
        close_loggers(loggers)
    score = best.best_model_score
    value = None if score is None else round(float(score), 6)
    return {
        "test": {"top1": None}  # nothing was tested
        if not tested
        else {key.removeprefix("test/"): round(value, 6) for key, value in tested[0].items()},
        "recall": dict(zip(data.class_names, classifier.recall_of_classes, strict=False)),
        "val": {
            "top1": value if keep["monitor"] == "val/top1" else None,
            "monitor": keep["monitor"],
            "best": value,
        },
        "best_checkpoint": chosen,
        "images_per_second": history.images_per_second,
        "wall_seconds": previous_seconds
        + (time.perf_counter() - started if trainer.global_step > steps_before else 0),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "skipped_steps": getattr(nan_policy, "skipped", 0),
        "seed": config["seed"],
        "parameters": count_parameters(model),
        "device": _device(trainer),
        "versions": versions(),
    }


def _confined(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a config that came out of a file so that it writes to `directory` only."""
    data = {k: v for k, v in config["data"].items() if k not in ("download", "cache")}
    logger = confined_loggers(config.get("logger"), directory)
    trainer = {k: v for k, v in config["trainer"].items() if k != "default_root_dir"}
    return {**config, "data": data, "logger": logger, "trainer": trainer}


def _refuse_ineffective(config: dict[str, Any], contents: dict[str, Any]) -> None:
    """Refuse changes of what a checkpoint has decided, and an end that lies behind it."""
    saved = contents["repnet"]["config"]
    for key in (
        "optimizer", "parameter_groups", "lr_scaling", "freeze", "seed", "pretrained", "lr_find"
    ):  # fmt: skip
        if config[key] != saved.get(key, config[key]):
            raise InputError(
                f"{key} cannot be changed in a resumed run, which goes on with what its checkpoint "
                "holds; start a new run with pretrained=CHECKPOINT"
            )
    progress = contents.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    epochs, end = (
        progress.get("current", {}).get("processed", 0),
        config["trainer"].get("max_epochs"),
    )
    if end is not None and 0 <= end < epochs:
        raise InputError(
            f"trainer.max_epochs={end} lies behind the run, which has trained {epochs} epochs; "
            f"choose {epochs} or more"
        )


def _build_callbacks(config: dict[str, Any]) -> dict[str, pl.Callback]:
    """Return the callbacks of a config by name.

    Raises:
        InputError: one is something else.
    """
    # A recipe may have settings of a callback that the run has not chosen.
    chosen = {name: spec for name, spec in config.items() if spec and "_target_" in spec}
    callbacks = {name: build(spec) for name, spec in chosen.items()}
    for name, callback in callbacks.items():
        if not isinstance(callback, pl.Callback):
            raise InputError(
                f"callbacks.{name}: {config[name]['_target_']} is not a callback of "
                "pytorch_lightning"
            )
    return callbacks


def _check_monitors(best: str, callbacks: dict[str, pl.Callback], classifier: Classifier) -> None:
    """Refuse a metric to watch that nobody logs, which Lightning would find after an epoch.

    What a callback of the user's own logs is not known, so that nothing is refused beside one.
    """
    known = ("repnet", "pytorch_lightning")
    if not all(within(type(callback).__module__, known) for callback in callbacks.values()):
        return
    logged = classifier.metric_names()
    for prefix in [getattr(callback, "metric_prefix", None) for callback in callbacks.values()]:
        logged += [f"{prefix}/{name}" for name in classifier.metric_names("val") if prefix]
    monitors = {"checkpoint.monitor": best} | {
        f"callbacks.{name}.monitor": getattr(callback, "monitor", None)
        for name, callback in callbacks.items()
    }
    for key, monitor in monitors.items():
        if monitor is not None and monitor not in logged:
            raise InputError(f"{key}: {unknown_name('metric', monitor, logged)}")


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold the directory of a run against other processes that would train in it."""
    if not is_main_process():
        yield
        return
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process trains in '{directory}'; wait for it to end, or choose another "
            "hydra.run.dir"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if made and not any(directory.iterdir()):
            directory.rmdir()


def _previous_seconds(directory: Path) -> float:
    """Return the wall time of a run that had finished before it is resumed, else 0."""
    return float((read_result(directory) or {}).get("wall_seconds") or 0)


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
        if state_dict.get("best_model_path") and (problem := problem_of(own)):
            if is_main_process():
                print(f"the best epoch is chosen among those that follow: {problem}", flush=True)
            return
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
    except MisconfigurationException as error:  # such as checkpoint.monitor=NOTHING
        raise InputError(str(error)) from error


def _on_cpu(config: dict[str, Any]) -> bool:
    accelerator = config["trainer"].get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def _refuse_impossible(config: dict[str, Any]) -> None:
    """Refuse what a CPU cannot do: half precision, many processes, slices that are recomputed."""
    if not _on_cpu(config):
        return
    devices, cores = config["trainer"].get("devices"), os.cpu_count() or 1
    if str(devices).isdecimal() and int(devices) > cores:
        raise InputError(
            f"trainer.devices={devices} starts as many processes on the CPU, which has {cores} "
            "cores; lower it, or choose trainer.accelerator=gpu"
        )
    precision = str(config["trainer"].get("precision", "32"))
    if precision.startswith("16"):
        raise InputError(
            f"trainer.precision={precision} needs a GPU; on the CPU use bf16-mixed or 32-true"
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
        f"{_device(trainer)}, precision {trainer.precision}\n"
        f"writing to {directory}",
        *(f"warning: {note}" for note in getattr(data, "notes", ())),
        sep="\n",
        flush=True,
    )


def _tell_early_stop(trainer: pl.Trainer) -> None:
    for callback in trainer.early_stopping_callbacks:
        if callback.stopped_epoch and trainer.is_global_zero:
            print(
                f"stopped after epoch {callback.stopped_epoch + 1}: {callback.monitor} did not "
                f"improve {callback.patience} times in a row",
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
