"""Packing an image folder, and reading shards of all origins."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repnet.data import ImageFolder, Shards, shards
from repnet.data import pack as packing
from repnet.data.__main__ import _bytes, main
from repnet.data.decoding import decode
from repnet.data.pack import Encoding, pack
from repnet.errors import InputError
from repnet.files import write_text
from tests.kills import KILLED, STAGES, killed

CLASSES = ["cat", "dög", "fox.2"]


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images of all kinds, and one large one, in each class."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            place = root / split / name
            (place / "deep").mkdir(parents=True)
            seed = 100 * label + (10 if split == "val" else 0)
            picture(seed).save(place / "a.jpg")
            picture(seed + 1).save(place / "a.png")
            picture(seed + 2).save(place / "b.c.bmp")
            picture(seed + 3).save(place / "deep" / "ñ.webp", lossless=True)
            picture(seed + 4, 160, 80).save(place / "large.jpeg")
    return root


@pytest.fixture(scope="session")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "out"
    pack(folder, target, Encoding(40), shard_bytes=10_000, workers=2)
    return target


def files(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.tar"))}


def test_shards_hold_what_the_folder_holds(folder: Path, packed: Path) -> None:
    index = json.loads((packed / "index.json").read_text())
    assert index["class_names"] == CLASSES
    assert index["sources"]["train"] == {"images": 15, "skipped": []}
    assert len(index["splits"]["train"]) > 1
    assert {s["file"] for shards in index["splits"].values() for s in shards} == set(
        contents(packed)
    )
    for split in ("train", "val"):
        held = {}
        for shard in sorted(packed.glob(f"{split}-*.tar")):
            held.update(files(shard))
        keys = {name.partition(".")[0] for name in held if "fox" not in name}
        assert keys == {
            f"{name}/{stem}"
            for name in CLASSES[:2]
            for stem in ("a", "a-2", "b_c", "deep/ñ", "large")
        }
        for label, name in enumerate(CLASSES):
            place = folder / split / name
            for suffix, path in (("a.jpg", "a.jpg"), ("a-2.png", "a.png")):
                assert held[f"{name}/{suffix}"] == (place / path).read_bytes()
            assert held[f"{name}/deep/ñ.webp"] == (place / "deep" / "ñ.webp").read_bytes()
            assert held[f"{name}/b_c.cls"] == str(label).encode()
            for stem, size in (("b_c.jpg", (24, 20)), ("large.jpg", (80, 40))):
                image = Image.open(io.BytesIO(held[f"{name}/{stem}"]))
                assert (image.format, image.size) == ("JPEG", size)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_read_as_the_folder_does(folder: Path, packed: Path, workers: int) -> None:
    options: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": workers}
    small, large = Shards(str(packed), **options), ImageFolder(str(folder), **options)
    for data in (small, large):
        data.setup()
    assert small.class_names == large.class_names == CLASSES
    assert small.describe() == large.describe()
    ours = [torch.cat(part) for part in zip(*small.val_dataloader(), strict=True)]
    theirs = [torch.cat(part) for part in zip(*large.val_dataloader(), strict=True)]
    assert torch.equal(ours[1], theirs[1])
    for position, (image, expected) in enumerate(zip(ours[0], theirs[0], strict=True)):
        if position % 5 in (0, 1, 4):  # stored byte by byte
            assert torch.equal(image, expected)
        else:
            assert (image - expected).abs().mean() < 0.2
    assert small.splits is not None
    labels = small.splits[0].labels.tolist()  # type: ignore[attr-defined]
    assert Counter(labels) == {0: 5, 1: 5, 2: 5}
    assert labels != sorted(labels)  # training images are shuffled over the shards


def test_encoding_bounds_the_sides() -> None:
    file = io.BytesIO()
    picture(0, 200, 100).save(file, "PNG")
    image = file.getvalue()

    def size(encoding: Encoding) -> tuple[int, int]:
        return Image.open(io.BytesIO(encoding.encode(image)[1])).size

    assert size(Encoding(50)) == (100, 50)
    assert size(Encoding(None, 50)) == (50, 25)
    assert size(Encoding(50, 60)) == (60, 30)
    for encoding in (Encoding(100), Encoding(None, 200), Encoding(None, None)):
        assert encoding.encode(image) == ("png", image)
    low, high = (len(Encoding(50, quality=q).encode(image)[1]) for q in (20, 95))
    assert low < high
    for wrong in ({"shorter_side": 0}, {"max_side": -1}, {"quality": 100}):
        with pytest.raises(InputError, match="--"):
            Encoding(**wrong)


def test_packing_goes_on_where_it_was_stopped(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written = tmp_path / "out", 0
    add = packing._add

    def interrupted(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise KeyboardInterrupt
        add(tar, name, contents)

    monkeypatch.setattr(packing, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, target, Encoding(40), shard_bytes=10_000)
    monkeypatch.undo()
    done = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert 0 < len(done) < len(contents(packed))
    assert not list(target.glob(".*"))
    with pytest.raises(InputError, match="packed with another quality"):
        pack(folder, target, Encoding(40, quality=50), shard_bytes=10_000)
    pack(folder, target, Encoding(40), shard_bytes=10_000)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert contents(target) == contents(packed)  # as one that was never stopped
    assert (target / "index.json").read_bytes() == (packed / "index.json").read_bytes()
    wrong = next(target.glob("train-*1.tar"))
    shutil.copy(target / "train-000000.tar", wrong)
    with pytest.raises(InputError, match="holds other images"):
        pack(folder, target, Encoding(40), shard_bytes=10_000)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_packing_goes_on_where_it_was_killed(folder: Path, packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write(path: Path) -> None:
        pack(folder, target, Encoding(40), shard_bytes=10_000, workers=2)

    for name in ("pack.json", "train-000001.tar", "index.json"):
        for stage in STAGES:
            assert killed(stage, target / name, write) == KILLED
            assert any(target.glob(f".{name}.*")) == (stage != "before")
    # Of a file that is not written again.
    assert killed("half", target / "pack.json", lambda path: write_text(path, "some")) == KILLED
    write(target)
    assert contents(target) == contents(packed)
    assert {path.name for path in target.iterdir()} == {path.name for path in packed.iterdir()}
    assert (target / "index.json").read_bytes() == (packed / "index.json").read_bytes()


def test_packing_refuses(folder: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold train/CLASS/IMAGE"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="is not empty"):
        pack(folder, folder)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    shutil.rmtree(other / "val" / "cat")
    with pytest.raises(InputError, match="other classes.*cat"):
        pack(other, tmp_path / "out")
    with pytest.raises(InputError, match="at least 1"):
        pack(folder, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_the_command(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "images"
    shutil.copytree(folder, source)
    bad = source / "train" / "cat" / "deep" / "bad.jpg"
    bad.write_bytes((source / "train" / "cat" / "a.jpg").read_bytes()[:-20])
    arguments = ("pack", source, tmp_path / "out", "--max-side", 80, "--shard-size", "1MB")
    monkeypatch.setattr(sys, "argv", ["repnet.data", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert f"error: cannot read the image '{bad}'" in error
    assert "--skip-corrupt" in error
    (source / "train" / "cat" / "empty.png").touch()
    bad.unlink()
    bad.with_suffix(".png").write_bytes(b"broken")
    command = [sys.executable, "-m", "repnet.data", *map(str, arguments), "--skip-corrupt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"skipped {bad.with_suffix('.png')}" in done.stdout
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["sources"]["train"]["images"] == 17
    assert len(index["sources"]["train"]["skipped"]) == 2
    assert sum(len(shard["labels"]) for shard in index["splits"]["train"]) == 15
    assert index["encoding"] == {"shorter_side": None, "max_side": 80, "quality": 90}


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1g", 10**9), ("5 ", 5), ("2KB", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert _bytes(text) == size
    with pytest.raises(InputError, match="no size"):
        _bytes(f"-{text}")


def copy(packed: Path, target: Path, change: Any = None) -> Shards:
    shutil.copytree(packed, target)
    if change:
        index = json.loads((target / "index.json").read_text())
        change(index, index["splits"]["train"][0])
        (target / "index.json").write_text(json.dumps(index))
    return Shards(str(target), image_size=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, shard: index.update(format="other"), "not of the format"),
        (lambda index, shard: index.pop("class_names"), "damaged.*class_names"),
        (lambda index, shard: shard.update(file="../x.tar"), "inconsistent"),
        (lambda index, shard: shard.update(file="gone.tar"), "gone.tar' is missing"),
        (lambda index, shard: shard.update(more=1), "damaged"),
        (lambda index, shard: shard["labels"].pop(), "inconsistent"),
        (lambda index, shard: shard["sizes"].__setitem__(0, 10**9), "beyond its end"),
        (lambda index, shard: shard["offsets"].__setitem__(0, -1), "no numbers"),
        (lambda index, shard: shard["labels"].__setitem__(0, 7), "label 7.*between 0 and 2"),
        (lambda index, shard: index["splits"].pop("val"), "no shards to val"),
    ],
)
def test_a_wrong_index_is_refused(packed: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        copy(packed, tmp_path / "copy", change).setup()


def test_a_damaged_copy_is_refused(packed: Path, tmp_path: Path) -> None:
    data = copy(packed, tmp_path / "copy")
    shard = tmp_path / "copy" / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(InputError, match=r"val-000000\.tar' has another size"):
        data.setup()
    (tmp_path / "copy" / "index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        data.setup()
    with pytest.raises(InputError, match="is no directory"):
        Shards(str(tmp_path / "nowhere")).setup()


def test_a_corrupt_image_in_a_shard_is_named(packed: Path, tmp_path: Path) -> None:
    data = copy(packed, tmp_path / "copy")
    data.setup()
    assert data.splits is not None
    images: Any = data.splits[1]
    shard = tmp_path / "copy" / "val-000000.tar"
    changed = bytearray(shard.read_bytes())
    start, size = int(images.offsets[1]), int(images.sizes[1])
    changed[start : start + size] = bytes(size)
    shard.write_bytes(bytes(changed))
    with pytest.raises(InputError, match=r"val-000000\.tar: cat/a-2\.png"):
        list(data.val_dataloader())
    skipping = Shards(str(tmp_path / "copy"), image_size=16, skip_corrupt=True)
    assert sum(len(labels) for _, labels in skipping.val_dataloader()) == 14
    assert len(skipping.corrupt_images()) == 1


def test_few_files_are_open_at_once(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    data = Shards(str(packed), image_size=16)
    data.setup()
    assert data.splits is not None
    images: Any = data.splits[0]
    assert len(images.files) > 3
    open_before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    before = [images.read(index) for index in range(15)]
    for index in np.random.default_rng(0).permutation(60) % 15:
        assert torch.equal(images.read(index), before[index])
    assert len(images.storage._open) == 2
    assert all(os.fstat(descriptor) for descriptor in images.storage._open.values())
    assert len(os.listdir("/dev/fd")) < open_before + 3  # noqa: PTH208
    spawned = pickle.loads(pickle.dumps(images))  # a worker's copy, without descriptors
    assert not spawned.storage._open
    assert torch.equal(spawned.read(7), before[7])


def add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    tar.addfile(info, io.BytesIO(contents))


def write_foreign(path: Path, labels: list[int], kind: str, mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for number, label in enumerate(labels):
            file = io.BytesIO()
            picture(label).save(file, "PNG")
            text = json.dumps({"label": label, "other": "x"}) if kind == "json" else f"{label}\n"
            add(tar, f"./v1.0/{number:04d}.{kind}", text.encode())
            add(tar, f"./v1.0/{number:04d}.png", file.getvalue())
            add(tar, f"./v1.0/{number:04d}.txt", b"a caption")


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_foreign_shards(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "shards", tmp_path / "cache"
    root.mkdir()
    write_foreign(root / "x-train-0.tar", [0, 2], kind)
    write_foreign(root / "x-train-1.tar", [1], kind)
    write_foreign(root / "x-val-0.tar", [2, 1], kind)
    options: dict[str, Any] = {"image_size": 16, "cache": str(cache)}
    data = Shards(str(root), **options)
    data.setup()
    assert data.class_names == ["0", "1", "2"]
    assert data.splits is not None
    train: Any = data.splits[0]
    assert train.labels.tolist() == [0, 2, 1]
    for index, label in enumerate([0, 2, 1]):
        file = io.BytesIO()
        picture(label).save(file, "PNG")
        assert torch.equal(train.read(index), decode(file.getvalue()))
    named = Shards(str(root), train="x-train-{0..1}.tar", class_names=["a", "b", "c"], **options)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "scan_tar", None)  # the first scan was kept
        named.setup()
    assert named.class_names == ["a", "b", "c"]
    with pytest.raises(InputError, match="label 2.*0 and 1"):
        Shards(str(root), class_names=["a", "b"], **options).setup()
    with pytest.raises(InputError, match="no shards to train"):
        Shards(str(root), train="nothing*.tar", **options).setup()
    write_foreign(root / "x-val-0.tar", [1, 1, 0], kind)  # another file: scanned again
    again = Shards(str(root), **options)
    again.setup()
    assert again.splits is not None
    assert again.splits[1].labels.tolist() == [1, 1, 0]  # type: ignore[attr-defined]


def test_foreign_shards_that_do_not_fit(tmp_path: Path) -> None:
    data = Shards(str(tmp_path), cache=str(tmp_path / "cache"), image_size=16)
    write_foreign(tmp_path / "val.tar", [0], "cls")

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            data.setup()

    write_foreign(tmp_path / "train.tar", [0], "cls", "w:gz")
    refused("uncompressed tar")
    (tmp_path / "train.tar").write_bytes(b"no tar at all")
    refused("cannot read the shard")
    write_foreign(tmp_path / "train.tar", [0], "json")
    with pytest.raises(InputError, match="entry 'class'"):
        Shards(str(tmp_path), label_key="class", cache=str(tmp_path / "cache")).setup()
    for name, text, message in (
        ("a.cls", b"cat", "integer in each KEY.cls"),
        ("b.cls", b"0", "'b' has no image"),
        ("b.png", b"", "'b' has no label"),
    ):
        write_foreign(tmp_path / "train.tar", [0], "cls")
        with tarfile.open(tmp_path / "train.tar", "a") as tar:
            add(tar, name, text)
        refused(message)


@pytest.fixture
def server(packed: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(packed)))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_at_a_url(packed: Path, server: str, tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": workers}
    local = Shards(str(packed), **options)
    remote = Shards(server, cache=str(tmp_path), **options)
    expected, found = list(local.val_dataloader()), list(remote.val_dataloader())
    for (images, labels), (other, other_labels) in zip(expected, found, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)
    copies = {path.name[17:]: path.read_bytes() for path in tmp_path.glob("*/*.tar")}
    held = contents(packed)
    assert copies.items() <= held.items()
    assert {name for name in held if name.startswith("val")} <= set(copies)
    assert len(copies) < len(held)  # only what was needed
    assert not list(tmp_path.glob("*/.*"))


def test_a_url_without_shards_is_refused(server: str, tmp_path: Path) -> None:
    names: Any = {split: f"{split}-{{0..1}}.tar" for split in ("train", "val", "test")}
    with pytest.raises(InputError, match="cannot copy.*train-0.tar"):
        Shards(f"{server}/none", **names, cache=str(tmp_path)).setup()
    with pytest.raises(InputError, match="cannot list.*name the shards"):
        Shards(f"{server}/none", cache=str(tmp_path)).setup()
    with pytest.raises(InputError, match="cannot be opened"):
        Shards("nothing://x").setup()


def test_a_copy_that_differs_is_refused(packed: Path, tmp_path: Path) -> None:
    def change(index: Any, shard: Any) -> None:
        shard["sha256"] = "0" * 64

    copy(packed, tmp_path / "copy", change)
    data = Shards(f"file://{tmp_path / 'copy'}", cache=str(tmp_path / "cache"), image_size=16)
    with pytest.raises(InputError, match=r"cannot copy .*train-000000\.tar.*SHA-256"):
        data.setup()
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_packing_half_a_folder_says_that_it_cannot_be_trained_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "images"
    shutil.copytree(folder / "train", source / "train")
    monkeypatch.setattr(sys, "argv", ["repnet.data", "pack", str(source), str(tmp_path / "out")])
    main()
    printed = capsys.readouterr()
    assert "training needs images in train/ and val/" in printed.err
    assert "train with:" not in printed.out
