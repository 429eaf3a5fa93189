"""How waiting jobs come in: in order of rank, where a row and the pages of their prompt are free.

A job whose beginning another prompt is just computing waits for it. Jobs behind it may pass,
`LOOK_AHEAD` at most.

A job of higher priority than a running one that ranks after it takes that one's row and pages, if
it cannot come in otherwise, and if those are enough. The newest are preempted first. Host only and
without torch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from granite_paged.engine.job import Job
from granite_paged.engine.prefix_cache import Hit, PrefixCache
from granite_paged.engine.running import RunningJobs, by_rank
from granite_paged.engine.waiting import WaitingQueue
from granite_paged.paging.allocator import PageAllocator

LOOK_AHEAD = 32
"""Most jobs that one step passes over because they wait for a prefix."""


class Admission:
    """Places waiting jobs."""

    def __init__(
        self,
        allocator: PageAllocator,
        prefix: PrefixCache,
        queue: WaitingQueue,
        running: RunningJobs,
    ) -> None:
        self._allocator = allocator
        self._prefix = prefix
        self._queue = queue
        self._running = running
        self._blocked: tuple[int, ...] = ()  # where the first job could not preempt

    @contextlib.contextmanager
    def passing(self) -> Iterator[Callable[[], Job | None]]:
        """Yield a function that returns the first job that is not passed over until the end."""
        try:
            yield self._queue.first
        finally:
            self._queue.unskip()

    def place(self, job: Job) -> bool:
        """Place the first job, or pass over it. Return False if no other may come in."""
        hit = self._prefix.find(job.path)
        return self._passes_over(job, hit) or self._running.place(job, hit)

    def outranks_running(self, job: Job) -> bool:
        """Return whether a waiting job may preempt any running one."""
        if self._situation(job) == self._blocked:
            return False
        if any(job.rank.preempts(other.rank) for other in self._running.jobs()):
            return True
        self._blocked = self._situation(job)
        return False

    def place_by_preempting(self, job: Job) -> bool:
        """Do what `place` does, and preempt the newest of lower priority as far as needed."""
        hit = self._prefix.find(job.path)
        if self._passes_over(job, hit) or self._place_with_row(job, hit):
            return True
        for victim in self.victims(job, hit):
            self._running.preempt(victim)
            if self._place_with_row(job, hit):
                return True
        self._blocked = self._situation(job)
        return False

    def victims(self, job: Job, hit: Hit) -> list[Job]:
        """Return the jobs to preempt, the newest first; [] if all of them would not be enough."""
        running = self._running.jobs()
        lower = [other for other in running if job.rank.preempts(other.rank)]
        rows = self._running.rows.free + len(lower)
        enough = rows > self._running.rows_kept(job, without=lower)
        needed = self._running.pages_to_place(job, hit) - self._allocator.free
        if enough and needed <= self._pages_of_only(lower, hit):
            return sorted(lower, key=by_rank, reverse=True)
        return []

    # -- details --------------------------------------------------------------------------------

    def _passes_over(self, job: Job, hit: Hit) -> bool:
        is_waiting = self._prefix.worth_waiting(job.path, hit)
        return is_waiting and self._queue.skip_first() < LOOK_AHEAD

    def _place_with_row(self, job: Job, hit: Hit) -> bool:
        return self._running.has_row_for(job) and self._running.place(job, hit)

    def _pages_of_only(self, jobs: list[Job], hit: Hit) -> int:
        """Return the number of pages that only these jobs and the prefix cache hold.

        Those of `hit` are not counted: the job that starts from them keeps them.
        """
        holders: Counter[int] = Counter()
        for sequence in [*self._prefix.sequences, *(job.placed.sequence for job in jobs)]:
            holders.update(self._allocator.pages_of(sequence))
        for page in hit.pages:
            del holders[page]
        return sum(self._allocator.references(page) == count for page, count in holders.items())

    def _situation(self, job: Job) -> tuple[int, ...]:
        """Return what decides whether a job can preempt."""
        return (job.ticket, self._running.moves, self._prefix.pages)
