"""Time and memory of prepared steps, several modes side by side.

Modes take turns within one run (A, B, then B, A, ...), so that whatever drifts, drifts for all of
them, and the i-th times of two modes are a pair. On a GPU, time is what CUDA events say, from an
idle device to the end of the last kernel: the host's part counts where the device waits for it.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from granite_paged.device import graph_bytes
from granite_paged.errors import GranitePagedError
from granite_paged.quantiles import quantile
from granite_paged.report.bench_results import Latency

FAILURES = (RuntimeError, MemoryError, GranitePagedError)
"""What one mode may fail with without ending the run: out of memory, a shape without a kernel, a
compiler's refusal. torch derives all of its own from RuntimeError."""


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Prepared:
    """A step that is ready to be timed.

    Attributes:
        step: the work; returns without waiting for the device.
        reset: puts back what a step used up; not timed.
        close: what it takes to give memory back beyond forgetting `step` and `reset`.
        note: how its caches were filled, where not by running the prompt.
        own_workspace: whether its products run on a stream of its own, and so with a workspace of
            its own: the current stream's is then none of its memory.
    """

    step: Callable[[], Any]
    reset: Callable[[], Any] = _nothing
    close: Callable[[], Any] = _nothing
    note: str = ""
    own_workspace: bool = False

    def release(self) -> None:
        """Give all memory back: close, and forget the closures that hold it."""
        close, self.step, self.reset, self.close = self.close, _nothing, _nothing, _nothing
        close()


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often a step is repeated.

    At least `least` times, then until `seconds` have gone by for all modes together or `most`
    times. A step so slow that `least` would take more than `patience` seconds is repeated `fewest`
    times; the count is in the result.
    """

    seconds: float = 3.0
    least: int = 10
    most: int = 200
    fewest: int = 3
    patience: float = 60.0

    def enough(self, done: int, elapsed: float) -> bool:
        """Whether `done` rounds that took `elapsed` seconds will do."""
        if done >= self.most:
            return True
        if done < self.least:
            return done >= self.fewest and elapsed >= self.patience
        return elapsed >= self.seconds


QUICK = Repeats(seconds=0.5, least=5, most=20)


@dataclass(slots=True)
class Samples:
    """Seconds of each repeat, in order, and what ended them early, if anything did."""

    seconds: list[float] = field(default_factory=list)
    error: str = ""

    def latency(self) -> Latency:
        """Median and percentiles in milliseconds."""
        ms = [1e3 * second for second in self.seconds]
        return Latency(quantile(ms, 0.5), quantile(ms, 0.1), quantile(ms, 0.9), len(ms))


def interleaved(
    steps: Mapping[str, Prepared], clock: Clock, repeats: Repeats
) -> dict[str, Samples]:
    """Time all steps in turn; one that fails drops out and says why."""
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
    """An error in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


class Clock:
    """Time and memory of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of one call, from an idle device until its last kernel has ended."""
        self.wait()
        if not self.gpu:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        first, last = _events()
        first.record()
        step()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def kernel_seconds(self, step: Callable[[], Any], flush: torch.Tensor | None) -> float:
        """Of the device alone: it sleeps while the host hands the work over.

        `flush`, larger than the device's cache, is overwritten before, so that inputs come from
        memory, as they do in a model whose weights have passed through the cache since.
        """
        if not self.gpu:
            return self.seconds(step)
        self.wait()
        first, last = _events()
        if flush is not None:
            flush.zero_()
        torch.cuda._sleep(_HIDING_CYCLES)  # type: ignore[no-untyped-call]
        first.record()
        step()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def graph_seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Of one call, all being made in turn by a CUDA graph; the median of some replays.

        Where each call has inputs of its own, and all are larger than the device's cache, inputs
        come from memory. On the CPU there is no graph.
        """

        def in_turn() -> None:
            for call in calls:
                call()

        replay = captured(in_turn, self.device) if self.gpu else in_turn
        times = [self.kernel_seconds(replay, None) for _ in range(_REPLAYS)]
        return quantile(times, 0.5) / len(calls)

    def allocated(self) -> int:
        """Bytes of tensors now, and of what CUDA graphs keep to themselves."""
        if not self.gpu:
            return 0
        self.wait()
        return torch.cuda.memory_allocated(self.device) + graph_bytes(self.device)

    def peak(self, step: Callable[[], Any]) -> int | None:
        """Most bytes at once while `step` runs; None on the CPU.

        Counted are all live tensors (weights, caches, pools, activations) as torch's allocator has
        them at the highest moment, and the private memory of CUDA graphs, which replays use without
        telling the allocator. Not counted are the CUDA context and memory that the allocator holds
        in reserve.
        """
        if not self.gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) + graph_bytes(self.device)


_REPLAYS = 15
_HIDING_CYCLES = 2_000_000  # about a millisecond: longer than the host takes for any one call


def _events() -> tuple[Any, Any]:
    make: Any = torch.cuda.Event
    return make(enable_timing=True), make(enable_timing=True)


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The replay of a CUDA graph of the step, which ran once before: everything is compiled."""
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
    """Let go of everything nobody refers to, reserves included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def level_workspaces(device: torch.device) -> int:
    """Have cuBLAS keep one workspace, this stream's, so that peaks repeat from run to run.

    It keeps one for every stream that ever multiplied, tens of megabytes each, and the first to use
    a stream would pay for all. Only where no CUDA graph is alive: graphs may compute in them.

    Returns:
        Bytes of the one that is kept.
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
    """Release all of them on the way out, whatever happens."""
    try:
        yield
    finally:
        for prepared in steps.values():
            prepared.release()
        release_cached_memory(device)
