"""Mutation tests of the engine: the random walk must detect each deliberate fault."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from granite_paged.engine.executor import Executor
from granite_paged.engine.job import Job, Placement, SampleJob, State
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.prefix_cache import Hit, PrefixCache
from granite_paged.engine.rank import Rank
from granite_paged.engine.request import SamplingParams
from granite_paged.engine.running import RunningJobs
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.waiting import WaitingQueue
from granite_paged.errors import BrokenInvariant, GranitePagedError
from granite_paged.paging.allocator import AppendPlan, PageAllocator
from tests.helpers.engine_harness import EngineHarness, random_walk
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner, SimulatedState

Patch = pytest.MonkeyPatch
STEPS = 3000


def state_of_another_boundary(patch: Patch) -> None:
    """A cached state belongs to an earlier boundary than it claims."""
    save = SimulatedRunner.save_row

    def early(self: SimulatedRunner, row: int, *, to_host: bool = False) -> SimulatedState:
        state = save(self, row, to_host=to_host)
        return state if to_host else state._replace(tokens=state.tokens[:-8])

    patch.setattr(SimulatedRunner, "save_row", early)


def page_not_retained(patch: Patch) -> None:
    """The prefix cache lists pages that it holds no reference to."""
    keep = PrefixCache._keep_block

    def unheld(self: PrefixCache, parent: Any, tokens: Any, pages: Sequence[int]) -> Any:
        node = keep(self, parent, tokens, pages)
        for page in pages:
            if self._allocator._references[page] > 1:
                self._allocator._references[page] -= 1
        return node

    patch.setattr(PrefixCache, "_keep_block", unheld)


def hit_by_hash(patch: Patch) -> None:
    """Blocks are compared by less than all of their tokens."""
    announce, keep = PrefixCache.announce, PrefixCache.keep

    def blurred(tokens: Sequence[int]) -> list[int]:
        return [token // 2 for token in tokens]

    patch.setattr(PrefixCache, "announce", lambda self, t, *more: announce(self, blurred(t), *more))
    patch.setattr(PrefixCache, "keep", lambda self, t, *more: keep(self, blurred(t), *more))


def pages_of_one_block_too_few(patch: Patch) -> None:
    """A hit gives the state of a block, but only the pages of the blocks before it."""
    find = PrefixCache.find

    def short(self: PrefixCache, path: Any) -> Hit:
        hit = find(self, path)
        return Hit(hit.tokens, hit.pages[:-1], hit.state)

    patch.setattr(PrefixCache, "find", short)


def rows_not_cleared(patch: Patch) -> None:
    """A row keeps the state of its last owner."""
    patch.setattr(SimulatedRunner, "clear_rows", lambda self, rows: None)


def forks_write_into_shared_pages(patch: Patch) -> None:
    """Forks do not copy a shared page before they write to it."""
    patch.setattr(PageAllocator, "_writes_shared_page", lambda self, sequence: False)


def copies_are_not_made(patch: Patch) -> None:
    """The allocator gives a writer its own page, but plans no copy into it."""
    append = PageAllocator.append

    def bare(self: PageAllocator, growth: Mapping[int, int]) -> AppendPlan:
        return AppendPlan(append(self, growth).writes, [])

    patch.setattr(PageAllocator, "append", bare)


def preemption_forgets_a_token(patch: Patch) -> None:
    """A swapped job comes back one token short."""
    swap_in = RunningJobs._swap_in

    def short(self: RunningJobs, job: Job, place: Placement, swapped: Any) -> None:
        swap_in(self, job, place, swapped)
        place.stored -= 1

    patch.setattr(RunningJobs, "_swap_in", short)


def late_tokens_are_delivered(patch: Patch) -> None:
    """The token that a sequence computes after its stop token is not dropped."""

    def late(self: SampleJob) -> str | None:
        if self.sampled > 1 and self.tokens[-2] in self.request.stop_tokens:
            return "stop"
        return "length" if self.sampled == self.limit else None

    patch.setattr(SampleJob, "finish", property(late))


def finished_jobs_keep_their_row(patch: Patch) -> None:
    """A finished request does not release its row and pages."""

    def lost(self: Scheduler, job: Job) -> None:
        if job.state is not State.DONE:
            self.queue.remove(job)
            running = self.running
            for jobs in (running.decoding, running.prefilling, running.scoring):
                jobs.pop(job, None)  # type: ignore[attr-defined]
            job.state = State.DONE

    patch.setattr(Scheduler, "finish", lost)


def noise_of_the_row_instead_of_the_request(patch: Patch) -> None:
    """A sample depends on the row that its request runs in."""
    drawn = Executor._drawn

    def by_row(self: Executor, logits: Any, jobs: Sequence[SampleJob], **more: Any) -> Any:
        for job in jobs:
            job.seed = job.placed.row
        return drawn(self, logits, jobs, **more)

    patch.setattr(Executor, "_drawn", by_row)


def scores_of_the_neighbour(patch: Patch) -> None:
    """Log-probabilities are returned in the wrong order."""
    read = OutputProcessor._read_scores
    patch.setattr(
        OutputProcessor,
        "_read_scores",
        lambda self, chunks, numbers: read(self, chunks[::-1], numbers),
    )


def waiting_jobs_never_preempt(patch: Patch) -> None:
    """A request of higher priority waits until a running one ends."""
    patch.setattr(Rank, "preempts", lambda self, other: False)


def the_last_come_first(patch: Patch) -> None:
    """The queue is a stack, so that the first may wait without end."""

    def push(self: WaitingQueue, job: Job) -> None:
        self._tickets += 1
        job.ticket = self._tickets
        heapq.heappush(self._heap, (Rank(-self._tickets, 0), job.ticket, job))

    patch.setattr(WaitingQueue, "_push", push)


BROKEN = [
    state_of_another_boundary,
    page_not_retained,
    hit_by_hash,
    pages_of_one_block_too_few,
    rows_not_cleared,
    forks_write_into_shared_pages,
    copies_are_not_made,
    preemption_forgets_a_token,
    late_tokens_are_delivered,
    finished_jobs_keep_their_row,
    noise_of_the_row_instead_of_the_request,
    scores_of_the_neighbour,
    waiting_jobs_never_preempt,
]


def busy_harness() -> EngineHarness:
    return EngineHarness(HashOracle(), {"preemption": "swap"}, pages=20, rows=4)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_engine_is_detected(broken: Callable[[Patch], None], monkeypatch: Patch) -> None:
    harness = busy_harness()
    broken(monkeypatch)
    with pytest.raises((AssertionError, BrokenInvariant, GranitePagedError, IndexError)):
        random_walk(harness, STEPS, seed=1)


def test_the_random_walk_passes_on_the_real_engine() -> None:
    harness = busy_harness()
    random_walk(harness, STEPS, seed=1)
    assert harness.met["swapped"]
    assert harness.met["hits"]
    assert harness.met["forked"]


def test_a_request_that_waits_too_long_is_detected(monkeypatch: Patch) -> None:
    the_last_come_first(monkeypatch)
    harness = EngineHarness(HashOracle(), rows=1, pages=20)
    with pytest.raises(AssertionError, match="are fair"):
        _step_with_arrivals(harness, 1000)


def _step_with_arrivals(harness: EngineHarness, arrivals: int) -> None:
    for number in range(arrivals):
        harness.submit([number % 97, number // 97], SamplingParams(max_new_tokens=2))
        harness.step()
