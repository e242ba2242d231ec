"""A form in a process of its own, where no other runtime's threads, caches or settings are."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from repnet.bench.recipe import Recipe, reason_of
from repnet.deploy.formats import format_named
from repnet.deploy.latency import time_passes
from repnet.deploy.native_output import silence_torch

WARMUP = 10  # passes, or as many as fit into the seconds below, but not fewer than 3
WARMUP_SECONDS = 2.0
SETTLE = 0.03  # seconds before a turn, in which the threads of the one before go to sleep
WAKE = 100.0  # milliseconds; the threads and caches of a faster form are woken by an untimed pass


class WorkerError(RuntimeError):
    """The process of a form could not do what it was told; the message says why."""


class Worker:
    """A process that holds one form; each method runs there.

    Args:
        recipe: of the form.
        threads: that it may use on the CPU.
    """

    def __init__(self, recipe: Recipe, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # no threads or CUDA context of this process
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, recipe, threads), daemon=True)
        with _environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)):
            self.process.start()
        theirs.close()

    def load(self) -> None:
        """Load the form, and remember how much memory there was before."""
        self._call("load")

    def warm_up(self, images: numpy.ndarray, batch: int) -> tuple[numpy.ndarray, float]:
        """Run a batch until its speed is steady.

        Args:
            images: that are repeated to make a batch.
            batch: images.

        Returns:
            Its output, and the milliseconds of the last pass.
        """
        output, milliseconds = self._call("warm_up", images, batch)
        return output, milliseconds

    def turn(self, passes: int) -> tuple[list[float], float]:
        """Run the same batch again: the milliseconds of each pass, and the CPU time of all."""
        times, cpu = self._call("turn", passes)
        return times, cpu

    def memory(self) -> int | None:
        """Return the bytes that the form needed at most since it was warmed up."""
        found: int | None = self._call("memory")
        return found

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            self.connection.send((name, arguments))
            done, result = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(timeout=5)
            code = self.process.exitcode
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with {code}"
            raise WorkerError(f"its process ended {how}") from error
        if not done:
            raise WorkerError(result)
        return result


def _serve(connection: Connection, recipe: Recipe, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reports
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the report's
    silence_torch()
    _pin(threads)
    held = _Held(recipe)
    with suppress(EOFError, KeyboardInterrupt), torch.inference_mode():
        while True:
            name, arguments = connection.recv()
            try:
                connection.send((True, getattr(held, name)(*arguments)))
            except Exception as error:  # what other packages raise
                connection.send((False, reason_of(error)))


class _Held:
    """The form, in its process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.device = recipe, torch.device(recipe.device)
        self.baseline = 0

    def load(self) -> None:
        form = self.recipe.form
        if form.runtime is not None:
            for package in format_named(form.runtime).packages:
                importlib.import_module(package)
        else:  # imports what the network is made of, without its weights
            torch.load(self.recipe.path, map_location="meta", weights_only=False)
        if form.compile is not None:
            importlib.import_module("torch._inductor.compile_fx")
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # the fastest algorithm, found in the warm-up
            torch.zeros(1, device=self.device)
        self.baseline = self._used()
        self.run = _loaded(self.recipe)

    def warm_up(self, images: numpy.ndarray, batch: int) -> tuple[numpy.ndarray, float]:
        repeated = torch.from_numpy(images)[torch.arange(batch) % len(images)]
        self.call: Callable[[], Any] = partial(self.run, repeated.to(self.device))
        started, passes = time.perf_counter(), 0
        while passes < 3 or (passes < WARMUP and time.perf_counter() - started < WARMUP_SECONDS):
            (milliseconds,) = time_passes(self.call, 1, device=self.device)
            passes += 1
        output = self.call().float().cpu().numpy().copy()
        gc.collect()
        self._forget_peak()
        return output, milliseconds

    def turn(self, passes: int) -> tuple[list[float], float]:
        time.sleep(SETTLE)
        before = time.process_time()
        times = time_passes(self.call, 1, device=self.device)
        if times[0] <= WAKE:
            before, times = time.process_time(), []
        times += time_passes(self.call, passes - len(times), device=self.device)
        return times, time.process_time() - before

    def memory(self) -> int | None:
        if self.device.type != "cuda":
            return max(0, _memory("VmHWM") - self.baseline)
        if self.recipe.form.runtime is not None:
            return None  # it has an allocator of its own, which cannot be asked
        # The pools of CUDA graphs count as reserved only.
        pools = self.recipe.form.compile == "reduce-overhead"
        used = torch.cuda.memory_reserved() if pools else torch.cuda.max_memory_allocated()
        return used - self.baseline

    def _used(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else _memory("VmRSS")

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS


def _loaded(recipe: Recipe) -> Callable[[Tensor], Tensor]:
    form = recipe.form
    if form.runtime is not None:
        load = format_named(form.runtime).load
        return load(recipe.path, precision=form.precision, device=recipe.device)
    # Written by this command a moment ago, in a directory of its own.
    network = torch.load(recipe.path, weights_only=False).to(recipe.device)
    model: nn.Module = InPrecision(network, form.precision, form.channels_last).eval()
    if form.compile is None:
        return model
    if recipe.device == "cpu":
        import torch._inductor.config as inductor

        inductor.freezing = True  # weights are constants: laid out for the kernels beforehand
    mode = None if form.compile == "default" else form.compile
    return torch.compile(model, mode=mode, dynamic=False)


class InPrecision(nn.Module):
    """A network in a precision and a memory format; float32 images in, float32 logits out.

    Args:
        network: changed in place.
        precision: `fp32`, `bf16` or `fp16`.
        channels_last: memory format.
    """

    def __init__(self, network: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            precision
        ]
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(self.dtype).to(memory_format=self.layout)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.to(dtype=self.dtype, memory_format=self.layout))
        return logits.float()


def _memory(key: str) -> int:
    """Return a number of bytes of this process, 0 where the system does not tell it."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB", status.read_text() if status.exists() else "", re.M)
    return int(found[1]) * 1024 if found else 0


def _pin(threads: int) -> None:
    """Give all runtimes the same number of threads, and no more cores than that."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[:threads])


def cores() -> list[int]:
    """Return the processors that this process may use, one of each core before their twins."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))
    seen: set[str] = set()
    first: list[int] = []
    twins: list[int] = []
    for index in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{index}/topology/thread_siblings_list")
        core = siblings.read_text() if siblings.exists() else str(index)
        (twins if core in seen else first).append(index)
        seen.add(core)
    return first + twins


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
