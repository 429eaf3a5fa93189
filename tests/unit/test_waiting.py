"""The queue of waiting jobs, with jobs and a prefix cache that only record."""

from __future__ import annotations

import heapq
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from granite_paged.engine.job import State
from granite_paged.engine.rank import PRIORITY_WORTH
from granite_paged.engine.waiting import LateCleanups, WaitingQueue
from granite_paged.errors import BrokenInvariant, QueueFull


class FakeJob(SimpleNamespace):
    """Stands for a job, and equals itself only."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Announcements:
    """Stands for the prefix cache: a path is what was announced."""

    def __init__(self) -> None:
        self.paths: list[Any] = []
        self.broken = False

    def announce(self, tokens: list[int], namespace: str) -> list[Any]:
        if self.broken:
            raise RuntimeError("no memory")
        self.paths.append((tuple(tokens), namespace))
        return [self.paths[-1]]

    def withdraw(self, nodes: list[Any]) -> None:
        if self.broken:
            raise RuntimeError("no memory")
        for node in nodes:
            self.paths.remove(node)


def make_queue(limit: int = 9) -> tuple[WaitingQueue, Announcements]:
    prefix: Any = Announcements()
    return WaitingQueue(prefix, limit), prefix


def job(queue: WaitingQueue, name: int, priority: int = 0, *, swapped: bool = False) -> Any:
    return FakeJob(
        state=State.NEW,
        path=None,
        swapped=swapped,
        tokens=[name],
        namespace="",
        rank=queue.rank(priority),
        ticket=0,
        placement=None,
    )


def test_jobs_come_out_in_order_of_arrival_and_priority() -> None:
    queue, _ = make_queue()
    jobs = [job(queue, 0), job(queue, 1), job(queue, 2, priority=1)]
    for one in jobs:
        queue.add(one)
        assert one.state is State.WAITING
        queue.check_valid()
    found = []
    while first := queue.first():
        assert queue.first() is first, "looking takes nothing out"
        found.append(first.tokens[0])
        queue.remove(first)
        first.state = State.DECODE
    assert found == [2, 0, 1]
    assert (len(queue), queue.jobs()) == (0, [])


def test_arrivals_are_counted_one_by_one() -> None:
    queue, _ = make_queue()
    assert [queue.rank(0).place for _ in range(3)] == [1, 2, 3]
    assert queue.rank(2) == (4 - 2 * PRIORITY_WORTH, 2)


def test_room_counts_what_waits_and_what_comes() -> None:
    queue, _ = make_queue(limit=3)
    queue.check_room(3)
    queue.add(job(queue, 0))
    queue.check_room(2)
    with pytest.raises(QueueFull) as refused:
        queue.check_room(3)
    assert (refused.value.waiting, refused.value.limit) == (1, 3)


def test_a_skipped_job_waits_on_and_comes_back() -> None:
    queue, _ = make_queue()
    first, second = job(queue, 0), job(queue, 1)
    queue.add(first)
    queue.add(second)
    assert queue.skip_first() == 1
    assert queue.first() is second
    assert queue.skip_first() == 2
    assert queue.first() is None
    assert len(queue) == 2
    queue.unskip()
    queue.check_valid()
    assert queue.first() is first
    assert queue.skip_first() == 1, "nothing stays skipped"


def test_a_job_that_left_while_it_was_skipped_stays_out() -> None:
    queue, _ = make_queue()
    gone, stays = job(queue, 0), job(queue, 1)
    queue.add(gone)
    queue.add(stays)
    queue.skip_first()
    queue.remove(gone)
    gone.state = State.DONE
    queue.unskip()
    queue.check_valid()
    assert queue.first() is stays


def test_a_job_that_waits_again_counts_once() -> None:
    queue, _ = make_queue()
    one = job(queue, 0)
    queue.add(one)
    queue.remove(one)
    queue.add(one)  # its first entry is stale
    assert (len(queue), queue.jobs()) == (1, [one])
    queue.check_valid()


def test_a_job_that_does_not_wait_is_not_taken_out() -> None:
    queue, prefix = make_queue()
    waiting, other = job(queue, 0), job(queue, 1)
    queue.add(waiting)
    queue.remove(other)
    assert (len(queue), len(prefix.paths)) == (1, 1)


def test_a_job_that_is_done_does_not_wait() -> None:
    queue, prefix = make_queue()
    done = job(queue, 0)
    done.state = State.DONE
    queue.add(done)
    assert (len(queue), prefix.paths, done.state) == (0, [], State.DONE)


def test_a_stale_entry_brings_no_job_forward() -> None:
    queue, _ = make_queue()
    one, other = job(queue, 0), job(queue, 1)
    queue.add(one)
    queue.add(other)
    queue.remove(one)
    queue.add(one)
    assert queue.first() is one
    queue.skip_first()
    assert queue.first() is other
    assert len(queue.late) == 0


def test_a_waiting_job_that_holds_a_row_breaks_the_invariant() -> None:
    queue, _ = make_queue()
    one = job(queue, 0)
    queue.add(one)
    one.placement = object()
    with pytest.raises(BrokenInvariant, match="holds a row"):
        queue.check_valid()


def test_tokens_are_announced_while_a_job_waits() -> None:
    queue, prefix = make_queue()
    one, swapped = job(queue, 7), job(queue, 8, swapped=True)
    queue.add(one)
    queue.add(swapped)  # its own states are kept: it needs no prefix
    assert prefix.paths == [((7,), "")]
    assert (one.path, swapped.path) == ([((7,), "")], [])
    queue.remove(one)
    assert (prefix.paths, one.path) == ([], [])


def test_a_job_that_cannot_be_announced_waits_without_a_path() -> None:
    queue, prefix = make_queue()
    prefix.broken = True
    one = job(queue, 7)
    queue.add(one)
    assert (len(queue), one.path) == (1, [])


def test_a_cleanup_that_raised_is_tried_until_it_succeeds() -> None:
    queue, prefix = make_queue()
    one = job(queue, 7)
    queue.add(one)
    prefix.broken = True
    queue.remove(one)
    queue.late.retry()
    assert len(prefix.paths) == 1
    prefix.broken = False
    queue.late.retry()
    assert prefix.paths == []
    queue.late.retry()  # a second time would raise, and be noted again
    assert queue.late._failed == []


def test_a_cleanup_that_succeeds_is_done_once() -> None:
    done: list[list[Any]] = []
    late = LateCleanups()
    late.attempt(done.append, [])
    late.retry()
    assert done == [[]]


def test_a_waiting_job_out_of_line_breaks_the_invariant() -> None:
    queue, _ = make_queue()
    queue.add(job(queue, 0))
    queue._heap.clear()
    with pytest.raises(BrokenInvariant, match="not in line"):
        queue.check_valid()


def test_a_job_that_could_not_be_put_in_line_is_once_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, _ = make_queue()
    one = job(queue, 0)
    with monkeypatch.context() as broken:
        broken.setattr(heapq, "heappush", mock.Mock(side_effect=MemoryError))
        queue.add(one)
    queue.check_valid()
    assert (len(queue), queue.first()) == (1, None)
    queue.late.retry()
    assert queue.first() is one
