"""Jobs that wait for a row and pages.

Order is by rank (`rank.py`). Jobs may be passed over for the rest of a step.

A waiting job announces its tokens to the prefix cache, so that running prompts know where to keep
their state. Host only and without torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from granite_paged.engine.job import Job, State
from granite_paged.engine.prefix_cache import Node, PrefixCache
from granite_paged.engine.rank import Rank
from granite_paged.errors import QueueFull, require


class LateCleanups:
    """Cleanups that raised. They are tried again at the next step, so that no fault leaks."""

    def __init__(self) -> None:
        self._failed: list[tuple[Callable[[list[Node]], None], list[Node]]] = []

    def attempt(self, cleanup: Callable[[list[Node]], None], nodes: list[Node]) -> None:
        """Do a cleanup, or note that it is still to be done."""
        try:
            cleanup(nodes)
        except Exception:
            self._failed.append((cleanup, nodes))

    def retry(self) -> None:
        """Do what is still to be done."""
        failed, self._failed = self._failed, []
        for cleanup, nodes in failed:
            self.attempt(cleanup, nodes)


class WaitingQueue:
    """Waiting jobs by rank.

    Attributes:
        late: cleanups of the prefix cache that raised.

    Args:
        prefix: receives the tokens of waiting jobs.
        limit: most jobs that may wait.
    """

    def __init__(self, prefix: PrefixCache, limit: int) -> None:
        self.late = LateCleanups()
        self._prefix = prefix
        self._limit = limit
        self._heap: list[tuple[Rank, int, Job]] = []  # a stale entry stays until it surfaces
        self._skipped: list[Job] = []
        self._waiting = 0
        self._tickets = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return self._waiting

    def rank(self, priority: int) -> Rank:
        """Return the rank of a job that arrives now."""
        self._arrivals += 1
        return Rank.of(self._arrivals, priority)

    def check_room(self, jobs: int) -> None:
        """Raise QueueFull unless `jobs` more may wait."""
        if self._waiting + jobs > self._limit:
            raise QueueFull(waiting=self._waiting, limit=self._limit)

    def add(self, job: Job) -> None:
        """Let a job wait, whatever the limit."""
        job.state = State.WAITING
        job.path = [] if job.swapped else self._announced(job)
        self._waiting += 1
        self._push(job)

    def remove(self, job: Job) -> None:
        """Take a job out, if it waits."""
        if job.state is State.WAITING:
            self._waiting -= 1
            path, job.path = job.path, []
            self.late.attempt(self._prefix.withdraw, path)

    def first(self) -> Job | None:
        """Return the waiting job of lowest rank that is not skipped."""
        while self._heap:
            _, ticket, job = self._heap[0]
            if _is_live(job, ticket):
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
            self._push(job)

    def check_valid(self) -> None:
        """Prove that jobs are counted and hold nothing; BrokenInvariant says what broke."""
        waiting = self.jobs()
        require(len(waiting) == self._waiting, "the count of waiting jobs")
        require(all(job.placement is None for job in waiting), "a waiting job holds a row")

    def jobs(self) -> list[Job]:
        """Return the waiting jobs, in no order."""
        return [job for _, ticket, job in self._heap if _is_live(job, ticket)]

    def _announced(self, job: Job) -> list[Node]:
        try:
            return self._prefix.announce(job.tokens, job.namespace)
        except Exception:
            return []  # without a path, the job shares no prefix

    def _push(self, job: Job) -> None:
        self._tickets += 1
        job.ticket = self._tickets
        heapq.heappush(self._heap, (job.rank, job.ticket, job))


def _is_live(job: Job, ticket: int) -> bool:
    return job.state is State.WAITING and job.ticket == ticket
