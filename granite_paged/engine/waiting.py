"""Jobs that wait for a row and pages.

Order is by rank (`rank.py`). Jobs may be passed over for the rest of a step.

A waiting job announces its tokens to the prefix cache, so that running prompts know where to keep
their state. Host only and without torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, TypeVar

from granite_paged.engine.job import Job, State
from granite_paged.engine.prefix_cache import Node, PrefixCache
from granite_paged.engine.rank import Rank
from granite_paged.errors import QueueFull, require

_Of = TypeVar("_Of")


class LateCleanups:
    """Cleanups that raised. They are tried again at the next step, so that no fault leaks."""

    def __init__(self) -> None:
        self._failed: list[tuple[Callable[[Any], object], Any]] = []

    def __len__(self) -> int:
        return len(self._failed)

    def attempt(self, cleanup: Callable[[_Of], object], of: _Of) -> None:
        """Do a cleanup, or note that it is still to be done."""
        try:
            cleanup(of)
        except Exception:
            self._failed.append((cleanup, of))

    def retry(self) -> None:
        """Do what is still to be done."""
        failed, self._failed = self._failed, []
        for cleanup, of in failed:
            self.attempt(cleanup, of)


class WaitingQueue:
    """Waiting jobs by rank.

    Attributes:
        late: cleanups that raised.
        limit: most jobs that may wait.

    Args:
        prefix: receives the tokens of waiting jobs.
    """

    def __init__(self, prefix: PrefixCache, limit: int) -> None:
        self.late = LateCleanups()
        self.limit = limit
        self._prefix = prefix
        self._heap: list[tuple[Rank, int, Job]] = []  # a stale entry stays until it surfaces
        self._skipped: list[Job] = []
        self._waiting: dict[Job, None] = {}
        self._tickets = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def rank(self, priority: int) -> Rank:
        """Return the rank of a job that arrives now."""
        self._arrivals += 1
        return Rank.of(self._arrivals, priority)

    def check_room(self, jobs: int) -> None:
        """Raise QueueFull unless `jobs` more may wait."""
        if len(self) + jobs > self.limit:
            raise QueueFull(waiting=len(self), limit=self.limit)

    def add(self, job: Job) -> None:
        """Let a job wait, whatever the limit, unless it is done."""
        if job.state is not State.DONE:
            job.state = State.WAITING
            job.path = [] if job.swapped else self._announced(job)
            self._waiting[job] = None
            self.late.attempt(self._push, job)

    def remove(self, job: Job) -> None:
        """Take a job out, if it waits."""
        if job in self._waiting:
            del self._waiting[job]
            if not self._waiting:
                self._heap.clear()  # of stale entries: an idle engine keeps no job alive
            path, job.path = job.path, []
            self.late.attempt(self._prefix.withdraw, path)

    def first(self) -> Job | None:
        """Return the waiting job of lowest rank that is not skipped."""
        while self._heap:
            _, ticket, job = self._heap[0]
            if self._is_live(job, ticket):
                return job
            heapq.heappop(self._heap)
        return None

    def skip_first(self) -> int:
        """Pass over the first job until `unskip`. Return how many are skipped."""
        self._skipped.append(heapq.heappop(self._heap)[-1])
        return len(self._skipped)

    def unskip(self) -> None:
        """Put skipped jobs back where their rank says."""
        skipped, self._skipped = self._skipped, []
        for job in skipped:
            self.late.attempt(self._push, job)

    def check_valid(self) -> None:
        """Prove that jobs are in line and hold nothing; BrokenInvariant says what broke."""
        in_line = {job for _, ticket, job in self._heap if self._is_live(job, ticket)}
        require(in_line == set(self._waiting) or len(self.late) > 0, "a waiting job is not in line")
        require(all(job.placement is None for job in self.jobs()), "a waiting job holds a row")

    def jobs(self) -> list[Job]:
        """Return the waiting jobs, in no order."""
        return list(self._waiting)

    def _announced(self, job: Job) -> list[Node]:
        try:
            return self._prefix.announce(job.tokens, job.namespace)
        except Exception:
            return []  # without a path, the job shares no prefix

    def _push(self, job: Job) -> None:
        self._tickets += 1
        job.ticket = self._tickets
        heapq.heappush(self._heap, (job.rank, job.ticket, job))

    def _is_live(self, job: Job, ticket: int) -> bool:
        return job in self._waiting and job.ticket == ticket
