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
from typing import Any, Literal, NamedTuple, TypeVar

from granite_paged.device import allocated_bytes
from granite_paged.engine.beams import BeamKeeper, BeamRequest, beam_params
from granite_paged.engine.executor import Executor, PendingResult
from granite_paged.engine.job import BeamJob, SampleJob, ScoringJob
from granite_paged.engine.limits import Limits
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.request import OnToken, Output, Request, SamplingParams, Scoring
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.stats import EngineStats
from granite_paged.engine.step import StepPlan
from granite_paged.errors import EngineBusy, GranitePagedError, require
from granite_paged.paging.allocator import PageAllocator
from granite_paged.runner.memory_plan import MemoryPlan
from granite_paged.runner.runner import Runner

_STALLED = 3  # steps without work while requests are open: a bug, better raised than waited out


SAMPLE_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two samples of a request: 2**64 divided by the golden ratio, made odd."""

_Asked = TypeVar("_Asked", bound=Request | Scoring)


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
        self._stop_tokens = stop_tokens
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
        self._outputs = OutputProcessor(tokenizer, self._scheduler, self._beams)
        self._pending: list[PendingResult] = []
        self._open: dict[Request | Scoring, None] = {}
        self._searches: set[BeamRequest] = set()
        self._cancelled: list[tuple[Request | Scoring, GranitePagedError]] = []
        self._phase: Literal["", "step", "deliver"] = ""
        self._numbers = 0
        self._stalled = 0
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
    def idle(self) -> bool:
        """Whether no request is open and no result is unread."""
        return not self._open and not self._pending

    @property
    def open(self) -> list[Request | Scoring]:
        """Return the requests that are not finished."""
        return list(self._open)

    # -- requests -------------------------------------------------------------------------------

    def open_samples(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        on_token: OnToken | None,
    ) -> Request:
        """Let the samples of a prompt wait. Raises RequestTooLarge, QueueFull."""
        self._scheduler.queue.check_room(params.n)
        longest = self._check_fits(len(prompt) + params.max_new_tokens - 1)
        request = Request(self._numbers, prompt, params, self._stops(params), on_token)
        request.jobs = [
            SampleJob(
                request=request,
                rank=self._scheduler.queue.rank(params.priority),
                tokens=list(prompt),
                max_stored=longest,
                index=index,
                limit=params.max_new_tokens,
                seed=(params.seed + index * SAMPLE_STRIDE) % 2**63,
                greedy=params.greedy,
            )
            for index in range(params.n)
        ]
        request.jobs[0].followers = request.jobs[1:]
        return self._opened(request, outputs=params.n)

    def open_scoring(
        self, context: tuple[int, ...], continuations: tuple[tuple[int, ...], ...]
    ) -> Scoring:
        """Let continuations of a context wait. Raises RequestTooLarge, QueueFull."""
        longest = self._check_fits(len(context) - 1 + max(map(len, continuations), default=0))
        scoring = Scoring(self._numbers, context, continuations, [None] * len(continuations))
        rank = self._scheduler.queue.rank(0)
        scoring.jobs = [
            ScoringJob(request=scoring, rank=rank, tokens=list(context), max_stored=longest)
        ]
        return self._opened(scoring)

    def open_search(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        width: int,
        length_penalty: float,
    ) -> BeamRequest:
        """Let a beam search wait. Raises InvalidSampling, RequestTooLarge, QueueFull."""
        stops = self._stops(params)
        params = beam_params(params, width, len(stops), self._runner.vocabulary)
        longest = self._check_fits(len(prompt) + params.max_new_tokens - 1)
        request = BeamRequest(
            self._numbers, prompt, params, stops, width=width, length_penalty=length_penalty
        )
        rank = self._scheduler.queue.rank(params.priority)
        beam = BeamJob(request=request, rank=rank, tokens=list(prompt), max_stored=longest, limit=1)
        request.jobs, request.scores = [beam], {beam: 0.0}
        self._searches.add(self._opened(request, outputs=width))
        return request

    def check_idle(self, method: str, *, may_deliver: bool = False) -> None:
        """Raise EngineBusy if `method` was called by code that a step runs.

        may_deliver: whether callbacks may call it, when the state of the step is complete.
        """
        if self._phase == "step" or (self._phase and not may_deliver):
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

    def end(self, request: Request | Scoring, error: GranitePagedError) -> None:
        """End a request as it is, unless it is finished. In the middle of a step: with the next."""
        if self._phase == "step":
            self._cancelled.append((request, error))
            return
        if not request.finished:
            self._outputs.end(request, "cancelled", error)
        self._close_request(request)

    # -- looking --------------------------------------------------------------------------------

    def forget_prefixes(self) -> None:
        """Drop everything in the prefix cache."""
        self._scheduler.running.forget(self._prefix.clear())

    def close(self) -> None:
        """Drop unread results and prefixes."""
        self._pending = []
        self.forget_prefixes()

    def inspect(self) -> Inspection:
        """Return the parts, to look at."""
        return Inspection(self._allocator, self._prefix, self._scheduler)

    def check_valid(self) -> None:
        """Prove every invariant between two steps; BrokenInvariant says what broke."""
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
        )

    # -- details --------------------------------------------------------------------------------

    def _check_fits(self, tokens: int) -> int:
        self._scheduler.check_fits(tokens)
        return tokens

    def _stops(self, params: SamplingParams) -> frozenset[int]:
        stops = params.stop_tokens
        return self._stop_tokens if stops is None else frozenset(stops)

    def _opened(self, request: _Asked, outputs: int = 0) -> _Asked:
        """Let the first job of a request wait, and with it its followers."""
        if isinstance(request, Request):
            request.outputs = [Output(request.number, i, request.prompt) for i in range(outputs)]
        if not request.finished:
            self._scheduler.submit(request.jobs[0])
            self._open[request] = None
        self._numbers += 1
        return request

    def _step(self) -> bool:
        self._end_cancelled()
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

    def _end_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, []
        for request, error in cancelled:
            self.end(request, error)

    def _plan(self) -> StepPlan:
        started = time.perf_counter()
        for request in self._searches:
            self._beams.make_way(request)
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
