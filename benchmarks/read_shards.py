"""Images per second of one core: packed shards beside the image folder they were made from.

    python benchmarks/read_shards.py
    python benchmarks/read_shards.py --images DIR     # with your own train/CLASS/IMAGE

Without `--images`, photograph-like JPEGs of 500 x 375 pixels are generated: noise of all scales, as
in nature, under shapes with hard edges. Both are read through the same decoder, in one process with
one thread, taking turns: pixels only, and with the training augmentation to 224 pixels. The folder
as torchvision reads it (PIL) is the third.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from repnet.data import ImageFolder, Shards
from repnet.data.pack import Encoding, pack


def photograph(random: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    pixels = np.full((height, width, 3), 120, dtype=np.float32)
    for columns, strength in ((6, 45), (16, 32), (48, 20), (140, 11), (500, 5)):
        rows = max(2, columns * height // width)
        for channel in range(3):
            noise = Image.fromarray(random.normal(size=(rows, columns)).astype(np.float32))
            large = noise.resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(large)
    y, x = np.mgrid[:height, :width]
    for _ in range(12):
        center, size = random.uniform((0, 0), (width, height)), random.uniform(20, 120)
        angle, flatness = random.uniform(0, np.pi), random.uniform(0.3, 1)
        along = (x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)
        across = (y - center[1]) * np.cos(angle) - (x - center[0]) * np.sin(angle)
        pixels[np.abs(along) + np.abs(across) * flatness < size] += random.normal(size=3) * 45
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generate(root: Path, count: int, quality: int) -> None:
    random = np.random.default_rng(0)
    for index in range(count):
        folder = root / ("val" if index < 2 else "train") / f"class {index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photograph(random).save(folder / f"{index}.jpg", quality=quality)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="directory with train/CLASS/IMAGE and val")
    parser.add_argument("--count", type=int, default=128, help="images to generate")
    parser.add_argument("--source-quality", type=int, default=92, help="of the generated JPEGs")
    parser.add_argument("--shorter-side", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90, help="of the packed JPEGs")
    parser.add_argument("--rounds", type=int, default=15, help="each reads every image once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.images or Path(temporary) / "images"
        if not options.images:
            generate(root, options.count, options.source_quality)
        packed = Path(temporary) / "packed"
        pack(root, packed, Encoding(options.shorter_side, None, options.quality))
        folder, shards = ImageFolder(str(root)), Shards(str(packed))
        folder.setup()
        shards.setup()
        assert folder.splits is not None
        assert shards.splits is not None
        images: Any = folder.splits[0]
        packed_images: Any = shards.splits[0]
        plain = torchvision.datasets.ImageFolder(
            str(root / "train"), transform=v2.Compose([v2.PILToTensor(), images.transform])
        )
        count = len(images)

        def size(dataset: Any) -> str:
            return f"{sum(len(dataset.contents(i)) for i in range(count)) / count / 1e3:.0f} KB"

        print(
            f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
            f"Pillow {PIL.__version__}, one thread, load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores, {count} images, {size(images)} each in the folder, "
            f"{size(packed_images)} packed; median of {options.rounds} (5 % - 95 %)"
        )
        read: dict[str, Callable[[int], Any]] = {
            "folder": images.read,
            "shards": packed_images.read,
            "folder, torchvision": lambda i: v2.functional.pil_to_tensor(
                plain.loader(plain.samples[i][0])
            ),
        }
        augmented: dict[str, Callable[[int], Any]] = {
            "folder": images.__getitem__,
            "shards": packed_images.__getitem__,
            "folder, torchvision": plain.__getitem__,
        }
        for title, readers in (("pixels", read), ("augmented for training", augmented)):
            report(title, readers, count, options.rounds)


def report(title: str, readers: dict[str, Callable[[int], Any]], count: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, reader in readers.items():
            start = time.perf_counter()
            for index in range(count):
                reader(index)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    print(title)
    for name, values in seconds.items():
        rates = [count / value for value in values]
        line = f"  {name:20s} {median(rates):7,.0f} images/s {spread(rates, ',.0f')}"
        if name != "shards":
            ratios = [own / packed for own, packed in zip(values, seconds["shards"], strict=True)]
            line += f"   shards are {median(ratios):.2f} x as fast {spread(ratios, '.2f')}"
        print(line)


def spread(values: list[float], style: str) -> str:
    low, high = np.quantile(values, [0.05, 0.95])
    return f"({low:{style}} - {high:{style}})"


if __name__ == "__main__":
    main()
