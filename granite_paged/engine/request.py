"""What a caller asks of the engine, and what comes back.

::

    Request    one prompt; its `n` samples are n jobs, which share the prompt's pages
    Scoring    one context and its continuations: one job, which is forked for each continuation

Host only and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from granite_paged.errors import InvalidSampling, PromptError, check_token_range

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

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: divides the logits before sampling. 0, or less than 1e-8, takes the most likely
            token each time.
        top_k: sample from the `top_k` most likely tokens. 0: from all.
        top_p: sample from the most likely tokens that together have this probability.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
        seed: a sample depends on the seed and on its prompt, not on other requests.
        logprobs: report the log-probability of each token, and of the `logprobs` most likely ones.
            None: report neither.
        stop_tokens: end after one of these tokens. None: the model's end of text; (): never.
        stop_strings: end before one of these appears in the text. Needs a tokenizer.
        n: number of samples of the prompt, which is computed once.
        priority: a request goes before those of lower priority that arrived up to 1,000 requests
            earlier per step of priority.

    Raises:
        InvalidSampling: for a value out of range.
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

    def __post_init__(self) -> None:
        for name, holds, must in (
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "be 0 or more, and finite"),
            ("top_k", self.top_k >= 0, "be 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "be positive"),
            ("seed", 0 <= self.seed < 2**63, "be in [0, 2**63)"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "be 0 or more, or None"),
            ("stop_strings", "" not in self.stop_strings, "not hold an empty string"),
            ("n", self.n >= 1, "be at least 1"),
        ):
            if not holds:
                raise InvalidSampling(f"{name} must {must}, got {getattr(self, name)}")

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
        request: number of the request; -1 if it was refused.
        index: which of the request's samples, from 0.
        prompt: token ids of the prompt.
        tokens: sampled token ids, a stop token included.
        text: decoded tokens, up to a stop string. Empty without a tokenizer.
        logprobs: one entry per token, if `SamplingParams.logprobs` is set.
        score: of a beam: its log-probability, divided by length ** length_penalty.
        finish: why it ended; None while it runs.
        error: what ended it, if `finish` is "error" or "cancelled".
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
"""Callback for each new token: (the sample so far, the token, the text that it added)."""


@dataclass(slots=True, eq=False)
class Request:
    """A prompt that was submitted. Its `outputs` fill as the engine steps."""

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_tokens: frozenset[int]
    on_token: OnToken | None = None
    outputs: list[Output] = field(default_factory=list)
    jobs: list[SampleJob] = field(default_factory=list)

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
    jobs: list[ScoringJob] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every continuation was scored, or the request failed."""
        return self.error is not None or None not in self.scores


def check_tokens(tokens: Sequence[int], vocabulary: int, what: str) -> tuple[int, ...]:
    """Return the tokens as a tuple. Raises PromptError if there are none, or unknown ones."""
    checked = tuple(tokens)
    if not checked:
        raise PromptError(f"empty {what}: it has no tokens")
    check_token_range(min(checked), max(checked), vocabulary)
    return checked
