"""What the scheduler runs: a job takes one state row and one sequence of pages.

::

    SampleJob    one sample of a request: its prompt is prefilled, then it decodes
    BeamJob      one beam of a search: a sample that pauses after each token
    ScoringJob   one context, which is forked for each continuation that is scored

Invariant: a job has a `Placement` exactly while it is in prefill, decode or score.

A job's tokens are its prompt and every sampled token that the host has read. Host only and without
torch.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from granite_paged.engine.rank import FIRST, Rank
from granite_paged.errors import BrokenInvariant

if TYPE_CHECKING:
    from granite_paged.engine.beams import BeamRequest
    from granite_paged.engine.prefix_cache import Node
    from granite_paged.engine.request import Finish, Request, Scoring


class State(enum.Enum):
    """Where a job is."""

    NEW = enum.auto()  # not submitted yet, or follows another sample of its prompt
    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    SCORE = enum.auto()
    UNREAD = enum.auto()  # everything was launched; it needs no row until that is read
    DONE = enum.auto()


@dataclass(slots=True)
class Placement:
    """Row and pages of a running job.

    Attributes:
        row: state row of the runner.
        sequence: sequence of the allocator.
        target: number of tokens that prefill stores.
        stored: number of tokens in pages.
        reserved: number of tokens that pages were taken for.
        is_shareable: whether other prompts may use its pages; not after weights changed.
    """

    row: int
    sequence: int
    target: int = 0
    stored: int = 0
    reserved: int = 0
    is_shareable: bool = True


@dataclass(frozen=True, slots=True)
class Swapped:
    """Pages and Mamba state of a preempted job, in host memory."""

    stored: int
    pages: Any
    state: Any
    nbytes: int


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """What all kinds of job have.

    Attributes:
        request: the request that this job belongs to.
        tokens: the prompt, and the sampled tokens that the host has read.
        max_stored: most tokens that it will ever store.
        rank: jobs of lower rank go first and are preempted last. Given when its request opens.
        generation: number of restarts. Results launched before a restart are dropped.
        isolated: it shared a call that raised, so it runs in calls of its own.
        followers: other samples of the same prompt, forked when its prefill is done.
        ticket: identifies its latest entry in the queue.
        path: prefix nodes of its tokens, while it waits.
        checkpoints: prefix nodes where its state will be kept, by number of tokens.
        swapped: its pages and state, where they were copied to host memory.
    """

    request: Request | Scoring
    tokens: list[int]
    max_stored: int
    rank: Rank = FIRST
    state: State = State.NEW
    placement: Placement | None = None
    generation: int = 0
    isolated: bool = False
    followers: list[SampleJob] = field(default_factory=list)
    ticket: int = 0
    path: list[Node] = field(default_factory=list)
    checkpoints: dict[int, Node] = field(default_factory=dict)
    swapped: Swapped | None = None

    @property
    def placed(self) -> Placement:
        """Its row and pages. Raises BrokenInvariant where it has none."""
        if self.placement is None:
            raise BrokenInvariant(f"a job of request {self.request.number} has no row")
        return self.placement

    @property
    def namespace(self) -> str:
        """Namespace of the prefixes that it may use."""
        return self.request.namespace

    @property
    def stored(self) -> int:
        """Number of tokens in pages; 0 while it has none."""
        place = self.placement  # once: another thread may be asking for the load
        return place.stored if place else 0

    @property
    def launched(self) -> bool:
        """Whether everything that it was to compute has been launched, or it ended before."""
        return self.state in (State.UNREAD, State.DONE)

    @property
    def remaining(self) -> int:
        """Number of tokens that it has yet to compute, at most."""
        return 0 if self.launched else self.max_stored - self.stored

    @property
    def prefill_tokens(self) -> int:
        """Number of tokens to store before the first draw or the first continuation."""
        return len(self.tokens)

    @property
    def rows_for_forks(self) -> int:
        """Number of rows that its forks need, without its own."""
        return 0

    @property
    def complete(self) -> bool:
        """Whether the host has read everything that it was to compute."""
        return False

    @property
    def siblings(self) -> Sequence[Job]:
        """Return the jobs that fail when this one does, itself included."""
        return [self]

    def prefilled(self) -> None:
        """Note that the last chunk of its prompt is launched."""
        raise NotImplementedError

    def start_over(self) -> None:
        """Forget everything that was launched and not read."""
        self.generation += 1


@dataclass(slots=True, eq=False, kw_only=True)
class SampleJob(Job):
    """One sample of a request.

    Attributes:
        index: which of the request's samples.
        limit: most draws.
        drawn: number of draws that were launched. The last may be unread.
        seed: seed of its draws.
        greedy: whether it needs the argmax of the logits only.
        seen: [V] bool on the device, tokens that the repetition penalty falls on.
    """

    request: Request
    index: int = 0
    limit: int = 0
    drawn: int = 0
    seed: int = 0
    greedy: bool = True
    seen: Any = None

    @property
    def sampled(self) -> int:
        """Number of sampled tokens that the host has read."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def finish(self) -> Finish | None:
        """Return why its last token ends it, or None."""
        if self.sampled and self.tokens[-1] in self.request.stop_tokens:
            return "stop"
        return "length" if self.sampled >= self.limit else None

    @property
    def complete(self) -> bool:
        """Whether its last token ended it."""
        return self.finish is not None

    def growth(self, page_size: int) -> int:
        """Return how many tokens to reserve next: to the end of a page, to ask seldom."""
        return page_size - self.placed.reserved % page_size

    def prefilled(self) -> None:
        """Note the first draw."""
        self.drawn += 1

    def start_over(self) -> None:
        """Draw every unread token again."""
        Job.start_over(self)
        self.drawn = self.sampled
        self.seen = None


