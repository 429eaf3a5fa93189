"""Score calls: which continuations fork their context, which take its row, and who makes room."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from granite_paged.engine.job import Job, SampleJob, ScoringJob, State
from granite_paged.engine.prefix_cache import Hit
from granite_paged.engine.rank import Rank
from granite_paged.engine.running import RunningJobs
from granite_paged.engine.scoring import ScorePlanner
from granite_paged.engine.step import ScoreChunk
from granite_paged.engine.waiting import LateCleanups
from granite_paged.paging.allocator import PageAllocator

NO_HIT = Hit()
LONGEST_CALL = 8


class Queue(list[Any]):
    """Waiting jobs, without a rank."""

    late = LateCleanups()

    def jobs(self) -> list[Any]:
        return list(self)

    def add(self, job: Job) -> None:
        job.state = State.WAITING
        self.append(job)

    def remove(self, job: Job) -> None:
        """Accept any job: those of these tests never waited."""


class Setting:
    """A planner over running jobs, with `pages` pages of 4 tokens and calls of up to 8 tokens."""

    def __init__(self, *, rows: int = 4, pages: int = 20) -> None:
        self.allocator = PageAllocator(pages + 1, 4)
        self.device: Any = mock.Mock()
        prefix: Any = mock.Mock(sequences=[])
        prefix.evict = lambda pages: []
        prefix.checkpoints.return_value = {}
        self.queue: Any = Queue()
        limits: Any = SimpleNamespace(
            rows=rows,
            chunk_tokens=LONGEST_CALL,
            shapes=SimpleNamespace(fits=lambda lengths: sum(lengths) <= LONGEST_CALL),
        )
        self.running = RunningJobs(self.device, self.allocator, prefix, self.queue, limits)
        self.planner = ScorePlanner(self.device, self.allocator, self.queue, self.running, limits)

    def context(self, *lengths: int, tokens: int = 4, arrival: int = 1) -> ScoringJob:
        """Return a context of whole pages whose continuations have these lengths."""
        request: Any = SimpleNamespace(
            number=arrival,
            continuations=[(1,) * length for length in lengths],
            scores=[None] * len(lengths),
        )
        job = ScoringJob(request=request, tokens=[1] * (tokens + 1), max_stored=40)
        self._start(job, arrival)
        job.placed.stored = job.placed.target
        self.running.end_prefill(job)
        return job

    def prompt(self, tokens: int = 4, *, arrival: int = 2) -> SampleJob:
        """Return a job in prefill."""
        request: Any = SimpleNamespace(number=arrival, prompt=[1] * tokens)
        job = SampleJob(request=request, tokens=[1] * tokens, max_stored=tokens)
        self._start(job, arrival)
        return job

    def _start(self, job: Job, arrival: int) -> None:
        job.rank, job.state = Rank(arrival, 0), State.WAITING
        assert self.running.place(job, NO_HIT)

    def plan(self, job: ScoringJob, budget: int = 100) -> list[list[ScoreChunk]]:
        planned = self.planner.plan(job, budget)
        assert [chunks[0].number for chunks in planned] == list(range(len(planned)))
        assert job.pending == list(range(len(planned), len(job.request.continuations)))
        return planned

    def fill(self, free: int) -> None:
        """Leave this number of pages free."""
        self.allocator.append({self.allocator.open(): 4 * (self.allocator.free - free)})


def forked(planned: Sequence[Sequence[ScoreChunk]]) -> list[bool]:
    """Return for each planned continuation whether it runs in a fork."""
    return [chunks[0].forked for chunks in planned]


# -- forks --------------------------------------------------------------------------------------


def test_the_last_continuation_takes_the_row_of_its_context() -> None:
    setting = Setting()
    job = setting.context(2, 3, 5)
    planned = setting.plan(job)
    assert forked(planned) == [True, True, False]
    (one,), (two,), (own,) = planned
    assert (own.row, own.sequence) == (job.placed.row, job.placed.sequence)
    assert [(c.start, c.end) for c in (one, two, own)] == [(0, 2), (0, 3), (0, 5)]
    setting.device.fork_row.assert_called_once_with(job.placed.row, one.row, two.row)
    lengths = [setting.allocator.length(chunk.sequence) for chunk in (one, two, own)]
    assert lengths == [6, 7, 9]
    assert job.placed.reserved == 9
    assert setting.running.forks == 2


@pytest.mark.parametrize(("count", "expected"), [(3, [True, True, False]), (4, [True, True])])
def test_forks_take_no_more_rows_than_are_free(count: int, expected: list[bool]) -> None:
    setting = Setting(rows=3)
    assert forked(setting.plan(setting.context(*[2] * count))) == expected


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_continuations_keep_to_a_budget_but_for_the_first(budget: int, count: int) -> None:
    setting = Setting(rows=8)
    assert forked(setting.plan(setting.context(2, 2, 2, 2), budget)) == [True] * count


def test_a_context_that_ends_in_this_step_takes_every_row() -> None:
    setting = Setting()
    setting.queue += ["a waiting job"] * 3
    assert forked(setting.plan(setting.context(2, 2, 2, 2))) == [True, True, True, False]


@pytest.mark.parametrize(("waiting", "count"), [(0, 3), (1, 2), (2, 2), (3, 2)])
def test_a_context_that_needs_more_steps_leaves_rows_to_waiting_jobs(
    waiting: int, count: int
) -> None:
    """Three rows are free; contexts keep half of all four."""
    setting = Setting()
    setting.queue += ["a waiting job"] * waiting
    assert forked(setting.plan(setting.context(*[2] * 6))) == [True] * count


def test_a_long_continuation_is_cut_into_calls() -> None:
    setting = Setting()
    (first, *_), (*_, last) = planned = setting.plan(setting.context(20, 8))
    assert [[(chunk.start, chunk.end) for chunk in chunks] for chunks in planned] == [
        [(0, 8), (8, 16), (16, 20)],
        [(0, 8)],
    ]
    assert {chunk.row for chunk in planned[0]} == {first.row}
    assert last.row != first.row


# -- rows and pages that are short --------------------------------------------------------------


def test_a_context_alone_without_rows_is_used_up() -> None:
    setting = Setting(rows=1)
    job = setting.context(2, 2, 2)
    assert forked(setting.plan(job)) == [False]


def test_a_context_alone_with_rows_keeps_its_own() -> None:
    setting = Setting(rows=3)
    job = setting.context(2, 2, 2, 2)
    setting.plan(job)
    assert job.placed.reserved == 4


@pytest.mark.parametrize("count", [2, 3])
def test_a_context_without_rows_is_not_used_up_while_others_run(count: int) -> None:
    setting = Setting(rows=2)
    job = setting.context(*[2] * count)
    setting.prompt()
    assert setting.plan(job) == []
    assert job.placed.reserved == 4


def test_no_continuation_takes_the_row_before_all_others_are_planned() -> None:
    """There are pages for two forks of three."""
    setting = Setting()
    setting.prompt(arrival=0)
    job = setting.context(2, 2, 2)
    setting.fill(1)
    assert forked(setting.plan(job)) == [True]
    assert setting.running.short
    other = Setting(rows=8)
    other.prompt(arrival=0)
    job = other.context(2, 2, 2)
    other.fill(1)
    assert forked(other.plan(job, budget=4)) == [True]
    assert job.placed.reserved == 4


def test_forks_without_pages_preempt_no_other_while_one_has_pages() -> None:
    setting = Setting(rows=8)
    job, newer = setting.context(2, 2, 2, 2, 2), setting.prompt()
    setting.fill(1)
    assert forked(setting.plan(job)) == [True]
    assert (newer.state, len(setting.queue)) == (State.PREFILL, 0)
    assert setting.running.forks == 1
    assert setting.running.rows.free == 5, "of eight; two jobs and a fork have one each"


def test_the_first_fork_preempts_the_newest_job() -> None:
    setting = Setting(rows=8)
    job, newer, newest = setting.context(2, 2, 2), setting.prompt(), setting.context(2, arrival=3)
    setting.fill(0)
    assert forked(setting.plan(job)) == [True]
    assert (newer.state, newest.state) == (State.PREFILL, State.WAITING)
    assert setting.queue == [newest]


@pytest.mark.parametrize("arrival", [0, 2])
def test_the_last_continuation_preempts_newer_jobs_only(arrival: int) -> None:
    setting = Setting()
    job, other = setting.context(2), setting.prompt(arrival=arrival)
    setting.fill(0)
    newer = arrival == 2
    assert forked(setting.plan(job)) == ([False] if newer else [])
    assert setting.queue == ([other] if newer else [])
    assert job.placed.reserved == (6 if newer else 4)
    assert job.state is State.SCORE
    assert setting.running.short


# -- calls --------------------------------------------------------------------------------------


def numbers(calls: Sequence[Sequence[ScoreChunk]]) -> list[list[int]]:
    return [[chunk.number for chunk in call] for call in calls]


def test_continuations_share_calls_as_far_as_they_fit() -> None:
    setting = Setting(rows=9)
    planned = setting.plan(setting.context(3, 3, 2, 3, 9, 3))
    assert numbers(setting.planner.calls(planned)) == [[0, 1, 2], [4], [4], [3, 5]]
    assert setting.planner.calls([]) == []


def test_an_isolated_context_shares_no_call() -> None:
    setting = Setting()
    job = setting.context(2, 2)
    job.isolated = True
    assert numbers(setting.planner.calls(setting.plan(job))) == [[0], [1]]


# -- release ------------------------------------------------------------------------------------


def launched(setting: Setting, job: ScoringJob, budget: int = 100) -> list[ScoreChunk]:
    """Plan a step and release it, as when it is launched."""
    chunks = [chunk for chunks in setting.plan(job, budget) for chunk in chunks]
    setting.planner.release(chunks)
    setting.running.check_valid()
    return chunks


def test_forks_end_with_their_step_and_the_context_goes_on() -> None:
    setting = Setting()
    job = setting.context(2, 2, 2)
    held = setting.allocator.held
    assert len(launched(setting, job, budget=4)) == 2
    assert (setting.running.forks, setting.running.rows.free) == (0, 3)
    assert setting.allocator.held == held
    assert (job.state, setting.queue) == (State.SCORE, [])


def test_a_context_gives_up_its_row_with_its_last_continuation() -> None:
    setting = Setting()
    job = setting.context(2, 2, 2)
    assert len(launched(setting, job)) == 3
    assert (setting.running.forks, setting.running.rows.free) == (0, 4)
    assert setting.allocator.held == 0
    assert (job.state, job.placement, setting.queue) == (State.UNREAD, None, [])


def test_a_context_that_is_used_up_waits_to_be_computed_again() -> None:
    setting = Setting(rows=1)
    job = setting.context(2, 2, 2)
    assert len(launched(setting, job)) == 1
    assert (setting.running.rows.free, setting.allocator.held) == (1, 0)
    assert (job.state, setting.queue) == (State.WAITING, [job])


def test_a_context_without_continuations_to_launch_gives_up_its_row() -> None:
    setting = Setting()
    job = setting.context(2, 2)
    (chunk,), _ = setting.plan(job)
    setting.planner.release([chunk])
    assert (job.state, job.placement) == (State.UNREAD, None)


def test_a_context_that_started_over_before_the_launch_is_left_alone() -> None:
    setting = Setting(rows=1)
    job = setting.context(2, 2)
    (chunks,) = setting.plan(job)
    setting.running.vacate(job)
    setting.queue.add(job)
    setting.planner.release(chunks)
    assert (job.state, setting.queue) == (State.WAITING, [job])
