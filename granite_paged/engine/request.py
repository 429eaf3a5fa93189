"""What a caller asks of the engine and gets back, and the jobs that the scheduler makes of it.

::

    Request  one prompt; `n` samples of it are n jobs, which share the prompt's pages
    Scoring  one context and its continuations: one job, forked for each continuation
    Job      what takes one row and one sequence of pages

A job's tokens are its prompt and every sampled token that the host has read. `stored` of them are
in pages; `sampled` counts draws, of which the last may still be on its way from the device.

Host only and without torch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from granite_paged.errors import InvalidSampling, PromptError, check_token_range

Finish = Literal["length", "stop", "cancelled", "error"]
"""Why a sample ended: `max_new_tokens`, a stop token or string, `cancel()`, or its `error`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        top_p: sample from the likeliest tokens that hold this much probability.
        repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
        seed: a sample depends on it and on its place in the answer, not on its neighbours.
        logprobs: report each token's log-probability, and those of so many of the likeliest.
        stop_tokens: end after one of these. None: the model's end of text; (): never.
        stop_strings: end before one of these appears in the text; needs a tokenizer.
        n: samples of the same prompt; the prompt is computed once.
        priority: a request goes before those of lower priority that arrived shortly before it.

    Raises:
        InvalidSampling: for a value that means nothing.
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
                raise InvalidSampling(f"{name} must {must}, {getattr(self, name)} given")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as the model says it, and nothing else is asked."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.logprobs is None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model, and those of the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Output:
    """One sample of one request.

    Attributes:
        request: number of the request.
        index: which of the request's samples.
        prompt: its tokens.
        tokens: sampled tokens, a stop token included.
        text: of the tokens, up to a stop string; empty without a tokenizer.
        logprobs: one a token, where asked for.
        score: of a beam, its log-probability with the length penalty.
        finish: why it ended; None while it runs.
        error: what ended it, where `finish` is "error" or "cancelled".
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
    """Log-likelihood of one continuation.

    Attributes:
        logprob: of all its tokens together.
        tokens: of each.
        greedy: whether each was the likeliest.
    """

    logprob: float
    tokens: tuple[float, ...]
    greedy: bool


OnToken = Callable[[Output, int, str], None]
"""Called for each new token with the sample so far, the token, and the text it added."""


@dataclass(slots=True, eq=False)
class Request:
    """A prompt that was submitted; `outputs` fill as the engine steps."""

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_tokens: frozenset[int]
    on_token: OnToken | None = None
    outputs: list[Output] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every sample ended."""
        return all(output.finish for output in self.outputs)


@dataclass(slots=True, eq=False)
class Scoring:
    """A context whose continuations are scored; `scores` fill as the engine steps."""

    number: int
    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    scores: list[Score | None] = field(default_factory=list)
    error: Exception | None = None
    jobs: list[Job] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every continuation was scored, or the request failed."""
        return self.error is not None or None not in self.scores


class State(enum.Enum):
    """Where a job is."""

    NEW = enum.auto()  # nowhere yet, or a follower
    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    SCORE = enum.auto()
    READ = enum.auto()  # all was launched; what comes of it is on its way
    DONE = enum.auto()


@dataclass(slots=True, eq=False)
class Job:
    """What takes one row and one sequence of pages.

    Attributes:
        request: whose it is.
        index: which of the request's samples.
        rank: lower goes first and is preempted last.
        tokens: the prompt, and what was sampled and read.
        limit: most tokens it samples; 0 for scoring.
        most: most tokens it will ever store.
        prompt_length: tokens that were not sampled.
        target: tokens that prefill stores.
        stored: tokens in pages.
        reserved: tokens that its pages were taken for.
        sampled: draws, the last perhaps unread.
        row, sequence: state row and sequence of the allocator; -1 where it has none.
        generation: counts restarts; what was launched before one is dropped.
        isolated: shared a call that raised, so it runs in calls of its own.
        followers: other samples of this prompt, forked when its prefill is done.
        single: scores continuations of one token each, which its last logits answer.
        pending: continuations to launch; partial: what is known of those in pieces.
        ticket: its latest place in the queue.
        path: prefix nodes of its tokens; checkpoints: where its state will be kept.
        swapped: its pages and state in host memory.
        seen: tokens that a repetition penalty falls on, on the device.
        seed: of its draws.
        greedy: whether an argmax is all it wants.
        exact: pages are reserved token by token, so that it can be forked at any time.
    """

    request: Request | Scoring
    index: int
    rank: int
    tokens: list[int]
    limit: int
    most: int
    prompt_length: int
    state: State = State.NEW
    target: int = 0
    stored: int = 0
    reserved: int = 0
    sampled: int = 0
    row: int = -1
    sequence: int = -1
    generation: int = 0
    isolated: bool = False
    followers: list[Job] = field(default_factory=list)
    single: bool = False
    pending: list[int] = field(default_factory=list)
    partial: dict[int, list[tuple[float, bool]]] = field(default_factory=dict)
    ticket: int = 0
    path: list[Any] = field(default_factory=list)
    checkpoints: dict[int, Any] = field(default_factory=dict)
    swapped: Swapped | None = None
    seen: Any = None
    seed: int = 0
    greedy: bool = True
    exact: bool = False

    @property
    def scoring(self) -> bool:
        """Whether it scores continuations instead of sampling."""
        return self.limit == 0

    @property
    def prefix_tokens(self) -> int:
        """Tokens to store before the first draw or the first continuation."""
        # a continuation's call begins with the context's last token: its logits score the first
        return len(self.tokens) - 1 if self.scoring and not self.single else len(self.tokens)

    @property
    def forks(self) -> bool:
        """Whether it needs another row for its continuations."""
        return len(self.pending) > 1 and not self.single

    def continuation(self, number: int) -> tuple[int, ...]:
        """One of the continuations it scores."""
        assert isinstance(self.request, Scoring)
        return self.request.continuations[number]

    def unscored(self) -> list[int]:
        """Continuations without a score."""
        if not isinstance(self.request, Scoring):
            return []
        return [n for n, score in enumerate(self.request.scores) if score is None]


@dataclass(frozen=True, slots=True)
class Swapped:
    """A preempted job's pages and row, in host memory."""

    stored: int
    pages: Any
    state: Any
    nbytes: int


def check_tokens(tokens: Sequence[int], vocabulary: int, what: str) -> tuple[int, ...]:
    """The tokens, as a tuple. Raises PromptError where there are none, or unknown ones."""
    checked = tuple(tokens)
    if not checked:
        raise PromptError(f"empty {what}: it has no tokens")
    check_token_range(min(checked), max(checked), vocabulary)
    return checked
