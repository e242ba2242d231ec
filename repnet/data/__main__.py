"""`python -m repnet.data`: pack an image folder into shards that are read faster.

Exit codes: 0 done and counted, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.table import Table

from repnet.data.pack import Encoding, pack
from repnet.errors import InputError
from repnet.terminal import print_table

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def main() -> None:
    """Run the command that the arguments name."""
    arguments = _parser().parse_args()
    try:
        shorter_side = arguments.shorter_side
        if shorter_side is None and arguments.max_side is None:
            shorter_side = 256
        index = pack(
            arguments.source,
            arguments.target,
            Encoding(shorter_side, arguments.max_side, arguments.quality),
            shard_bytes=_bytes(arguments.shard_size),
            workers=arguments.workers,
            skip_corrupt=arguments.skip_corrupt,
        )
    except (InputError, OSError) as error:  # a full disk, a directory that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command again goes on from here", file=sys.stderr)
        sys.exit(130)
    table = Table("split", "images", "skipped", "classes", "shards", "MB")
    for split, shards in index["splits"].items():
        table.add_row(
            split,
            f"{sum(len(shard['labels']) for shard in shards):,}",
            f"{len(index['sources'][split]['skipped']):,}",
            f"{len(index['class_names']):,}",
            f"{len(shards):,}",
            f"{sum(shard['bytes'] for shard in shards) / 1e6:,.1f}",
        )
    print_table(table)
    for source in index["sources"].values():
        for name in source["skipped"]:
            print(f"skipped {name}")
    counts = {
        split: sum(len(shard["labels"]) for shard in shards)
        for split, shards in index["splits"].items()
    }
    if not (counts.get("train") and counts.get("val")):
        print("warning: training needs images in train/ and val/", file=sys.stderr)
        return
    print(f"train with: python train.py data=webdataset data.root={arguments.target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m repnet.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="write an image folder as shards")
    command.add_argument(
        "source", metavar="IMAGEFOLDER", type=Path, help="with train/CLASS/IMAGE, val/CLASS/IMAGE"
    )
    command.add_argument("target", metavar="OUT", type=Path)
    command.add_argument(
        "--shorter-side",
        type=int,
        metavar="PIXELS",
        help="scale images down to this (default: 256, which suits training at 224)",
    )
    command.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="bound the longer side instead, or as well (default: no bound)",
    )
    command.add_argument("--quality", type=int, default=90, help="of JPEG (default: 90)")
    command.add_argument(
        "--shard-size", default="256MB", help="about the length of a file (default: 256MB)"
    )
    command.add_argument("--workers", type=int, help="threads (default: all cores)")
    command.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out and list images that cannot be read, instead of stopping",
    )
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if not match:
        raise InputError(f"--shard-size={text} is no size such as 256MB or 1GB")
    return int(match[1]) * _UNITS[match[2]]


if __name__ == "__main__":
    main()
