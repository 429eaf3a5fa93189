"""The engine: requests in, tokens out, everything else shared.

One step, one way::

    schedule   host    who runs; rows and pages taken          (scheduler.py, prefix.py)
    launch     device  decode, score and prefill calls, draws  (launch.py, sampling.py)
    read       host    the numbers of the step before          (answers.py)

Reading is one step behind launching, so the device never waits for the host: a sequence that met
its stop token computes one token more, which is dropped.

Whoever waits for an answer drives the engine, step by step, under its lock; there is no thread of
its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from granite_paged.engine.beams import BeamKeeper, BeamRequest, beam_params
from granite_paged.engine.executor import Executor, PendingResult
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.request import (
    Job,
    OnToken,
    Output,
    Request,
    SamplingParams,
    Score,
    Scoring,
    check_tokens,
)
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.stats import EngineStats
from granite_paged.engine.step import Limits
from granite_paged.errors import (
    EngineClosed,
    GranitePagedError,
    InvalidSampling,
    QueueFull,
    RequestCancelled,
    TokenizerError,
    require,
)
from granite_paged.geometry import PagedConfig
from granite_paged.paging.allocator import PageAllocator
from granite_paged.progress import Progress, silent
from granite_paged.runner.memory_plan import MemoryPlan
from granite_paged.runner.runner import Runner

Prompt = str | Sequence[int]
"""A text, for an engine with a tokenizer, or tokens."""

Preemption = Literal["auto", "recompute", "swap"]
"""What becomes of a preempted job's pages: computed again, copied to the host, or the cheaper."""

PREFILL_TOKENS_A_SECOND = 1.6e5
"""granite-4.0-h-1b on an H200: 2,048 tokens in 12.7 ms (`golden/perf/nvidia-h200.json`)."""

LONGEST_STEP = 2.0
"""Times a step's decodes. Tokens then come at most three times as far apart as usual: a step with
prompts also decodes more rows than the usual one, and its calls have costs of their own."""

STEP_CHUNKS = 4
"""Of prompts in a step where nothing decodes. Many prompts share the larger graphs; the first of
them gets its token after 50 ms, on the GPU above, instead of 13."""

LEAST_CHUNK = 256
"""Tokens that are worth a call: what a prompt that could be cut anywhere, since its model has no
Mamba layers, is cut into beside few rows. With Mamba layers it is their chunk, 256 for Granite."""

HOST_BYTES_A_SECOND = 50e9
"""Pinned memory over PCIe 5.0 x16, one way."""

STATE_BYTES = 1 << 30
SWAP_BYTES = 4 << 30
QUEUE = 4096
_STALLED = 3  # steps without work while somebody waits: a bug, and better said than waited out


_SAMPLE_STRIDE = 0x9E3779B97F4A7C15
_Asked = TypeVar("_Asked", Request, Scoring, BeamRequest)


class Piece(NamedTuple):
    """What a stream yields: a token of one sample, and the text that it made certain."""

    sample: int
    token: int
    text: str


