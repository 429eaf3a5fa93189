"""Admission: who is passed over, who is preempted, and when nothing is preempted in vain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.admission import LOOK_AHEAD, Admission
from granite_paged.engine.prefix_cache import Hit
from granite_paged.engine.rank import Rank
from granite_paged.paging.allocator import PageAllocator

NO_HIT = Hit()


class Setting:
    """An `Admission` over a real allocator of 10 pages, and parts that a test sets.

    Attributes:
        hit: what the prefix cache finds for any job.
        worth_waiting: whether a job should wait for a prefix.
        kept: rows that contexts keep for their forks.
        needed: pages that a job needs to come in; it comes in if they are free.
        placed, preempted: what was done.
    """

    def __init__(self, *, rows: int = 0, kept: int = 0, needed: int = 2) -> None:
        self.allocator = PageAllocator(11, 4)
        self.hit, self.worth_waiting = NO_HIT, False
        self.kept, self.needed = kept, needed
        self.jobs: list[Any] = []
        self.placed: list[Any] = []
        self.preempted: list[Any] = []
        self.skipped = 0
        self.running: Any = SimpleNamespace(
            rows=SimpleNamespace(free=rows),
            moves=0,
            jobs=lambda: list(self.jobs),
            rows_kept=lambda job, without: self.kept,
            has_row_for=lambda job: self.running.rows.free > self.kept,
            pages_to_place=lambda job, hit: self.needed,
            place=self._place,
            preempt=self._preempt,
        )
        self.prefix: Any = SimpleNamespace(
            sequences=[],
            pages=0,
            find=lambda path: self.hit,
            worth_waiting=lambda path, hit: self.worth_waiting,
        )
        queue: Any = SimpleNamespace(skip_first=self._skip, first=lambda: None)
        self.admission = Admission(self.allocator, self.prefix, queue, self.running)

    def run(self, pages: int = 0, *, rank: Rank, shares: Any = ()) -> Any:
        """Return a running job with new pages, after those of `shares`."""
        sequence = self.allocator.open(shares)
        self.allocator.append({sequence: 4 * pages})
        job = SimpleNamespace(rank=rank, placed=SimpleNamespace(sequence=sequence))
        self.jobs.append(job)
        return job

    def cache(self, pages: int) -> tuple[int, ...]:
        """Let the prefix cache hold new pages, and return them."""
        sequence = self.allocator.open()
        self.allocator.append({sequence: 4 * pages})
        self.prefix.sequences.append(sequence)
        return tuple(self.allocator.pages_of(sequence))

    def fill(self, free: int) -> None:
        """Leave this number of pages free."""
        self.allocator.append({self.allocator.open(): 4 * (self.allocator.free - free)})

    def _place(self, job: Any, hit: Hit) -> bool:
        if self.allocator.free < self.needed:
            return False
        self.placed.append(job)
        return True

    def _preempt(self, job: Any) -> None:
        self.jobs.remove(job)
        self.allocator.release(job.placed.sequence)
        self.running.rows.free += 1
        self.preempted.append(job)

    def _skip(self) -> int:
        self.skipped += 1
        return self.skipped


def waiting(place: int = 0, priority: int = 1, ticket: int = 1) -> Any:
    return SimpleNamespace(rank=Rank(place, priority), ticket=ticket, path=[])


LOW = Rank(5, 0)


# -- passing over -------------------------------------------------------------------------------


def test_a_step_passes_over_fewer_than_32_jobs() -> None:
    setting = Setting(rows=1)
    setting.worth_waiting = True
    assert LOOK_AHEAD == 32
    jobs = [waiting(n) for n in range(LOOK_AHEAD)]
    assert all(setting.admission.place(job) for job in jobs)
    assert setting.placed == jobs[-1:]


def test_a_job_that_waits_for_a_prefix_preempts_no_other() -> None:
    setting = Setting(rows=0)
    setting.worth_waiting = True
    setting.run(2, rank=LOW)
    assert setting.admission.place_by_preempting(waiting())
    assert (setting.preempted, setting.placed) == ([], [])


# -- preempting ---------------------------------------------------------------------------------


def test_a_job_that_fits_preempts_no_other() -> None:
    setting, job = Setting(rows=1), waiting()
    setting.run(2, rank=LOW)
    assert setting.admission.place_by_preempting(job)
    assert (setting.preempted, setting.placed) == ([], [job])


def test_the_newest_of_lower_priority_are_preempted_until_a_job_fits() -> None:
    setting, job = Setting(rows=1, needed=4), waiting()
    old, newer, newest = (setting.run(2, rank=Rank(5 + n, 0)) for n in range(3))
    equal = setting.run(2, rank=Rank(9, 1))
    setting.fill(0)
    assert setting.admission.place_by_preempting(job)
    assert setting.preempted == [newest, newer]
    assert setting.placed == [job]
    assert setting.jobs == [old, equal]


def test_a_row_alone_is_taken_where_pages_are_free() -> None:
    setting, job = Setting(rows=0), waiting()
    running = setting.run(1, rank=LOW)
    assert setting.admission.place_by_preempting(job)
    assert (setting.preempted, setting.placed) == ([running], [job])


@pytest.mark.parametrize(("kept", "enough"), [(1, True), (2, False)])
def test_rows_that_contexts_keep_are_not_enough(kept: int, enough: bool) -> None:
    """A row is free, and one would be; a job needs one that no context keeps."""
    setting, job = Setting(rows=1, kept=kept), waiting()
    running = setting.run(1, rank=LOW)
    assert setting.admission.place_by_preempting(job) == enough
    assert setting.preempted == ([running] if enough else [])


@pytest.mark.parametrize(("needed", "enough"), [(5, True), (6, False)])
def test_nothing_is_preempted_for_too_few_pages(needed: int, enough: bool) -> None:
    """One page is free, the job to preempt holds two, and the cache holds two."""
    setting, job = Setting(rows=1, needed=needed), waiting()
    running = setting.run(2, rank=LOW)
    setting.cache(2)
    setting.fill(1)
    assert setting.admission.victims(job, NO_HIT) == ([running] if enough else [])


@pytest.mark.parametrize("holder", ["the job to preempt", "another job", "the cache alone"])
@pytest.mark.parametrize(("needed", "enough"), [(2, True), (3, False)])
def test_pages_that_a_job_starts_from_are_never_counted_as_freed(
    holder: str, needed: int, enough: bool
) -> None:
    """The job to preempt has two pages of its own. Those of the hit stay, with any holder."""
    setting, job = Setting(rows=1, needed=needed), waiting()
    pages = setting.cache(3)
    running = setting.run(2, rank=LOW, shares=pages if holder == "the job to preempt" else ())
    if holder == "another job":
        setting.run(0, rank=Rank(4, 1), shares=pages)
    setting.fill(0)
    found = setting.admission.victims(job, Hit(12, pages))
    assert found == ([running] if enough else [])


@pytest.mark.parametrize(("needed", "enough"), [(1, True), (2, False)])
def test_pages_that_another_job_shares_are_not_freed(needed: int, enough: bool) -> None:
    setting, job = Setting(rows=1, needed=needed), waiting()
    pages = setting.cache(1)
    running = setting.run(1, rank=LOW, shares=pages)
    setting.run(0, rank=Rank(4, 1), shares=pages)
    setting.fill(0)
    assert setting.admission.victims(job, NO_HIT) == ([running] if enough else [])


# -- trying again -------------------------------------------------------------------------------


def test_a_job_that_could_not_preempt_tries_again_once_something_changed() -> None:
    setting, job = Setting(rows=1, needed=9), waiting()
    setting.run(2, rank=LOW)
    setting.fill(0)
    assert setting.admission.outranks_running(job)
    assert not setting.admission.place_by_preempting(job)
    assert not setting.admission.outranks_running(job)
    setting.running.moves += 1
    assert setting.admission.outranks_running(job)
    assert not setting.admission.place_by_preempting(job)
    setting.prefix.pages += 1
    assert setting.admission.outranks_running(job)
    assert not setting.admission.place_by_preempting(job)
    assert setting.admission.outranks_running(waiting(ticket=2))


def test_a_job_outranks_running_ones_of_lower_priority_only() -> None:
    setting = Setting()
    setting.run(1, rank=Rank(5, 1))
    assert not setting.admission.outranks_running(waiting(priority=1))
    setting.running.moves += 1
    setting.run(1, rank=LOW)
    assert setting.admission.outranks_running(waiting(priority=1))
