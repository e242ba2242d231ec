"""`python -m repnet.bench`: how fast every form of a network is, each checked before it is timed.

Exit codes: 0 measured, 2 bad input, 3 a form computes something else and was not timed, 130
interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live

from repnet.errors import InputError


def main() -> None:
    """Run the command that the arguments name."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        refused = _run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    sys.exit(3 if refused else 0)


def _run(arguments: argparse.Namespace) -> bool:
    """Return whether a form was refused."""
    _check(arguments)
    import torch  # only when there is work to do

    from repnet.bench.environment import environment
    from repnet.bench.forms import check_names
    from repnet.bench.measure import REFUSED, TIMED, Options, Row, benchmark
    from repnet.bench.plot import draw
    from repnet.bench.subjects import find_subject
    from repnet.bench.table import (
        Result,
        print_tables,
        read_results,
        write_csv,
        write_markdown,
        write_results,
    )
    from repnet.bench.worker import cores
    from repnet.deploy.native_output import native_output_hidden, silence_torch

    silence_torch()
    names = check_names(arguments.forms.split(",") if arguments.forms else [])
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    threads = arguments.threads or min(torch.get_num_threads(), len(cores()))
    torch.set_num_threads(threads)
    options = Options(
        batches=sorted(set(arguments.batch)), device=device, threads=threads,
        runs=arguments.runs, seconds=arguments.seconds,
    )  # fmt: skip
    results, rows = [], list[Row]()
    subjects, texts = [], list[str]()
    for text in dict.fromkeys(arguments.subjects):
        if Path(text).suffix == ".json" and Path(text).is_file():
            results += read_results(text)
        else:
            subjects.append(find_subject(text, size=arguments.size, trust=arguments.trust))
            texts.append(text)
    taken = Counter(subject.name for subject in subjects)
    for subject, text in zip(subjects, texts, strict=True):
        if taken[subject.name] > 1:  # two runs may have directories of the same name
            subject.name = text
    # Nothing moves while something is timed.
    console = Console(stderr=True)
    with (
        native_output_hidden(),
        Live(console=console, auto_refresh=False, transient=True) as live,
    ):
        show = partial(live.update, refresh=True)
        for subject in subjects:
            rows += benchmark(subject, names, options, show, timm=arguments.timm)
    if rows:
        results.append(Result(environment(device, threads), rows))
    print_tables(results)
    writers: dict[str, Callable[[Sequence[Result], Path], None]] = {
        "csv": write_csv,
        "json": write_results,
        "markdown": write_markdown,
        "plot": draw,
    }
    everything = [row for result in results for row in result.rows]
    if not any(row.status == TIMED for row in everything):
        writers.pop("plot")
    for kind, write in writers.items():
        path = getattr(arguments, kind)
        if path is not None:
            try:
                write(results, path)
            except OSError as error:
                raise InputError(f"--{kind}: '{path}' cannot be written: {error}") from error
            print(f"{kind} written to '{path}'", file=sys.stderr)
    return any(row.status == REFUSED for row in everything)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that make no sense before anything is measured."""
    counts = {
        "--size": [arguments.size],
        "--batch": arguments.batch,
        "--threads": [1 if arguments.threads is None else arguments.threads],
        "--runs": [1 if arguments.runs is None else arguments.runs],
    }
    for option, values in counts.items():
        if min(values) < 1:
            raise InputError(f"{option} {min(values)} must be at least 1")
    if not 0 < arguments.seconds < math.inf:
        raise InputError(f"--seconds {arguments.seconds} must be above 0")
    for kind in ("csv", "json", "markdown", "plot"):
        path = getattr(arguments, kind)
        if path is not None and path.is_dir():
            raise InputError(f"--{kind}: '{path}' is a directory")
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"--{kind}: there is no directory '{path.parent}'")
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        raise InputError(f"--plot: '{arguments.plot}' must end in .png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m repnet.bench", description=__doc__)
    parser.add_argument(
        "subjects",
        nargs="+",
        metavar="ARTEFACT_OR_NAME",
        help="name of a model (random weights), artefact's directory, run, checkpoint, or a file "
        "that --json wrote, which is only shown",
    )
    parser.add_argument(
        "--forms",
        metavar="NAME,...",
        help="comma-separated, or all (default: those that suit the device; of an artefact, its "
        "own files); an unknown name lists them",
    )
    parser.add_argument(
        "--timm", action="store_true", help="timm's model, same weights, folded by timm, as well"
    )
    parser.add_argument("--size", type=int, default=224, help="pixels, for names (default: 224)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 64], metavar="N", help="(default: 1 64)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda if there is one)")
    parser.add_argument("--threads", type=int, help="of each runtime on the CPU (default: torch's)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--runs", type=int, help="timed passes of each form and batch")
    length.add_argument(
        "--seconds", type=float, default=5.0, help="that these take, about (default: 5)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row for each form and batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same, with all details")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="accuracy over latency, or latencies"
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="may be imported to build the network of a file; native: files of an artefact "
        "that are code (torch.export, AOTInductor, TensorRT) may be run",
    )
    return parser


if __name__ == "__main__":
    main()
