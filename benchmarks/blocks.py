"""Blocks and training methods in one network on Fashion-MNIST, each trained, folded and verified.

    python benchmarks/blocks.py --root DIR --jobs 2 --markdown docs/blocks.md
    python benchmarks/blocks.py --root DIR --set trainer=gpu trainer.precision=bf16-mixed

Runs `train.py` and `deploy.py` as a user would. Runs that have finished are not run again, so that
the command continues where it was stopped. With several jobs each process gets its share of the
cores, and seconds are those of a machine that runs so many at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import Progress

PROJECT = Path(__file__).parent.parent
BLOCKS = ("plain", "repvgg", "ac", "dbb", "mobileone")
METHODS = {
    "as it is": [],
    "EMA": ["callbacks=[ema]", "callbacks.ema.decay=0.99"],
    "R-Drop": ["objective=rdrop", "model.dropout=0.1"],
    "kernel decay": ["callbacks=[kernel_decay]"],
}
# A narrow network and few steps: a run takes about a minute on one core.
SETTINGS = [
    "model=repvgg_tiny",
    "model.widths=[0.25,0.25,0.25,0.25]",
    "model.strides=[2,1,2,2,1]",
    "data=fashion_mnist",
    "trainer.max_epochs=2",
    "+trainer.limit_train_batches=50",
    "+trainer.limit_val_batches=10",
    "pictures=false",
]


def run(
    block: str, method: str, seed: int, arguments: argparse.Namespace, threads: int
) -> dict[str, Any]:
    """Train and deploy one setting; return its row, with `error` if a command failed."""
    directory = arguments.runs / f"{block}-{method.replace(' ', '_')}-{seed}"
    row: dict[str, Any] = {"block": block, "method": method, "seed": seed}
    train = [
        "train.py",
        *SETTINGS,
        f"data.root={arguments.root.resolve()}",
        f"block={block}",
        f"seed={seed}",
        *METHODS[method],
        *arguments.set,
        f"hydra.run.dir={directory}",
    ]
    deploy = ["deploy.py", f"ckpt={directory / 'checkpoints' / 'best.ckpt'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for command, result in ((train, "result.json"), (deploy, "deploy/report.json")):
        if (directory / result).exists():
            continue
        if command is train and (directory / "checkpoints" / "last.ckpt").exists():
            command = ["train.py", f"resume={directory}"]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return row | {"error": (done.stderr.strip() or done.stdout).splitlines()[-1]}
    trained = json.loads((directory / "result.json").read_text())
    report = json.loads((directory / "deploy" / "report.json").read_text())
    return row | {
        "top1": report["metrics"]["deploy_form"]["top1"],
        "samples": report["samples"],
        "unchanged": round(report["agreement"] * report["samples"]),
        "verified": report["verified"],
        "train_seconds": trained["wall_seconds"],
        "deploy_seconds": report["wall_seconds"],
        "images_per_second": trained["images_per_second"],
        "device": trained["device"],
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, one row for each block and method."""
    yield "| block | method | test top-1, mean ± sd | unchanged | training | images/s | deploy |"
    yield "|---|---|---|---|---|---|---|"
    for block in BLOCKS:
        for method in METHODS:
            found = [r for r in rows if (r["block"], r["method"]) == (block, method)]
            done = [r for r in found if "error" not in r]
            if not done:
                continue
            top1 = [100 * r["top1"] for r in done]
            spread = f" ± {stdev(top1):.2f}" if len(top1) > 1 else ""
            same = f"{sum(r['unchanged'] for r in done):,} of {sum(r['samples'] for r in done):,}"
            if not all(r["verified"] for r in done) or len(done) < len(found):
                same += ", **not all verified**"
            seconds = mean(r["train_seconds"] for r in done)
            rate = mean(r["images_per_second"] for r in done)
            deploy = mean(r["deploy_seconds"] for r in done)
            yield (
                f"| {block} | {method} | {mean(top1):.2f}{spread} % ({len(top1)}) | {same} | "
                f"{seconds:.0f} s | {rate:,.0f} | {deploy:.0f} s |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="holds Fashion-MNIST")
    parser.add_argument("--runs", type=Path, default=Path("outputs/blocks"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides of train.py")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    arguments.runs = arguments.runs.resolve()
    settings = [
        (block, method, seed)
        for seed in range(arguments.seeds)
        for method in arguments.methods
        for block in arguments.blocks
        if (block, method) != ("plain", "kernel decay")  # its kernel is its weight
    ]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    rows = []
    with Progress() as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("runs", total=len(settings))
        for row in pool.map(lambda s: run(s[0], s[1], s[2], arguments, threads), settings):
            rows.append(row)
            if "error" in row:
                progress.print(row)
            progress.advance(task)
    lines = list(table(rows))
    text = "\n".join(
        [
            "# Blocks and methods in one network",
            "",
            f"`benchmarks/blocks.py`: `train.py {' '.join([*SETTINGS, *arguments.set])}`, then "
            f"`deploy.py`; {arguments.seeds} seeds. torch {torch.__version__}, "
            f"{next((r['device'] for r in rows if 'device' in r), platform.machine())}, "
            f"{arguments.jobs} runs at a time with {threads} threads each. Methods: "
            + "; ".join(f"{name}: `{' '.join(o) or '-'}`" for name, o in METHODS.items())
            + ".",
            "",
            *lines,
            "",
        ]
    )
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
