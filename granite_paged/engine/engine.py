"""The public engine: prompts in, answers out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from granite_paged.arguments import function
from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.interrupts import interrupts_wait
from granite_paged.engine.prompts import (
    Chat,
    Message,
    Prompt,
    as_prompts,
    context_and_continuations,
    conversations,
    matched,
    samples_of,
    scoring_items,
)
from granite_paged.engine.request import Output, Request, SamplingParams, Score, Scoring
from granite_paged.engine.stepwise import StepwiseEngine
from granite_paged.engine.streams import AsyncStream, StreamedToken, TokenBuffer
from granite_paged.errors import GranitePagedError, QueueFull
from granite_paged.progress import Progress, silent

_Asked = TypeVar("_Asked", bound=Request | Scoring)


class Engine(StepwiseEngine):
    """Continuous batching for one model on one device.

    Any thread may call it. A request that is refused or fails ends by name; others are unaffected.

    Args:
        model: a `GraniteMoeHybridForCausalLM` in eval mode, not patched.
        config: page size, pools and rows.
        tokenizer: encodes prompts that are text, and decodes answers.
        runner: used instead of one made for `model` and `config`.
        step_tokens: most tokens computed per step, decoded ones included. None: one per row, and
            four chunks of prompts.
        longest_step: limit on a step with prompts while a streamed request decodes, as a multiple
            of the step's decode-only time. One chunk is always allowed. `math.inf` removes the
            limit. Requests of `stream` and `astream`, with a callback, or with
            `SamplingParams(streamed=True)` are streamed.
        queue: most sequences that may wait.
        state_bytes: device memory for the Mamba states of shared prefixes. 0 turns prefix sharing
            off.
        swap_bytes: host memory for preempted sequences.
        preemption: how a preempted sequence gets its pages back: "recompute", "swap" to host
            memory, or "auto", the one estimated to be faster.
        warmup: "full" compiles and captures every step on a GPU before the first request; "lazy"
            does so as they occur, while requests wait. A CPU needs neither.
        progress: called during a full warm-up.

    Raises:
        UnsupportedModel: if the model's architecture is not paged.
        GeometryError: if sizes do not fit the model.
        OutOfMemory: if pools and rows do not fit the device.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        progress: Progress = silent,
    ) -> list[Output]:
        """Answer prompts, as many at once as fit.

        Args:
            prompts: one or several; see `granite_paged.engine.prompts` for what a prompt may be.
            params: for all prompts, or one for each. None takes the defaults of the model's
                generation config, as transformers' `generate()` does; see `default_params`.
            progress: called as answers are finished.

        Returns:
            One output per sample, in the order of the prompts. A request that was refused or
            failed has its `error` in its outputs.
        """
        listed = as_prompts(prompts)
        pairs = list(zip(listed, matched(params, len(listed)), strict=True))
        return self.generate_pairs(pairs, progress=progress)

    def generate_pairs(
        self,
        pairs: Sequence[tuple[Prompt, SamplingParams | None]],
        *,
        progress: Progress = silent,
    ) -> list[Output]:
        """Answer as `generate` does. Each of `pairs` is one prompt and its params.

        So a number in the place of a prompt is refused, where `generate` would take a list of
        numbers as one prompt.
        """
        encodings = [partial(self._encoded, *pair) for pair in pairs]
        outputs: list[Output] = []
        for pair, asked in zip(pairs, self._run(encodings, "generate", progress), strict=True):
            if isinstance(asked, Request):
                outputs += asked.outputs
            else:
                outputs += self._refused(*pair, asked)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        progress: Progress = silent,
        **template: Any,
    ) -> list[Output]:
        """Answer conversations, each as the tokenizer's chat template writes it.

        The template adds the generation prompt and all special tokens; no others are added.

        Args:
            messages: one conversation or several: lists of {"role": ..., "content": ...}.
            params: as in `generate`.
            progress: called as answers are finished.
            template: passed to the template, for example `tools`.

        Returns:
            As `generate` does. A conversation that the template refuses has its `error` in its
            outputs.

        Raises:
            TokenizerError: if there is no tokenizer.
            PromptError: if it has no chat template, or `messages` is neither a conversation nor
                several.
        """
        self._encoder.check_chat()
        chats = [Chat(tuple(each), template) for each in conversations(messages)]
        return self.generate(chats, params, progress=progress)

    def score(
        self,
        items: Sequence[tuple[Prompt, Sequence[Prompt]]],
        *,
        namespace: str = "",
        progress: Progress = silent,
    ) -> list[list[Score]]:
        """Compute log-likelihoods of continuations. Each context is computed once.

        Args:
            items: (context, its continuations), as text or token ids.
            namespace: as `SamplingParams.namespace`.
            progress: called as contexts are finished.

        Returns:
            For each context, one score per continuation.

        Raises:
            GranitePagedError: the first refusal or failure, after the others are done.
        """
        encodings = [partial(self._encoded_item, item, namespace) for item in scoring_items(items)]
        done = [_sound(asked) for asked in self._run(encodings, "score", progress)]
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
            params: only `max_new_tokens`, `stop_tokens`, `priority` and `namespace` may be set.
            beams: number of beams, and of answers.
            length_penalty: an answer's score is its log-probability / length ** length_penalty.
            progress: called as prompts are finished.

        Returns:
            For each prompt, its answers, the best first.

        Raises:
            GranitePagedError: the first refusal or failure, after the others are done.
        """
        options = {"beams": beams, "length_penalty": length_penalty}
        encodings = [
            partial(self._encoded_search, prompt, params, options) for prompt in as_prompts(prompts)
        ]
        return [_sound(asked).outputs for asked in self._run(encodings, "search", progress)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[StreamedToken]:
        """Answer one prompt token by token. Leaving the loop cancels the request.

        Raises:
            GranitePagedError: what ended the request early.
        """
        tokens = TokenBuffer()
        request = self.submit(prompt, params, on_token=tokens.on_token)
        try:
            while not request.finished:
                self.step()
                yield from tokens
            yield from tokens
        finally:
            self.cancel(request)
        _sound(request)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[StreamedToken]:
        """Answer one prompt token by token, for asyncio. Leaving the loop cancels the request.

        One thread steps the engine for all such streams. Nothing waits for a step on the event
        loop, but text is encoded there: of long texts, pass the token ids.

        Raises:
            GranitePagedError: what ended the request early.
        """
        stream = AsyncStream(asyncio.get_running_loop())
        request = self.submit(prompt, params, on_token=stream.on_token)
        try:
            self._streams.follow(self, stream, request)
            more = True
            while more:
                more = await stream.wait()
                for token in stream:
                    yield token
            if stream.error is not None:
                raise stream.error
        finally:
            self.cancel(request)
        _sound(request)

    # -- details --------------------------------------------------------------------------------

    def _encoded(self, prompt: Prompt, params: SamplingParams | None) -> Callable[[], Request]:
        """Encode a prompt. Return the call that submits it."""
        return partial(self.submit, self._encoder.encode(prompt), params)

    def _encoded_item(self, item: Any, namespace: str) -> Callable[[], Scoring]:
        """Encode an item to score. Return the call that submits it."""
        context, continuations = context_and_continuations(item)
        tokens = self._encoder.encode(context, "context")
        encoded = [self._encoder.encode(each, "continuation") for each in as_prompts(continuations)]
        return partial(self.submit_scoring, tokens, encoded, namespace=namespace)

    def _encoded_search(
        self, prompt: Prompt, params: SamplingParams | None, options: dict[str, Any]
    ) -> Callable[[], BeamRequest]:
        """Encode the prompt of a search. Return the call that submits it."""
        return partial(self.submit_search, self._encoder.encode(prompt), params, **options)

    def _run(
        self,
        encodings: Sequence[Callable[[], Callable[[], _Asked]]],
        method: str,
        progress: Progress,
    ) -> list[_Asked | GranitePagedError]:
        """Submit everything, as the queue has room, and step until all of it is finished.

        Args:
            encodings: each encodes one request, and returns the call that submits it.
            method: name of the caller's method.
            progress: called as requests are finished.

        Returns:
            For each, the finished request, or the error that refused it.
        """
        function("progress", progress)
        self._check_reentry(method)
        asked: list[_Asked | GranitePagedError] = []
        try:
            for encode in encodings:
                self._submit_into(asked, encode)
            for done, one in enumerate(asked):
                progress(method, done, len(encodings))
                while not (isinstance(one, GranitePagedError) or one.finished):
                    self.step()
            progress(method, len(encodings), len(encodings))
        finally:
            for one in asked:
                if not isinstance(one, GranitePagedError):
                    self.cancel(one)
        return asked

    def _refused(
        self, prompt: Prompt, params: SamplingParams | None, error: GranitePagedError
    ) -> list[Output]:
        """Return the outputs of a request that was refused: one per sample it asked for."""
        tokens: tuple[int, ...] = ()
        with contextlib.suppress(GranitePagedError):
            tokens = self._encoder.encode(prompt)
        refused = partial(
            Output,
            self._core.intake.number(),
            prompt=tokens,
            finish="error",
            error=error,
            refused=prompt,
        )
        return [refused(index=index) for index in range(samples_of(params))]

    def _submit_into(
        self,
        asked: list[_Asked | GranitePagedError],
        encode: Callable[[], Callable[[], _Asked]],
    ) -> None:
        """Add the request to `asked`, or what refused it. Step while the queue is full.

        It is encoded once, however long it waits.
        """
        try:
            submit = encode()
        except GranitePagedError as refusal:
            asked.append(refusal)
            return
        while True:
            with interrupts_wait():  # an open request is in the list
                try:
                    asked.append(submit())
                    return
                except QueueFull:
                    pass  # a step makes room
                except GranitePagedError as refusal:
                    asked.append(refusal)
                    return
            self.step()


def _sound(asked: _Asked | GranitePagedError) -> _Asked:
    """Return the request, or raise what ended it early."""
    if isinstance(asked, GranitePagedError):
        raise asked
    errors = [asked.error] if isinstance(asked, Scoring) else [o.error for o in asked.outputs]
    for error in errors:
        if error is not None:
            raise error
    return asked
