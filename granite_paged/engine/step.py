"""What the scheduler plans with, and what it plans: one step.

Host only and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from granite_paged.engine.request import Job
from granite_paged.paging.allocator import AppendPlan


class Device(Protocol):
    """What the scheduler has done to device memory, in the order of its calls."""

    def write_pages(self, plan: AppendPlan, row_of: Mapping[int, int]) -> None:
        """Carry out a plan of the allocator; `row_of`: sequence -> row."""
        ...

    def forget_pages(self, pages: Sequence[int]) -> None:
        """Nobody holds these pages any more."""
        ...

    def fork_row(self, source: int, *targets: int) -> None:
        """Copy a row with all that is in it: its page table and its Mamba state."""
        ...

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Empty these rows for new owners."""
        ...

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """A row's page table begins with these pages."""
        ...

    def save_row(self, row: int, *, to_host: bool = False) -> Any:
        """A copy of a row's Mamba state, with `nbytes`."""
        ...

    def load_row(self, row: int, state: Any) -> None:
        """Put it back, in any row."""
        ...

    def save_pages(self, pages: Sequence[int]) -> Any:
        """A copy of pages in host memory, with `nbytes`."""
        ...

    def load_pages(self, pages: Sequence[int], contents: Any) -> None:
        """Put it back, in any pages."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes the scheduler keeps to.

    Attributes:
        rows: jobs that may run.
        longest: most tokens of one sequence.
        step_tokens: tokens of a step, decoded ones included.
        longest_step: most that prompts may make of a step, times what its decodes alone take; a
            chunk of `alignment` at least is computed. infinity: as many as a step takes.
        chunk_tokens: most tokens of one prefill or score call.
        alignment: chunks are multiples of it, but for the last of a prompt.
        queue: jobs that may wait.
        swap_bytes: most host memory of preempted jobs.
        fits: whether one call takes chunks of these lengths.
        prefill_cost: device time of a call for chunks of these lengths.
        decode_cost: device time of a call that decodes so many rows, in the same unit: the time
            that one more token of a prompt takes.
        swap: whether so many stored tokens are better copied to the host than computed again.
    """

    rows: int
    longest: int
    step_tokens: int
    longest_step: float
    chunk_tokens: int
    alignment: int
    queue: int
    swap_bytes: int
    fits: Callable[[Sequence[int]], bool]
    prefill_cost: Callable[[Sequence[int]], float]
    decode_cost: Callable[[int], float]
    swap: Callable[[int], bool]


class PrefillChunk(NamedTuple):
    """A job's tokens `start` to `end`, to be computed."""

    job: Job
    generation: int
    start: int
    end: int
    last: bool  # the prompt ends here


class ScoreChunk(NamedTuple):
    """Tokens `start` to `end` of one continuation, in a row of their own or in the context's."""

    job: Job
    generation: int
    number: int
    start: int
    end: int
    row: int
    sequence: int
    forked: bool


@dataclass(slots=True)
class Step:
    """Calls to make, in this order; an isolated job has calls of its own.

    `resumed` jobs came back from host memory: their last token is fed next. `ready` contexts came
    in with nothing left to compute: their continuations are scored next.
    """

    decodes: list[list[Job]] = field(default_factory=list)
    scores: list[list[ScoreChunk]] = field(default_factory=list)
    prefills: list[list[PrefillChunk]] = field(default_factory=list)
    resumed: list[Job] = field(default_factory=list)
    ready: list[Job] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.scores or self.prefills or self.resumed or self.ready)


_Item = TypeVar("_Item")


def calls(items: Sequence[_Item], job_of: Callable[[_Item], Job]) -> list[list[_Item]]:
    """One call for all, but for each isolated job its own."""
    alone = [[item] for item in items if job_of(item).isolated]
    together = [item for item in items if not job_of(item).isolated] if alone else list(items)
    return [together, *alone] if together else alone
