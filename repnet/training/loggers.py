"""Lightning loggers from a config: one, or several by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from repnet.errors import InputError
from repnet.lightning import is_a
from repnet.spec import build

# Logger and the module that it needs; the extra of repnet has the name that the error gives.
_NEEDS = {
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
}
# What a resumed run's logger keeps of its config: plain words, no path and no address.
_KEPT = ("name", "version", "project", "group", "experiment_name", "run_name", "offline")


class TensorBoardLogger(pl.loggers.TensorBoardLogger):
    """Writes the training and the test into one event file; Lightning starts a file for each."""

    def save(self) -> None:
        self.experiment.flush()  # Lightning adds an hparams.yaml, which config.yaml makes needless

    def finalize(self, status: str) -> None:
        self.save()  # without closing the file


def build_loggers(config: Any) -> list[Any]:
    """Return the loggers that `config` describes.

    Args:
        config: a description with `_target_`, a dict of descriptions by name, or None.

    Raises:
        InputError: a library is not installed, or a logger does not take its arguments.
    """
    # MLflow 3.7 and later want to be told that a store in files is meant.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = []
    for spec in _descriptions(config):
        kind = str(spec["_target_"]).rpartition(".")[2]
        module, extra = _NEEDS.get(kind, ("", ""))
        if module and find_spec(module) is None:
            raise InputError(f'{kind} needs {module}: pip install "repnet[{extra}]"')
        loggers.append(build(spec))
    return loggers


def confined_loggers(config: Any, directory: Path) -> dict[str, Any]:
    """Return the loggers of a config that came out of a file, so that they write to `directory`.

    Addresses of servers are dropped: those of the environment (`MLFLOW_TRACKING_URI`,
    `WANDB_BASE_URL`) count. W&B and MLflow continue the run that they find in `directory`; the
    table of `CSVLogger`, which it would delete, stays, and `session_2` beside it goes on.
    """
    confined = {}
    for index, spec in enumerate(_descriptions(config)):
        kind = str(spec["_target_"]).rpartition(".")[2]
        # A name may not lead out of the directory.
        kept = {
            k: Path(v).name.replace("..", "") if isinstance(v, str) else v
            for k, v in spec.items()
            if k in _KEPT and isinstance(v, str | bool)
        }
        if kind in (*_NEEDS, "CSVLogger"):
            folder = directory / "mlflow" if kind == "MLFlowLogger" else directory
            kept = {"save_dir": str(folder), **kept, **_continued(kind, directory, kept)}
        confined[str(index)] = {"_target_": spec["_target_"], **kept}
    return confined


def log_hyperparameters(loggers: Sequence[Any], config: dict[str, Any]) -> None:
    """Send the config of a run to its loggers."""
    for logger in loggers:
        # A resumed run goes on in its MLflow run, which takes each parameter only once.
        taken = is_a(logger, "MLFlowLogger") and (
            logger.experiment.get_run(logger.run_id).data.params
        )
        if not taken:
            logger.log_hyperparams(config)


def close_loggers(loggers: Sequence[Any]) -> None:
    """Finish what would otherwise go on into the next run of this process."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.close()
    if any(type(logger).__name__ == "WandbLogger" for logger in loggers):
        import wandb

        wandb.finish()


def _descriptions(config: Any) -> list[dict[str, Any]]:
    if not config:
        return []
    return [config] if "_target_" in config else [spec for spec in config.values() if spec]


def _continued(kind: str, directory: Path, kept: dict[str, Any]) -> dict[str, str]:
    """Return the identity of the run that an earlier session has logged to, if there is one."""
    if kind == "WandbLogger":  # wandb/offline-run-DATE_TIME-ID, wandb/run-DATE_TIME-ID
        runs = sorted(directory.glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
        return {"id": runs[-1].name.rpartition("-")[2]} if runs else {}
    if kind == "MLFlowLogger":
        runs = sorted(directory.glob("mlflow/*/*/meta.yaml"), key=lambda p: p.stat().st_mtime)
        return {"run_id": runs[-1].parent.name} if runs else {}
    if kind == "CSVLogger" and isinstance(kept.get("version"), str):
        folder = directory / str(kept.get("name", "lightning_logs"))
        if (folder / kept["version"] / "metrics.csv").exists():
            versions = (f"session_{number}" for number in count(2))
            return {"version": next(v for v in versions if not (folder / v).exists())}
    return {}
