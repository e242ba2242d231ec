"""`SweepSummary`: how a sweep is continued, and what it leaves behind: a table and a picture."""

from __future__ import annotations

import csv
import io
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from repnet.cli.trials import RECORD, identity, record_of, result_of
from repnet.errors import InputError
from repnet.files import write_text
from repnet.records import RESULT, read_metrics

SCORE = "val_top1"
_MEASURED = (SCORE, "test_top1", "images_per_second", "wall_seconds", "epochs")
_HIDDEN = ("status", "error", "directory")  # in the file, and below the table
_PLUGINS = {  # choice of sweep=, hydra/launcher= or hydra/sweeper=: the plugin and its extra
    "joblib": ("hydra_joblib_launcher", "sweeps"),
    "optuna": ("hydra_optuna_sweeper", "sweeps"),
    "slurm": ("hydra_submitit_launcher", "sweeps"),
    "slurm_local": ("hydra_submitit_launcher", "sweeps"),
    "submitit_slurm": ("hydra_submitit_launcher", "sweeps"),
    "submitit_local": ("hydra_submitit_launcher", "sweeps"),
    "ray": ("hydra_ray_launcher", "ray"),
}
_unfinished: list[Path] = []  # the sweep that this process runs


class SweepSummary(Callback):
    """At the end of a multirun write `sweep.csv` and `sweep.png`, and print a table, best first.

    The exit code is 1 if a job failed; its reason is in the table.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        directory.mkdir(parents=True, exist_ok=True)  # SQLite makes none
        _unfinished.append(directory)
        if config.hydra.sweeper.get("storage") and config.hydra.sweeper.get("study_name"):
            _continue_study(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir).absolute()
        _unfinished.clear()
        rows = summarize(directory)
        bad = sum(row["status"] in ("failed", "unfinished") for row in rows)
        if bad:
            print(f"error: {bad} of {len(rows)} jobs failed", file=sys.stderr, flush=True)
            print(f"To try them again:\n{continuation(directory)}", flush=True)
            raise SystemExit(1)


def finish() -> None:
    """Summarize the sweep that broke off in this process, and say how it is continued."""
    while _unfinished:
        directory = _unfinished.pop()
        if summarize(directory):
            print(f"The sweep is not finished. Continue with:\n{continuation(directory)}")
        elif directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def explain(error: Exception) -> str | None:
    """Return what is to be said of an error that a sweeper raises because every job failed."""
    # Optuna looks for the best trial; which words say that there is none depends on its storage.
    rows = collect(_unfinished[-1]) if _unfinished and isinstance(error, ValueError) else []
    if rows and all(row["error"] for row in rows):
        return f"{len(rows)} of {len(rows)} jobs failed"
    return None


def require_plugins(arguments: Sequence[str]) -> None:
    """Check that what the command chooses is installed.

    Raises:
        InputError: it is not; names the extra that brings it.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") not in ("sweep", "hydra/launcher", "hydra/sweeper"):
            continue
        for name in value.strip("[]").split(","):
            module, extra = _PLUGINS.get(name.strip(), ("", ""))
            if module and not _installed(module):
                raise InputError(f'{key}={name} needs an extra: pip install "repnet[{extra}]"')


def continuation(directory: Path) -> str:
    """Return the command that continues the sweep of this process in its directory."""
    rest = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
    script = Path(sys.argv[0]).name
    words = [script] if script.startswith("repnet-") else ["python", script]
    return shlex.join([*words, *rest, f"hydra.sweep.dir={directory}"])


def summarize(directory: Path) -> list[dict[str, Any]]:
    """Write `sweep.csv`, `sweep_seeds.csv` and `sweep.png`, print the tables, return the rows."""
    rows = collect(directory)
    if not rows:
        return rows
    columns = _columns(rows)
    _write(directory / "sweep.csv", columns, rows)
    varied = varied_keys(rows)
    _show(
        f"{len(rows)} jobs, best first", rows, ["job", *varied, SCORE, "test_top1", "wall_seconds"]
    )
    seeds = group_seeds(rows, varied)
    if seeds:
        _write(directory / "sweep_seeds.csv", _columns(seeds), seeds)
        _show("mean and standard deviation over seeds", seeds, _columns(seeds))
    for row in rows:
        if row["error"]:
            print(f"job {row['job']} {row['status']}: {row['error']}")
    if any(row.get(SCORE) is not None for row in rows):
        from repnet.cli.sweep_plot import draw_sweep  # matplotlib is imported at the end only

        draw_sweep(
            rows, [key for key in varied if key != "seed"] or varied, directory / "sweep.png"
        )
        print(f"picture: {directory / 'sweep.png'}")
    print(f"all columns: {directory / 'sweep.csv'}", flush=True)
    return rows


