"""What native code prints stays out of the output; what Python prints does not."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from repnet.deploy.native_output import native_output_hidden
from tests.commands import environment

OPEN = Path("/proc/self/fd")
SCRIPT = """
import os, sys
from repnet.deploy.native_output import native_output_hidden

print("before", file=sys.stderr)
try:
    with native_output_hidden():
        os.write(1, b"native one\\n")
        os.write(2, b"native two\\n")
        print("python one")
        print("python two", file=sys.stderr)
        raise ValueError
except ValueError:
    pass
os.write(2, b"after\\n")
print("last")
"""


def test_only_python_is_heard() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment(), capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert result.stdout == "python one\nlast\n"
    assert result.stderr == "before\npython two\nafter\n"


def test_streams_that_are_no_files_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with native_output_hidden():
        print("heard", file=sys.stderr)
    assert sys.stderr is stream
    assert stream.getvalue() == "heard\n"


@pytest.mark.skipif(not OPEN.is_dir(), reason="Linux lists descriptors there")
def test_no_descriptor_is_left_open() -> None:
    def descriptors() -> int:
        return len(list(OPEN.iterdir()))

    before = descriptors()
    for _ in range(5):
        with native_output_hidden():
            pass
    assert descriptors() == before
