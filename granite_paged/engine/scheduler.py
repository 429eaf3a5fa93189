"""Who runs next, in which row and pages.

A step decodes one token of every running job, spends what is left of its token budget on chunks of
prompts, and scores continuations whose context is computed. So a long prompt never stalls running
jobs for longer than a step.

::

    queue ───place──> prefill ──> decode ──> done        pages of the whole prompt at admission
       ^                     └──> score  ──> done        a page whenever a decode fills its last
       └───preempt (newest)───┴──────┘

The running job of lowest rank can always go on: the newest give up their pages, which are computed
again or, where that takes longer, copied to host memory and back. A waiting job that ranks first
takes the rows and pages of jobs of lower priority. `docs/guides/scheduling.md` has the rules.

Host only and without torch: what happens on the device is asked of a `Device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

from granite_paged.engine.admission import Admission
from granite_paged.engine.job import Job, SampleJob, ScoringJob, State
from granite_paged.engine.lifecycle import JobLifecycle
from granite_paged.engine.limits import Limits
from granite_paged.engine.prefix_cache import PrefixCache, Snapshot
from granite_paged.engine.rank import Rank
from granite_paged.engine.running import by_rank, newest
from granite_paged.engine.step import Device, PrefillChunk, ScoreChunk, StepPlan, calls
from granite_paged.geometry import bucket
from granite_paged.paging.allocator import PageAllocator

_is_streamed = attrgetter("request.streamed")


class Scheduler(JobLifecycle):
    """Plans steps: which jobs decode, score, come in and are computed."""

    def __init__(
        self, device: Device, allocator: PageAllocator, prefix: PrefixCache, limits: Limits
    ) -> None:
        super().__init__(device, allocator, prefix, limits)
        self._admission = Admission(allocator, prefix, self.queue, self.running)
        self._starved: ScoringJob | None = None  # the first context, if it found no pages

    # -- one step -------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step and take its rows and pages."""
        self.counts.steps += 1
        self.running.begin_step()
        step = StepPlan(loading=self.running.loading)
        self._make_way(step)
        decodes = self._decodes()
        step.decodes = calls(decodes, decodes)
        if not (len(self.queue) or self.running.prefilling or self.running.scoring):
            return step
        time = self._prefill_time(decodes)
        budget = self._limits.prefill_tokens(len(decodes), time)
        budget = max(budget - self._plan_scores(step, budget), self._limits.alignment)
        self._admit_waiting(step, budget)
        while budget > 0 and (chunks := self._prefill(budget, time, first=not step.prefills)):
            lengths = [chunk.end - chunk.start for chunk in chunks]
            budget -= sum(lengths)
            if decodes:
                time -= self._limits.shapes.prefill_cost(lengths)
            step.prefills += calls(chunks, [chunk.job for chunk in chunks])
        return step

    def prefilled(self, chunk: PrefillChunk) -> Iterator[SampleJob]:
        """Fork the other samples of a prompt whose last chunk is launched.

        Yields:
            Each that is forked. The others wait for rows of their own. After a fault, those without
            a place still follow the first one.
        """
        followers = chunk.job.followers
        while followers:
            follower = followers[0]
            is_new = follower.state is State.NEW  # else it got its place before a fault
            if is_new and self.running.has_row_for(follower):
                self.guarded(follower, self.running.fork, chunk.job, follower)
            elif is_new:
                self.queue.add(follower)
            followers.pop(0)
            if is_new and follower.state is State.DECODE:
                yield follower

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
            self.queue.late.attempt(self._prefix.unpromise, [job.checkpoints.pop(chunk.end)])

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

    def _prefill_time(self, decodes: Sequence[SampleJob]) -> float:
        streamed = any(map(_is_streamed, decodes))
        return self._limits.prefill_time(len(decodes), streamed=streamed)

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
        """Plan continuations of the contexts that are computed. Return their number of tokens.

        The first context gets one continuation at least. Prompts get the rest of the budget before
        contexts that rank after them, and one chunk at least.
        """
        if len(self.queue) > 0 or self.running.prefilling:
            budget = max(budget - self._limits.alignment, 1)
        spent = 0
        planned: list[list[ScoreChunk]] = []
        jobs = sorted((job for job in self.running.scoring if job.pending), key=by_rank)
        for job in jobs:
            left = budget - spent - self._prompts_before(job.rank)
            if job.state is State.SCORE and (left > 0 or job is jobs[0]):
                found = self.guarded(job, self._scores.plan, job, left) or []
                spent += sum(chunks[-1].end for chunks in found)
                planned += found
        self._starved = jobs[0] if jobs and not planned else None
        step.scores = self._scores.calls(planned)
        return spent

    def _prompts_before(self, rank: Rank) -> int:
        """Return the number of tokens of running prompts that are to be computed before `rank`."""
        prompts = (job for job in self.running.prefilling if job.rank < rank)
        return sum(job.placed.target - job.placed.stored for job in prompts)

    # -- admission ------------------------------------------------------------------------------

    def _make_way(self, step: StepPlan) -> None:
        """Preempt for a context that found no pages, and for waiting jobs of higher priority.

        A job that gave up its row has a token to be read, so it cannot come back in this step.
        """
        if self._starved in self.running.scoring:
            self.running.preempt_newest_after(self._starved)
        if not len(self.queue):
            return
        decodes = list(self.running.decoding)
        budget = self._limits.prefill_tokens(len(decodes), self._prefill_time(decodes))
        with self._admission.passing() as first:
            while (job := first()) and self._admission.outranks_running(job):
                if self._prompts_before(job.rank) >= budget or not self._let_in(
                    step, job, self._admission.place_by_preempting
                ):
                    return

    def _admit_waiting(self, step: StepPlan, budget: int) -> None:
        """Let jobs in by rank, as long as work, rows and pages last."""
        running = self.running
        budget -= sum(job.placed.target - job.placed.stored for job in running.prefilling)
        with self._admission.passing() as first:
            while budget > 0 and not running.short:
                job = first()
                if job is None or not running.has_row_for(job):
                    return
                if not self._let_in(step, job, self._admission.place):
                    return
                if job.placement:
                    budget -= job.placement.target - job.placement.stored

    def _let_in(self, step: StepPlan, job: Job, place: Callable[[Job], bool]) -> bool:
        """Place or skip a waiting job. Return whether the next one may come in."""
        handled = self.guarded(job, place, job)
        if job.state is State.DECODE:
            step.resumed.append(job)
        elif job.state is State.SCORE:
            step.ready.append(job)
        return bool(handled) or job.state is not State.WAITING
