"""Who runs next, in which row and pages.

A step decodes one token of every running job, spends what is left of its token budget on prompts in
chunks, and scores continuations whose context is there. So a long prompt never stalls running ones
for more than a chunk.

::

    waiting ──admit──> prefill ──> decode ──> done       pages of the whole prompt at admission
       ^   └─swap in────────────────^  │                 a page whenever a decode fills its last
       └──────────preempt (newest)─────┘

Order is by rank: arrival, moved ahead by priority as by a fixed number of arrivals, so nobody waits
for ever. Whoever ranks first can always run: the newest give up their pages, to be computed again
or, where that is dearer, copied to host memory and back. Rows are handed out by number and cleared
before reuse; a step names the rows it wants, so none has to move into a hole.

Invariant: a job has a row and a sequence of pages exactly while it is in prefill, decode or score.
Host only and without torch: what happens on the device is asked of a `Device`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from granite_paged.engine.prefix_cache import Hit, PrefixCache, RowState
from granite_paged.engine.request import Job, State, Swapped
from granite_paged.engine.step import Device, Limits, PrefillChunk, ScoreChunk, Step, calls
from granite_paged.errors import QueueFull, RequestTooLarge, require
from granite_paged.geometry import bucket
from granite_paged.paging.allocator import PageAllocator

PRIORITY_WORTH = 1000
"""Arrivals that one step of priority puts a request ahead by."""

LOOK_AHEAD = 32
"""Waiting jobs that one step considers while those before them wait for a prefix."""


@dataclass(slots=True)
class Counts:
    """What the scheduler did since it was made."""

    steps: int = 0
    admitted: int = 0
    preempted: int = 0
    swapped: int = 0
    restarted: int = 0


class Scheduler:
    """Queues of jobs over an allocator and a prefix cache.

    Args:
        failed: told of a job that a fault ended, and of the fault; it calls `finish`.
    """

    def __init__(
        self,
        device: Device,
        allocator: PageAllocator,
        prefix: PrefixCache,
        limits: Limits,
        failed: Callable[[Job, Exception], None],
    ) -> None:
        self.counts = Counts()
        self.decoding: dict[Job, None] = {}
        self.prefilling: dict[Job, None] = {}
        self.scoring: dict[Job, None] = {}
        self.waiting = 0
        self.swapped_bytes = 0
        self._device = device
        self._allocator = allocator
        self._prefix = prefix
        self._limits = limits
        self._failed = failed
        self._queue: list[tuple[int, int, Job]] = []  # what left early stays until it surfaces
        self._arrivals = 0
        self._queued = 0
        self._rows = list(range(limits.rows, 0, -1))
        self._dirty = set(self._rows)
        self._short = False  # this step wanted pages that were not there: nobody new comes in
        self._branches: dict[int, int] = {}  # sequence -> row of the continuations of this step
        self._unreleased: list[int] = []  # sequences whose release raised
        self._unforgotten: list[int] = []  # free pages that the device was not told of

    # -- looking --------------------------------------------------------------------------------

    @property
    def free_rows(self) -> int:
        """Rows nobody has."""
        return len(self._rows)

    @property
    def running(self) -> int:
        """Jobs with a row."""
        return len(self.decoding) + len(self.prefilling) + len(self.scoring)

    def jobs(self) -> list[Job]:
        """Those with a row."""
        return [*self.decoding, *self.prefilling, *self.scoring]

    def check_fits(self, tokens: int) -> None:
        """Whether a sequence of so many tokens would fit alone. Raises RequestTooLarge."""
        needed, there = self._allocator.pages_for(tokens), self._allocator.pages - 1
        if needed > there:
            advice = f"raise max_tokens or memory_fraction, or ask for fewer than {tokens} tokens"
            raise RequestTooLarge(needed=needed, free=there, advice=advice)
        if tokens > self._limits.longest:
            there = self._allocator.pages_for(self._limits.longest)
            advice = f"a sequence may have {self._limits.longest} tokens, {tokens} were asked for"
            raise RequestTooLarge(needed=needed, free=there, advice=advice)

    def rank(self, priority: int) -> int:
        """Rank of a job that arrives now."""
        self._arrivals += 1
        return self._arrivals - priority * PRIORITY_WORTH

    # -- jobs come and go -----------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job], followers: int = 0) -> None:
        """Let jobs wait, all or none, and with them as many followers. Raises QueueFull."""
        if self.waiting + len(jobs) + followers > self._limits.queue:
            raise QueueFull(waiting=self.waiting, limit=self._limits.queue)
        for job in jobs:
            self._enqueue(job)

    def finish(self, job: Job) -> None:
        """The job is done, wherever it was; what it held is free."""
        if job.state is State.DONE:
            return
        self._leave_queue(job)
        self._vacate(job)
        self._drop_swapped(job)
        job.state = State.DONE
        followers, job.followers = job.followers, []
        for follower in followers:  # nobody is left to fork them from
            self._enqueue(follower)

    def rest(self, job: Job) -> None:
        """A job that has drawn all it may does not need its row and pages for now."""
        if job in self.decoding:
            self._vacate(job)
            job.state = State.READ

    def requeue(self, job: Job) -> None:
        """A job without a row has tokens to draw again: it waits to be computed."""
        self._leave_queue(job)
        self._vacate(job)
        self._enqueue(job)

    def fork(self, job: Job, child: Job) -> bool:
        """Give a new job the row and pages of a decoding one, if there is a row for it."""
        if job not in self.decoding or not self._row_for(child):
            return False
        return self._guarded(child, self._fork, job, child)

    def recover(self, jobs: Iterable[Job], error: Exception) -> None:
        """A call with these jobs raised, so their rows and pages hold anything.

        One that was alone fails. Several start over, each in calls of its own, so that the next
        fault says whose it is.
        """
        affected = [job for job in dict.fromkeys(jobs) if job.state is not State.DONE]
        for job in affected:
            if len(affected) == 1:
                self._failed(job, error)
            else:
                job.isolated = True
                self._restart(job)

    def restart(self, jobs: Iterable[Job]) -> None:
        """A step was interrupted: whatever is not done starts over."""
        self.scored(())
        for job in jobs:
            if job.state not in (State.DONE, State.NEW):
                self._restart(job)

    # -- one step -------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Decide the next step and take its rows and pages."""
        self.counts.steps += 1
        self._short = False
        self._release_late()
        step = Step()
        decodes = self._decodes()
        step.decodes = calls(decodes, lambda job: job)
        beside = self._time_beside(len(decodes))
        budget = self._prompt_tokens(len(decodes), beside)
        budget -= self._plan_scores(step, budget)
        self._admit_waiting(step, budget)
        while budget > 0 and (chunks := self._spans(budget, beside, first=not step.prefills)):
            lengths = [chunk.end - chunk.start for chunk in chunks]
            budget -= sum(lengths)
            beside -= self._limits.prefill_cost(lengths) if beside < math.inf else 0
            step.prefills += calls(chunks, lambda chunk: chunk.job)
        return step

    def _time_beside(self, decodes: int) -> float:
        """What prompts may take beside so many decoded rows, in the unit of the limits' costs."""
        limits = self._limits
        return (limits.longest_step - 1) * limits.decode_cost(decodes) if decodes else math.inf

    def _prompt_tokens(self, decodes: int, time: float) -> int:
        """Most tokens of prompts and continuations beside so many decoded ones, in that time."""
        most = min(self._limits.step_tokens - decodes, time)
        return max(int(most), self._limits.alignment)

    def prefilled(self, chunk: PrefillChunk) -> list[Job]:
        """The prompt's last chunk was launched: fork its other samples. Returns who draws now."""
        job = chunk.job
        drawing, followers = [job], job.followers
        job.followers = []
        for follower in followers:
            if self._row_for(follower):
                if self._guarded(follower, self._fork, job, follower):
                    drawing.append(follower)
            else:
                self._enqueue(follower)
        return drawing

    def room_for_state(self, chunk: PrefillChunk, nbytes: int) -> bool:
        """Make room for the row's state after this chunk, if it is to be kept for others. Whether
        there is: what it takes the place of is gone before it is copied.
        """
        is_cut = chunk.end in chunk.job.checkpoints and self._prefix.stateful
        return is_cut and self._prefix.make_room(nbytes)

    def keep(self, chunk: PrefillChunk, state: RowState | None) -> None:
        """The chunk was computed and is sound: others that begin alike may use it."""
        if (
            chunk.job.generation == chunk.generation and chunk.job.row > 0
        ):  # else its pages went to others
            self._guarded(chunk.job, self._keep, chunk, state)

    def _keep(self, chunk: PrefillChunk, state: RowState | None) -> bool:
        job = chunk.job
        if chunk.last or chunk.end in job.checkpoints:
            pages = self._allocator.pages_of(job.sequence)
            self._prefix.keep(job.tokens[: chunk.end], pages, state)
        if chunk.end in job.checkpoints:
            self._prefix.unpromise([job.checkpoints.pop(chunk.end)])
        return True

    def scored(self, parts: Sequence[ScoreChunk]) -> None:
        """A step was made, with these parts: what was taken for them is free.

        Call only after the previous step was read: its chunks may still hand the context's pages to
        the prefix cache.
        """
        for sequence in list(self._branches):
            self._end_branch(sequence)
        used_up = {part.job for part in parts if not part.forked}
        for job in dict.fromkeys(part.job for part in parts):
            if job in self.scoring and (job in used_up or not job.pending):
                self._vacate(job)
                job.state = State.READ
                if job.pending:
                    self._enqueue(job)

    # -- decode ---------------------------------------------------------------------------------

    def _decodes(self) -> list[Job]:
        """Every decoding job with tokens to go, each with a slot for the token it is fed."""
        jobs = [job for job in self.decoding if job.sampled < job.limit]
        full = [job for job in jobs if job.stored == job.reserved]
        if full:
            while full and not self._grow(full):
                self._preempt(self._newest(self.jobs()))
                full = [job for job in full if job.state is State.DECODE]
            jobs = [job for job in jobs if job.state is State.DECODE]
        for job in jobs:
            job.stored += 1
            job.sampled += 1
        return jobs

    def _grow(self, jobs: Sequence[Job]) -> bool:
        """Room up to the end of a page for each, so that most steps ask for nothing."""
        size = self._allocator.page_size
        growth = {job.sequence: 1 if job.exact else size - job.reserved % size for job in jobs}
        try:
            if not self._prefix.evict(self._allocator.pages_needed(growth)):
                return False
            plan = self._allocator.append(growth)
            for job in jobs:
                job.reserved += growth[job.sequence]
            self._device.write_pages(plan, {job.sequence: job.row for job in jobs})
        except Exception as error:  # whatever it is, it concerns these jobs only
            self.recover(jobs, error)
        return True

    def _newest(self, jobs: Iterable[Job]) -> Job:
        return max(jobs, key=_rank)

    def _preempt(self, job: Job) -> None:
        """Take a job's row and pages; it waits to come back."""
        self.counts.preempted += 1
        self._short = True
        if job.state is State.DECODE and job.sampled == job.limit:
            self.rest(job)
            return
        if job.state is State.DECODE and not job.isolated and self._limits.swap(job.stored):
            self._swap_out(job)
        self._vacate(job)
        self._enqueue(job)

    def _swap_out(self, job: Job) -> None:
        try:
            held = self._allocator.pages_of(job.sequence)[: self._allocator.pages_for(job.stored)]
            pages = self._device.save_pages(held)
            state = self._device.save_row(job.row, to_host=True)
        except Exception:
            return  # computing it again needs nothing of the device
        nbytes = pages.nbytes + state.nbytes
        if self.swapped_bytes + nbytes <= self._limits.swap_bytes:
            job.swapped = Swapped(job.stored, pages, state, nbytes)
            self.swapped_bytes += nbytes
            self.counts.swapped += 1

    # -- prompts --------------------------------------------------------------------------------

    def _spans(self, budget: int, time: float, *, first: bool) -> list[PrefillChunk]:
        """Chunks of one call, in order of rank. Their jobs go on as if it was made.

        The step's first chunk is cut to what fits; whoever comes after it and does not fit waits
        for the next step, whose first chunk may be longer.
        """
        chunks: list[PrefillChunk] = []
        lengths: list[int] = []
        for job in sorted(self.prefilling, key=_rank):
            length = self._chunk(job, budget)
            if first and not chunks:
                length = self._cut(length, time)
            elif not self._affords([*lengths, length], time):
                break
            if length < 1:
                break
            lengths.append(length)
            end = job.stored + length
            chunks.append(PrefillChunk(job, job.generation, job.stored, end, end == job.target))
            budget -= length
        for chunk in chunks:
            chunk.job.stored = chunk.end
            if chunk.last:
                self._prompt_done(chunk.job)
        return chunks

    def _chunk(self, job: Job, budget: int) -> int:
        """Tokens of the job's next chunk: to where a state is kept, or as many as may be."""
        most = min(budget, self._limits.chunk_tokens)
        ends = [end for end in job.checkpoints if end > job.stored]
        length = min([job.target, *ends]) - job.stored
        return length if length <= most else most - most % self._limits.alignment

    def _cut(self, length: int, time: float) -> int:
        """The most of a chunk that fits into one call and the time; `alignment` always does."""
        while length > self._limits.alignment and not self._affords([length], time):
            shorter = bucket(length) // 2
            length = max(shorter - shorter % self._limits.alignment, self._limits.alignment)
        return length

    def _affords(self, lengths: Sequence[int], time: float) -> bool:
        in_time = time == math.inf or self._limits.prefill_cost(lengths) <= time
        return in_time and self._limits.fits(lengths)

    def _prompt_done(self, job: Job) -> None:
        del self.prefilling[job]
        if job.scoring:
            job.state = State.SCORE
            self.scoring[job] = None
            if job.single:
                job.pending.clear()  # its last logits answer them all
        else:
            job.state = State.DECODE
            self.decoding[job] = None
            job.sampled += 1

    def _fork(self, job: Job, follower: Job) -> bool:
        follower.sequence, follower.row = self._allocator.fork(job.sequence), self._rows.pop()
        follower.stored, follower.reserved = job.stored, job.reserved
        follower.target, follower.isolated = job.target, job.isolated
        follower.state, follower.sampled = State.DECODE, 1
        self.decoding[follower] = None
        self._dirty.add(follower.row)
        self._device.fork_row(job.row, follower.row)
        return True

    # -- coming in ------------------------------------------------------------------------------

    def _admit_waiting(self, step: Step, budget: int) -> None:
        """Let jobs in by rank, as long as there is work left to give, rows and pages.

        One whose beginning is just being computed by another waits for it; those behind may pass.
        """
        budget -= sum(job.target - job.stored for job in self.prefilling)
        passed: list[Job] = []
        try:
            while budget > 0 and not self._short and len(passed) < LOOK_AHEAD:
                job = self._first_waiting()
                if job is None or not self._row_for(job):
                    break
                self._guarded(job, self._admit_or_pass, job, passed)
                if job.state is State.WAITING and job not in passed:
                    break
                budget -= max(0, job.target - job.stored)
                if job.state is State.DECODE:
                    step.resumed.append(job)
                elif job.state is State.SCORE:
                    step.ready.append(job)
        finally:
            for job in passed:
                self._push(job)

    def _admit_or_pass(self, job: Job, passed: list[Job]) -> bool:
        hit = self._prefix.find(job.path)
        if self._prefix.worth_waiting(job.path, hit):
            heapq.heappop(self._queue)
            passed.append(job)
            return False
        return self._admit(job, hit)

    def _first_waiting(self) -> Job | None:
        while self._queue:
            number, job = self._queue[0][1:]
            if job.state is State.WAITING and job.ticket == number:
                return job
            heapq.heappop(self._queue)
        return None

    def _row_for(self, job: Job) -> bool:
        """Whether one is free beside those that contexts fork into.

        They keep as many as the one with the most continuations needs, and half of all at most:
        with fewer, all contexts would wait for each other's.
        """
        asking = (job, *self.scoring, *self.prefilling)
        forks = max((len(other.pending) - 1 for other in asking if other.forks), default=0)
        return len(self._rows) > min(forks, self._limits.rows // 2)

    def _admit(self, job: Job, hit: Hit) -> bool:
        """Give a waiting job its row and the pages of its prompt, or leave it waiting."""
        swapped = job.swapped
        pages = () if swapped else hit.pages
        job.target = swapped.stored if swapped else job.prefix_tokens
        tokens = max(job.target, min(job.target + 1, job.most))
        job.sequence, job.row = self._allocator.open(pages), self._rows.pop()
        if not self._prefix.evict(self._allocator.pages_for(tokens) - len(pages)):
            self._vacate(job)
            return False
        self._clear_row(job.row)
        if swapped:
            self._swap_in(job, swapped)
        else:
            self._start(job, hit)
        self._leave_queue(job)
        self.counts.admitted += 1
        self._enter(job, State.DECODE if swapped else State.PREFILL)
        return True

    def _clear_row(self, row: int) -> None:
        """Clear a row for its new owner, and with it all others that will need it."""
        if row in self._dirty:
            rows = self._dirty.intersection([row, *self._rows])
            self._device.clear_rows(sorted(rows))
            self._dirty -= rows
        self._dirty.add(row)  # by what its owner will leave in it

    def _start(self, job: Job, hit: Hit) -> None:
        if hit.pages:
            self._device.set_pages(job.row, hit.pages)
        if hit.state is not None:
            self._device.load_row(job.row, hit.state)
        self._append(job, job.target - hit.tokens)
        job.stored, job.reserved = hit.tokens, job.target
        self._prefix.used(job.path, hit, job.target)
        job.checkpoints = self._prefix.checkpoints(job.path, hit)
        self._prefix.promise(list(job.checkpoints.values()))

    def _swap_in(self, job: Job, swapped: Swapped) -> None:
        self._append(job, swapped.stored)
        self._device.load_pages(self._allocator.pages_of(job.sequence), swapped.pages)
        self._device.load_row(job.row, swapped.state)
        job.stored = job.reserved = swapped.stored
        self._drop_swapped(job)

    def _append(self, job: Job, tokens: int) -> None:
        if tokens:
            plan = self._allocator.append({job.sequence: tokens})
            self._device.write_pages(plan, {job.sequence: job.row})

    def _enter(self, job: Job, state: State) -> None:
        if job.scoring and job.stored == job.target:
            state = State.SCORE
        job.state = state
        {
            State.PREFILL: self.prefilling,
            State.DECODE: self.decoding,
            State.SCORE: self.scoring,
        }[state][job] = None

    # -- scores ---------------------------------------------------------------------------------

    def _plan_scores(self, step: Step, budget: int) -> int:
        """Continuations of the contexts that are there, each in a fork. Returns their tokens."""
        spent = 0
        planned: list[list[ScoreChunk]] = []
        for job in sorted(self.scoring, key=_rank):
            before = len(planned)
            if job.state is State.SCORE and job.pending and spent < budget:
                self._guarded(job, self._plan_continuations, job, budget - spent, planned)
            spent += sum(pieces[-1].end for pieces in planned[before:])
        step.scores = self._score_calls(planned)
        return spent

    def _plan_continuations(self, job: Job, budget: int, planned: list[list[ScoreChunk]]) -> bool:
        """As many of a context's as there is room for; the last of all in the context's own row."""
        numbers = self._affordable(job, budget)
        last = len(numbers) == len(job.pending)
        forks = self._fork_out(job, numbers[:-1] if last else numbers)
        for number, (sequence, row) in zip(numbers, forks, strict=False):
            planned.append(self._pieces(job, number, row, sequence))
        done = len(forks)
        alone = self.running == 1 and not self._branches  # nobody else will make room
        own = alone or (last and done == len(numbers) - 1)
        if own and self._grow_own(job, len(job.continuation(numbers[done]))):
            planned.append(self._pieces(job, numbers[done], job.row, job.sequence))
            done += 1
        del job.pending[:done]
        return done > 0

    def _affordable(self, job: Job, budget: int) -> list[int]:
        """The next continuations: one, and more as long as rows and the budget last."""
        numbers = job.pending[:1]
        budget -= len(job.continuation(numbers[0]))
        for number in job.pending[1 : len(self._rows) + 1]:
            budget -= len(job.continuation(number))
            if budget < 0:
                break
            numbers.append(number)
        return numbers

    def _pieces(self, job: Job, number: int, row: int, sequence: int) -> list[ScoreChunk]:
        """A continuation in pieces that one call can take each."""
        size, tokens = self._limits.chunk_tokens, len(job.continuation(number))
        forked = sequence != job.sequence
        return [
            ScoreChunk(
                job, job.generation, number, start, min(start + size, tokens), row, sequence, forked
            )
            for start in range(0, tokens, size)
        ]

    def _fork_out(self, job: Job, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Forks of a context with room for these continuations, or for the first few of them.

        Returns:
            Sequence and row of each.
        """
        growth: dict[int, int] = {}
        for number in numbers[: len(self._rows)]:
            sequence = self._allocator.fork(job.sequence)
            self._branches[sequence] = self._rows.pop()
            growth[sequence] = len(job.continuation(number))
        while growth and not self._room(job, growth, needed=len(growth) == 1):
            self._end_branch(growth.popitem()[0])
        if not growth:
            return []
        rows = {sequence: self._branches[sequence] for sequence in growth}
        self._dirty.update(rows.values())
        self._device.fork_row(job.row, *rows.values())
        self._device.write_pages(self._allocator.append(growth), rows)
        return list(rows.items())

    def _end_branch(self, sequence: int) -> None:
        self._rows.append(self._branches.pop(sequence))
        self._release(sequence)

    def _grow_own(self, job: Job, tokens: int) -> bool:
        """Room in the context's own pages: for its last continuation, or where no fork fits."""
        if not self._room(job, {job.sequence: tokens}, needed=True):
            return False
        self._append(job, tokens)
        job.reserved += tokens
        return True

    def _room(self, job: Job, growth: dict[int, int], *, needed: bool) -> bool:
        """Make room; if it is needed, at the cost of newer jobs that nothing was planned for."""
        while not self._prefix.evict(self._allocator.pages_needed(growth)):
            newer = [o for o in (*self.scoring, *self.prefilling) if o.rank > job.rank]
            if not needed or not newer:
                self._short = True
                return False
            self._preempt(self._newest(newer))
        return True

    def _score_calls(self, planned: Sequence[list[ScoreChunk]]) -> list[list[ScoreChunk]]:
        calls: list[list[ScoreChunk]] = []
        shared: list[ScoreChunk] = []
        for pieces in planned:
            if len(pieces) > 1 or pieces[0].job.isolated:
                calls += [[piece] for piece in pieces]
                continue
            lengths = [part.end - part.start for part in (*shared, *pieces)]
            if shared and not self._limits.fits(lengths):
                calls.append(shared)
                shared = []
            shared = [*shared, *pieces]
        return [*calls, shared] if shared else calls

    # -- details --------------------------------------------------------------------------------

    def _guarded(self, job: Job, action: Callable[..., bool], *arguments: Any) -> bool:
        """Do something for one job; a fault ends that job only."""
        try:
            return action(*arguments)
        except Exception as error:
            self._failed(job, error)
            return False

    def _enqueue(self, job: Job) -> None:
        job.state = State.WAITING
        job.path = [] if job.swapped else self._prefix.announce(job.tokens)
        self.waiting += 1
        self._push(job)

    def _push(self, job: Job) -> None:
        self._queued += 1
        job.ticket = self._queued
        heapq.heappush(self._queue, (job.rank, job.ticket, job))

    def _leave_queue(self, job: Job) -> None:
        if job.state is State.WAITING:
            self.waiting -= 1
            path, job.path = job.path, []
            self._prefix.withdraw(path)

    def _restart(self, job: Job) -> None:
        self.counts.restarted += 1
        job.generation += 1
        job.sampled = len(job.tokens) - job.prompt_length
        job.pending = job.unscored()
        job.partial.clear()
        job.seen = None
        self._drop_swapped(job)
        self._vacate(job)
        if job.state is not State.WAITING:
            self._enqueue(job)

    def _vacate(self, job: Job) -> None:
        """Take back what a job holds, if anything."""
        for jobs in (self.decoding, self.prefilling, self.scoring):
            jobs.pop(job, None)
        checkpoints, job.checkpoints = job.checkpoints, {}
        self._prefix.unpromise(list(checkpoints.values()))
        row, sequence = job.row, job.sequence
        job.row = job.sequence = -1  # first: interrupted from here on, they are given back once
        job.stored = job.reserved = 0
        if row > 0:
            self._rows.append(row)
        if sequence >= 0:
            self._release(sequence)

    def _drop_swapped(self, job: Job) -> None:
        if job.swapped:
            self.swapped_bytes -= job.swapped.nbytes
            job.swapped = None

    def _release(self, sequence: int) -> None:
        """Close a sequence of pages. What raises is done again at the next step, so none leak."""
        try:
            freed = self._allocator.release(sequence)
        except Exception:
            self._unreleased.append(sequence)
        else:
            self.forget(freed)

    def forget(self, pages: list[int]) -> None:
        """The device may forget these pages, which nobody holds any more."""
        try:
            self._device.forget_pages(pages)
        except Exception:
            self._unforgotten += pages

    def _release_late(self) -> None:
        if self._unreleased:
            handles, self._unreleased = self._unreleased, []
            for sequence in handles:
                self._release(sequence)
        if self._unforgotten:
            pages, self._unforgotten = self._unforgotten, []
            # one that was issued again belongs to its new owner
            self.forget([page for page in pages if not self._allocator.references(page)])

    # -- proving --------------------------------------------------------------------------------

    def check_valid(self) -> None:
        """Prove the invariant between two steps; BrokenInvariant says what broke."""
        self._allocator.check_valid()
        self._prefix.check_valid()
        jobs = self.jobs()
        rows = sorted([*(job.row for job in jobs), *self._rows])
        require(rows == list(range(1, self._limits.rows + 1)), "a row is lost, or has two owners")
        owners = [*(job.sequence for job in jobs), *self._unreleased, *self._prefix.handles]
        ours = sorted(self._allocator.sequences)
        require(sorted(owners) == ours, "a sequence without an owner, or with two")
        for job in jobs:
            require(self._allocator.length(job.sequence) == job.reserved, "pages and reservation")
            require(job.stored <= job.reserved, "tokens without a page")
        live = [job for _, ticket, job in self._queue if job.ticket == ticket]
        waiting = [job for job in live if job.state is State.WAITING]
        require(len(waiting) == self.waiting, "the count of waiting jobs")
        require(all(job.row == job.sequence == -1 for job in waiting), "a waiting job holds a row")
        swapped = sum(job.swapped.nbytes for job in waiting if job.swapped)
        require(swapped == self.swapped_bytes, "bytes in host memory")


def _rank(job: Job) -> int:
    return job.rank
