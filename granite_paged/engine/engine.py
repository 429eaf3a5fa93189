"""The public engine: requests in, tokens out.

The caller who waits for an answer drives the engine, step by step, under its lock; the engine has
no thread of its own. What a step does is in `core.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from granite_paged.device import on_device
from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.core import EngineCore, Inspection
from granite_paged.engine.driver import run
from granite_paged.engine.limits import LONGEST_STEP, Limits, Preemption
from granite_paged.engine.prompts import Prompt, PromptEncoder, as_prompts, checked_params, matched
from granite_paged.engine.request import (
    OnToken,
    Output,
    Request,
    SamplingParams,
    Score,
    Scoring,
)
from granite_paged.engine.stats import EngineStats
from granite_paged.errors import (
    EngineClosed,
    GranitePagedError,
    InvalidSampling,
    RequestCancelled,
)
from granite_paged.geometry import PagedConfig
from granite_paged.progress import Progress, silent
from granite_paged.runner.memory_plan import MemoryPlan
from granite_paged.runner.runner import Runner

STATE_BYTES = 1 << 30
SWAP_BYTES = 4 << 30
QUEUE = 4096

_Asked = TypeVar("_Asked", bound=Request | Scoring)


class StreamedToken(NamedTuple):
    """One token of one sample, and the text that it completed."""

    sample: int
    token: int
    text: str


class Engine:
    """Continuous batching for one model on one device.

    Any thread may call it. A request that is refused or fails ends by name; others are unaffected.

    Args:
        model: a `GraniteMoeHybridForCausalLM` in eval mode, not patched.
        config: page size, pools and rows.
        tokenizer: encodes prompts that are text, and decodes answers.
        runner: used instead of one made for `model` and `config`.
        step_tokens: most tokens computed per step, decoded ones included. None: one per row, and
            four chunks of prompts.
        longest_step: limit on a step with prompts, as a multiple of its decode-only time. One
            chunk is always allowed. `math.inf` removes the limit, for the highest throughput.
        queue: most sequences that may wait.
        state_bytes: device memory for the Mamba states of shared prefixes. 0 turns prefix sharing
            off.
        swap_bytes: host memory for preempted sequences.
        preemption: how a preempted sequence gets its pages back: "recompute", "swap" to host
            memory, or "auto", the faster of the two.

    Raises:
        UnsupportedModel: if the model's architecture is not paged.
        GeometryError: if sizes do not fit the model.
        OutOfMemory: if pools and rows do not fit the device.
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
        limits = Limits.of(
            self.runner,
            step_tokens=step_tokens,
            longest_step=longest_step,
            queue=queue,
            swap_bytes=swap_bytes,
            preemption=preemption,
        )
        stop_tokens = _end_of_text(model)
        self._core = EngineCore(self.runner, tokenizer, limits, state_bytes, stop_tokens)
        self._encoder = PromptEncoder(tokenizer, self.runner.vocabulary)
        self._lock = threading.RLock()
        self._closed = self._is_shut = False

    # -- answers --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress = silent,
    ) -> list[Output]:
        """Answer prompts, as many at once as fit.

        Args:
            prompts: one or several; see `granite_paged.engine.prompts` for what a prompt may be.
            params: for all prompts, or one for each.
            progress: called as answers are finished.

        Returns:
            One output per sample, in the order of the prompts. A request that was refused or
            failed has its `error` in its outputs.
        """
        listed = as_prompts(prompts)
        params = matched(params, len(listed))
        submits = [partial(self.submit, *pair) for pair in zip(listed, params, strict=True)]
        outputs: list[Output] = []
        for number, asked in enumerate(self._run(submits, "generate", progress)):
            if isinstance(asked, Request):
                outputs += asked.outputs
            else:
                refused = Output(-1, 0, (), finish="error", error=asked)
                outputs += [refused] * params[number].n
        return outputs

    def score(
        self,
        items: Sequence[tuple[Prompt, Sequence[Prompt]]],
        *,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        """Compute log-likelihoods of continuations. Each context is computed once.

        Args:
            items: (context, its continuations), as text or token ids.
            progress: called as contexts are finished.

        Returns:
            For each context, one score per continuation.

        Raises:
            GranitePagedError: the first refusal or failure, after the others are done.
        """
        submits = [partial(self.submit_scoring, *item) for item in items]
        done = [_sound(asked) for asked in self._run(submits, "score", progress)]
        return [[score for score in asked.scores if score is not None] for asked in done]

    def search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        progress: Progress = silent,
    ) -> list[list[Output]]:
        """Find the best `beams` answers of each prompt by beam search.

        Args:
            prompts: one or several; see `granite_paged.engine.prompts` for what a prompt may be.
            params: only `max_new_tokens`, `stop_tokens` and `priority` may be set.
            beams: number of beams, and of answers.
            length_penalty: an answer's score is its log-probability / length ** length_penalty.
            progress: called as prompts are finished.

        Returns:
            For each prompt, its answers, the best first.

        Raises:
            GranitePagedError: the first refusal or failure, after the others are done.
        """
        submits = [
            partial(self.submit_search, p, params, beams=beams, length_penalty=length_penalty)
            for p in as_prompts(prompts)
        ]
        return [_sound(asked).outputs for asked in self._run(submits, "search", progress)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[StreamedToken]:
        """Answer one prompt token by token. Leaving the loop cancels the request.

        Raises:
            GranitePagedError: what ended the request early.
        """
        tokens: deque[StreamedToken] = deque()
        request = self.submit(prompt, params, on_token=_collect(tokens))
        try:
            while not request.finished:
                self.step()
                while tokens:
                    yield tokens.popleft()
            yield from tokens
        finally:
            self.cancel(request)
        _sound(request)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[StreamedToken]:
        """Answer one prompt token by token, for asyncio. Steps run in a thread.

        Raises:
            GranitePagedError: what ended the request early.
        """
        tokens: deque[StreamedToken] = deque()
        request = self.submit(prompt, params, on_token=_collect(tokens))
        try:
            while not request.finished:
                await asyncio.to_thread(self.step)
                while tokens:
                    yield tokens.popleft()
            while tokens:
                yield tokens.popleft()
        finally:
            self.cancel(request)
        _sound(request)

    # -- step by step ---------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> Request:
        """Let a request wait. Its outputs fill as the engine steps.

        Raises:
            PromptError: if the prompt has no tokens, or one outside the vocabulary.
            InvalidSampling: for stop strings without a tokenizer.
            RequestTooLarge: if it would not fit alone.
            QueueFull: if its samples are more than may wait.
            EngineClosed: after `close`.
        """
        params = checked_params(params)
        tokens = self._encoder.encode(prompt)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidSampling("stop_strings need a tokenizer: pass Engine(tokenizer=...)")
        with self._opening():
            return self._core.open_samples(tokens, params, on_token)

    def submit_scoring(self, context: Prompt, continuations: Sequence[Prompt]) -> Scoring:
        """Let continuations of a context wait to be scored. Raises as `submit` does."""
        tokens = self._encoder.encode(context, "context")
        listed = as_prompts(continuations)
        encoded = tuple(self._encoder.encode(one, "continuation") for one in listed)
        with self._opening():
            return self._core.open_scoring(tokens, encoded)

    def submit_search(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
    ) -> BeamRequest:
        """Let a beam search wait. Raises as `submit` does."""
        params = checked_params(params)
        tokens = self._encoder.encode(prompt)
        with self._opening():
            return self._core.open_search(tokens, params, beams, length_penalty)

    def step(self) -> bool:
        """Run one step and deliver the one before. Return whether there was anything to do."""
        with self._lock:
            self._core.check_idle("step")
            try:
                with torch.inference_mode(), on_device(self.runner.device):
                    return self._core.step()
            finally:
                if self._closed:  # by a callback
                    self._shut_down()

    def cancel(self, request: Request | Scoring) -> None:
        """End a request, unless it is finished. Its outputs keep what they have.

        In the middle of a step, the request ends with the next one.
        """
        with self._lock:
            self._core.end(request, RequestCancelled(request.number))

    def forget_prefixes(self) -> None:
        """Drop the pages and states that are kept for prompts with a common beginning."""
        with self._lock:
            self._core.check_idle("forget_prefixes", may_deliver=True)
            self._core.forget_prefixes()

    def close(self) -> None:
        """End every request and give the memory back. Closing twice does nothing.

        From a callback, the engine closes when the step is over.
        """
        with self._lock:
            self._closed = True
            if not self._core.stepping:  # else the step that runs closes it at its end
                self._shut_down()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- numbers --------------------------------------------------------------------------------

    @property
    def plan(self) -> MemoryPlan:
        """Memory by use: the runner's, and what the prefix cache may keep besides."""
        return self._core.plan

    @property
    def idle(self) -> bool:
        """Whether no request is open and no result is unread."""
        return self._core.idle

    @property
    def load(self) -> int:
        """Number of tokens that open requests have yet to compute, at most."""
        with self._lock:
            jobs = (job for request in self._core.open for job in request.jobs)
            return sum(job.max_stored - job.stored for job in jobs)

    def stats(self) -> EngineStats:
        """Return counts, sizes and times of the engine."""
        with self._lock:
            return self._core.stats()

    def inspect(self) -> Inspection:
        """Return the allocator, the prefix cache and the scheduler, to look at."""
        return self._core.inspect()

    def check_valid(self) -> None:
        """Prove every invariant between two steps; BrokenInvariant says what broke."""
        with self._lock:
            self._core.check_valid()

    # -- details --------------------------------------------------------------------------------

    def _run(
        self, submits: Sequence[Callable[[], _Asked]], method: str, progress: Progress
    ) -> list[_Asked | GranitePagedError]:
        with self._lock:
            self._core.check_idle(method)
        return run(self, submits, method, progress)

    def _shut_down(self) -> None:
        """Close, unless it is done already."""
        if not self._is_shut:
            self._is_shut = True
            for request in self._core.open:
                error = EngineClosed("the engine was closed while the request ran")
                self._core.end(request, error)
            self._core.close()
            self.runner.close()

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        with self._lock:
            self._core.check_idle("submit", may_deliver=True)
            if self._closed:
                raise EngineClosed("the engine is closed: make another one")
            yield


def _end_of_text(model: Any) -> frozenset[int]:
    """Return the tokens that end an answer, by the model's own configuration."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        tokens = getattr(config, "eos_token_id", None)
        if tokens is not None:
            return frozenset([tokens] if isinstance(tokens, int) else tokens)
    return frozenset()


def _collect(tokens: deque[StreamedToken]) -> OnToken:
    return lambda output, token, text: tokens.append(StreamedToken(output.index, token, text))


def _sound(asked: _Asked | GranitePagedError) -> _Asked:
    """Return the request, or raise what ended it early."""
    if isinstance(asked, GranitePagedError):
        raise asked
    errors = [asked.error] if isinstance(asked, Scoring) else [o.error for o in asked.outputs]
    for error in errors:
        if error is not None:
            raise error
    return asked
