"""Jobs with a row and pages: how they come by them, share them and give them up.

::

    place    row, pages of the whole prompt, what the prefix cache has; or back from host memory
    grow     pages for the next tokens
    fork     a second job takes a row of its own and shares the pages
    preempt  row and pages are given up; the job waits, perhaps with a copy in host memory

Invariant: a running job is in exactly one of `prefilling`, `decoding` and `scoring`, and has a row
and a sequence of pages that no other job has. Host only and without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from granite_paged.engine.job import Job, Placement, SampleJob, ScoringJob, State, Swapped
from granite_paged.engine.limits import Limits
from granite_paged.engine.prefix_cache import Hit, PrefixCache
from granite_paged.engine.rank import Rank
from granite_paged.engine.rows import RowPool
from granite_paged.engine.step import Device
from granite_paged.engine.waiting import WaitingQueue
from granite_paged.errors import require
from granite_paged.paging.allocator import PageAllocator


@dataclass(slots=True)
class Counts:
    """What the scheduler did since it was made."""

    steps: int = 0
    preempted: int = 0
    swapped: int = 0
    restarted: int = 0


class RunningJobs:
    """Running jobs over an allocator, a row pool and a prefix cache.

    Attributes:
        short: pages ran out in this step, so no waiting job comes in.
        loading: jobs that came in with a saved state in this step.
        forks: number of rows that continuations have in this step.
        moves: number of times that a job came to run or ceased to.
        swapped_bytes: host memory of preempted jobs.
    """

    def __init__(
        self,
        device: Device,
        allocator: PageAllocator,
        prefix: PrefixCache,
        queue: WaitingQueue,
        limits: Limits,
    ) -> None:
        self.decoding: dict[SampleJob, None] = {}
        self.prefilling: dict[Job, None] = {}
        self.scoring: dict[ScoringJob, None] = {}
        self.rows = RowPool(device, limits.rows)
        self.counts = Counts()
        self.short = False
        self.loading: list[Job] = []
        self.forks = self.moves = 0
        self.swapped_bytes = 0
        self._device = device
        self._allocator = allocator
        self._prefix = prefix
        self._queue = queue
        self._limits = limits
        self._not_given: list[int] = []  # rows whose return raised
        self._unreleased: list[int] = []  # sequences whose release raised
        self._unforgotten: list[int] = []  # free pages of which the device was not told
        self._late = queue.late

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling) + len(self.scoring)

    def jobs(self) -> list[Job]:
        """Return every job with a row."""
        return [*self.decoding, *self.prefilling, *self.scoring]

    def begin_step(self) -> None:
        """Start a step: release what could not be released before."""
        self.short, self.loading = False, []
        self._late.retry()
        self._release_late()

    # -- coming and going -----------------------------------------------------------------------

    def has_row_for(self, job: Job) -> bool:
        """Return whether a row is free that no context needs for its forks."""
        return self.rows.free > self.rows_kept(job)

    def rows_kept(self, job: Job, without: Collection[Job] = ()) -> int:
        """Return the number of free rows that contexts keep for their forks, `job` included.

        Their rows are what the context with the most continuations needs, but at most half of all.
        With fewer, every context would wait for the others' forks.
        """
        asking = (job, *self.scoring, *self.prefilling)
        forks = max(other.rows_for_forks for other in asking if other not in without)
        return max(0, min(forks, self._limits.rows // 2) - self.forks)

    def place(self, job: Job, hit: Hit) -> bool:
        """Give a waiting job a row and the pages of its prompt. Return False if pages are short.

        A job whose copy cannot be loaded waits on without it, and is computed again.
        """
        swapped, needed = job.swapped, self.pages_to_place(job, hit)
        sequence = self._allocator.open(() if swapped else hit.pages)
        row = self.take_row(sequence)
        place = job.placement = Placement(row, sequence, target=_target(job))
        if not self.make_room(needed):
            self.vacate(job)
            return False
        self.rows.clear(place.row)
        if not swapped:
            self._start(job, place, hit)
        elif not self._swap_in(job, place, swapped):
            self._queue.remove(job)  # and back, so that its tokens are announced
            self._queue.add(job)
            return True
        self._queue.remove(job)
        self._enter(job, place)
        return True

    def pages_to_place(self, job: Job, hit: Hit) -> int:
        """Return the number of free pages that a waiting job needs to come in."""
        tokens = max(_target(job), min(_target(job) + 1, job.max_stored))
        return self._allocator.pages_for(tokens) - (0 if job.swapped else len(hit.pages))

    def end_prefill(self, job: Job) -> None:
        """Move a job whose prompt is launched to what comes next."""
        del self.prefilling[job]
        self._enter(job, job.placed)
        job.prefilled()

    def fork(self, parent: SampleJob, child: SampleJob) -> None:
        """Give a new job a row of its own and the pages of a decoding one."""
        source = parent.placed
        sequence = self._allocator.fork(source.sequence)
        row = self.take_row(sequence)
        place = child.placement = replace(source, row=row, sequence=sequence)
        self.moves += 1
        child.isolated, child.drawn, child.state = parent.isolated, 1, State.DECODE
        self.decoding[child] = None
        self._device.fork_row(source.row, place.row)

    def vacate(self, job: Job) -> None:
        """Take back what a job holds, if anything."""
        self.moves += job.state is not State.WAITING
        self.prefilling.pop(job, None)
        if isinstance(job, ScoringJob):
            self.scoring.pop(job, None)
        elif isinstance(job, SampleJob):
            self.decoding.pop(job, None)
        checkpoints, job.checkpoints = job.checkpoints, {}
        self._late.attempt(self._prefix.unpromise, list(checkpoints.values()))
        place, job.placement = job.placement, None  # first: an interrupt must not give it twice
        if place:
            self.give_row(place.row)
            self.release(place.sequence)

    def take_row(self, sequence: int) -> int:
        """Take a row for a new sequence, which is closed if that raises."""
        try:
            return self.rows.take()
        except Exception:
            self.release(sequence)
            raise

    def give_row(self, row: int) -> None:
        """Take a row back. One that is not taken back is at the next step."""
        try:
            self.rows.give(row)
        except Exception:
            self._not_given.append(row)

    def pause(self, job: Job) -> None:
        """Vacate a decoding job whose draws are all launched."""
        if job in self.decoding:
            self.vacate(job)
            job.state = State.UNREAD

    def preempt(self, job: Job) -> None:
        """Take a job's row and pages. It waits to come back."""
        self.counts.preempted += 1
        self.short = True
        if isinstance(job, SampleJob) and job.state is State.DECODE:
            if job.drawn == job.limit:
                self.pause(job)
                return
            if not job.isolated and self._limits.swap.pays(job.stored):
                self._swap_out(job, job.placed)
        self.vacate(job)
        self._queue.add(job)

    def preempt_newest_after(self, job: Job) -> None:
        """Take row and pages of the newest running job that ranks after this one, if any."""
        later = [other for other in self.jobs() if other.rank > job.rank]
        if later:
            self.preempt(newest(later))

    def drop_swapped(self, job: Job) -> None:
        """Drop a job's copy in host memory, if it has one."""
        if job.swapped:
            self.swapped_bytes -= job.swapped.nbytes
            job.swapped = None

    # -- pages ----------------------------------------------------------------------------------

    def make_room(self, pages: int) -> bool:
        """Evict prefixes until `pages` pages are free. Return whether they are."""
        if self._allocator.free < pages:
            self.forget(self._prefix.evict(pages))
        return self._allocator.free >= pages

    def grow(self, jobs: Sequence[SampleJob]) -> bool:
        """Reserve pages for the next tokens of each job, or return False if pages are short."""
        growth = {job.placed.sequence: job.growth(self._allocator.page_size) for job in jobs}
        if not self.make_room(self._allocator.pages_needed(growth)):
            return False
        plan = self._allocator.append(growth)
        for job in jobs:
            job.placed.reserved += growth[job.placed.sequence]
        self._device.write_pages(plan, {job.placed.sequence: job.placed.row for job in jobs})
        return True

    def append(self, growth: Mapping[int, int], row_of: Mapping[int, int]) -> None:
        """Grow sequences, for which there is room, by a number of tokens each."""
        self._device.write_pages(self._allocator.append(growth), row_of)

    def release(self, sequence: int) -> None:
        """Close a sequence. One whose release raises is released at the next step."""
        try:
            freed = self._allocator.release(sequence)
        except Exception:
            self._unreleased.append(sequence)
        else:
            self.forget(freed)

    def forget(self, pages: list[int]) -> None:
        """Tell the device that no sequence holds these pages any more."""
        try:
            self._device.forget_pages(pages)
        except Exception:
            self._unforgotten += pages

    def check_valid(self) -> None:
        """Prove the invariant between two steps; BrokenInvariant says what broke."""
        places = [job.placed for job in self.jobs()]
        self.rows.check_valid([*self._not_given, *(place.row for place in places)])
        owners = [place.sequence for place in places]
        owners += [*self._unreleased, *self._prefix.sequences]
        ours = sorted(self._allocator.sequences)
        require(sorted(owners) == ours, "a sequence without an owner, or with two")
        for place in places:
            reserved = self._allocator.length(place.sequence)
            require(reserved == place.reserved, "pages and reservation")
            require(place.stored <= place.reserved, "tokens without a page")
        swapped = sum(job.swapped.nbytes for job in self._queue.jobs() if job.swapped)
        require(swapped == self.swapped_bytes, "bytes in host memory")

    # -- details --------------------------------------------------------------------------------

    def _enter(self, job: Job, place: Placement) -> None:
        self.moves += 1
        if place.stored < place.target:
            job.state = State.PREFILL
            self.prefilling[job] = None
        elif isinstance(job, ScoringJob):
            job.state = State.SCORE
            self.scoring[job] = None
        elif isinstance(job, SampleJob):
            job.state = State.DECODE
            self.decoding[job] = None

    def _start(self, job: Job, place: Placement, hit: Hit) -> None:
        if hit.pages:
            self._device.set_pages(place.row, hit.pages)
        if hit.state is not None:
            self._device.load_row(place.row, hit.state)
            self.loading.append(job)
        self._reserve(place, place.target - hit.tokens)
        place.stored, place.reserved = hit.tokens, place.target
        self._prefix.used(job.path, hit, place.target)
        checkpoints = self._prefix.checkpoints(job.path, hit)
        self._prefix.promise(list(checkpoints.values()))
        job.checkpoints = checkpoints

    def _swap_in(self, job: Job, place: Placement, swapped: Swapped) -> bool:
        """Load a job's copy and drop it. Return whether it was loaded; if not, vacate the job."""
        self.drop_swapped(job)
        try:
            self._reserve(place, swapped.stored)
            self._device.load_pages(self._allocator.pages_of(place.sequence), swapped.pages)
            self._device.load_row(place.row, swapped.state)
            self.loading.append(job)
        except Exception:
            self.vacate(job)
            return False
        place.stored = place.reserved = swapped.stored
        return True

    def _swap_out(self, job: Job, place: Placement) -> None:
        try:
            held = self._allocator.pages_of(place.sequence)
            pages = self._device.save_pages(held[: self._allocator.pages_for(place.stored)])
            state = self._device.save_row(place.row, to_host=True)
        except Exception:
            return  # computing it again needs nothing of the device
        nbytes = pages.nbytes + state.nbytes
        if self.swapped_bytes + nbytes <= self._limits.swap_bytes:
            job.swapped = Swapped(place.stored, pages, state, nbytes)
            self.swapped_bytes += nbytes
            self.counts.swapped += 1

    def _reserve(self, place: Placement, tokens: int) -> None:
        if tokens:
            self.append({place.sequence: tokens}, {place.sequence: place.row})

    def _release_late(self) -> None:
        rows, self._not_given = self._not_given, []
        for row in rows:
            self.give_row(row)
        sequences, self._unreleased = self._unreleased, []
        for sequence in sequences:
            self.release(sequence)
        if self._unforgotten:
            pages, self._unforgotten = self._unforgotten, []
            # a page that was issued again belongs to its new owner
            self.forget([page for page in pages if not self._allocator.references(page)])


def _target(job: Job) -> int:
    """Return how many tokens a waiting job has in pages before it goes on."""
    return job.swapped.stored if job.swapped else job.prefill_tokens


def newest(jobs: Iterable[Job]) -> Job:
    """Return the job that goes last by rank."""
    return max(jobs, key=by_rank)


def by_rank(job: Job) -> Rank:
    """Sort key: jobs of lower rank go first."""
    return job.rank
