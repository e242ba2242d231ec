"""Atomic writes, killed at every stage, and the sweep of what they leave."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repnet import files
from repnet.deploy.staging import Stage
from repnet.errors import InputError
from repnet.files import reserve, sweep_leftovers, write_atomically, write_text
from tests.kills import KILLED, forked, killed

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


def write_tensor(path: Path, value: str) -> None:
    state = {"x": torch.tensor(float(len(value)))}
    write_atomically(path, lambda temporary: save_file(state, temporary), load_file)


def write_directory(path: Path, value: str) -> None:
    with Stage(path, overwrite=True) as stage:
        write_text(stage.path / "report.json", value)


def read_directory(path: Path) -> str:
    (file,) = path.iterdir()
    return file.read_text()


CASES: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], Any]]] = {
    "text": (write_text, Path.read_text),
    "tensor": (write_tensor, lambda path: load_file(path)["x"].item()),
    "directory": (write_directory, read_directory),
}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_a_write_that_is_killed_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, case: str
) -> None:
    write, read = CASES[case]
    results, left = [], 0
    for stage in count():
        path = tmp_path / str(stage) / "a[1]"
        write(path, "old")
        old = read(path)
        code = killed(stage, path, lambda path: write(path, "newer"))
        left += len(names(path.parent)) > 1
        sweep_leftovers(path.parent, "other")
        sweep_leftovers(path.parent, path.name)
        assert names(path.parent) == [path.name]
        results.append(read(path))
        if code == 0:
            break
        assert code == KILLED
    assert left > 5
    new = results.index(results[-1])
    assert 0 < new < len(results) - 1
    assert results == [old] * new + [results[-1]] * (len(results) - new)


@pytest.mark.parametrize("case", CASES)
def test_a_sweep_that_is_killed_anywhere_is_finished_by_the_next(tmp_path: Path, case: str) -> None:
    write, _ = CASES[case]
    for stage in count():
        path = tmp_path / str(stage) / "file"
        write(path, "old")
        assert killed("whole", path, lambda path: write(path, "newer")) == KILLED
        code = killed(stage, path, lambda path: sweep_leftovers(path.parent))
        assert code in (0, KILLED)
        write(path, "newest")  # sweeps what has the same name
        assert names(path.parent) == ["file"]
        if code == 0:
            assert stage > 3
            return


def test_a_directory_that_was_replaced_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_directory(path, "old")
    assert killed("renamed", path, lambda path: write_directory(path, "new")) == KILLED
    assert read_directory(path) == "new"
    shutil.rmtree(path)
    sweep_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_what_a_library_writes_beside_its_file_is_swept_too(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.with_name(".tmpX3a9").write_bytes(b"half")  # as safetensors does
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(lambda: write_atomically(tmp_path / "file", write)) == KILLED
    assert list(tmp_path.rglob(".tmpX3a9"))
    sweep_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_what_a_live_process_writes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    foreign = {".other.abcdefgh.tmp", ".file.abcdefgh.lock", ".file.writer"}
    for name in foreign:
        (tmp_path / name).touch()

    def write(path: Path) -> None:
        path.write_text("first")
        sweep_leftovers(tmp_path)
        write_text(tmp_path / "file", "second")

    write_atomically(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "first"
    assert set(names(tmp_path)) == foreign | {"file"}


def test_a_sweep_before_the_lock_is_held_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = files.lock_file, []

    def late(file: Any, **options: Any) -> bool:
        if not swept:
            swept.append(names(tmp_path))
            monkeypatch.setattr(files, "lock_file", lock)
            sweep_leftovers(tmp_path)
        return lock(file, **options)

    monkeypatch.setattr(files, "lock_file", late)
    with reserve(tmp_path / "file") as directory:
        assert names(tmp_path) == [directory.name, directory.with_suffix(".writer").name]
    assert len(swept[0]) == 1
    assert names(tmp_path) == []


def test_nothing_is_swept_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed("half", tmp_path / "file", lambda path: write_text(path, "new")) == KILLED
    left = names(tmp_path)
    assert len(left) == 2

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_text(tmp_path / "file", "new")
    assert names(tmp_path) == sorted([*left, "file"])


def test_a_directory_that_cannot_be_replaced_stays_and_the_new_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "out", "old")
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path.name == "new" and target.name == "out":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(InputError, match=r"cannot replace .*the result is in '.*out\.2'"):
        write_directory(tmp_path / "out", "new")
    assert read_directory(tmp_path / "out") == "old"
    assert read_directory(tmp_path / "out.2") == "new"
    assert names(tmp_path) == ["out", "out.2"]