@dataclass(slots=True, eq=False, kw_only=True)
class BeamJob(SampleJob):
    """One beam of a search. Its `limit` rises when the search chooses it."""

    request: BeamRequest
    greedy: bool = False

    @property
    def complete(self) -> bool:
        """Whether it is over: the search decides, not its tokens."""
        return False

    @property
    def siblings(self) -> Sequence[Job]:
        """Return every beam of the search."""
        return [*self.request.jobs, self]

    def start_over(self) -> None:
        """Draw its next token again, and forget the report of it."""
        SampleJob.start_over(self)
        self.request.reports.pop(self, None)

    def growth(self, page_size: int) -> int:
        """Return 1: pages are reserved token by token, so that it can be forked at any time."""
        return 1


@dataclass(slots=True, eq=False, kw_only=True)
class ScoringJob(Job):
    """A context and its continuations.

    Attributes:
        pending: numbers of the continuations that are still to launch.
        partial: (log-probability, greedy) of the tokens read so far, of continuations that are
            scored in several chunks.
        single: whether every continuation is one token, so that the context's last logits answer
            them all.
    """

    request: Scoring
    pending: list[int] = field(init=False)
    partial: dict[int, list[tuple[float, bool]]] = field(default_factory=dict)
    single: bool = field(init=False)

    def __post_init__(self) -> None:
        self.pending = self.unscored()
        self.single = all(len(one) == 1 for one in self.request.continuations)

    @property
    def prefill_tokens(self) -> int:
        """Number of tokens to store before the first continuation."""
        # a continuation's call begins with the context's last token: its logits score the first
        return len(self.tokens) if self.single else len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """Number of tokens of its context and continuations that are not computed, at most."""
        if self.launched:
            return 0
        continuations = sum(len(self.continuation(number)) for number in self.pending)
        return len(self.tokens) - self.stored + continuations

    @property
    def rows_for_forks(self) -> int:
        """Number of rows that its continuations need, without its own."""
        return 0 if self.single else max(0, len(self.pending) - 1)

    @property
    def complete(self) -> bool:
        """Whether every continuation has a score."""
        return None not in self.request.scores

    def prefilled(self) -> None:
        """Note that the last logits answer continuations of one token."""
        if self.single:
            self.pending.clear()

    def start_over(self) -> None:
        """Launch every continuation without a score again."""
        Job.start_over(self)
        self.pending = self.unscored()
        self.partial.clear()

    def continuation(self, number: int) -> tuple[int, ...]:
        """Return the tokens of one continuation."""
        return self.request.continuations[number]

    def unscored(self) -> list[int]:
        """Return the numbers of the continuations without a score."""
        return [number for number, score in enumerate(self.request.scores) if score is None]
