"""Score continuations: the log-likelihood of each, given its context.

    context    c0 c1 c2 ... cn | t0 t1 t2     a continuation
    logits at            cn      t0 t1        decide t0, t1, t2

A `Scorer` may run a context once, or once per continuation; the scores are the same. It counts the
tokens that it ran, so that reports can separate less work from faster work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from granite_paged.errors import PromptError

T = TypeVar("T")

FILLER_TOKEN = 0  # right padding, which causal attention hides from every position that is read


class ScoreRequest(NamedTuple):
    """A context and the continuations to score, as token ids; what `Engine.score` takes."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Number of tokens of the context and of all continuations."""
        return len(self.context) + sum(map(len, self.continuations))

    @property
    def longest(self) -> int:
        """Number of tokens of the context and the longest continuation."""
        return len(self.context) + max(map(len, self.continuations))

    @property
    def forks(self) -> bool:
        """Whether the context is forked: of several continuations, one is longer than a token."""
        return len(self.continuations) > 1 and max(map(len, self.continuations)) > 1


class Needs(NamedTuple):
    """The most that any request of a run takes.

    Attributes:
        longest: tokens of the longest sequence.
        shared: tokens of the longest prefix that neighbouring requests share.
        forks: whether any context is forked.
    """

    longest: int
    shared: int = 0
    forks: bool = False

    @classmethod
    def of(cls, requests: Iterable[ScoreRequest], shared: int = 0) -> Needs:
        """Return what these requests need. Raises ValueError if there are none."""
        held = list(requests)
        return cls(
            longest=max(request.longest for request in held),
            shared=shared,
            forks=any(request.forks for request in held),
        )

    def shares(self, page_size: int) -> bool:
        """Whether the shared prefix fills a page; a shorter one is not cached."""
        return self.shared >= page_size

    def combined(self, other: Needs) -> Needs:
        """Return needs that cover both."""
        return Needs(
            max(self.longest, other.longest),
            max(self.shared, other.shared),
            self.forks or other.forks,
        )


class Answer(NamedTuple):
    """Scores of one request.

    Attributes:
        logprobs: log-likelihood of each continuation, in nats.
        greedy: for each continuation, whether greedy decoding would write it.
        computed: tokens that were run for the request, without padding.
        reused: context tokens that were not run because an earlier request had run them.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    computed: int
    reused: int

    @property
    def finite(self) -> bool:
        """Whether every log-likelihood is a finite number."""
        return all(map(math.isfinite, self.logprobs))


class Scorer(Protocol):
    """Anything that scores requests. `batch` is the number of rows to pass at once."""

    batch: int

    def score(self, requests: Sequence[ScoreRequest]) -> list[Answer]:
        """Score requests and return the answers in their order.

        Raises:
            OutOfPages: if a request does not fit.
            PromptError: if a context or a continuation is empty.
        """
        ...

    def forget(self) -> None:
        """Drop everything cached from earlier requests."""
        ...

    def close(self) -> None:
        """Free all memory; no request may follow."""
        ...


class TokenRead(NamedTuple):
    """Where to read one token's log-probability: `row` and position `at`, for continuation `slot`.

    Slots number the continuations through all requests of a call.
    """

    row: int
    at: int
    token: int
    slot: int


@dataclass
class ScoredSequence:
    """One sequence to run, with the continuations that are read from its last logits.

    Attributes:
        tokens: context and continuation, without the last token, whose logits nothing reads.
        endings: (slot, continuation) for each continuation that this sequence scores.
    """

    tokens: list[int]
    endings: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    @property
    def first_read(self) -> int:
        """First position whose logits are read."""
        return len(self.tokens) - max(len(ending) for _, ending in self.endings)

    def reads(self, row: int) -> Iterable[TokenRead]:
        """Yield all reads of this sequence, as row `row` of a batch."""
        for slot, ending in self.endings:
            start = len(self.tokens) - len(ending)
            yield from (TokenRead(row, start + i, token, slot) for i, token in enumerate(ending))


def distinct_sequences(requests: Sequence[ScoreRequest]) -> list[ScoredSequence]:
    """Return the sequences that score all requests, each sequence once.

    Continuations that differ only in their last token share a sequence, as in lm-eval.
    """
    sequences: dict[tuple[int, ...], ScoredSequence] = {}
    slot = 0
    for request in requests:
        for continuation in request.continuations:
            tokens = (*request.context, *continuation[:-1])
            sequence = sequences.setdefault(tokens, ScoredSequence(list(tokens)))
            sequence.endings.append((slot, continuation))
            slot += 1
    return list(sequences.values())


def chunked(items: Sequence[T], rows: int, request: Callable[[T], ScoreRequest]) -> list[list[T]]:
    """Split items into chunks of at most `rows` distinct sequences, or of one item."""
    chunks: list[list[T]] = []
    filled = 0
    for item in items:
        more = len(distinct_sequences([request(item)]))
        if not chunks or filled + more > rows:
            chunks.append([])
            filled = 0
        chunks[-1].append(item)
        filled += more
    return chunks


def uncached_tokens(request: ScoreRequest) -> int:
    """Return the number of tokens that scoring without any cache runs."""
    return sum(len(sequence.tokens) for sequence in distinct_sequences([request]))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the rows as int64 [n, longest], padded on the right with `FILLER_TOKEN`."""
    width = max(map(len, rows))
    filled = [[*row, *[FILLER_TOKEN] * (width - len(row))] for row in rows]
    return torch.tensor(filled, device=device)


