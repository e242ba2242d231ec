"""`python deploy.py`, `repnet-deploy`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repnet.cli import command
from repnet.errors import InputError


def main() -> None:
    """Deploy a checkpoint."""
    OmegaConf.register_new_resolver("repnet.deploy_directory", deploy_directory, replace=True)
    command.run("deploy", job)


def deploy_directory(checkpoint: str) -> str:
    """Return where a checkpoint is deployed to unless `hydra.run.dir` says otherwise.

    Args:
        checkpoint: a file in `RUN/checkpoints/`, which gives `RUN/deploy`, or a directory.

    Raises:
        InputError: there is no such file or directory; nothing has been made yet.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise InputError(
            f"there is no checkpoint '{checkpoint}'; pass a file such as "
            "RUN/checkpoints/best.ckpt, or the run's directory"
        )
    folder = path if path.is_dir() else path.parent
    return str((folder.parent if folder.name == "checkpoints" else folder) / "deploy")


def job(cfg: DictConfig) -> None:
    """Run one deployment."""
    directory = command.output_directory()
    for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, signal.default_int_handler)
    try:
        report, failed = _deploy(cfg, directory)
    finally:
        command.remove_if_empty(directory)
    _summarize(report, directory)
    if failed:
        raise failed


def _deploy(cfg: DictConfig, directory: Path) -> tuple[dict[str, Any], Exception | None]:
    from repnet.deploy.formats import ExportError  # torch only when there is work to do
    from repnet.deploy.pipeline import Int8, Settings, deploy

    exports = {
        str(name): command.listed(f"export.{name}.precisions", options.precisions)
        for name, options in cfg.export.items()
        if isinstance(options, DictConfig)
    }
    settings = Settings(
        trust=command.listed("trust", cfg.trust),
        split=cfg.split,
        device=cfg.device,
        data=OmegaConf.to_container(cfg.data, resolve=True),  # type: ignore[arg-type]
        tolerance=cfg.deploy.tolerance,
        latency_runs=cfg.latency.runs,
        latency_batch=cfg.latency.batch,
        overwrite=cfg.deploy.overwrite,
        weights=cfg.weights,
        recalibrate=cfg.recalibrate,
        allow_norms=cfg.deploy.allow_norms,
        exports=exports,
        preprocess=cfg.export.preprocess,
        export_tolerance=cfg.export.tolerance,
        export_max_drop=cfg.export.max_drop,
        export_min_agreement=cfg.export.min_agreement,
        int8=Int8(**OmegaConf.to_container(cfg.int8)),  # type: ignore[arg-type]
    )
    report = deploy(cfg.ckpt, directory, settings)
    reasons = [
        f"{export['format']} {export['precision']}: {export['reason']}"
        for export in report["exports"]
        if export["status"] == "failed"
    ]
    if not reasons:
        return report, None
    return report, ExportError(
        f"{len(reasons)} of {len(report['exports'])} exports failed, the others are saved: "
        f"{'; '.join(reasons)}"
    )


def _summarize(report: dict[str, Any], directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from repnet.deploy.report import claims
    from repnet.terminal import print_table

    console = Console()
    console.print("[bold green]Verified[/]")
    print(*claims.headline(report), sep="\n")
    if loosened := claims.loosened(report):
        console.print(f"[bold yellow]Loosened limits:[/] {', '.join(loosened)}", highlight=False)
    table = Table()
    table.add_column("")
    for column in ("train form", "deploy form", "ratio"):
        table.add_column(column, justify="right")
    rows = {
        "top-1": ({k: v["top1"] for k, v in report["metrics"].items()}, "{:.2%}"),
        "parameters": (report["parameters"], "{:,}"),
        "multiply-adds": (report["macs"], "{:,}"),
        "latency, ms": (report["latency_ms"], "{:.3f}"),
    }
    compared = report["latency"]["forms"]["deploy_form"]["speed_up"] is not None
    for name, (values, style) in rows.items():
        train, deployed = values["train_form"], values["deploy_form"]
        known = name != "top-1" and (compared or name != "latency, ms")
        ratio = f"{deployed / train:.2f}" if known else ""
        table.add_row(name, style.format(train), style.format(deployed), ratio)
    print_table(table, console=console)
    if left_out := report["unreadable"]:
        print(f"images that cannot be read, left out: {len(left_out):,} ('{left_out[0]}', ...)")
    print(
        f"largest error of {len(report['blocks'])} folded blocks in float64: "
        f"{claims.largest_error(report):.1e}"
    )
    if report["exports"]:
        print_table(_exports(report), console=console)
        for export in report["exports"]:
            if export["status"] != "verified":
                print(f"{export['file']} {export['status']}: {export['reason']}")
    for reason in claims.withheld(report):
        print(f"speeds are not compared: {reason}")
    if report["fold"]["left"]:
        print(f"batch norms left: {', '.join(report['fold']['left'])} (reasons in the report)")
    print(f"model and report: {directory}", flush=True)


def _exports(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Exports, run in their own runtimes over the same images")
    table.add_column("file", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for column in ("top-1", "changed", "ms", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    colors = {"verified": "green", "skipped": "yellow", "failed": "red"}
    for export in report["exports"]:
        ran = export["verified"]
        table.add_row(
            export["file"],
            f"[{colors[export['status']]}]{export['status']}[/]",
            f"{export['top1']:.2%}" if ran else "",
            f"{export['changed']:,}" if ran else "",
            f"{export['latency_ms']:.3f}" if ran else "",
            f"{export['bytes'] / 1e6:.1f}" if ran else "",
        )
    return table
