"""`signal_stack_kept`: what OpenVINO does to signal handlers is undone."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (
        ("ss_sp", ctypes.c_void_p),
        ("ss_flags", ctypes.c_int),
        ("ss_size", ctypes.c_size_t),
    )


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread the memory back on which its signal handlers ran before.

    The CPU plugin of each `openvino.Core` puts its own memory there and frees it when it ends. If
    the cores do not end in the reverse order, or in another thread, handlers are left with memory
    that is gone, and the next signal, such as Ctrl-C or the end of a data loader's process, is a
    segmentation fault (seen with OpenVINO 2026.4). Python's own memory is large enough for the
    registers of AMX, for which OpenVINO does it.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
