"""Who runs next, in which row and pages.

A step decodes one token of every running job, spends what is left of its token budget on chunks of
prompts, and scores continuations whose context is computed. So a long prompt never stalls running
jobs for longer than a chunk.

::

    queue ───place──> prefill ──> decode ──> done        pages of the whole prompt at admission
       ^                     └──> score  ──> done        a page whenever a decode fills its last
       └───preempt (newest)───┴──────┘

The running job of lowest rank can always go on: the newest give up their pages, which are computed
again or, where that takes longer, copied to host memory and back.

Faults are values: a job that a fault ends is finished at once and noted in `failures`. Host only
and without torch: what happens on the device is asked of a `Device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from granite_paged.engine.job import Job, SampleJob, State
from granite_paged.engine.limits import Limits
from granite_paged.engine.prefix_cache import PrefixCache, Snapshot
from granite_paged.engine.running import RunningJobs, by_rank, newest
from granite_paged.engine.scoring import ScorePlanner
from granite_paged.engine.step import Device, PrefillChunk, ScoreChunk, StepPlan, calls
from granite_paged.engine.waiting import WaitingQueue
from granite_paged.errors import RequestTooLarge, StepFailed
from granite_paged.geometry import bucket
from granite_paged.paging.allocator import PageAllocator

LOOK_AHEAD = 32
"""Most jobs that one step passes over because they wait for a prefix."""

_Result = TypeVar("_Result")


class Failure(NamedTuple):
    """A job that ended, and the error that its request reports."""

    job: Job
    error: Exception


class Scheduler:
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

    def submit(self, job: Job) -> None:
        """Let a job wait, and with it its followers. Raises QueueFull unless all may."""
        self.queue.check_room(1 + len(job.followers))
        self.queue.add(job)

    def finish(self, job: Job) -> None:
        """End a job, wherever it is, and free what it holds."""
        if job.state is State.DONE:
            return
        self.queue.remove(job)
        self.running.vacate(job)
        self.running.drop_swapped(job)
        job.state = State.DONE
        followers, job.followers = job.followers, []
        for follower in followers:  # they cannot be forked from it any more
            self.queue.add(follower)

    def fail(self, job: Job, error: Exception) -> None:
        """End a job that a fault concerns, and those that fail with it."""
        if job.state is not State.DONE:
            for sibling in job.siblings:
                self.finish(sibling)
            self.failures.append(Failure(job, error))

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
        self.running.vacate(job)
        if job.state is not State.WAITING:
            self.queue.add(job)

    # -- one step -------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step and take its rows and pages."""
        self.counts.steps += 1
        self.running.begin_step()
        step = StepPlan()
        decodes = self._decodes()
        step.decodes = calls(decodes, lambda job: job)
        time = self._limits.prefill_time(len(decodes))
        budget = self._limits.prefill_tokens(len(decodes), time)
        budget -= self._plan_scores(step, budget)
        self._admit_waiting(step, budget)
        while budget > 0 and (chunks := self._prefill(budget, time, first=not step.prefills)):
            lengths = [chunk.end - chunk.start for chunk in chunks]
            budget -= sum(lengths)
            if decodes:
                time -= self._limits.shapes.prefill_cost(lengths)
            step.prefills += calls(chunks, lambda chunk: chunk.job)
        return step

    def prefilled(self, chunk: PrefillChunk) -> list[SampleJob]:
        """Fork the other samples of a prompt whose last chunk is launched.

        Returns:
            Those forked. The others wait for rows of their own.
        """
        followers, chunk.job.followers = chunk.job.followers, []
        forked = []
        for follower in followers:
            if not self.running.has_row_for(follower):
                self.queue.add(follower)
            else:
                self.guarded(follower, self.running.fork, chunk.job, follower)
                if follower.state is State.DECODE:
                    forked.append(follower)
        return forked

    def room_for_state(self, chunk: PrefillChunk, nbytes: int) -> bool:
        """Return whether to copy the row's state after this chunk, and make room for it first."""
        is_checkpoint = chunk.end in chunk.job.checkpoints and self._prefix.stateful
        return is_checkpoint and self._prefix.make_room(nbytes)

    def keep(self, chunk: PrefillChunk, state: Snapshot | None) -> None:
        """Offer a computed chunk to prompts that begin with the same tokens."""
        if chunk.job.generation == chunk.generation and chunk.job.placement:  # else pages moved on
            self.guarded(chunk.job, self._keep, chunk, state)

    def release(self, chunks: Sequence[ScoreChunk]) -> None:
        """Release the rows and pages reserved for these chunks; see `ScorePlanner.release`."""
        self._scores.release(chunks)

    def check_valid(self) -> None:
        """Prove the invariants between two steps; BrokenInvariant says what broke."""
        self._allocator.check_valid()
        self._prefix.check_valid()
        self.queue.check_valid()
        self.running.check_valid()

    def _keep(self, chunk: PrefillChunk, state: Snapshot | None) -> None:
        job = chunk.job
        if job.placed.is_shareable and (chunk.last or chunk.end in job.checkpoints):
            pages = self._allocator.pages_of(job.placed.sequence)
            self._prefix.keep(job.tokens[: chunk.end], pages, state, job.namespace)
        if chunk.end in job.checkpoints:
            self._prefix.unpromise([job.checkpoints.pop(chunk.end)])

    # -- decode ---------------------------------------------------------------------------------

    def _decodes(self) -> list[SampleJob]:
        """Return the decoding jobs with draws to go, each with a slot for the token it is fed."""
        jobs = [job for job in self.running.decoding if job.drawn < job.limit]
        places = [job.placed for job in jobs]
        full = [job for job, at in zip(jobs, places, strict=True) if at.stored == at.reserved]
        if full:
            while full and not self._grow(full):
                self.running.preempt(newest(self.running.jobs()))
                full = [job for job in full if job.state is State.DECODE]
            jobs = [job for job in jobs if job.state is State.DECODE]
            places = [job.placed for job in jobs]
        for job, place in zip(jobs, places, strict=True):
            place.stored += 1
            job.drawn += 1
        return jobs

    def _grow(self, jobs: Sequence[SampleJob]) -> bool:
        try:
            return self.running.grow(jobs)
        except Exception as error:  # whatever it is, it concerns these jobs only
            self.recover(jobs, error)
            return True

    # -- prompts --------------------------------------------------------------------------------

    def _prefill(self, budget: int, time: float, *, first: bool) -> list[PrefillChunk]:
        """Return the chunks of one call, in order of rank, and count them as stored.

        The step's first chunk is cut to what fits. A later one that does not fit waits for the next
        step, whose first chunk may be longer.
        """
        chunks: list[PrefillChunk] = []
        lengths: list[int] = []
        for job in sorted(self.running.prefilling, key=by_rank):
            length = self._chunk(job, budget)
            if first and not chunks:
                length = self._cut(length, time)
            elif not self._limits.allows([*lengths, length], time):
                break
            if length < 1:
                break
            lengths.append(length)
            place = job.placed
            end = place.stored + length
            chunks.append(PrefillChunk(job, job.generation, place.stored, end, end == place.target))
            budget -= length
        for chunk in chunks:
            chunk.job.placed.stored = chunk.end
            if chunk.last:
                self.running.end_prefill(chunk.job)
        return chunks

    def _chunk(self, job: Job, budget: int) -> int:
        """Return the length of a job's next chunk: up to a checkpoint, or as much as may be."""
        place, most = job.placed, min(budget, self._limits.chunk_tokens)
        ends = [end for end in job.checkpoints if end > place.stored]
        length = min([place.target, *ends]) - place.stored
        return length if length <= most else most - most % self._limits.alignment

    def _cut(self, length: int, time: float) -> int:
        """Return the most of a chunk that one call and the time allow, `alignment` at least."""
        alignment = self._limits.alignment
        while length > alignment and not self._limits.allows([length], time):
            shorter = bucket(length) // 2
            length = max(shorter - shorter % alignment, alignment)
        return length

    # -- scores ---------------------------------------------------------------------------------

    def _plan_scores(self, step: StepPlan, budget: int) -> int:
        """Plan continuations of the contexts that are computed. Return their number of tokens."""
        others = len(self.queue) > 0 or self.running.prefilling
        if others and budget > self._limits.alignment:
            budget -= self._limits.alignment  # a chunk for prompts
        spent = 0
        planned: list[list[ScoreChunk]] = []
        for job in sorted(self.running.scoring, key=by_rank):
            if job.state is State.SCORE and job.pending and spent < budget:
                found = self.guarded(job, self._scores.plan, job, budget - spent) or []
                spent += sum(chunks[-1].end for chunks in found)
                planned += found
        step.scores = self._scores.calls(planned)
        return spent

    # -- admission ------------------------------------------------------------------------------

    def _admit_waiting(self, step: StepPlan, budget: int) -> None:
        """Let jobs in by rank, as long as work, rows and pages last.

        A job whose beginning another prompt is just computing waits for it. Jobs behind it may
        pass, `LOOK_AHEAD` at most.
        """
        running = self.running
        budget -= sum(job.placed.target - job.placed.stored for job in running.prefilling)
        try:
            while budget > 0 and not running.short:
                job = self.queue.first()
                if job is None or not running.has_row_for(job):
                    break
                skipped = self.guarded(job, self._place_or_skip, job)
                if job.placement:
                    budget -= job.placement.target - job.placement.stored
                elif job.state is State.WAITING and (not skipped or skipped == LOOK_AHEAD):
                    break
                if job.state is State.DECODE:
                    step.resumed.append(job)
                elif job.state is State.SCORE:
                    step.ready.append(job)
        finally:
            self.queue.unskip()

    def _place_or_skip(self, job: Job) -> int:
        """Place a job, or skip it if a prefix is worth waiting for. Return how many are skipped."""
        hit = self._prefix.find(job.path)
        if self._prefix.worth_waiting(job.path, hit):
            return self.queue.skip_first()
        self.running.place(job, hit)
        return 0
