"""What a caller asks of the engine, and what comes back.

::

    Request    one prompt; its `n` samples are n jobs, which share the prompt's pages
    Scoring    one context and its continuations: one job, which is forked for each continuation

Host only and without torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from granite_paged.arguments import instance, integer, number
from granite_paged.engine.defaults import sampling_fields
from granite_paged.errors import InvalidSampling

if TYPE_CHECKING:
    from granite_paged.engine.job import SampleJob, ScoringJob

Finish = Literal["length", "stop", "cancelled", "error"]
"""Why a sample ended: `max_new_tokens`, a stop token or stop string, `cancel()`, or its `error`."""


COLDEST = 1e-8
"""Lowest temperature that is sampled at. Below it, float32 logits of about 1 that differ at all are
12 nats or more apart, so a draw is the argmax."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when an answer ends.

    An object made here stands alone: what it leaves out has the value below, and of the model's
    generation config only the stop tokens apply. `from_generation_config` takes the rest as well.

    Attributes:
        max_new_tokens: most tokens of an answer; below 2**31.
        temperature: divides the logits before sampling. 0, or less than 1e-8, takes the most likely
            token each time.
        top_k: sample from the `top_k` most likely tokens. 0: from all.
        top_p: sample from the most likely tokens that together have this probability.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
        seed: a sample depends on the seed and on its prompt, not on other requests.
        logprobs: report the log-probability of each token, and of the `logprobs` most likely ones.
            None: report neither.
        stop_tokens: end after one of these tokens. None: every `eos_token_id` of the model's
            generation config, or else of its config; (): never.
        stop_strings: end before one of these appears in the text. Needs a tokenizer.
        n: number of samples of the prompt, which is computed once; below 65,536.
        priority: a request goes before those of lower priority that arrived up to 1,000 requests
            earlier per step of priority. It takes rows and pages of running ones of lower
            priority, if it cannot come in otherwise.
        streamed: limit the time between tokens while other prompts are computed, at the cost of
            throughput, as for a request with a callback; see `Engine(longest_step=...)`.
        namespace: prompts share cached beginnings with prompts of the same namespace only. One per
            tenant keeps timings from telling one tenant what another one asked.

    Raises:
        InvalidSampling: for a value of the wrong type or out of range. numpy numbers, lists and a
            single stop string are converted.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    streamed: bool = False
    namespace: str = ""

    def __post_init__(self) -> None:
        convert = functools.partial(object.__setattr__, self)
        for name, (least, below) in _INTEGERS.items():
            convert(name, integer(name, getattr(self, name), least, below, error=InvalidSampling))
        for name, (holds, must) in _NUMBERS.items():
            convert(name, number(name, getattr(self, name), holds, must, error=InvalidSampling))
        if self.logprobs is not None:
            convert("logprobs", integer("logprobs", self.logprobs, 0, error=InvalidSampling))
        if self.stop_tokens is not None:
            convert("stop_tokens", _stop_tokens(self.stop_tokens))
        convert("stop_strings", _stop_strings(self.stop_strings))
        instance("streamed", self.streamed, bool, error=InvalidSampling)
        instance("namespace", self.namespace, str, error=InvalidSampling)

    @classmethod
    def from_generation_config(
        cls, config: Any | None, *, prompt_tokens: int = 0, **overrides: Any
    ) -> SamplingParams:
        """Return the params that transformers' `generate()` takes from a generation config.

        Without `do_sample` the temperature is 0; with it, `top_k` is 50 unless it is set. The
        fields taken are max_new_tokens, max_length, temperature, top_k, top_p, repetition_penalty
        and stop_strings. What neither the config nor `overrides` set has the defaults above.

        Args:
            config: a `GenerationConfig` of transformers, or None.
            prompt_tokens: tokens of the prompt, which `max_length` includes.
            overrides: fields that win over the config's. None stands for "not set".

        Raises:
            InvalidSampling: for a value of the wrong type or out of range.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        if "max_new_tokens" in given:
            prompt_tokens = 0
        return cls(**{**sampling_fields(config, prompt_tokens), **given})

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; below `COLDEST`, the most likely token is taken."""
        return self.temperature >= COLDEST

    @property
    def greedy(self) -> bool:
        """Whether the argmax of the logits is all that is needed."""
        return not self.samples and self.repetition_penalty == 1 and self.logprobs is None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model, before temperature and penalties.

    Attributes:
        top: (token, log-probability) of the most likely tokens in its place, the best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Output:
    """One sample of one request.

    Attributes:
        request: number of the request in its engine; -1 if a group lost every engine.
        index: which of the request's samples, from 0.
        prompt: token ids of the prompt; () if it was refused before it had any.
        tokens: sampled token ids, a stop token included.
        text: decoded tokens, up to a stop string. Empty without a tokenizer.
        logprobs: one entry per token, if `SamplingParams.logprobs` is set.
        score: of a beam: its log-probability, divided by length ** length_penalty.
        finish: why it ended; None while it runs.
        error: what ended it, if `finish` is "error" or "cancelled".
        refused: the prompt as the caller gave it, if the request was refused; else None.
    """

    request: int
    index: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float | None = None
    finish: Finish | None = None
    error: Exception | None = None
    refused: Any = None


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of one continuation, in nats.

    Attributes:
        logprob: sum over its tokens.
        tokens: log-probability of each token, given the context and the tokens before it.
        greedy: whether each token was the most likely one in its place.
    """

    logprob: float
    tokens: tuple[float, ...]
    greedy: bool


OnToken = Callable[[Output, int, str], None]
"""Callback for each new token: (the sample so far, the token, the text that it added).

