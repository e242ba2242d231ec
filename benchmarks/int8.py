"""RepVGG and QARepVGG in int8 on Fashion-MNIST: trained, folded, quantized, fine-tuned.

    python benchmarks/int8.py --root DIR --markdown docs/int8.md
    python benchmarks/int8.py --root DIR --models repvgg --runs outputs/train/DATE_TIME

Runs `train.py` as a user would; runs that have finished are not run again. Every int8 file is run
by its own runtime over the whole test split and compared with the folded network in float. The
table is printed, and takes the place of the one in the `--markdown` file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

import repnet
from repnet.data import FashionMNIST
from repnet.deploy.formats import format_named
from repnet.deploy.int8 import quantize, sensitivity

PROJECT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks/int8.py -->", "<!-- end -->"
FORMATS = ("openvino", "onnx")
# A narrow network: on one core an epoch takes three quarters of a minute.
SETTINGS = [
    "model=repvgg_tiny",
    "model.widths=[0.25,0.25,0.25,0.25]",
    "model.strides=[2,1,2,2,1]",
    "data=fashion_mnist",
    "trainer=cpu",
    "pictures=false",
]
AWARE = [
    "block=plain",
    "pretrained_head=true",
    "callbacks=[quantization_aware]",
    "optimizer.lr=0.01",
]


@dataclass(frozen=True)
class Data:
    """What the files are calibrated and judged on."""

    calibration: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """One int8 file, and the network that it was made from."""

    model: str
    file: str
    top1: float
    top1_int8: float
    agreement: float
    worst: str
    sqnr_db: float
    weight_spread: float


def train(directory: Path, overrides: list[str], threads: int) -> Path:
    """Return the best checkpoint of a run, after training it where it is not there."""
    if not (directory / "result.json").exists():
        unfinished = (directory / "checkpoints" / "last.ckpt").exists()
        command = [f"resume={directory}"] if unfinished else overrides
        subprocess.run(
            [sys.executable, "train.py", *command, f"hydra.run.dir={directory}"],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return directory / "checkpoints" / "best.ckpt"


def load_data(root: Path, samples: int) -> Data:
    """Return calibration images, drawn from the training split with a seed, and the test split."""
    data = FashionMNIST(root=str(root))
    data.setup()
    assert data.splits is not None
    images = data.splits[0]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:samples]  # type: ignore[arg-type]
    tests = list(data.test_dataloader())
    return Data(
        images.__getitems__(chosen.tolist())[0],  # type: ignore[attr-defined]
        torch.cat([batch for batch, _ in tests]),
        torch.cat([labels for _, labels in tests]),
    )


@torch.no_grad()
def measure(name: str, model: nn.Module, data: Data, folder: Path) -> Iterator[Row]:
    """Yield a row for each int8 file of a network."""
    folded = repnet.reparameterize(model, data.calibration[:2])
    layers = sensitivity(folded, data.calibration)
    worst = min(layers, key=lambda layer: layer.sqnr_db)
    expected = torch.cat([folded(batch) for batch in data.images.split(500)]).argmax(1)
    folder.mkdir(parents=True, exist_ok=True)
    for format_name in FORMATS:
        format_ = format_named(format_name)
        source = folder / format_.file_name()
        format_.export(folded, data.calibration[:2], source)
        for per_channel in (True, False):
            target = folder / f"{'channel' if per_channel else 'tensor'}_{source.name}"
            quantize(format_name, source, target, data.calibration, per_channel=per_channel)
            run = format_.load(target, precision="int8")
            found = torch.cat([run(batch) for batch in data.images.split(500)]).argmax(1)
            yield Row(
                name,
                f"{format_name}, scale per {'channel' if per_channel else 'weight'}",
                float((expected == data.labels).float().mean()),
                float((found == data.labels).float().mean()),
                float((found == expected).float().mean()),
                worst.name,
                worst.sqnr_db,
                max(layer.weight_spread for layer in layers),
            )


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield (
        "| network | int8 file | top-1 float | top-1 int8 | drop, points | same prediction | "
        "worst layer | largest weight spread |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.model} | {row.file} | {row.top1:.2%} | {row.top1_int8:.2%} | "
            f"{100 * (row.top1 - row.top1_int8):.2f} | {row.agreement:.2%} | "
            f"{row.worst}, {row.sqnr_db:.1f} dB | {row.weight_spread:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="holds Fashion-MNIST")
    parser.add_argument("--models", nargs="+", default=["repvgg", "qarepvgg"], help="blocks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--aware-epochs", type=int, default=1, help="of fine-tuning; 0 for none")
    parser.add_argument("--samples", type=int, default=300, help="calibration images")
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="*",
        default=[],
        help="of the models, in their order; not trained",
    )
    parser.add_argument("--directory", type=Path, default=Path("outputs/int8"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = load_data(arguments.root, arguments.samples)
    directory, root = arguments.directory.resolve(), arguments.root.resolve()
    rows: list[Row] = []
    with Progress() as progress:
        steps = (1 if arguments.runs else len(arguments.seeds)) * len(arguments.models)
        task = progress.add_task("networks", total=steps * (2 if arguments.aware_epochs else 1))
        for index, model in enumerate(arguments.models):
            for seed in arguments.seeds if not arguments.runs else arguments.seeds[:1]:
                title = model if len(arguments.seeds) == 1 else f"{model}, seed {seed}"
                common = [*SETTINGS, f"data.root={root}", f"seed={seed}"]
                home = directory / f"{model}-{seed}"
                if arguments.runs:
                    checkpoint = arguments.runs[index].resolve()
                else:
                    overrides = [f"block={model}", f"trainer.max_epochs={arguments.epochs}"]
                    checkpoint = train(home / "run", [*common, *overrides], arguments.threads)
                network, _ = repnet.load_checkpoint(checkpoint)
                rows += measure(title, network.eval(), data, home / "files")
                progress.advance(task)
                if arguments.aware_epochs:
                    overrides = [
                        *AWARE,
                        f"pretrained={checkpoint}",
                        f"trainer.max_epochs={arguments.aware_epochs}",
                    ]
                    aware = train(home / "aware", [*common, *overrides], arguments.threads)
                    network, _ = repnet.load_checkpoint(aware)
                    rows += measure(
                        f"{title}, fine-tuned", network.eval(), data, home / "aware_files"
                    )
                    progress.advance(task)
    text = "\n".join(
        [
            f"`train.py {' '.join(SETTINGS)}`, {arguments.epochs} epochs; fine-tuned: "
            f"{arguments.aware_epochs} more with `{' '.join(AWARE)}`. {arguments.samples} "
            f"calibration images, {len(data.labels):,} test images; one run each, so that "
            f"{100 * (0.25 / len(data.labels)) ** 0.5:.1f} points are within chance. torch "
            f"{torch.__version__}, {arguments.threads} threads.",
            "",
            *table(rows),
        ]
    )
    print(text)
    if arguments.markdown:
        page = arguments.markdown.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        page = f"{before}{BEGIN}\n{text}\n{END}{after}"
        arguments.markdown.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