class Engine:
    """Continuous batching for one model on its device.

    Args:
        model: a `GraniteMoeHybridForCausalLM` in eval mode, not patched.
        config: page size, pools, rows.
        tokenizer: for prompts that are text, and for the text of answers.
        runner: instead of one made for `model` and `config`.
        step_tokens: most tokens computed a step, decoded ones included. None: every row's, and
            four whole chunks of prompts.
        longest_step: most that prompts may make of a step, times what its decodes alone take, one
            short chunk always allowed: so a long prompt stalls nobody for long. `math.inf`: no such
            bound, for the most tokens a second.
        queue: sequences that may wait.
        state_bytes: memory for Mamba states that prompts share; 0 turns prefix sharing off.
        swap_bytes: host memory for preempted sequences.
        preemption: see `Preemption`.

    Raises:
        UnsupportedModel, GeometryError: as for `PagedCache`.
    """

    def __init__(
        self,
        model: Any,
        config: PagedConfig | None = None,
        *,
        tokenizer: Any | None = None,
        runner: Runner | None = None,
        step_tokens: int | None = None,
        longest_step: float = LONGEST_STEP,
        queue: int = QUEUE,
        state_bytes: int = STATE_BYTES,
        swap_bytes: int = SWAP_BYTES,
        preemption: Preemption = "auto",
    ) -> None:
        self.runner = runner or Runner.for_model(model, config)
        self.tokenizer = tokenizer
        self._stop_tokens = _end_of_text(model)
        self._preemption = preemption
        self._allocator = PageAllocator(self.runner.pages, self.runner.config.page_size)
        self._outputs = OutputProcessor(tokenizer)
        self._prefix = PrefixCache(
            self._allocator,
            math.lcm(self._allocator.page_size, self.runner.alignment),
            stateful=bool(self.runner.geometry.mamba_layers),
            budget=state_bytes,
            forget=lambda pages: self._scheduler.forget(pages),  # noqa: PLW0108  # it is made below
        )
        self._scheduler = Scheduler(
            self.runner,
            self._allocator,
            self._prefix,
            self._limits(step_tokens, longest_step, queue, swap_bytes),
            self._outputs.failed,
        )
        self._outputs.scheduler = self._scheduler
        self._executor = Executor(self.runner, self._scheduler)
        self._outputs.beams = self._beams = BeamKeeper(self._scheduler, self._executor.feed)
        self._lock = threading.RLock()
        self._pending: list[PendingResult] = []
        self._open: dict[Request | Scoring, None] = {}
        self._searches: set[BeamRequest] = set()
        self._numbers = 0
        self._closed = False
        self._stalled = 0
        self._seconds = self._schedule_seconds = 0.0

    # -- answers --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress = silent,
    ) -> list[Output]:
        """Answer prompts, all at once. One output for each sample, in the order of the prompts.

        Args:
            prompts: one or several.
            params: of all, or one for each.
            progress: called as answers are finished.

        A request that is refused or fails has its `error` in its output; others are answered.
        """
        listed = as_prompts(prompts)
        params = matched(params, len(listed))
        outputs: list[list[Output]] = []
        make = [lambda p=p, w=w: self.submit(p, w) for p, w in zip(listed, params, strict=True)]
        for number, asked in enumerate(self._run(make, "generate", progress)):
            if isinstance(asked, Request):
                outputs.append(asked.outputs)
            else:
                failure = Output(-1, 0, (), finish="error", error=asked)
                outputs.append([failure] * params[number].n)
        return [output for samples in outputs for output in samples]

    def score(
        self,
        items: Sequence[tuple[Prompt, Sequence[Prompt]]],
        *,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        """Log-likelihoods of continuations. A context is computed once, and forked for each.

        Args:
            items: (context, its continuations), tokens or text.

        Raises:
            PromptError, RequestTooLarge, StepFailed, NonFiniteRequest: of the first that failed,
                when the others are done.
        """
        make = [lambda c=c, k=k: self.submit_scoring(c, k) for c, k in items]
        done = self._run(make, "score", progress)
        return [_scores(asked) for asked in done]

    def search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        progress: Progress = silent,
    ) -> list[list[Output]]:
        """Beam search: the best `beams` answers of each prompt, the best first.

        Raises:
            GranitePagedError: of the first request that was refused or failed.
        """
        make = [
            lambda p=prompt: self.submit_search(
                p, params, beams=beams, length_penalty=length_penalty
            )
            for prompt in as_prompts(prompts)
        ]
        found = []
        for asked in self._run(make, "search", progress):
            if isinstance(asked, GranitePagedError):
                raise asked
            _raise_first(asked)
            found.append(asked.outputs)
        return found

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Answer one prompt, token by token. Leaving the loop cancels the request.

        Raises:
            GranitePagedError: what ended the request early.
        """
        pieces: deque[Piece] = deque()
        request = self.submit(prompt, params, on_token=_collect(pieces))
        try:
            while not request.finished:
                self._drive()
                while pieces:
                    yield pieces.popleft()
            yield from pieces
        finally:
            self.cancel(request)
        _raise_first(request)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Piece]:
        """As `stream`, for asyncio: steps run in a thread, so the loop goes on."""
        pieces: deque[Piece] = deque()
        request = self.submit(prompt, params, on_token=_collect(pieces))
        try:
            while not request.finished:
                await asyncio.to_thread(self._drive)
                while pieces:
                    yield pieces.popleft()
            while pieces:
                yield pieces.popleft()
        finally:
            self.cancel(request)
        _raise_first(request)

    # -- step by step ---------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> Request:
        """Let a request wait; its outputs fill as the engine steps.

        Raises:
            PromptError: no tokens, or one outside the vocabulary.
            InvalidSampling: stop strings or tokens that cannot be.
            RequestTooLarge: it would not fit alone, with the pages needed and there.
            QueueFull, EngineClosed.
        """
        params = params or SamplingParams()
        tokens = check_tokens(self._tokens(prompt), self.runner.vocabulary, "prompt")
        if params.stop_strings and self.tokenizer is None:
            raise InvalidSampling("stop_strings need a tokenizer: pass Engine(tokenizer=...)")
        with self._lock:
            self._check_open()
            self._scheduler.check_fits(len(tokens) + params.max_new_tokens - 1)
            request = Request(self._numbers, tokens, params, self._stops(params), on_token)
            jobs = [self._job(request, index) for index in range(params.n)]
            leader, *leader.followers = jobs
            self._scheduler.submit([leader], followers=len(leader.followers))
            request.jobs = jobs
            request.outputs = [Output(request.number, index, tokens) for index in range(params.n)]
            return self._opened(request)

    def submit_scoring(self, context: Prompt, continuations: Sequence[Prompt]) -> Scoring:
        """Let continuations of a context wait to be scored. Raises as `submit` does."""
        vocabulary = self.runner.vocabulary
        tokens = check_tokens(self._tokens(context), vocabulary, "context")
        asked = tuple(
            check_tokens(self._tokens(one, context=False), vocabulary, "continuation")
            for one in continuations
        )
        with self._lock:
            self._check_open()
            most = len(tokens) - 1 + max(map(len, asked), default=0)
            self._scheduler.check_fits(most)
            scoring = Scoring(self._numbers, tokens, asked, [None] * len(asked))
            rank = self._scheduler.rank(0)
            job = Job(scoring, 0, rank, list(tokens), 0, most, len(tokens))
            job.pending = list(range(len(asked)))
            job.single = all(len(one) == 1 for one in asked)
            if asked:
                self._scheduler.submit([job])
            scoring.jobs = [job]
            return self._opened(scoring)

    def submit_search(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
    ) -> BeamRequest:
        """Let a beam search wait. Raises as `submit` does."""
        params = params or SamplingParams()
        tokens = check_tokens(self._tokens(prompt), self.runner.vocabulary, "prompt")
        stop_tokens = self._stops(params)
        wanted = beam_params(params, beams, len(stop_tokens))
        with self._lock:
            self._check_open()
            self._scheduler.check_fits(len(tokens) + wanted.max_new_tokens - 1)
            request = BeamRequest(self._numbers, tokens, wanted, stop_tokens)
            request.width, request.length_penalty = beams, length_penalty
            job = self._job(request, 0)
            job.exact, job.limit = True, 1
            self._scheduler.submit([job])
            request.jobs, request.scores = [job], {job: 0.0}
            request.outputs = [Output(request.number, index, tokens) for index in range(beams)]
            self._searches.add(request)
            return self._opened(request)

    def step(self) -> bool:
        """Launch one step and deliver the one before. Whether there was anything to do."""
        with self._lock, torch.inference_mode(), self._on_device():
            started = time.perf_counter()
            try:
                busy = self._step()
            except BaseException:  # interrupted: nobody knows how far it came
                self._pending = []
                self._scheduler.restart([job for asked in self._open for job in asked.jobs])
                raise
            ended, self._outputs.ended = self._outputs.ended, []
            for asked in ended:
                if asked.finished:
                    self._close_request(asked)
            self._seconds += (time.perf_counter() - started) if busy else 0.0
            return busy

    def cancel(self, request: Request | Scoring) -> None:
        """End a request where it is; what it has so far stays. Nothing, if it is finished."""
        self._end(request, RequestCancelled(request.number))

    def forget_prefixes(self) -> None:
        """Drop what is kept for prompts that begin alike; what a waiting prompt needs, too."""
        with self._lock:
            self._prefix.clear()

    def close(self) -> None:
        """End every request and give the memory back. Closing twice is nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for asked in list(self._open):
                self._end(asked, EngineClosed("the engine was closed while the request ran"))
            self._pending = []
            self._open.clear()
            self._prefix.clear()
            self.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- numbers --------------------------------------------------------------------------------

    @property
    def plan(self) -> MemoryPlan:
        """The runner's, and what the prefix cache may keep beside it."""
        kept = self._prefix.budget if self._prefix.stateful else 0
        return replace(self.runner.plan, prefix_bytes=kept)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is still to be read."""
        return not self._open and not self._pending

    @property
    def load(self) -> int:
        """Tokens that open requests have yet to compute, roughly: what a new one has ahead."""
        with self._lock:
            jobs = [job for asked in self._open for job in asked.jobs]
            return sum(job.most - job.stored for job in jobs)

    def stats(self) -> EngineStats:
        """What it did and holds."""
        with self._lock:
            counts, prefix = self._scheduler.counts, self._prefix.stats
            return EngineStats(
                steps=counts.steps,
                waiting=self._scheduler.waiting,
                running=self._scheduler.running,
                rows=self.runner.rows,
                rows_held=self.runner.rows - self._scheduler.free_rows,
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
                swapped_bytes=self._scheduler.swapped_bytes,
                restarted=counts.restarted,
                tokens=self._outputs.tokens,
                tokens_per_second=self._outputs.tokens / self._seconds if self._seconds else 0.0,
                schedule_ms=1000 * self._schedule_seconds / max(1, counts.steps),
                planned_bytes=self.plan.total_bytes,
                device_bytes=self._device_bytes(),
            )

    def check_valid(self) -> None:
        """Prove every invariant between two steps; BrokenInvariant says what broke."""
        with self._lock:
            self._scheduler.check_valid()
            for asked in self._open:
                require(not asked.finished, "a finished request is open")

    # -- details --------------------------------------------------------------------------------

    def _step(self) -> bool:
        started = time.perf_counter()
        for request in self._searches:
            self._beams.make_way(request)
        step = self._scheduler.schedule()
        self._schedule_seconds += time.perf_counter() - started
        launched = self._executor.launch(step)
        landing, self._pending = self._pending, launched
        for result in landing:
            self._outputs.read(result)
        self._scheduler.scored([part for parts in step.scores for part in parts])
        return bool(step or landing)

    def _drive(self) -> None:
        """One step for somebody who waits."""
        with self._lock:
            self._stalled = 0 if self.step() or not self._open else self._stalled + 1
            require(self._stalled < _STALLED, "requests are open, but no step has work")

    def _run(
        self, make: Sequence[Callable[[], _Asked]], what: str, progress: Progress
    ) -> list[_Asked | GranitePagedError]:
        """Submit everything, as the queue takes it, and step until all of it is finished."""
        asked: list[_Asked | GranitePagedError] = []
        try:
            asked += (self._submitted(one) for one in make)
            for done, one in enumerate(asked):
                progress(what, done, len(make))
                while not (isinstance(one, GranitePagedError) or one.finished):
                    self._drive()
            progress(what, len(make), len(make))
        finally:
            for one in asked:
                if not isinstance(one, GranitePagedError):
                    self.cancel(one)
        return asked

    def _submitted(self, submit: Callable[[], _Asked]) -> _Asked | GranitePagedError:
        while True:
            try:
                return submit()
            except QueueFull as full:
                if self.idle:
                    return full
                self._drive()
            except GranitePagedError as refusal:
                return refusal

    def _opened(self, asked: _Asked) -> _Asked:
        self._numbers += 1
        if not asked.finished:
            self._open[asked] = None
        return asked

    def _end(self, asked: Request | Scoring, error: GranitePagedError) -> None:
        with self._lock:
            if not asked.finished:
                for job in asked.jobs:
                    self._outputs.end(job, "cancelled", error)
            self._close_request(asked)

    def _close_request(self, asked: Request | Scoring) -> None:
        self._open.pop(asked, None)
        if isinstance(asked, BeamRequest):
            self._searches.discard(asked)

    def _job(self, request: Request, index: int) -> Job:
        params, tokens = request.params, request.prompt
        most = len(tokens) + params.max_new_tokens - 1  # the last token is never fed
        rank = self._scheduler.rank(params.priority)
        job = Job(request, index, rank, list(tokens), params.max_new_tokens, most, len(tokens))
        job.seed = (params.seed + index * _SAMPLE_STRIDE) % 2**63
        job.greedy = params.greedy
        return job

    def _stops(self, params: SamplingParams) -> frozenset[int]:
        stops = params.stop_tokens
        return self._stop_tokens if stops is None else frozenset(stops)

    def _tokens(self, prompt: Prompt, *, context: bool = True) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise TokenizerError("a prompt that is text needs a tokenizer: Engine(tokenizer=...)")
        tokens: list[int] = self.tokenizer(prompt, add_special_tokens=context)["input_ids"]
        return tokens

    def _limits(
        self, step_tokens: int | None, longest_step: float, queue: int, swap_bytes: int
    ) -> Limits:
        runner = self.runner
        alignment = runner.alignment if self._prefix.stateful else LEAST_CHUNK
        return Limits(
            rows=runner.rows,
            longest=runner.longest,
            step_tokens=step_tokens or STEP_CHUNKS * runner.chunk_tokens + runner.rows,
            longest_step=longest_step,
            chunk_tokens=runner.chunk_tokens,
            alignment=min(alignment, runner.chunk_tokens),
            queue=queue,
            swap_bytes=swap_bytes,
            fits=runner.shapes.fits,
            prefill_cost=runner.shapes.prefill_cost,
            decode_cost=runner.shapes.decode_cost,
            swap=self._swap_is_cheaper,
        )

    def _swap_is_cheaper(self, tokens: int) -> bool:
        if self._preemption != "auto":
            return self._preemption == "swap"
        geometry = self.runner.geometry
        pages = geometry.pages_for(tokens) * geometry.bytes_per_page
        both_ways = 2 * (pages + self.runner.row_bytes)
        recompute = tokens / PREFILL_TOKENS_A_SECOND
        cheaper = both_ways / HOST_BYTES_A_SECOND < recompute
        return bool(cheaper) and self.runner.device.type == "cuda"

    def _device_bytes(self) -> int | None:
        if self.runner.device.type != "cuda":
            return None
        return int(torch.cuda.memory_allocated(self.runner.device))

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        if self.runner.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.device(self.runner.device)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed: make another one")


def _end_of_text(model: Any) -> frozenset[int]:
    """Tokens that end an answer, by the model's own word."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        tokens = getattr(config, "eos_token_id", None)
        if tokens is not None:
            return frozenset([tokens] if isinstance(tokens, int) else tokens)
    return frozenset()


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt, by what it holds
    return list(prompts)  # type: ignore[arg-type]


def matched(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    """Params of each prompt. Raises InvalidSampling where there are more or fewer."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise InvalidSampling(f"{len(params)} params for {prompts} prompts: give one, or one each")
    return list(params)


def _collect(pieces: deque[Piece]) -> OnToken:
    return lambda output, token, text: pieces.append(Piece(output.index, token, text))


def _raise_first(request: Request) -> None:
    for output in request.outputs:
        if output.finish == "error" and output.error is not None:
            raise output.error


def _scores(asked: Scoring | GranitePagedError) -> list[Score]:
    error = asked if isinstance(asked, GranitePagedError) else asked.error
    if error is not None:
        raise error
    assert isinstance(asked, Scoring)
    return [score for score in asked.scores if score is not None]
