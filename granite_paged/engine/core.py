"""The engine's parts, wired in one line, and the one way through a step.

::

    plan      host     who runs; rows and pages are taken       scheduler.py
    run       device   decode, score and prefill calls          executor.py, sampling.py
    read      host     numbers of the step before               outputs.py
    deliver   host     text, callbacks and errors: user code    outputs.py

Reading is one step behind running, so the device never waits for the host: a sequence that met its
stop token computes one more token, which is dropped.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

from granite_paged.engine.beams import BeamKeeper, BeamRequest
from granite_paged.engine.executor import Executor, PendingResult
from granite_paged.engine.limits import Limits
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.request import Request, Scoring
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.stats import EngineStats
from granite_paged.engine.step import StepPlan
from granite_paged.errors import GranitePagedError, require
from granite_paged.paging.allocator import PageAllocator
from granite_paged.runner.memory_plan import MemoryPlan
from granite_paged.runner.runner import Runner

_STALLED = 3  # steps without work while requests are open: a bug, better raised than waited out


class Inspection(NamedTuple):
    """An engine's parts, for tests and profilers to look at. Changing them breaks the engine."""

    allocator: PageAllocator
    prefix: PrefixCache
    scheduler: Scheduler


class EngineCore:
    """Steps open requests. It has no lock and no thread: its caller has.

    Args:
        state_bytes: memory for Mamba states that prompts share; 0 turns prefix sharing off.
    """

    def __init__(
        self, runner: Runner, tokenizer: Any | None, limits: Limits, state_bytes: int
    ) -> None:
        self.runner = runner
        self.allocator = PageAllocator(runner.pages, runner.config.page_size)
        self.prefix = PrefixCache(
            self.allocator,
            math.lcm(self.allocator.page_size, runner.alignment),
            stateful=bool(runner.geometry.mamba_layers),
            budget=state_bytes,
        )
        self.scheduler = Scheduler(runner, self.allocator, self.prefix, limits)
        self._executor = Executor(runner, self.scheduler)
        self._beams = BeamKeeper(self.scheduler, self._executor)
        self._outputs = OutputProcessor(tokenizer, self.scheduler, self._beams)
        self._pending: list[PendingResult] = []
        self._open: dict[Request | Scoring, None] = {}
        self._searches: set[BeamRequest] = set()
        self._stalled = 0
        self._seconds = self._schedule_seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request is open and no result is unread."""
        return not self._open and not self._pending

    @property
    def open(self) -> list[Request | Scoring]:
        """Return the requests that are not finished."""
        return list(self._open)

    def add(self, request: Request | Scoring) -> None:
        """Submit the jobs of a request. Raises QueueFull."""
        if not request.finished:
            leader, *_ = request.jobs
            self.scheduler.submit(leader)
            self._open[request] = None
            if isinstance(request, BeamRequest):
                self._searches.add(request)

    def step(self) -> bool:
        """Run one step and deliver the one before. Return whether there was anything to do.

        Raises:
            BrokenInvariant: if requests are open, but step after step has no work.
        """
        started = time.perf_counter()
        busy = self._step()
        self._close_ended()
        self._stalled = 0 if busy or not self._open else self._stalled + 1
        require(self._stalled < _STALLED, "requests are open, but no step has work")
        self._seconds += (time.perf_counter() - started) if busy else 0.0
        return busy

    def end(self, request: Request | Scoring, error: GranitePagedError) -> None:
        """End a request as it is, unless it is finished."""
        if not request.finished:
            for job in request.jobs:
                self._outputs.end(job, "cancelled", error)
        self._close_request(request)

    def forget_prefixes(self) -> None:
        """Drop everything in the prefix cache."""
        self.scheduler.running.forget(self.prefix.clear())

    def close(self) -> None:
        """Drop unread results and prefixes."""
        self._pending = []
        self.forget_prefixes()

    def inspect(self) -> Inspection:
        """Return the parts, to look at."""
        return Inspection(self.allocator, self.prefix, self.scheduler)

    def check_valid(self) -> None:
        """Prove every invariant between two steps; BrokenInvariant says what broke."""
        self.scheduler.check_valid()
        for request in self._open:
            require(not request.finished, "a finished request is open")

    def stats(self, plan: MemoryPlan, device_bytes: int | None) -> EngineStats:
        """Return what was done and is held."""
        counts, prefix, running = self.scheduler.counts, self.prefix.stats, self.scheduler.running
        tokens = self._outputs.tokens
        return EngineStats(
            steps=counts.steps,
            waiting=len(self.scheduler.queue),
            running=len(running),
            rows=running.rows.rows,
            rows_held=running.rows.rows - running.rows.free,
            pages=self.allocator.pages - 1,
            pages_held=self.allocator.held,
            pages_cached=self.prefix.pages,
            state_bytes=self.prefix.state_bytes,
            prefix_hits=prefix.hits,
            prefix_misses=prefix.misses,
            tokens_hit=prefix.tokens_hit,
            prefix_hit_rate=prefix.hit_rate,
            preempted=counts.preempted,
            swapped=counts.swapped,
            swapped_bytes=running.swapped_bytes,
            restarted=counts.restarted,
            tokens=tokens,
            tokens_per_second=tokens / self._seconds if self._seconds else 0.0,
            schedule_ms=1000 * self._schedule_seconds / max(1, counts.steps),
            planned_bytes=plan.total_bytes,
            device_bytes=device_bytes,
        )

    # -- details --------------------------------------------------------------------------------

    def _step(self) -> bool:
        try:
            step = self._plan()
            landing, self._pending = self._pending, self._executor.launch(step)
            for result in landing:
                self._outputs.read(result)
            self.scheduler.release(step.score_chunks)
        except BaseException:  # interrupted: how far it came is unknown
            self._pending = []
            self.scheduler.restart([job for request in self._open for job in request.jobs])
            raise
        return self._outputs.deliver() or bool(step or landing)

    def _plan(self) -> StepPlan:
        started = time.perf_counter()
        for request in self._searches:
            self._beams.make_way(request)
        step = self.scheduler.schedule()
        self._schedule_seconds += time.perf_counter() - started
        return step

    def _close_ended(self) -> None:
        ended, self._outputs.ended = self._outputs.ended, []
        for request in ended:
            if request.finished:
                self._close_request(request)

    def _close_request(self, request: Request | Scoring) -> None:
        self._open.pop(request, None)
        if isinstance(request, BeamRequest):
            self._searches.discard(request)
