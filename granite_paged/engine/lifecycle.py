"""How jobs come and go: they are submitted, forked, finished, failed and started over.

Faults are values: a job that a fault ends is finished at once and noted in `failures`. Host only
and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from granite_paged.engine.job import Job, SampleJob, State
from granite_paged.engine.limits import Limits
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.running import RunningJobs
from granite_paged.engine.scoring import ScorePlanner
from granite_paged.engine.step import Device
from granite_paged.engine.waiting import WaitingQueue
from granite_paged.errors import RequestTooLarge, StepFailed
from granite_paged.paging.allocator import PageAllocator

_Result = TypeVar("_Result")


class Failure(NamedTuple):
    """A job that ended, and the error that its request reports."""

    job: Job
    error: Exception


class JobLifecycle:
    """Moves jobs between a queue and the rows and pages of a device.

    Attributes:
        queue: jobs that wait.
        running: jobs with a row and pages.
        failures: jobs that a fault ended; the reader empties the list.
    """

    def __init__(
        self, device: Device, allocator: PageAllocator, prefix: PrefixCache, limits: Limits
    ) -> None:
        self.failures: list[Failure] = []
        self.queue = WaitingQueue(prefix, limits.queue)
        self.running = RunningJobs(device, allocator, prefix, self.queue, limits)
        self.counts = self.running.counts
        self._scores = ScorePlanner(device, allocator, self.queue, self.running, limits)
        self._allocator = allocator
        self._prefix = prefix
        self._limits = limits

    def check_fits(self, tokens: int) -> None:
        """Raise RequestTooLarge unless a sequence of `tokens` tokens would fit alone."""
        longest = self._limits.longest
        needed, usable = self._allocator.pages_for(tokens), self._allocator.pages - 1
        if needed > usable:
            advice = f"raise max_tokens or memory_fraction, or ask for fewer than {tokens} tokens"
            raise RequestTooLarge(needed=needed, free=usable, advice=advice)
        if tokens > longest:
            usable = self._allocator.pages_for(longest)
            advice = f"a sequence may have {longest} tokens, got {tokens}"
            raise RequestTooLarge(needed=needed, free=usable, advice=advice)

    # -- jobs come and go -----------------------------------------------------------------------

    def finish(self, job: Job) -> None:
        """End a job, wherever it is, and free what it holds; what raises is freed later."""
        if job.state is State.DONE:
            return
        late = self.queue.late
        for cleanup in (self.queue.remove, self.running.vacate, self.running.drop_swapped):
            late.attempt(cleanup, job)
        job.state = State.DONE
        followers, job.followers = job.followers, []
        for follower in followers:  # they cannot be forked from it any more
            if follower.state is State.NEW:
                late.attempt(self.queue.add, follower)

    def fail(self, job: Job, error: Exception) -> None:
        """End a job that a fault concerns, and those that fail with it."""
        if job.state is not State.DONE:
            self.failures.append(Failure(job, error))  # first: its request ends, whatever happens
            for sibling in job.siblings:
                self.finish(sibling)

    def requeue(self, job: Job) -> None:
        """Let a job without a row wait, to compute its tokens."""
        self.queue.remove(job)
        self.running.vacate(job)
        self.queue.add(job)

    def fork(self, job: SampleJob, child: SampleJob) -> bool:
        """Give a new job a row and the pages of a decoding one. Return whether there was room."""
        if job not in self.running.decoding or not self.running.has_row_for(child):
            return False
        self.guarded(child, self.running.fork, job, child)
        return child.state is not State.DONE

    # -- faults ---------------------------------------------------------------------------------

    def guarded(self, job: Job, action: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """Do something for one job; a fault ends that job only."""
        try:
            return action(*arguments)
        except Exception as error:
            self.fail(job, StepFailed(job.request.number, error))
            return None

    def recover(self, jobs: Iterable[Job], error: Exception) -> None:
        """Clean up after a call with these jobs raised: their rows and pages may hold anything.

        A job that was alone in the call fails. Several start over, each in calls of its own, so
        that the next fault has one owner.
        """
        affected = [job for job in dict.fromkeys(jobs) if job.state is not State.DONE]
        for job in affected:
            if len(affected) == 1:
                self.fail(job, StepFailed(job.request.number, error))
            else:
                job.isolated = True
                self._restart(job)

    def restart(self, jobs: Iterable[Job]) -> None:
        """Clean up after an interrupted step: jobs that are not complete start over."""
        self._scores.release(())
        for job in jobs:
            if job.complete:
                self.finish(job)
            elif job.state not in (State.DONE, State.NEW):
                self._restart(job)

    def _restart(self, job: Job) -> None:
        self.counts.restarted += 1
        job.start_over()
        self.running.drop_swapped(job)
        self.requeue(job)
