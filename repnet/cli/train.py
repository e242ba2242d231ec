"""`python train.py`, `repnet-train`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from repnet.cli import command
from repnet.errors import InputError
from repnet.files import write_json
from repnet.spec import foreign_packages

# What a resumed run builds beside its network and data, from libraries that need no trust.
_TRAINING = ("loss", "optimizer", "scheduler", "trainer", "logger")
_ABSENT = object()
_LIBRARIES = ("repnet", "torch", "torchvision", "pytorch_lightning")


def main() -> None:
    """Train from a config, resume a run, or sweep over configs (`-m`)."""
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "resume" and value and value != "null":
            # The run continues in its own directory.
            path = value.strip("'\"").replace("\\'", "'")  # as Hydra reads it
            sys.argv.append(f"hydra.run.dir={command.quoted(Path(path).resolve())}")
            break
    command.run("train", job)


def job(cfg: DictConfig) -> float | None:
    """Run one training; in a sweep a failure is written down and the next job starts."""
    directory = command.output_directory()
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    overrides = list(HydraConfig.get().overrides.task)
    try:
        result = _train(cfg, directory, overrides)
    except Exception as error:
        if not sweeping:
            command.remove_if_empty(directory)
            raise
        message = command.message_of(error) if command.exit_code(error) else repr(error)
        failure = {"error": message, "overrides": overrides}
        write_json(directory / "result.json", failure)
        print(f"job failed: {message}", file=sys.stderr, flush=True)
        return None
    except KeyboardInterrupt:
        if (directory / "checkpoints" / "last.ckpt").exists():
            config = OmegaConf.to_container(cfg, resolve=True)
            resume = command.command_line("train", resume=directory, **_trust(config, _TRAINING))
            print(f"\nThe state was saved. Continue with:\n{resume}", flush=True)
        command.remove_if_empty(directory)
        raise
    return result["val"]["top1"]


def _train(cfg: DictConfig, directory: Path, overrides: list[str]) -> dict[str, Any]:
    trust = list(cfg.trust)
    config: Any
    if cfg.resume and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise InputError("resume continues one run in its own directory; leave out -m")
    if cfg.resume:
        config = _saved_config(cfg, directory, overrides)
    else:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        del config["resume"], config["trust"]
    from repnet.training.run import train  # torch is imported only when there is work to do

    result = train(config, directory, resume=bool(cfg.resume), trust=trust)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        path = directory / "result.json"
        if cfg.resume and path.exists():  # how the run was started stays known
            overrides = [*json.loads(path.read_text())["overrides"], *overrides]
        write_json(path, {**result, "overrides": overrides})
        _summarize(result, {**config, "trust": trust})
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
    saved = OmegaConf.load(path)
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


def _trust(config: Any, parts: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the `trust` that the next command needs: packages of the network, data and `parts`."""
    packages = {
        *config["trust"],
        *foreign_packages([config["model"], config.get("block")]),
        *foreign_packages({"_target_": config["data"]["_target_"]}, _LIBRARIES[:1]),
        *foreign_packages([config.get(part) for part in parts], _LIBRARIES),
    }
    return {"trust": sorted(packages)} if packages else {}


def _summarize(result: dict[str, Any], config: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Training finished", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    top1 = result["val"]["top1"]
    table.add_row("test top-1", f"[bold]{result['test']['top1']:.2%}[/bold]")
    table.add_row("test top-5", f"{result['test']['top5']:.2%}")
    table.add_row("best validation top-1", "-" if top1 is None else f"{top1:.2%}")
    table.add_row("epochs", str(result["epochs"]))
    table.add_row("training speed", f"{result['images_per_second']:,.0f} images/s")
    table.add_row("wall time", f"{result['wall_seconds']:.1f} s")
    Console().print(table)
    print("Next, fold it and confirm that its predictions are unchanged:")
    print(
        command.command_line("deploy", ckpt=result["best_checkpoint"], **_trust(config)), flush=True
    )
