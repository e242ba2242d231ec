"""What native runtimes print past Python, which is not for the reader of a command's output."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


def silence_torch() -> None:
    """Leave out what torch logs of CUDA on a machine without a GPU, and of its own enums."""
    for name in ("torch.utils.cpp_extension", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def native_output_hidden() -> Iterator[None]:
    """Drop what native code writes to the descriptors of standard output and error.

    What Python writes to `sys.stdout` and `sys.stderr` is shown as before.
    """
    silence_torch()
    with ExitStack() as stack:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nowhere)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            stream = getattr(sys, name)
            try:
                kept = os.dup(descriptor)
            except OSError:  # closed
                continue
            stack.callback(os.close, kept)
            if _descriptor(stream) == descriptor:
                shown = open(kept, "w", encoding=stream.encoding, buffering=1, closefd=False)  # noqa: SIM115
                stream.flush()
                setattr(sys, name, shown)
                stack.callback(shown.close)
                stack.callback(setattr, sys, name, stream)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(nowhere, descriptor)
        yield


def _descriptor(stream: object) -> int | None:
    try:
        return stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # in a notebook, or captured
        return None
