"""`python train.py`, `repnet-train`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from repnet.cli import command, evaluate, explain, sweep, trials
from repnet.cli.saved_config import read_config
from repnet.cli.scores import add_scores, percent
from repnet.config import packages_to_trust
from repnet.errors import InputError
from repnet.files import write_json
from repnet.processes import is_main_process
from repnet.records import RESULT, read_result

_ABSENT = object()


def main() -> None:
    """Train from a config, resume a run, evaluate a model, or sweep over configs (`-m`)."""
    if any(argument.lstrip("+").startswith("eval=") for argument in sys.argv[1:]):
        sys.argv[1:] = evaluate.prepare(sys.argv[1:])
    if "--explain" in sys.argv[1:]:
        return explain.main(sys.argv[1:])
    resumed: Path | None = None
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "resume" and value and value != "null":
            # The run continues in its own directory.
            resumed = Path(value.strip("'\"").replace("\\'", "'"))  # as Hydra reads it
            sys.argv.append(f"hydra.run.dir={command.quoted(resumed.resolve())}")
            break
    try:
        if resumed is not None and resumed.is_file():
            raise InputError(
                f"cannot resume: '{resumed}' is a file; pass the directory of the run, which "
                "continues from its last checkpoint"
            )
        sweep.require_plugins(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(command.BAD_INPUT)
    try:
        command.run("train", job, sweep.explain)
    finally:
        sweep.finish()  # one that broke off: a worker was killed, or Ctrl-C


def job(cfg: DictConfig) -> float | None:
    """Run one training, or one trial of a sweep; return its best validation accuracy."""
    directory = command.output_directory()
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN and not cfg.get("eval"):
        return _trial(cfg, directory, overrides)
    try:
        if cfg.get("eval"):
            evaluate.run(cfg, directory)
            return None
        result = _train(cfg, directory, overrides)
    except Exception:
        command.remove_if_empty(directory)
        raise
    except KeyboardInterrupt:
        if is_main_process() and (directory / "checkpoints" / "last.ckpt").exists():
            # A resumed run has been allowed what it names.
            named = {} if cfg.resume else _plain(cfg)
            trust = _trust(named, command.listed("trust", cfg.trust))
            resume = command.command_line("train", resume=directory, **trust)
            print(f"\nThe state was saved. Continue with:\n{resume}", flush=True)
        command.remove_if_empty(directory)
        raise
    return None if cfg.lr_find else result["val"]["best"]


def _trial(cfg: DictConfig, made: Path, overrides: list[str]) -> float | None:
    """Run one job of a sweep, unless it has been; a failure is written down.

    One that was cut off continues, one that had failed is tried again. None for a failure: Optuna
    counts it as such, and the next job starts.
    """
    sweep_directory = Path(HydraConfig.get().sweep.dir).absolute()
    main = is_main_process()
    with trials.claim(sweep_directory, made, overrides, main=main) as directory:
        if directory != made and main:
            command.remove_if_empty(made)
        result = trials.result_of(directory)
        if result and "error" not in result:
            if main:
                print(f"job {directory.name} is finished: {' '.join(overrides)}", flush=True)
            return result["val"]["best"]
        resume = any((directory / "checkpoints").glob("*.ckpt"))
        if main:
            if result and result.get("type") in ("NonFiniteLossError", "InputError"):
                resume = False  # it would come to the same end
            if not resume:
                trials.restart(directory)
            (directory / RESULT).unlink(missing_ok=True)
        try:
            _refuse_nested_processes(cfg)
            trust = packages_to_trust(_plain(cfg))
            again = [f"resume={command.quoted(directory)}", f"trust={command.quoted(trust)}"]
            with trials.as_single_run(directory, again if resume else overrides):
                result = _train(cfg, directory, overrides, trial_of=trust, resume=resume)
        except Exception as error:
            message = command.message_of(error) if command.exit_code(error) else repr(error)
            failure = {"error": message, "type": type(error).__name__, "overrides": overrides}
            if main:
                write_json(directory / RESULT, failure)
            print(f"job failed: {message}", file=sys.stderr, flush=True)
            if command.exit_code(error) is None or command.traceback_is_wanted():
                traceback.print_exc()
            return None
        return result["val"]["best"]


def _refuse_nested_processes(cfg: DictConfig) -> None:
    """Refuse to start processes of a trial in a process that the launcher has started."""
    launcher = HydraConfig.get().runtime.choices.get("hydra/launcher")
    strategy, devices = str(cfg.trainer.get("strategy", "auto")), cfg.trainer.get("devices", 1)
    several = strategy.startswith(("ddp", "fsdp")) and str(devices) != "1"
    if several and launcher not in ("basic", "submitit_slurm"):
        raise InputError(
            f"trainer.strategy={strategy} on several devices cannot be started by "
            f"hydra/launcher={launcher}; leave the launcher out, or use sweep=slurm with "
            f"hydra.launcher.tasks_per_node={devices}"
        )


def _train(
    cfg: DictConfig,
    directory: Path,
    overrides: list[str],
    *,
    resume: bool = False,
    trial_of: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, and write `result.json`.

    Args:
        cfg: composed by Hydra.
        directory: of the run.
        overrides: of the command.
        resume: a trial of a sweep, from its last checkpoint and with the config of the command.
        trial_of: the packages which that config names.
    """
    trust = command.listed("trust", cfg.trust)
    config: Any
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if cfg.resume:
            raise InputError("resume continues one run in its own directory; leave out -m")
        if cfg.lr_find:
            raise InputError("lr_find=true trains nothing that a sweep could compare; leave out -m")
    config = _saved_config(cfg, directory, overrides) if cfg.resume else _plain(cfg)
    from repnet.training.run import train  # torch is imported only when there is work to do

    allowed = [*trust, *trial_of]
    result = train(config, directory, resume=resume or bool(cfg.resume), trust=allowed)
    if found := result.get("lr_find"):
        if is_main_process():
            print(
                f"optimizer.lr={found['suggestion']:.2g} is where the loss falls fastest, a safe "
                f"choice; it is lowest at {found['lowest']:.2g}: see {directory / 'lr_find.png'}"
            )
        return result
    if is_main_process():
        if cfg.resume and (before := read_result(directory)):  # how the run was started stays known
            overrides = [*before.get("overrides", []), *overrides]
        write_json(directory / RESULT, {**result, "overrides": overrides})
        described = {
            "model": config["model"],
            "block": config.get("block"),
            "data": {**config["data"]},
        }
        described["data"].pop("augment", None)  # of training only
        _summarize(result, _trust(described, trust))
    return result


