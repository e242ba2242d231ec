"""`python -m repnet.predict`: classify images with a deploy model, in any of its formats.

Exit codes: 0 done, 2 bad input or images that cannot be read, 130 interrupted.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from repnet.deploy.native_output import native_output_hidden
from repnet.errors import InputError
from repnet.files import write_text
from repnet.predict.predictor import Prediction, Predictor, find_images
from repnet.terminal import print_table
from repnet.text import printable

NEXT = "next"  # heading of the classes behind the best one


def main() -> None:
    """Run the command."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.json == arguments.csv == "-":
        parser.error("--json - and --csv - would both write to standard output")
    try:
        unreadable = _run(arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    for _, reason in unreadable:
        print(reason, file=sys.stderr)
    if unreadable:
        print(f"images that cannot be read: {len(unreadable):,}", file=sys.stderr)
        sys.exit(0 if arguments.skip_corrupt else 2)


def _run(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Predict, print and write; return the images that could not be read, and why."""
    paths = find_images(arguments.images)
    with native_output_hidden():
        predictor = Predictor(arguments.artefact, trust=arguments.trust, device=arguments.device)
        predictions, unreadable = _predict(predictor, paths, arguments.top, arguments.batch)
    if not predictions:
        raise InputError(f"not one image can be read: {unreadable[0][1]}")
    if arguments.json:
        _write(arguments.json, _as_json(predictor, predictions, unreadable))
    if arguments.csv:
        _write(arguments.csv, _as_csv(predictions))
    if "-" not in (arguments.json, arguments.csv):
        console = Console()
        print_table(_table(predictions, _places(arguments.images)), spare=[NEXT], console=console)
        console.print(f"images: {predictor.rule}", soft_wrap=True, highlight=False)
    return unreadable


def _predict(
    predictor: Predictor, paths: Sequence[Path], top: int, batch_size: int
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    def attempt(path: Path) -> np.ndarray | InputError:
        try:
            return predictor.prepare(path)
        except InputError as error:
            return error

    predictions: list[Prediction] = []
    unreadable: list[tuple[str, str]] = []
    workers = min(batch_size, os.cpu_count() or 1)
    if predictor.takes_uint8 and predictor.resize is not None:  # of full size: not many at once
        batch_size = workers
    # Standard output keeps the result; decoders release the interpreter's lock.
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        task = progress.add_task("classifying", total=len(paths))
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            images: list[np.ndarray] = []
            names: list[str] = []
            for path, image in zip(chunk, pool.map(attempt, chunk), strict=True):
                name = printable(str(path))
                if isinstance(image, np.ndarray):
                    images.append(image)
                    names.append(name)
                else:
                    unreadable.append((name, str(image)))
            if images:
                predictions += predictor.classify(images, names, top=top)
            progress.advance(task, len(chunk))
    return predictions, unreadable


def _as_json(
    predictor: Predictor,
    predictions: Sequence[Prediction],
    unreadable: Sequence[tuple[str, str]],
) -> str:
    contents = {
        "artefact": str(predictor.artefact),
        "preparation": predictor.rule,
        "predictions": [asdict(prediction) for prediction in predictions],
        "unreadable": [{"image": name, "reason": why} for name, why in unreadable],
    }
    return json.dumps(contents, indent=2, ensure_ascii=False) + "\n"


def _as_csv(predictions: Sequence[Prediction]) -> str:
    """Return one row for each class of each image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "index", "probability"])
    for prediction in predictions:
        for rank, score in enumerate(prediction.scores, 1):
            row = [prediction.image, rank, score.name, score.index, score.probability]
            writer.writerow(row)
    return text.getvalue()


def _write(target: str, text: str) -> None:
    if target == "-":
        sys.stdout.write(text)
    else:
        write_text(target, text)


def _places(images: Sequence[Path]) -> str:
    """Return the folder that the images are named relative to: the one given, or what all share."""
    folders = [path if path.is_dir() else path.parent for path in images]
    return os.path.commonpath([folder.absolute() for folder in folders])


def _table(predictions: Sequence[Prediction], folder: str) -> Table:
    """Return bars for one image, a row for each of several, with names relative to `folder`."""
    table = Table(title_justify="left")
    if len(predictions) == 1:
        table.title = Text(predictions[0].image)
        table.add_column("class")
        table.add_column("probability", justify="right")
        table.add_column("")
        for score in predictions[0].scores:
            bar = Bar(1, 0, score.probability, width=30)
            table.add_row(Text(score.name), f"{score.probability:.2%}", bar)
        return table
    names = [os.path.relpath(prediction.image, folder) for prediction in predictions]
    table.add_column("image", no_wrap=True)
    table.add_column("class")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column(NEXT, min_width=20)
    for name, prediction in zip(names, predictions, strict=True):
        best, *others = prediction.scores
        cells = [Text(name), Text(best.name), Text(f"{best.probability:.2%}")]
        following = ", ".join(f"{score.name} {score.probability:.1%}" for score in others)
        table.add_row(*cells, Text(following))
    return table


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "positive integer"  # argparse: "invalid positive integer value: '0'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m repnet.predict", description=__doc__)
    parser.add_argument(
        "artefact", metavar="ARTEFACT", type=Path, help="directory of deploy.py, or a file in it"
    )
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", type=Path)
    parser.add_argument(
        "--top", type=_positive, default=5, help="classes of each image (default: 5)"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - for standard output")
    parser.add_argument("--csv", metavar="FILE", help="write CSV; - for standard output")
    parser.add_argument(
        "--batch", type=_positive, default=32, help="images run at once (default: 32)"
    )
    parser.add_argument("--device", default="cpu", help="of the network (default: cpu)")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package that may be imported to build the network; native: run files that are code",
    )
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="end with 0 although images could not be read; they are listed all the same",
    )
    return parser


if __name__ == "__main__":
    main()
