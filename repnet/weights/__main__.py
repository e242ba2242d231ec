"""`python -m repnet.weights`: convert a file of weights, or say what is in it.

Exit codes: 0 done and read back, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from repnet.errors import InputError
from repnet.files import write_atomically
from repnet.terminal import print_table
from repnet.weights.architecture import guess_name
from repnet.weights.conversion import renamed
from repnet.weights.identify import Weights, read_weights
from repnet.weights.layouts import FORMATS
from repnet.weights.reading import read

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def main() -> None:
    """Run the command that the arguments name."""
    arguments = _parser().parse_args()
    try:
        weights = read_weights(
            arguments.source,
            ema=arguments.ema,
            source_format=arguments.source_format,
            prefix=arguments.prefix,
        )
        if arguments.command == "convert":
            _convert(weights, arguments.source, arguments.target, arguments.to)
        _print(weights)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m repnet.weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="write the same tensors under other names")
    inspect = commands.add_parser("inspect", help="say what a file holds")
    for command in (convert, inspect):
        command.add_argument("source", metavar="IN", type=Path)
    convert.add_argument("target", metavar="OUT", type=Path, help=", ".join(SUFFIXES))
    convert.add_argument(
        "--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS)
    )
    for command in (convert, inspect):
        command.add_argument(
            "--from",
            dest="source_format",
            choices=FORMATS,
            metavar="FORMAT",
            help="whose names the file has (default: detect)",
        )
        command.add_argument(
            "--ema",
            action=argparse.BooleanOptionalAction,
            help="take the average over training (default: where there is one)",
        )
        command.add_argument("--prefix", help="take only the keys that begin with it")
    return parser


def _convert(weights: Weights, source: Path, target: Path, to: str) -> None:
    if target.suffix not in SUFFIXES:
        raise InputError(f"'{target}' must end in one of {', '.join(SUFFIXES)}")
    if target.is_dir() or target.resolve() == source.resolve():
        raise InputError(f"'{target}' is {'a directory' if target.is_dir() else 'the input file'}")
    state = {key: value.clone().contiguous() for key, value in renamed(weights, to).items()}
    save = save_file if target.suffix == ".safetensors" else torch.save
    try:
        write_atomically(target, lambda path: save(state, path), lambda path: _check(path, state))
    except OSError as error:
        raise InputError(f"'{target}' cannot be written: {error}") from error
    print(f"{len(state)} tensors written to '{target}' in the format {to}, and read back")


def _check(path: Path, state: Mapping[str, Tensor]) -> None:
    written = read(path).state
    if written.keys() != state.keys() or any(
        not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (value, written[key])))
        for key, value in state.items()
    ):
        raise RuntimeError(f"'{path}' does not hold what was written")


def _print(weights: Weights) -> None:
    chosen = weights.chosen
    parameters = sum(
        value.numel()
        for key, value in weights.tensors.items()
        if key.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked")
    )
    kind = "average over training (EMA)" if chosen.ema else "trained"
    unused = f"; not used: '{chosen.unused}'" if chosen.unused is not None else ""
    table = Table(title=str(weights.name), show_header=False, title_justify="left")
    for row in (
        ("format", weights.format),
        ("form", weights.form),
        ("network", guess_name(weights.tensors) or weights.family or "not known by its shapes"),
        ("weights", f"{kind}{f', in {chosen.entry!r}' if chosen.entry else ''}{unused}"),
        ("tensors", f"{len(weights.origins):,}"),
        ("parameters", f"{parameters:,}"),
        ("dtypes", ", ".join(sorted({str(v.dtype) for v in weights.tensors.values()}))),
    ):
        table.add_row(*row)
    print_table(table)


if __name__ == "__main__":
    main()
