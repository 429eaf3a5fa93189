"""An engine that its callers drive step by step, under one lock.

The caller who waits for an answer calls `step`. What a step does is in `core.py`. A table in
`docs/architecture.md` says which method may be called when.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch

from granite_paged.arguments import function, instance
from granite_paged.device import on_device
from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.core import EngineCore, Inspection
from granite_paged.engine.defaults import end_of_text, ignored_fields
from granite_paged.engine.interrupts import interrupts_wait
from granite_paged.engine.limits import LONGEST_STEP, Limits, Preemption, Warmup, check_options
from granite_paged.engine.lock import FairLock
from granite_paged.engine.prompts import Prompt, PromptEncoder, as_prompts, checked_params
from granite_paged.engine.request import OnToken, Request, SamplingParams, Scoring
from granite_paged.engine.stats import EngineStats
from granite_paged.engine.streams import StreamThread
from granite_paged.errors import InvalidArgument, InvalidSampling, RequestCancelled, TokenizerError
from granite_paged.geometry import PagedConfig
from granite_paged.progress import Progress, silent
from granite_paged.runner.memory_plan import MemoryPlan
from granite_paged.runner.runner import Runner

STATE_BYTES = 1 << 30
SWAP_BYTES = 4 << 30
QUEUE = 4096

_Asked = TypeVar("_Asked", bound=Request | Scoring)


class StepwiseEngine:
    """Requests are submitted and fill as the engine steps. `Engine` has the arguments."""

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
        warmup: Warmup = "full",
        progress: Progress = silent,
    ) -> None:
        check_options(
            step_tokens=step_tokens,
            longest_step=longest_step,
            queue=queue,
            state_bytes=state_bytes,
            swap_bytes=swap_bytes,
            preemption=preemption,
            warmup=warmup,
        )
        function("progress", progress)
        _check_parts(tokenizer, runner)
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
        self._generation_config = getattr(model, "generation_config", None)
        stop_tokens = end_of_text(self._generation_config, getattr(model, "config", None))
        self._core = EngineCore(self.runner, tokenizer, limits, state_bytes, stop_tokens)
        self._encoder = PromptEncoder(tokenizer, self.runner.vocabulary)
        self._lock = FairLock()
        self._streams = StreamThread()
        self._closed = self._is_shut = False
        if warmup == "full":
            self._warm_up(progress, limits, state_bytes)

    # -- requests -------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> Request:
        """Let a request wait. Its outputs fill as the engine steps. Never waits for a step.

        Args:
            prompt: see `granite_paged.engine.prompts` for what a prompt may be.
            params: None takes the defaults of the model's generation config.
            on_token: called with each new token.

        Raises:
            PromptError: if the prompt has no tokens, or one outside the vocabulary.
            TokenizerError: for text or messages, without a tokenizer.
            InvalidSampling: for stop strings without a tokenizer, or more samples than the queue
                holds.
            RequestTooLarge: if it would not fit alone.
            QueueFull: if too many others wait now.
            EngineClosed: after `close`.
        """
        params = checked_params(params)
        if on_token is not None:
            function("on_token", on_token)
        tokens = self._encoder.encode(prompt)
        params = params or self._defaults(len(tokens))
        if params.stop_strings and self.tokenizer is None:
            raise InvalidSampling("stop_strings need a tokenizer: pass Engine(tokenizer=...)")
        return self._handed_in(self._core.intake.samples(tokens, params, on_token))

    def submit_scoring(
        self, context: Prompt, continuations: Sequence[Prompt], *, namespace: str = ""
    ) -> Scoring:
        """Let continuations of a context wait to be scored. Raises as `submit` does.

        namespace: as `SamplingParams.namespace`.
        """
        instance("namespace", namespace, str)
        tokens = self._encoder.encode(context, "context")
        listed = as_prompts(continuations)
        encoded = tuple(self._encoder.encode(one, "continuation") for one in listed)
        return self._handed_in(self._core.intake.scoring(tokens, encoded, namespace))

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
        if params is None:
            params = SamplingParams(max_new_tokens=self._defaults(len(tokens)).max_new_tokens)
        search = self._core.intake.search(tokens, params, beams, length_penalty)
        return self._handed_in(search)

    def step(self) -> bool:
        """Run one step and deliver the one before. Return whether there was anything to do.

        Ctrl-C waits for its end, when the engine can go on; a second one interrupts at once.
        """
        with self._locked("step"):
            try:
                with torch.inference_mode(), on_device(self.runner.device):
                    return self._core.step()
            finally:
                if self._closed:  # by a callback
                    self._shut_down()

    def cancel(self, request: Request | Scoring) -> None:
        """End a request, unless it is finished. Its outputs keep what they have.

        Never waits for a step: while one runs, the request ends when it is over.

        Raises:
            InvalidArgument: for anything but a request of this engine or a finished one.
        """
        if not isinstance(request, Request | Scoring) or not self._core.knows(request):
            raise InvalidArgument(f"cancel takes a request of this engine, got {request!r:.80}")
        if not request.finished:
            self._core.intake.end(request, RequestCancelled(request.number))
            self._settle()

    def cancel_all(self) -> None:
        """End every open request, as `cancel` does."""
        for request in self._core.open:
            self.cancel(request)

    def forget_prefixes(self) -> None:
        """Drop the pages and states that are kept for prompts with a common beginning."""
        with self._locked("forget_prefixes", may_deliver=True):
            self._core.forget_prefixes()

    def close(self) -> None:
        """End every request and give the memory back. Closing twice does nothing.

        From a callback, the engine closes when the step is over.
        """
        self._closed = True
        self._core.intake.close()
        with self._locked():
            if not self._core.stepping:  # else the step that runs closes it at its end
                self._shut_down()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- numbers --------------------------------------------------------------------------------

    @property
    def default_params(self) -> SamplingParams:
        """Params of requests that bring none: what the model's generation config says.

        `dataclasses.replace(engine.default_params, seed=1)` overrides a field. A `max_length` of
        the config is counted without a prompt here.

        Raises:
            InvalidSampling: if the config has a value that cannot be used.
        """
        return self._defaults(0)

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
        return sum(job.remaining for request in self._core.open for job in list(request.jobs))

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for a row."""
        return len(self._core.inspect().scheduler.queue)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def stats(self) -> EngineStats:
        """Return counts, sizes and times of the engine. Never waits for a step."""
        return self._core.stats()

    def inspect(self) -> Inspection:
        """Return the allocator, the prefix cache and the scheduler, to look at."""
        return self._core.inspect()

    def check_valid(self) -> None:
        """Prove every invariant between two steps; BrokenInvariant says what broke."""
        with self._locked("check_valid", may_deliver=True):
            self._core.check_valid()

    # -- details --------------------------------------------------------------------------------

    def _warm_up(self, progress: Progress, limits: Limits, state_bytes: int) -> None:
        try:
            with on_device(self.runner.device):
                self.runner.warm_up(progress)
                if self.runner.device.type == "cuda":
                    core = EngineCore(self.runner, None, limits, state_bytes, frozenset())
                    with torch.inference_mode():  # as in a step
                        _rehearse(core, self.runner)
        except BaseException:
            self.close()
            raise

    def _defaults(self, prompt_tokens: int) -> SamplingParams:
        config = self._generation_config
        if ignored := ignored_fields(config):
            names = ", ".join(ignored)
            warnings.warn(f"the engine ignores {names} of the generation config", stacklevel=3)
        return SamplingParams.from_generation_config(config, prompt_tokens=prompt_tokens)

    def _check_reentry(self, method: str, *, may_deliver: bool = False) -> None:
        """Raise EngineBusy if code that a step of this thread runs must not call `method`."""
        if self._lock.is_mine:
            self._core.check_idle(method, may_deliver=may_deliver)

    @contextlib.contextmanager
    def _locked(self, method: str = "", *, may_deliver: bool = False) -> Iterator[None]:
        """Hold the lock, then take in what was handed in while it was held."""
        if method:
            self._check_reentry(method, may_deliver=may_deliver)
        with interrupts_wait():
            try:
                with self._lock:
                    yield
            finally:
                self._settle()

    def _handed_in(self, request: _Asked) -> _Asked:
        self._settle()
        return request

    @interrupts_wait()
    def _settle(self) -> None:
        """Take in what was handed in, unless the lock is held: its holder settles afterwards."""
        while len(self._core.intake) and self._lock.acquire_now():
            try:
                if not self._core.take_in():
                    break
                if self._closed and not self._core.stepping:
                    self._shut_down()
            finally:
                self._lock.release()

    def _shut_down(self) -> None:
        """Close, unless it is done already."""
        if not self._is_shut:
            self._is_shut = True
            self._core.close()
            self.runner.close()


def _rehearse(core: EngineCore, runner: Runner) -> None:
    """Answer three prompts that begin with the same tokens, one by one, and forget them.

    This loads most of torch's kernels, and allocates memory, before the first request. The second
    prompt saves the state that the third one starts from. What fails here fails again, by name, for
    a request.

    core: parts of an engine on this runner. They are closed.
    """
    length = min(core.inspect().prefix.block + 1, runner.longest - 1)
    greedy = SamplingParams(max_new_tokens=2, stop_tokens=())
    for params in (greedy, replace(greedy, temperature=1.0, logprobs=1), greedy):
        core.intake.samples((0,) * length, params, None)
        while not core.idle:
            core.step()
    core.close()


def _check_parts(tokenizer: Any, runner: Any) -> None:
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise TokenizerError(f"tokenizer must encode and decode text, got {tokenizer!r:.80}")
    if runner is not None and not hasattr(runner, "prefill"):
        raise InvalidArgument(f"runner must be a Runner, got {runner!r:.80}")