It runs when the state of the step is complete. It may submit, cancel and close, and look at
statistics; methods that run a step raise EngineBusy. What it raises ends its own sample.
"""


@dataclass(slots=True, eq=False)
class Request:
    """A prompt that was submitted. Its `outputs` fill as the engine steps.

    Attributes:
        streamed: whether its tokens are read one by one, as they come.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_tokens: frozenset[int]
    on_token: OnToken | None = None
    outputs: list[Output] = field(default_factory=list)
    jobs: list[SampleJob] = field(default_factory=list)
    streamed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.streamed = self.on_token is not None or self.params.streamed

    @property
    def namespace(self) -> str:
        """Namespace of the prefixes that it may use."""
        return self.params.namespace

    @property
    def finished(self) -> bool:
        """Whether every sample ended."""
        return all(output.finish for output in self.outputs)


@dataclass(slots=True, eq=False)
class Scoring:
    """A context whose continuations are scored. Its `scores` fill as the engine steps."""

    number: int
    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    scores: list[Score | None] = field(default_factory=list)
    error: Exception | None = None
    namespace: str = ""
    jobs: list[ScoringJob] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every continuation was scored, or the request failed."""
        return self.error is not None or None not in self.scores


_INTEGERS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 2**31),
    "top_k": (0, math.inf),
    "seed": (0, 2**63),
    "n": (1, 2**16),
    "priority": (-math.inf, math.inf),
}
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < math.inf, "be a finite number of at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "be a number in (0, 1]"),
    "repetition_penalty": (lambda value: 1e-6 <= value <= 1e6, "be a number in [1e-6, 1e6]"),
}


def _stop_tokens(tokens: Any) -> tuple[int, ...]:
    if not isinstance(tokens, Iterable) or isinstance(tokens, str | Mapping):
        raise InvalidSampling(f"stop_tokens must be token ids or None, got {tokens!r}")
    each = "stop_tokens must hold token ids: each"
    return tuple(integer(each, token, 0, error=InvalidSampling) for token in tokens)


def _stop_strings(strings: Any) -> tuple[str, ...]:
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, Iterable) or isinstance(listed, Mapping):
        raise InvalidSampling(f"stop_strings must be strings, got {strings!r}")
    for one in (listed := tuple(listed)):
        if not isinstance(one, str) or not one:
            raise InvalidSampling(f"stop_strings must be strings that are not empty, got {one!r}")
    return listed
