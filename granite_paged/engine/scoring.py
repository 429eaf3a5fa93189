"""Continuations of contexts: each in a fork of its context, as many at once as fit.

A fork lives for one step. The last continuation takes the context's own row and pages, and so does
every one that no fork has room for while the context runs alone: it is computed again afterwards.
Host only and without torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from granite_paged.engine.job import ScoringJob, State
from granite_paged.engine.limits import Limits
from granite_paged.engine.running import RunningJobs, newest
from granite_paged.engine.step import Device, ScoreChunk
from granite_paged.engine.waiting import WaitingQueue
from granite_paged.paging.allocator import PageAllocator


class ScorePlanner:
    """Plans the score calls of a step, and takes their forks back."""

    def __init__(
        self,
        device: Device,
        allocator: PageAllocator,
        queue: WaitingQueue,
        running: RunningJobs,
        limits: Limits,
    ) -> None:
        self._device = device
        self._allocator = allocator
        self._queue = queue
        self._running = running
        self._rows = running.rows
        self._limits = limits
        self._forks: dict[int, int] = {}  # sequence -> row, of this step

    def plan(self, job: ScoringJob, budget: int) -> list[list[ScoreChunk]]:
        """Plan as many of a context's continuations as fit, each as a list of chunks.

        The last of all takes the context's own row.
        """
        rows = self._rows_for(job)
        numbers = self._affordable(job, budget, rows)
        is_last = len(numbers) == len(job.pending)
        forks = self._fork(job, numbers[:-1] if is_last else numbers[:rows])
        planned = [
            self._chunks(job, number, row, sequence)
            for number, (sequence, row) in zip(numbers, forks, strict=False)
        ]
        done = len(forks)
        is_alone = len(self._running) == 1 and not self._forks  # no other job will make room
        if is_alone or (is_last and done == len(numbers) - 1):
            number, place = numbers[done], job.placed
            if self._grow_own(job, len(job.continuation(number))):
                planned.append(self._chunks(job, number, place.row, place.sequence))
        del job.pending[: len(planned)]
        return planned

    def calls(self, planned: Sequence[list[ScoreChunk]]) -> list[list[ScoreChunk]]:
        """Group planned continuations into calls. One in several chunks has calls of its own."""
        calls: list[list[ScoreChunk]] = []
        shared: list[ScoreChunk] = []
        for chunks in planned:
            if len(chunks) > 1 or chunks[0].job.isolated:
                calls += [[chunk] for chunk in chunks]
                continue
            lengths = [chunk.end - chunk.start for chunk in (*shared, *chunks)]
            if shared and not self._limits.shapes.fits(lengths):
                calls.append(shared)
                shared = []
            shared = [*shared, *chunks]
        return [*calls, shared] if shared else calls

    def release(self, chunks: Sequence[ScoreChunk]) -> None:
        """Release the rows and pages reserved for these chunks, when their step is launched.

        Call only after the previous step was read: its chunks may still hand pages to the prefix
        cache.
        """
        for sequence in list(self._forks):
            self._end_fork(sequence)
        used_up = {chunk.job for chunk in chunks if not chunk.forked}
        for job in dict.fromkeys(chunk.job for chunk in chunks):
            if job in self._running.scoring and (job in used_up or not job.pending):
                self._running.vacate(job)
                job.state = State.UNREAD
                if job.pending:
                    self._queue.add(job)

    # -- details --------------------------------------------------------------------------------

    def _rows_for(self, job: ScoringJob) -> int:
        """Return the number of rows to fork into.

        A context that needs more than one step anyway leaves rows to waiting jobs, as far as
        contexts need not keep them.
        """
        free = self._rows.free
        if job.rows_for_forks <= free:
            return free
        return max(min(free, self._running.rows_kept(job)), free - len(self._queue))

    def _affordable(self, job: ScoringJob, budget: int, rows: int) -> list[int]:
        """Return the next continuations: one, and more as long as `rows` and the budget last."""
        numbers = job.pending[:1]
        budget -= len(job.continuation(numbers[0]))
        for number in job.pending[1 : rows + 1]:
            budget -= len(job.continuation(number))
            if budget < 0:
                break
            numbers.append(number)
        return numbers

    def _chunks(self, job: ScoringJob, number: int, row: int, sequence: int) -> list[ScoreChunk]:
        """Cut a continuation into chunks that one call can take each."""
        size, tokens = self._limits.chunk_tokens, len(job.continuation(number))
        forked = sequence != job.placed.sequence
        return [
            ScoreChunk(
                job, job.generation, number, start, min(start + size, tokens), row, sequence, forked
            )
            for start in range(0, tokens, size)
        ]

    def _fork(self, job: ScoringJob, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Fork a context for these continuations, or for the first few that there is room for.

        Returns:
            Sequence and row of each fork.
        """
        place = job.placed
        growth: dict[int, int] = {}
        for number in numbers:
            sequence = self._allocator.fork(place.sequence)
            self._forks[sequence] = self._running.take_row(sequence)
            self._running.forks += 1
            growth[sequence] = len(job.continuation(number))
        while growth and not self._make_room(job, growth, needed=len(growth) == 1):
            self._end_fork(growth.popitem()[0])
        if not growth:
            return []
        rows = {sequence: self._forks[sequence] for sequence in growth}
        self._device.fork_row(place.row, *rows.values())
        self._running.append(growth, rows)
        return list(rows.items())

    def _end_fork(self, sequence: int) -> None:
        self._running.give_row(self._forks.pop(sequence))
        self._running.forks -= 1
        self._running.release(sequence)

    def _grow_own(self, job: ScoringJob, tokens: int) -> bool:
        """Make room in the context's own pages."""
        place = job.placed
        if not self._make_room(job, {place.sequence: tokens}, needed=True):
            return False
        self._running.append({place.sequence: tokens}, {place.sequence: place.row})
        place.reserved += tokens
        return True

    def _make_room(self, job: ScoringJob, growth: dict[int, int], *, needed: bool) -> bool:
        """Make room; if it is needed, by preempting newer jobs that nothing is planned for."""
        running = self._running
        while not running.make_room(self._allocator.pages_needed(growth)):
            newer = [o for o in (*running.scoring, *running.prefilling) if o.rank > job.rank]
            if not needed or not newer:
                running.short = True
                return False
            running.preempt(newest(newer))
        return True
