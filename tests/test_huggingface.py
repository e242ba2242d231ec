"""Data sets of Hugging Face, made here: nothing is fetched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
datasets: Any = pytest.importorskip("datasets")

from repnet.data import HuggingFace  # noqa: E402
from repnet.errors import InputError  # noqa: E402

SIZE: dict[str, Any] = {"image_size": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def dataset(n: int, start: int = 0, label: Any = None, **more: Any) -> Any:
    columns = {"img": [picture(start + i) for i in range(n)], "label": [i % 2 for i in range(n)]}
    features = {
        "img": datasets.Image(),
        "label": label or datasets.ClassLabel(names=["cat", "dog"]),
    }
    features |= {name: datasets.Value("int64") for name in more}
    return datasets.Dataset.from_dict(columns | more, features=datasets.Features(features))


def test_splits_by_name(tmp_path: Path) -> None:
    parts = {"train": dataset(6), "validation": dataset(4, 10), "test": dataset(2, 20)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    data = HuggingFace(str(tmp_path), batch_size=4, **SIZE)
    data.setup()
    assert data.splits is not None
    assert [len(split) for split in data.splits] == [6, 4, 2]  # type: ignore[arg-type]
    assert data.class_names == ["cat", "dog"]
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 1, 0, 1]
    split: Any = data.splits[1]
    expected = torch.from_numpy(np.array(picture(11))).permute(2, 0, 1)
    assert torch.equal(split.read(1), expected)
    train = HuggingFace(str(tmp_path), train_split="test", val_split="train", **SIZE)
    train.setup()
    assert train.splits is not None
    assert len(train.splits[0]) == 2  # type: ignore[arg-type]
    with pytest.raises(InputError, match="split 'none' of train, validation, test"):
        HuggingFace(str(tmp_path), val_split="none", **SIZE).setup()


def test_without_other_splits_some_images_are_held_out(tmp_path: Path) -> None:
    dataset(10).save_to_disk(tmp_path)
    chosen = []
    for _ in range(2):
        data = HuggingFace(str(tmp_path), val_share=0.3, **SIZE)
        data.setup()
        assert data.splits is not None
        train, val, test = (
            {split.read(i).numpy().tobytes() for i in range(len(split))}
            for split in data.splits  # type: ignore[attr-defined]
        )
        assert (len(train), len(val)) == (7, 3)
        assert val == test
        assert not train & val
        chosen.append(val)
    assert chosen[0] == chosen[1]
    with pytest.raises(InputError, match="val_share=1"):
        HuggingFace(str(tmp_path), val_share=1)


def test_files_that_load_dataset_reads(tmp_path: Path) -> None:
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    dataset(6).to_parquet(parquet / "train-00000-of-00001.parquet")
    dataset(2, 10).to_parquet(parquet / "test-00000-of-00001.parquet")
    data = HuggingFace(str(parquet), val_split="train[4:]", train_split="train[:4]", **SIZE)
    data.setup()
    assert data.splits is not None
    assert [len(split) for split in data.splits] == [4, 2, 2]  # type: ignore[arg-type]
    folder = tmp_path / "folder"
    for split, n in (("train", 4), ("test", 2)):
        for number in range(n):
            place = folder / split / ("cat", "dog")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture(number).save(place / f"{number}.png")
    data = HuggingFace(str(folder), val_share=0.25, **SIZE)
    data.setup()
    assert data.class_names == ["cat", "dog"]
    assert data.splits is not None
    assert [len(split) for split in data.splits] == [3, 1, 2]  # type: ignore[arg-type]
    assert len(next(iter(data.val_dataloader()))[0]) == 1
    bad = folder / "test" / "dog" / "1.png"
    bad.write_bytes(b"broken")
    with pytest.raises(InputError, match=f"cannot read the image '{folder}, test, {bad}'"):
        list(data.test_dataloader())


def test_columns(tmp_path: Path) -> None:
    plain = datasets.Value("int64")
    dataset(6, label=plain, fine=[5, 1, 0, 3, 2, 4]).save_to_disk(tmp_path / "ints")
    data = HuggingFace(str(tmp_path / "ints"), label_column="fine", val_share=0.5, **SIZE)
    data.setup()
    assert data.class_names == [str(n) for n in range(6)]
    with pytest.raises(InputError, match=r"0 columns of type ClassLabel.*img, label, fine"):
        HuggingFace(str(tmp_path / "ints"), **SIZE).setup()
    with pytest.raises(InputError, match="no column data.image_column=pixels; it has img"):
        HuggingFace(str(tmp_path / "ints"), image_column="pixels", **SIZE).setup()
    unlabelled = dataset(2).map(lambda row: {"label": -1})
    parts = {"train": dataset(4), "test": unlabelled}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "hidden")
    with pytest.raises(InputError, match="'test'.*label -1.*between 0 and 1"):
        HuggingFace(str(tmp_path / "hidden"), **SIZE).setup()
    words = dataset(2).cast_column("label", datasets.Value("string"))
    words.save_to_disk(tmp_path / "words")
    with pytest.raises(InputError, match="are no integers"):
        HuggingFace(str(tmp_path / "words"), label_column="label", **SIZE).setup()


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"cannot read the data set data\.path='.*nowhere'"):
        HuggingFace(str(tmp_path / "nowhere"), **SIZE).setup()

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("repnet.data.huggingface.import_module", missing)
    with pytest.raises(InputError, match=r"pip install \"repnet\[datasets\]\""):
        HuggingFace("any", **SIZE).setup()