def _saved_config(cfg: DictConfig, directory: Path, overrides: list[str]) -> Any:
    """Return the config that a run was started with, changed by plain value overrides only."""
    path = directory / "config.yaml"
    if not path.exists():
        what = (
            "holds a deploy model, which is not trained"
            if (directory / "model.json").exists()
            else "is not a run: it has no config.yaml"
        )
        raise InputError(f"cannot resume: '{cfg.resume}' {what}")
    saved = read_config(path)
    groups = [name for name in HydraConfig.get().runtime.choices if "/" not in str(name)]
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") in ("resume", "trust"):
            continue
        if (
            key in groups
            or key.startswith(("+", "~"))
            or OmegaConf.select(saved, key, default=_ABSENT) is _ABSENT
        ):
            raise InputError(
                f"'{override}' cannot be combined with resume, which continues a run with its own "
                "config; values such as trainer.max_epochs=60 can be changed"
            )
        OmegaConf.update(saved, key, OmegaConf.create(f"value: {value}").value)
    return OmegaConf.to_container(saved, resolve=False)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return what a command composed as the config of a run."""
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return {key: value for key, value in config.items() if key not in ("resume", "trust", "eval")}


def _trust(config: dict[str, Any], trust: Sequence[str]) -> dict[str, list[str]]:
    """Return the `trust` that the next command needs to read `config` from a file."""
    packages = sorted({*trust, *packages_to_trust(config)})
    return {"trust": packages} if packages else {}


def _summarize(result: dict[str, Any], trust: dict[str, list[str]]) -> None:
    from rich.table import Table

    from repnet.terminal import print_table

    table = Table(title="Training finished", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    add_scores(table, result, "test ")
    table.add_row("best validation top-1", percent(result["val"]["top1"]))
    table.add_row("epochs", str(result["epochs"]))
    table.add_row("training speed", f"{result['images_per_second']:,.0f} images/s")
    table.add_row("wall time", f"{result['wall_seconds']:.1f} s")
    print_table(table)
    print("Next, fold it and confirm that its predictions are unchanged:")
    print(command.command_line("deploy", ckpt=result["best_checkpoint"], **trust), flush=True)
