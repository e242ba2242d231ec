"""`python train.py eval=PATH`: a checkpoint, run or deploy model on the test split of any data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from repnet.cli import command
from repnet.cli.scores import add_scores
from repnet.config import validated
from repnet.errors import InputError
from repnet.files import write_json
from repnet.processes import is_main_process
from repnet.spec import DATA_PACKAGES, build

if TYPE_CHECKING:
    from torch import nn


def prepare(arguments: list[str]) -> list[str]:
    """Return the command line of an evaluation as Hydra takes it.

    The first process writes to `outputs/eval` unless told otherwise. The others, whose clocks may
    show another second, make no directory. Values such as `data.root` may change the data set of
    the checkpoint, which Hydra does not know.
    """
    keys = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    prepared = []
    for argument in arguments:
        free = argument.startswith("eval=") or (
            argument.startswith("data.") and "data" not in keys and "experiment" not in keys
        )
        prepared.append(f"++{argument}" if free else argument)
    if "hydra.run.dir" not in keys:
        directory = "outputs/eval/${now:%Y-%m-%d_%H-%M-%S}" if is_main_process() else "."
        prepared.append(f"hydra.run.dir={directory}")
    return prepared


def run(cfg: DictConfig, directory: Path) -> dict[str, Any]:
    """Evaluate `cfg.eval`; write `eval.json`, pictures and `per_class.csv`, print a table."""
    from repnet.training import run as training  # torch only when there is work to do
    from repnet.training.evaluate import evaluate

    training._quiet()
    trust = command.listed("trust", cfg.trust)
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    for key in ("trainer", "logger"):
        config[key] = OmegaConf.to_container(cfg[key], resolve=True) if cfg.get(key) else None
    config = validated(config, parts=("trainer", "logger", "channels_last"))
    model, form, saved, described = _load(str(cfg.eval), trust)
    data = _data(cfg, saved, described, trust)
    warnings = _compare(described, data)
    main_process = is_main_process()
    if main_process:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        shape = "x".join(str(side) for side in data.input_shape)
        print(
            f"{cfg.eval} ({form} form) on\n{len(data.splits[2]):,} test images of "
            f"{type(data).__name__}, {shape}, {data.num_classes} classes",
            flush=True,
        )
    result = {
        "checkpoint": str(Path(str(cfg.eval)).absolute()),
        "form": form,
        "data": type(data).__name__,
        **evaluate(model, data, config, directory),
        "warnings": warnings,
        "versions": training.versions(),
    }
    if main_process:
        write_json(directory / "eval.json", result)
        _summarize(result, directory)
    return result


def _load(path: str, trust: list[str]) -> tuple[nn.Module, str, Any, dict[str, Any]]:
    """Return the network, its form, the config of its data if known, and what that data was."""
    from repnet.checkpoint import find_checkpoint, model_from, read_checkpoint
    from repnet.deploy.artifact import load_deployed
    from repnet.deploy.description import DESCRIPTION, read_description

    directory = Path(path).parent if Path(path).name == DESCRIPTION else Path(path)
    if (directory / DESCRIPTION).is_file():
        description = read_description(directory)
        source = (description.get("provenance") or {}).get("checkpoint")
        saved = None
        if isinstance(source, str) and Path(source).is_file():
            saved = read_checkpoint(source)["repnet"]["config"].get("data")
        model = load_deployed(directory, trust=trust)
        return model, "deploy", saved, description.get("data") or {}
    checkpoint = find_checkpoint(path)
    contents = read_checkpoint(checkpoint)
    entry = contents["repnet"]
    model = model_from(contents, checkpoint, trust=trust)
    return model, "train", entry["config"].get("data"), entry.get("data") or {}


def _data(cfg: DictConfig, saved: Any, described: dict[str, Any], trust: list[str]) -> Any:
    """Return the data set of the command line or else that of the checkpoint, set up.

    Images are normalized, and scaled where the config does not say, as in training.
    """
    from repnet.data import as_image_data

    overrides = [text.lstrip("+").partition("=")[0] for text in HydraConfig.get().overrides.task]
    own = {"data", "experiment"} & set(overrides)
    changed = {key.removeprefix("data.") for key in overrides if key.startswith("data.")}
    spec: Any
    if own:
        spec = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
        _as_in_training(spec, described, changed)
    elif isinstance(saved, dict):
        spec = {key: value for key, value in saved.items() if key != "download"}
        values: Any = OmegaConf.to_container(cfg.data, resolve=True)
        spec |= {key: values[key] for key in changed if key in values}
    else:
        raise InputError(
            f"'{cfg.eval}' does not say which data it was trained on; add data=NAME and, for most, "
            "data.root=DIR"
        )
    spec.pop("augment", None)  # training only
    try:
        data = as_image_data(build(spec, allowed=None if own else (*DATA_PACKAGES, *trust)))
    except InputError as error:
        hint = "" if own else "; add data=NAME to the command to choose another data set"
        raise InputError(f"the data of '{cfg.eval}': {error}{hint}") from error
    mean, std = described.get("mean"), described.get("std")
    if own and mean and std and len(mean) == len(data.mean):
        data.mean, data.std = list(mean), list(std)  # what the network was trained on
    data.setup()
    return data


def _as_in_training(spec: dict[str, Any], described: dict[str, Any], changed: set[str]) -> None:
    """Scale images as in training, where the data set can and the command does not say."""
    shape = described.get("input_shape")
    if shape and "image_size" in spec and "image_size" not in changed:
        spec["image_size"] = shape[-1]
        if described.get("resize") and "resize" in spec and "resize" not in changed:
            spec["resize"] = described["resize"]


def _compare(described: dict[str, Any], data: Any) -> list[str]:
    """Return warnings about what differs from the data of the training.

    Raises:
        InputError: the network cannot be evaluated on these data.
    """
    names, found = described.get("class_names") or [], list(data.class_names)
    if names and len(names) != len(found):
        raise InputError(
            f"the network tells {len(names)} classes apart, the data set has {len(found)}; choose "
            "data with the same classes"
        )
    shape, own = described.get("input_shape") or [], list(data.input_shape)
    if shape and shape[0] != own[0]:
        raise InputError(f"the network takes images of {shape[0]} channels, not {own[0]}")
    warnings = []
    if shape and list(shape) != own:
        warnings.append(f"trained on images of {shape}, evaluated on images of {own}")
    if names and sorted(names) == sorted(found) and list(names) != found:
        warnings.append(
            "the data set has the classes of the training in another order: its labels mean other "
            "classes, and the accuracy says nothing"
        )
    elif names and list(names) != found:
        pair = next((a, b) for a, b in zip(names, found, strict=True) if a != b)
        warnings.append(
            f"the classes have other names than in training, for instance '{pair[1]}' in place of "
            f"'{pair[0]}'"
        )
    return warnings


def _summarize(result: dict[str, Any], directory: Path) -> None:
    from rich.table import Table

    from repnet.terminal import print_table

    table = Table(title="Evaluation", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    add_scores(table, result)
    table.add_row("loss", f"{result['test']['loss']:.4f}")
    table.add_row("images", f"{result['samples']:,}")
    table.add_row("parameters", f"{result['parameters']:,}")
    print_table(table)
    print(f"eval.json, per_class.csv and pictures: {directory}", flush=True)