class Tally:
    """Sums of log-probabilities, one per continuation."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        check_requests(requests)
        self._sizes = [len(request.continuations) for request in requests]
        self._logprobs = [0.0] * sum(self._sizes)
        self._greedy = [True] * sum(self._sizes)

    def add(self, logits: Tensor, reads: Sequence[TokenRead], first: int = 0) -> None:
        """Add what is read from logits [n, S, V], whose column 0 belongs to position `first`."""
        cells = sorted({(read.row, read.at) for read in reads})
        place = {cell: i for i, cell in enumerate(cells)}
        row, at = torch.tensor(cells, device=logits.device).T
        found = logits[row, at - first].float()  # [cells, V]
        chosen = torch.tensor(
            [(place[read.row, read.at], read.token) for read in reads], device=logits.device
        )
        best = found.argmax(dim=-1)[chosen[:, 0]] == chosen[:, 1]
        logprobs = found.log_softmax(dim=-1)[chosen[:, 0], chosen[:, 1]].double()
        both = torch.stack([logprobs, best.double()]).tolist()  # the only wait for the device
        for read, logprob, greedy in zip(reads, *both, strict=True):
            self._logprobs[read.slot] += logprob
            self._greedy[read.slot] &= bool(greedy)

    def sums(self) -> list[tuple[tuple[float, ...], tuple[bool, ...]]]:
        """Return each request's log-likelihoods and greedy flags, as `Answer` holds them."""
        ends = list(itertools.accumulate(self._sizes))
        slices = [slice(end - size, end) for end, size in zip(ends, self._sizes, strict=True)]
        return [(tuple(self._logprobs[part]), tuple(self._greedy[part])) for part in slices]


def choice(logprobs: Sequence[float]) -> int:
    """Return the index of the most likely continuation; the first one wins a tie, as in lm-eval."""
    return max(range(len(logprobs)), key=lambda i: (logprobs[i], -i))


def check_requests(requests: Sequence[ScoreRequest]) -> None:
    """Raise PromptError if a request has an empty context or an empty continuation."""
    for i, request in enumerate(requests):
        if not request.context:
            raise PromptError(f"request {i} has an empty context; pass at least one token")
        if not request.continuations or not all(request.continuations):
            raise PromptError(f"request {i} has an empty continuation; pass at least one token")
