"""Scoring: the log-likelihood of every continuation of a context.

    context    c0 c1 c2 ... cn | t0 t1 t2     a continuation
    logits at            cn      t0 t1        decide t0, t1, t2

A `Scorer` may run a context once or once a continuation; what it returns is the same. What it ran
is counted, so that work saved can be told from work done faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from granite_paged.errors import PromptError

T = TypeVar("T")

FILLER_TOKEN = 0  # on the right of short rows, where no position that is read can see it


class Request(NamedTuple):
    """One question: a context and the continuations to choose from, as token ids.

    `shared` leading tokens of the context recur in the requests beside it.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    shared: int = 0

    @property
    def tokens(self) -> int:
        """Tokens to read once: the context and every continuation."""
        return len(self.context) + sum(map(len, self.continuations))

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.context) + max(map(len, self.continuations))

    @property
    def forks(self) -> bool:
        """Whether several continuations are run, being longer than a token."""
        return len(self.continuations) > 1 and max(map(len, self.continuations)) > 1


class Needs(NamedTuple):
    """What the requests of a run take at most.

    Attributes:
        longest: tokens of one sequence.
        shared: tokens with which requests beside each other begin.
        forks: whether any context is forked.
    """

    longest: int
    shared: int = 0
    forks: bool = False

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Needs:
        """The most of them. At least one request."""
        held = list(requests)
        return cls(
            longest=max(request.longest for request in held),
            shared=max(request.shared for request in held),
            forks=any(request.forks for request in held),
        )

    def shares(self, page_size: int) -> bool:
        """Whether what is shared fills a page: less is not kept."""
        return self.shared >= page_size

    def with_those(self, other: Needs) -> Needs:
        """What both take at most."""
        return Needs(
            max(self.longest, other.longest),
            max(self.shared, other.shared),
            self.forks or other.forks,
        )


class Score(NamedTuple):
    """Of one continuation: its log-likelihood, and whether greedy decoding would write it."""

    logprob: float
    greedy: bool


class Answer(NamedTuple):
    """Of one request.

    Attributes:
        scores: one a continuation.
        computed: tokens run for it, padding left out.
        reused: tokens of the context that an earlier request had run already.
    """

    scores: list[Score]
    computed: int
    reused: int


class Scorer(Protocol):
    """Anything that answers requests. `batch` is how many it likes to get at once."""

    batch: int

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer them, in their order. Raises OutOfPages where one does not fit."""
        ...

    def forget(self) -> None:
        """Let go of everything kept from earlier requests."""
        ...

    def close(self) -> None:
        """Give memory back: this was the last request."""
        ...


class Wanted(NamedTuple):
    """The log-probability of `token` after position `at` of `row`, for continuation `slot`."""

    row: int
    at: int
    token: int
    slot: int


@dataclass
class Row:
    """One sequence to run, and what its last logits are wanted for."""

    tokens: list[int]
    endings: list[tuple[int, Sequence[int]]] = field(default_factory=list)  # (slot, continuation)

    @property
    def first_read(self) -> int:
        """The first position whose logits are wanted."""
        return len(self.tokens) - max(len(ending) for _, ending in self.endings)

    def wanted(self, row: int) -> Iterable[Wanted]:
        """All of it, once this is row `row` of a batch."""
        for slot, ending in self.endings:
            start = len(self.tokens) - len(ending)
            yield from (Wanted(row, start + i, token, slot) for i, token in enumerate(ending))


def distinct_rows(requests: Sequence[Request]) -> list[Row]:
    """The sequences that answer the requests, each once.

    Continuations that differ in the last token only are read off the same logits, as lm-eval does.
    Slots count continuations through all requests.
    """
    rows: dict[tuple[int, ...], Row] = {}
    slot = 0
    for request in requests:
        for continuation in request.continuations:
            tokens = (*request.context, *continuation[:-1])
            row = rows.setdefault(tokens, Row(list(tokens)))
            row.endings.append((slot, continuation))
            slot += 1
    return list(rows.values())


def chunked(items: Sequence[T], rows: int, request: Callable[[T], Request]) -> list[list[T]]:
    """Neighbours that make at most `rows` distinct rows together; at least one a chunk."""
    parts: list[list[T]] = []
    filled = 0
    for item in items:
        more = len(distinct_rows([request(item)]))
        if not parts or filled + more > rows:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += more
    return parts


def full_length(request: Request) -> int:
    """Tokens that scoring without a cache runs for it."""
    return sum(len(row.tokens) for row in distinct_rows([request]))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[n, longest] int64, filled up on the right."""
    width = max(map(len, rows))
    filled = [[*row, *[FILLER_TOKEN] * (width - len(row))] for row in rows]
    return torch.tensor(filled, device=device)


class Tally:
    """Adds up log-probabilities, slot by slot."""

    def __init__(self, requests: Sequence[Request]) -> None:
        check_requests(requests)
        self._sizes = [len(request.continuations) for request in requests]
        self._logprobs = [0.0] * sum(self._sizes)
        self._greedy = [True] * sum(self._sizes)

    def add(self, logits: Tensor, wanted: Sequence[Wanted], first: int = 0) -> None:
        """Read logits [n, S, V], whose column 0 stands for position `first`."""
        cells = sorted({(want.row, want.at) for want in wanted})
        place = {cell: i for i, cell in enumerate(cells)}
        row, at = torch.tensor(cells, device=logits.device).T
        read = logits[row, at - first].float()  # [cells, V]
        chosen = torch.tensor(
            [(place[want.row, want.at], want.token) for want in wanted], device=logits.device
        )
        best = read.argmax(dim=-1)[chosen[:, 0]] == chosen[:, 1]
        logprobs = read.log_softmax(dim=-1)[chosen[:, 0], chosen[:, 1]].double()
        both = torch.stack([logprobs, best.double()]).tolist()  # the one wait for the device
        for want, logprob, greedy in zip(wanted, *both, strict=True):
            self._logprobs[want.slot] += logprob
            self._greedy[want.slot] &= bool(greedy)

    def scores(self) -> list[list[Score]]:
        """One list a request."""
        every = map(Score, self._logprobs, self._greedy)
        return [[next(every) for _ in range(size)] for size in self._sizes]


def choice(logprobs: Sequence[float]) -> int:
    """The likeliest continuation, the first of equals, as lm-eval has it."""
    return max(range(len(logprobs)), key=lambda i: (logprobs[i], -i))


def is_finite(answer: Answer) -> bool:
    """Whether every log-likelihood is a number."""
    return all(math.isfinite(score.logprob) for score in answer.scores)


def check_requests(requests: Sequence[Request]) -> None:
    """Raises PromptError where there is nothing to score, or nothing before it."""
    for i, request in enumerate(requests):
        if not request.context:
            raise PromptError(f"request {i} has an empty context: give it at least one token")
        if not request.continuations or not all(request.continuations):
            raise PromptError(f"request {i} has an empty continuation: nothing can be scored")
