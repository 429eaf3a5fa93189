"""Running jobs: what they get, what they give back, and what happens where that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from granite_paged.engine.job import Job, SampleJob, ScoringJob, State
from granite_paged.engine.prefix_cache import Hit
from granite_paged.engine.rank import Rank
from granite_paged.engine.running import Counts, RunningJobs
from granite_paged.engine.step import calls
from granite_paged.engine.waiting import LateCleanups
from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import PageAllocator

NO_HIT = Hit()
ROW_BYTES, PAGE_BYTES = 100, 10


class Memory:
    """A device that records what is asked of it, and refuses the calls in `broken`."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            if name in self.broken:
                raise RuntimeError(f"{name} fails")
            self.log.append((name, *given, *options.values()))
            pages = len(given[0]) if name == "save_pages" else 0
            return SimpleNamespace(nbytes=ROW_BYTES if name == "save_row" else PAGE_BYTES * pages)

        return call

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of this name."""
        return [call[1:] for call in self.log if call[0] == name]


class Setting:
    """Running jobs over a real allocator of `pages` pages of 4 tokens, and a cache that records.

    Attributes:
        waiting: jobs that were put back into the queue.
        evicted: for how many free pages the cache was asked.
    """

    def __init__(self, *, pages: int = 9, rows: int = 4, swap_bytes: int = 10**6) -> None:
        self.allocator = PageAllocator(pages + 1, 4)
        self.memory: Any = Memory()
        self.waiting: list[Any] = []
        self.evicted: list[int] = []
        self.prefix: Any = mock.Mock(sequences=[])
        self.prefix.evict = lambda pages: self.evicted.append(pages) or []
        self.prefix.checkpoints.return_value = {}
        queue: Any = SimpleNamespace(
            late=LateCleanups(),
            jobs=lambda: self.waiting,
            add=self._add,
            remove=lambda job: None,
        )
        self.pays = True
        limits: Any = SimpleNamespace(
            rows=rows,
            swap_bytes=swap_bytes,
            swap=SimpleNamespace(pays=lambda stored: self.pays),
        )
        self.running = RunningJobs(self.memory, self.allocator, self.prefix, queue, limits)

    def _add(self, job: Job) -> None:
        job.state = State.WAITING
        self.waiting.append(job)

    def start(self, tokens: int = 6, *, arrival: int = 1, **options: Any) -> SampleJob:
        """Return a sample that decodes, its prompt computed."""
        job = sample(tokens, arrival=arrival, **options)
        assert self.running.place(job, NO_HIT)
        job.placed.stored = job.placed.target
        self.running.end_prefill(job)
        return job


def sample(tokens: int = 6, *, arrival: int = 1, most: int = 40, limit: int = 9) -> SampleJob:
    request: Any = SimpleNamespace(number=arrival, prompt=[1] * tokens, stop_tokens=())
    job = SampleJob(request=request, tokens=[1] * tokens, max_stored=most, limit=limit)
    job.rank, job.state = Rank(arrival, 0), State.WAITING
    return job


def scoring(tokens: int = 6, *, arrival: int = 1) -> ScoringJob:
    request: Any = SimpleNamespace(
        number=arrival, continuations=[(1, 2), (3,)], scores=[None, None]
    )
    job = ScoringJob(request=request, tokens=[1] * tokens, max_stored=40)
    job.rank, job.state = Rank(arrival, 0), State.WAITING
    return job


# -- coming -------------------------------------------------------------------------------------


def test_nothing_is_counted_before_the_first_step() -> None:
    assert Counts() == Counts(steps=0, preempted=0, swapped=0, restarted=0)
    running = Setting().running
    assert (running.moves, running.forks, running.swapped_bytes, running.short) == (0, 0, 0, False)


@pytest.mark.parametrize(
    ("tokens", "most", "pages"), [(7, 40, 2), (8, 40, 3), (9, 40, 3), (8, 8, 2), (8, 9, 3)]
)
def test_a_prompt_comes_in_with_room_for_its_first_token(
    tokens: int, most: int, pages: int
) -> None:
    assert Setting().running.pages_to_place(sample(tokens, most=most), NO_HIT) == pages


def test_pages_of_a_prefix_need_not_be_free_unless_the_job_was_swapped() -> None:
    setting = Setting()
    hit = Hit(4, (1,))
    job = sample(8)
    assert setting.running.pages_to_place(job, hit) == 2
    job.swapped = SimpleNamespace(stored=7)
    assert setting.running.pages_to_place(job, hit) == 2, "7 tokens and the next"


def test_a_job_that_finds_no_pages_leaves_everything_as_it_was() -> None:
    setting = Setting(pages=2)
    job = sample(8)
    assert not setting.running.place(job, NO_HIT)
    assert (job.placement, setting.running.jobs()) == (None, [])
    assert setting.allocator.free == 2
    assert setting.evicted == [3]
    setting.running.check_valid()


def test_nothing_is_evicted_while_enough_pages_are_free() -> None:
    setting = Setting(pages=2)
    assert setting.running.place(sample(7), NO_HIT)
    assert setting.evicted == []


def test_every_coming_and_going_of_a_job_is_a_move() -> None:
    setting = Setting()
    running = setting.running
    job = sample()
    running.place(job, NO_HIT)
    assert running.moves == 1
    job.placed.stored = 6
    running.end_prefill(job)
    assert running.moves == 2
    child = sample()
    running.fork(job, child)
    assert running.moves == 3
    running.vacate(child)
    assert running.moves == 4
    child.state = State.WAITING
    running.vacate(child)
    assert running.moves == 4, "it was not running"


def test_a_fork_has_the_tokens_and_a_row_of_its_own() -> None:
    setting = Setting()
    parent = setting.start(6)
    parent.isolated = True
    child = sample()
    setting.running.fork(parent, child)
    assert setting.memory.calls("fork_row") == [(parent.placed.row, child.placed.row)]
    assert (child.stored, child.placed.reserved) == (6, 6)
    assert (child.isolated, child.drawn, child.state) == (True, 1, State.DECODE)
    setting.running.check_valid()


# -- preempting ---------------------------------------------------------------------------------


def test_a_preempted_decode_is_copied_to_host_memory_and_back() -> None:
    setting = Setting()
    job = setting.start(6)
    setting.running.preempt(job)
    assert job.swapped is not None
    nbytes = 2 * PAGE_BYTES + ROW_BYTES
    assert (job.swapped.stored, job.swapped.nbytes) == (6, nbytes)
    assert setting.memory.calls("save_row") == [(1, True)], "to host memory"
    assert setting.running.swapped_bytes == nbytes
    assert setting.running.counts == Counts(preempted=1, swapped=1)
    assert (setting.waiting, setting.running.short) == ([job], True)
    setting.running.check_valid()
    setting.running.begin_step()
    assert not setting.running.short
    setting.waiting.clear()
    assert setting.running.place(job, NO_HIT)
    assert (job.stored, job.state, job.swapped) == (6, State.DECODE, None)
    assert setting.running.swapped_bytes == 0
    setting.running.check_valid()


@pytest.mark.parametrize(("room", "swapped"), [(120, 1), (119, 0)])
def test_copies_fill_host_memory_to_its_limit(room: int, swapped: int) -> None:
    setting = Setting(swap_bytes=room)
    setting.running.preempt(setting.start(6))
    assert setting.running.counts.swapped == swapped
    assert setting.running.swapped_bytes == 120 * swapped


@pytest.mark.parametrize("call", ["save_pages", "save_row"])
def test_a_job_that_cannot_be_copied_is_computed_again(call: str) -> None:
    setting = Setting()
    job = setting.start(6)
    setting.memory.broken = {call}
    setting.running.preempt(job)
    assert (job.swapped, setting.waiting) == (None, [job])
    assert setting.running.counts == Counts(preempted=1)
    setting.running.check_valid()


@pytest.mark.parametrize("call", ["write_pages", "load_pages", "load_row"])
def test_a_copy_that_cannot_be_loaded_is_dropped_and_computed_again(call: str) -> None:
    setting = Setting()
    job = setting.start(6)
    setting.running.preempt(job)
    setting.waiting.clear()
    setting.memory.broken = {call}
    assert setting.running.place(job, NO_HIT), "pages are not short"
    assert (job.placement, job.swapped, job.state) == (None, None, State.WAITING)
    assert setting.waiting == [job]
    assert setting.running.swapped_bytes == 0
    setting.running.check_valid()
    setting.memory.broken = set()
    assert setting.running.place(job, NO_HIT)
    assert (job.state, job.placed.target) == (State.PREFILL, 6)


def test_only_decodes_are_copied() -> None:
    setting = Setting()
    prefilling, scored = sample(5), scoring(5, arrival=2)
    setting.running.place(prefilling, NO_HIT)
    setting.running.place(scored, NO_HIT)
    for job in (prefilling, scored):
        setting.running.preempt(job)
        assert job.swapped is None
    assert setting.memory.calls("save_row") == []
    assert setting.waiting == [prefilling, scored]


def test_an_isolated_decode_and_one_that_is_cheap_to_compute_are_not_copied() -> None:
    setting = Setting()
    isolated, cheap = setting.start(6), setting.start(6, arrival=2)
    isolated.isolated = True
    setting.running.preempt(isolated)
    setting.pays = False
    setting.running.preempt(cheap)
    assert (isolated.swapped, cheap.swapped) == (None, None)


def test_a_decode_whose_draws_are_all_launched_does_not_wait() -> None:
    setting = Setting()
    job = setting.start(6, limit=1)
    setting.running.preempt(job)
    assert (job.state, job.placement, setting.waiting) == (State.UNREAD, None, [])


def test_the_newest_after_a_job_is_preempted_and_never_the_job_itself() -> None:
    setting = Setting()
    first, second, third = (setting.start(3, arrival=n) for n in range(3))
    setting.running.preempt_newest_after(first)
    assert setting.waiting == [third]
    setting.running.preempt_newest_after(second)
    assert setting.waiting == [third]


# -- failures -----------------------------------------------------------------------------------


def test_a_sequence_without_a_row_is_closed() -> None:
    setting = Setting(rows=1)
    setting.start(3)
    with pytest.raises(IndexError):
        setting.running.place(sample(3), NO_HIT)
    setting.running.check_valid()


def test_a_row_that_cannot_be_taken_back_is_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = Setting(rows=1)
    job = setting.start(3)
    with monkeypatch.context() as broken:
        broken.setattr(setting.running.rows, "give", mock.Mock(side_effect=MemoryError))
        setting.running.vacate(job)
    setting.running.check_valid()
    assert setting.running.rows.free == 0
    setting.running.begin_step()
    assert setting.running.rows.free == 1
    setting.running.check_valid()


def test_a_sequence_that_cannot_be_released_is_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = Setting()
    job = setting.start(6)
    with monkeypatch.context() as broken:
        broken.setattr(setting.allocator, "release", mock.Mock(side_effect=MemoryError))
        setting.running.vacate(job)
    setting.running.check_valid()
    assert setting.allocator.free == 7
    setting.running.begin_step()
    assert setting.allocator.free == 9
    assert setting.memory.calls("forget_pages") == [([1, 2],)]


def test_the_device_forgets_pages_later_unless_they_have_a_new_owner() -> None:
    setting = Setting()
    job = setting.start(10)
    pages = setting.allocator.pages_of(job.placed.sequence)
    setting.memory.broken = {"forget_pages"}
    setting.running.vacate(job)
    setting.memory.broken = set()
    taken = setting.allocator.open()
    setting.allocator.append({taken: 4})
    (owned,) = setting.allocator.pages_of(taken)
    setting.running.begin_step()
    assert owned in pages
    (told,) = setting.memory.calls("forget_pages")
    assert sorted(told[0]) == sorted(set(pages) - {owned})
    setting.memory.log.clear()
    setting.running.begin_step()
    assert setting.memory.log == [], "nothing is left to forget"


def test_tokens_without_a_page_break_the_invariant() -> None:
    setting = Setting()
    job = setting.start(6)
    setting.running.check_valid()
    job.placed.stored = 7
    with pytest.raises(BrokenInvariant, match="tokens without a page"):
        setting.running.check_valid()
    job.placed.stored, job.placed.reserved = 6, 7
    with pytest.raises(BrokenInvariant, match="pages and reservation"):
        setting.running.check_valid()


def test_bytes_that_no_job_has_in_host_memory_break_the_invariant() -> None:
    setting = Setting()
    setting.running.preempt(setting.start(6))
    setting.running.swapped_bytes += 1
    with pytest.raises(BrokenInvariant, match="bytes in host memory"):
        setting.running.check_valid()


def test_a_sequence_without_an_owner_breaks_the_invariant() -> None:
    setting = Setting()
    setting.allocator.open()
    with pytest.raises(BrokenInvariant, match="without an owner"):
        setting.running.check_valid()


@pytest.mark.parametrize(
    ("isolated", "expected"),
    [
        ((), []),
        ((False, False, False), [["a", "b", "c"]]),
        ((False, True, False), [["a", "c"], ["b"]]),
        ((True, True, True), [["a"], ["b"], ["c"]]),
    ],
)
def test_an_isolated_job_has_calls_of_its_own(
    isolated: tuple[bool, ...], expected: list[list[str]]
) -> None:
    jobs: Any = [SimpleNamespace(isolated=each) for each in isolated]
    assert calls("abc"[: len(jobs)], jobs) == expected
