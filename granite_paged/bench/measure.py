"""Time and memory of prepared steps, with several modes side by side.

Modes take turns within one run (A, B, then B, A, ...). Drift of the machine then affects all of
them, and the i-th times of two modes form a pair. On a GPU, CUDA events measure the time from an
idle device to the end of the last kernel; time on the host counts where the device waits for it.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from granite_paged.device import graph_bytes, is_out_of_memory
from granite_paged.errors import GranitePagedError
from granite_paged.quantiles import quantile
from granite_paged.report.bench_results import Latency

FAILURES = (RuntimeError, MemoryError, GranitePagedError)
"""Failures of one mode that do not end the run: out of memory, a shape without a kernel, a compiler
error. torch derives all its errors from RuntimeError."""


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Prepared:
    """A step that is ready to be timed.

    Attributes:
        step: the work; returns without waiting for the device.
        reset: restores the state before a step; not timed.
        close: releases memory that is not released by dropping `step` and `reset`.
        note: how the caches were filled, if not by running the whole prompt.
        own_workspace: whether matrix products run on a stream of their own, with a cuBLAS
            workspace of their own; the current stream's workspace is then not counted.
    """

    step: Callable[[], Any]
    reset: Callable[[], Any] = _nothing
    close: Callable[[], Any] = _nothing
    note: str = ""
    own_workspace: bool = False

    def release(self) -> None:
        """Release all memory: close, and drop the closures that hold it."""
        close, self.step, self.reset, self.close = self.close, _nothing, _nothing, _nothing
        close()


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often a step is repeated.

    At least `least` times, then until all modes together took `seconds`, or `most` times. A step
    so slow that `least` repeats would take more than `patience` seconds is repeated `fewest`
    times. Results hold the number of repeats.
    """

    seconds: float = 3.0
    least: int = 10
    most: int = 200
    fewest: int = 3
    patience: float = 60.0

    def enough(self, done: int, elapsed: float) -> bool:
        """Return whether `done` rounds that took `elapsed` seconds are enough."""
        if done >= self.most:
            return True
        if done < self.least:
            return done >= self.fewest and elapsed >= self.patience
        return elapsed >= self.seconds


QUICK = Repeats(seconds=0.5, least=5, most=20)


@dataclass(slots=True)
class Samples:
    """Seconds of each repeat, in order, and the error that ended them early, if any."""

    seconds: list[float] = field(default_factory=list)
    error: str = ""

    def latency(self) -> Latency:
        """Return the median and the 10th and 90th percentiles, in milliseconds."""
        ms = [1e3 * second for second in self.seconds]
        return Latency(quantile(ms, 0.5), quantile(ms, 0.1), quantile(ms, 0.9), len(ms))


def interleaved(
    steps: Mapping[str, Prepared], clock: Clock, repeats: Repeats
) -> dict[str, Samples]:
    """Time all steps in turn; a step that fails drops out, and its samples hold the reason."""
    samples = {name: Samples() for name in steps}
    begin, rounds = time.perf_counter(), 0
    while not repeats.enough(rounds, time.perf_counter() - begin):
        running = [name for name in steps if not samples[name].error]
        if not running:
            break
        for name in running if rounds % 2 == 0 else reversed(running):
            _once(steps[name], clock, samples[name])
        rounds += 1
    return samples


def _once(prepared: Prepared, clock: Clock, samples: Samples) -> None:
    try:
        prepared.reset()
        samples.seconds.append(clock.seconds(prepared.step))
    except FAILURES as error:
        samples.error = reason(error)


def reason(error: BaseException) -> str:
    """Return an error as one line of at most 200 characters.

    Every error that says that a GPU's memory ran out is named `OutOfMemoryError`.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = "OutOfMemoryError" if is_out_of_memory(error) else type(error).__name__
    return f"{name}: {lines[0] if lines else 'no message'}"[:200]


class Clock:
    """Measures time and memory on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Callable[[], Any]) -> float:
        """Time one call, from an idle device until its last kernel has ended."""
        self.wait()
        if not self.gpu:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        return _between_events(step)

    def kernel_seconds(
        self, step: Callable[[], Any], flush: torch.Tensor | None, cycles: int = 0
    ) -> float:
        """Time one call on the device alone: the device sleeps while the host queues the work.

        It sleeps for `cycles`, and for about a millisecond at least.

        First overwrites `flush`, which is larger than the device's cache, so that inputs come from
        memory. In a model they do too, because its weights pass through the cache in between.
        """
        if not self.gpu:
            return self.seconds(step)
        self.wait()
        if flush is not None:
            flush.zero_()
        torch.cuda._sleep(max(_HIDING_CYCLES, cycles))  # type: ignore[no-untyped-call]
        return _between_events(step)

    def graph_seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Return the median time of one call, when a CUDA graph makes all calls in turn.

        Inputs come from memory if each call has its own and together they exceed the device's
        cache. On the CPU, the calls run without a graph.
        """

        def in_turn() -> None:
            for call in calls:
                call()

        replay = captured(in_turn, self.device) if self.gpu else in_turn
        times = [self.kernel_seconds(replay, None) for _ in range(_REPLAYS)]
        return quantile(times, 0.5) / len(calls)

    def allocated(self) -> int:
        """Return the bytes of all tensors, including the private memory of CUDA graphs."""
        if not self.gpu:
            return 0
        self.wait()
        return torch.cuda.memory_allocated(self.device) + graph_bytes(self.device)

    def peak(self, step: Callable[[], Any]) -> int | None:
        """Return the peak number of bytes while `step` runs; None on the CPU.

        Counts all tensors alive at the peak (weights, caches, pools, activations), as torch's
        allocator sees them, and the private memory of CUDA graphs, which replays use without the
        allocator. Does not count the CUDA context or memory that the allocator keeps in reserve.
        """
        if not self.gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) + graph_bytes(self.device)


_REPLAYS = 15
_HIDING_CYCLES = 2_000_000  # about a millisecond: longer than the host needs for any call


def _between_events(step: Callable[[], Any]) -> float:
    event: Any = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)
    first.record()
    step()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Run the step once, to compile it; capture it in a CUDA graph, and return its replay."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def release_cached_memory(device: torch.device) -> None:
    """Free unreferenced tensors, and return cached memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def level_workspaces(device: torch.device) -> int:
    """Reduce cuBLAS to one workspace, for this stream, so that peaks repeat from run to run.

    cuBLAS keeps a workspace of tens of megabytes for each stream that ever multiplied, and the
    first measurement to use a stream would count it. Call this only while no CUDA graph is alive:
    graphs may use the workspaces.

    Returns:
        Size of the remaining workspace in bytes.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated(device)
    square = torch.ones(64, 64, device=device)
    torch.mm(square, square)
    del square
    release_cached_memory(device)
    return int(torch.cuda.memory_allocated(device) - before)


@contextlib.contextmanager
def released(steps: Mapping[str, Prepared], device: torch.device) -> Iterator[None]:
    """Release all steps when the block ends, also after an error."""
    try:
        yield
    finally:
        for prepared in steps.values():
            prepared.release()
        release_cached_memory(device)
