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
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from granite_paged.device import allocated_bytes
from granite_paged.engine.beams import BeamKeeper, BeamRequest
from granite_paged.engine.executor import Executor, PendingResult
from granite_paged.engine.intake import Intake
from granite_paged.engine.limits import Limits
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.request import Request, Scoring
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.stats import EngineStats
from granite_paged.engine.step import StepPlan
from granite_paged.errors import (
    EngineBusy,
    EngineClosed,
    GranitePagedError,
    StepFailed,
    require,
)
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
        stop_tokens: end answers where a request names no others.

    Attributes:
        intake: where requests and cancellations come in, without the lock.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any | None,
        limits: Limits,
        state_bytes: int,
        stop_tokens: frozenset[int],
    ) -> None:
        self._runner = runner
        self._allocator = PageAllocator(runner.pages, runner.config.page_size)
        self._prefix = PrefixCache(
            self._allocator,
            math.lcm(self._allocator.page_size, runner.alignment),
            stateful=bool(runner.geometry.mamba_layers),
            budget=state_bytes,
        )
        self._scheduler = Scheduler(runner, self._allocator, self._prefix, limits)
        self._executor = Executor(runner, self._scheduler)
        self._beams = BeamKeeper(self._scheduler, self._executor)
        self.intake = Intake(self._scheduler, runner.vocabulary, stop_tokens)
        self._outputs = OutputProcessor(tokenizer, self._scheduler, self._beams)
        self._pending: list[PendingResult] = []
        self._open: dict[Request | Scoring, None] = {}
        self._searches: set[BeamRequest] = set()
        self._phase: Literal["", "take in", "step", "deliver"] = ""
        self._stalled = 0
        self._closed = False
        self._has_new = False  # whether requests opened since the model was looked at
        self._seconds = self._schedule_seconds = 0.0

    @property
    def plan(self) -> MemoryPlan:
        """Memory by use: the runner's, and what the prefix cache may keep besides."""
        prefix = self._prefix
        kept = prefix.budget if prefix.stateful else 0
        return replace(self._runner.plan, prefix_bytes=kept)

    @property
    def stepping(self) -> bool:
        """Whether a step runs, or delivers its outputs."""
        return bool(self._phase)

    @property
    def busy(self) -> bool:
        """Whether state is half updated: code that runs now must not change it."""
        return self._phase in ("take in", "step")

    @property
    def idle(self) -> bool:
        """Whether no request is open or about to be, and no result is unread."""
        return not (self._open or self._pending or len(self.intake))

    @property
    def open(self) -> list[Request | Scoring]:
        """Return the requests that are not finished, those that are about to open included."""
        return [*list(self._open), *self.intake.requests]

    def knows(self, request: Request | Scoring) -> bool:
        """Whether a request is open here or about to be, or finished in any engine."""
        is_open = request.finished or request in self._open
        # and if it opens while this looks
        return is_open or request in self.intake.requests or request in self._open

    # -- requests -------------------------------------------------------------------------------

    def check_idle(self, method: str, *, may_deliver: bool) -> None:
        """Raise EngineBusy if `method` was called by code that a step runs.

        may_deliver: whether callbacks may call it, when the state of the step is complete.
        """
        if self.busy or (self.stepping and not may_deliver):
            raise EngineBusy(method)

    def step(self) -> bool:
        """Run one step and deliver the one before. Return whether there was anything to do.

        Raises:
            BrokenInvariant: if requests are open, but step after step has no work.
        """
        started = time.perf_counter()
        try:
            busy = self._step()
        finally:
            self._close_ended()
        self._stalled = 0 if busy or not self._open else self._stalled + 1
        require(self._stalled < _STALLED, "requests are open, but no step has work")
        self._seconds += (time.perf_counter() - started) if busy else 0.0
        return busy

    def take_in(self) -> bool:
        """Open and end what was handed in. Return False, and do nothing, in the middle of a step.

        A callback counts as between two steps: the state of its step is complete.
        """
        if self.busy:
            return False
        phase, self._phase = self._phase, "take in"
        try:
            while arrival := self.intake.first():
                self._take_in(*arrival)
                self.intake.drop_first()
        finally:
            self._phase = phase
        return True

    # -- looking --------------------------------------------------------------------------------

    def forget_prefixes(self) -> None:
        """Drop everything in the prefix cache, and keep nothing of what runs."""
        for job in self._scheduler.running.jobs():
            job.placed.is_shareable = False
        self._scheduler.queue.late.retry()
        self._scheduler.running.forget(self._prefix.clear())

    def close(self) -> None:
        """End every request, and drop unread results and prefixes."""
        self.intake.close()
        for request in self.open:
            self.intake.end(request, EngineClosed("the engine was closed while the request ran"))
        self._closed = True
        self.take_in()
        self._pending = []
        self.forget_prefixes()

    def inspect(self) -> Inspection:
        """Return the parts, to look at."""
        return Inspection(self._allocator, self._prefix, self._scheduler)

    def check_valid(self) -> None:
        """Prove every invariant between two steps; BrokenInvariant says what broke."""
        self.check_idle("check_valid", may_deliver=True)
        self._scheduler.check_valid()
        for request in () if self.stepping else self._open:  # a step closes them at its end
            require(not request.finished, "a finished request is open")

    def stats(self) -> EngineStats:
        """Return what was done and is held."""
        counts, running = self._scheduler.counts, self._scheduler.running
        prefix = self._prefix.stats
        tokens = self._outputs.tokens
        return EngineStats(
            steps=counts.steps,
            waiting=len(self._scheduler.queue),
            running=len(running),
            rows=running.rows.rows,
            rows_held=running.rows.rows - running.rows.free,
            pages=self._allocator.pages - 1,
            pages_held=self._allocator.held,
            pages_cached=self._prefix.pages,
            state_bytes=self._prefix.state_bytes,
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
            planned_bytes=self.plan.total_bytes,
            device_bytes=allocated_bytes(self._runner.device),
            late_captures=self._runner.late_captures,
        )

    # -- details --------------------------------------------------------------------------------

    def _take_in(self, request: Request | Scoring, error: GranitePagedError | None) -> None:
        if error is None and self._closed:
            error = EngineClosed("the engine was closed before the request ran")
        if error is None:
            try:
                self._open_request(request)
            except Exception as fault:  # it concerns this request, not the caller of this step
                self._outputs.end(request, "error", StepFailed(request.number, fault))
                self._close_request(request)
        elif not request.finished:
            self._outputs.end(request, "cancelled", error)
            self._close_request(request)

    def _open_request(self, request: Request | Scoring) -> None:
        """Let the first job of a request wait, and with it its followers."""
        priority = request.params.priority if isinstance(request, Request) else 0
        for job in request.jobs:
            job.rank = self._scheduler.queue.rank(priority)
        self._scheduler.queue.add(request.jobs[0])
        self._open[request] = None
        self._has_new = True
        if isinstance(request, BeamRequest):
            self._searches.add(request)

    def _step(self) -> bool:
        self.take_in()
        if self._has_new:
            self._look_at_model()
        try:
            self._phase = "step"
            step = self._plan()
            landing, self._pending = self._pending, self._executor.launch(step)
            for result in landing:
                self._outputs.read(result)
            self._scheduler.release(step.score_chunks)
        except BaseException:  # interrupted: how far it came is unknown
            self._pending = []
            self._scheduler.restart([job for request in self._open for job in request.jobs])
            raise
        finally:
            self._phase = ""
        self._phase = "deliver"
        try:
            return self._outputs.deliver() or bool(step or landing)
        finally:
            self._phase = ""

    def _look_at_model(self) -> None:
        """Forget prefixes if weights changed; end every request if the model cannot run."""
        self._has_new = False
        idle = not len(self._scheduler.running) and not self._pending
        try:
            if self._runner.notice_changes(idle=idle):
                self.forget_prefixes()
        except GranitePagedError as error:
            for request in list(self._open):
                self._outputs.end(request, "error", error)

    def _plan(self) -> StepPlan:
        started = time.perf_counter()
        for request in self._searches:
            if request.jobs:  # else it is over
                self._scheduler.guarded(request.jobs[0], self._beams.make_way, request)
        step = self._scheduler.schedule()
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
