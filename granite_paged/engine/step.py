"""What the scheduler decides for one step, and what it asks of device memory.

Host only and without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar

from granite_paged.engine.job import Job, SampleJob, ScoringJob
from granite_paged.paging.allocator import AppendPlan


class Device(Protocol):
    """Changes to device memory, which are carried out in the order of the calls."""

    def write_pages(self, plan: AppendPlan, row_of: Mapping[int, int]) -> None:
        """Carry out a plan of the allocator; `row_of` maps sequences to rows."""
        ...

    def forget_pages(self, pages: Sequence[int]) -> None:
        """Drop what was to be written for pages that no sequence holds any more."""
        ...

    def fork_row(self, source: int, *targets: int) -> None:
        """Copy a row to each target: its page table and its Mamba state."""
        ...

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Empty these rows for new owners."""
        ...

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """Make these the first pages of a row's page table."""
        ...

    def save_row(self, row: int, *, to_host: bool = False) -> Any:
        """Return a copy of a row's Mamba state. It has `nbytes`."""
        ...

    def load_row(self, row: int, state: Any) -> None:
        """Put a saved Mamba state into any row, before its next step at the latest."""
        ...

    def save_pages(self, pages: Sequence[int]) -> Any:
        """Return a copy of pages in host memory. It has `nbytes`."""
        ...

    def load_pages(self, pages: Sequence[int], contents: Any) -> None:
        """Put saved contents into any pages."""
        ...


class PrefillChunk(NamedTuple):
    """Tokens `start` to `end` of a job, to be computed."""

    job: Job
    generation: int
    start: int
    end: int
    last: bool  # the prompt ends here


class ScoreChunk(NamedTuple):
    """Tokens `start` to `end` of one continuation, in a forked row or in the context's own."""

    job: ScoringJob
    generation: int
    number: int
    start: int
    end: int
    row: int
    sequence: int
    forked: bool


@dataclass(slots=True)
class StepPlan:
    """Calls to make, in this order. An isolated job has calls of its own.

    Attributes:
        loading: jobs that came in with a saved state, which is loaded first.
        resumed: jobs that came back from host memory; their last token is fed next.
        ready: contexts that came in with nothing left to compute. Their continuations are scored
            in the next step.
    """

    loading: list[Job] = field(default_factory=list)
    decodes: list[list[SampleJob]] = field(default_factory=list)
    scores: list[list[ScoreChunk]] = field(default_factory=list)
    prefills: list[list[PrefillChunk]] = field(default_factory=list)
    resumed: list[Job] = field(default_factory=list)
    ready: list[Job] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.scores or self.prefills or self.resumed or self.ready)

    @property
    def score_chunks(self) -> list[ScoreChunk]:
        """Return the chunks of all score calls."""
        return [chunk for chunks in self.scores for chunk in chunks]


_Item = TypeVar("_Item")
_is_isolated = attrgetter("isolated")


def calls(items: Sequence[_Item], jobs: Sequence[Job]) -> list[list[_Item]]:
    """Group items into one call, and one more for each item of an isolated job.

    jobs: the job of each item.
    """
    if not any(map(_is_isolated, jobs)):
        return [list(items)] if items else []
    alone = [[item] for item, job in zip(items, jobs, strict=True) if job.isolated]
    together = [item for item, job in zip(items, jobs, strict=True) if not job.isolated]
    return [together, *alone] if together else alone