def collect(directory: Path) -> list[dict[str, Any]]:
    """Return one row per job that was started, best first, those without a score last."""
    rows = []
    jobs = {path.parent for name in (RECORD, RESULT) for path in directory.glob(f"*/{name}")}
    for path in sorted(jobs):
        result = result_of(path)
        record = result or record_of(path) or {"overrides": []}
        row: dict[str, Any] = {"job": path.name, "status": _status(path, result)}
        row |= dict(o.split("=", 1) for o in identity(record["overrides"]) if "=" in o)
        error = ""
        if result is None:
            error = f"was killed or cut off after {_epochs(path)} epochs"
        elif "error" in result:
            error = result["error"]
        else:
            row |= {
                SCORE: result["val"]["top1"],
                "test_top1": result["test"]["top1"],
                "images_per_second": round(result["images_per_second"], 1),
                "wall_seconds": round(result["wall_seconds"], 1),
                "epochs": result["epochs"],
            }
        rows.append({**row, "error": error, "directory": str(path)})
    return sorted(rows, key=lambda row: (bool(row["error"]), -(row.get(SCORE) or 0)))


def varied_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the overrides that are not the same in all rows."""
    fixed = {"job", *_HIDDEN, *_MEASURED}
    return [c for c in _columns(rows) if c not in fixed and len({r.get(c) for r in rows}) > 1]


def group_seeds(rows: Sequence[dict[str, Any]], varied: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per setting that was run with several seeds: means, standard deviations."""
    if "seed" not in varied:
        return []
    settings: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    keys = [key for key in varied if key != "seed"]
    for row in rows:
        if row.get(SCORE) is not None:
            settings.setdefault(tuple(row.get(key, "") for key in keys), []).append(row)
    groups = []
    for values, members in settings.items():
        group: dict[str, Any] = {**dict(zip(keys, values, strict=True)), "seeds": len(members)}
        for metric in (SCORE, "test_top1"):
            scores = [row[metric] for row in members]
            group[metric] = mean(scores)
            group[f"{metric}_std"] = stdev(scores) if len(scores) > 1 else None
        groups.append(group)
    return sorted(groups, key=lambda group: -group[SCORE])


def _continue_study(config: DictConfig) -> None:
    """Count what an Optuna study has done; draw what it had not finished once more."""
    import optuna

    sweeper = config.hydra.sweeper
    seeded = "seed" in sweeper.get("sampler", {})  # not every sampler draws
    with open_dict(config):
        if seeded and sweeper.sampler.seed is None:
            sweeper.sampler.seed = config.seed
    try:
        study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)
    except KeyError:
        return  # a new study
    states = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params)
    done = sum(trial.state == states.COMPLETE for trial in trials)
    with open_dict(config):
        sweeper.n_trials = max(0, sweeper.n_trials - done)
        if seeded:  # or it draws its first values again
            sweeper.sampler.seed += len(trials)
    print(f"continuing a study of {done} trials, {sweeper.n_trials} to go", flush=True)


def _installed(module: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{module}") is not None
    except ModuleNotFoundError:
        return False


def _status(path: Path, result: dict[str, Any] | None) -> str:
    if result is None:
        return "unfinished"
    if "error" in result:
        return "failed"
    return "pruned" if (path / "pruned.json").exists() else "done"


def _epochs(path: Path) -> int:
    try:
        return len(read_metrics(path))
    except InputError:  # damaged
        return 0


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def _show(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from repnet.terminal import print_table

    styles = {"failed": "red", "unfinished": "yellow", "pruned": "dim"}
    table = Table(title=title, title_justify="left")
    shown = [column for column in columns if not column.endswith("_std")]
    for column in shown:
        table.add_column(column, no_wrap=True, justify="right" if column in _MEASURED else "left")
    for row in rows:
        cells = [_cell(column, row) for column in shown]
        table.add_row(*cells, style=styles.get(row.get("status", "")))
    console = Console(markup=False)  # a list is no markup: callbacks=[ema]
    print_table(table, spare=("wall_seconds", "test_top1"), console=console)


def _cell(column: str, row: dict[str, Any]) -> str:
    value, status = row.get(column), row.get("status")
    if column == SCORE and status in ("failed", "unfinished"):
        return status
    if isinstance(value, float) and column.endswith("top1"):
        spread = row.get(f"{column}_std")
        pruned = " pruned" if column == SCORE and status == "pruned" else ""
        return f"{value:.2%}{'' if spread is None else f' ± {spread:.2%}'}{pruned}"
    text = "" if value is None else str(value)
    return f"{float(text):.4g}" if re.fullmatch(r"-?\d*\.\d{5,}(e-?\d+)?", text) else text
