"""The allocator is fast, and its cost does not depend on the size of the pool."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from granite_paged.errors import OutOfPages
from granite_paged.paging.allocator import PageAllocator

OPERATIONS_PER_SECOND = 200_000
SMALL_POOL, LARGE_POOL = 10**3, 10**7
NOISE = 20
"""Factor by which two equal times may differ on a loaded machine. A cost that grows with the pool
grows by 10**4 here, so it is not missed."""


def cpu_seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Return the best of several times: other processes can only add to it."""

    def once() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return min(once() for _ in range(times))


def serve(allocator: PageAllocator, rounds: int = 1) -> int:
    """Prefill, fork, decode across page ends and release. Return the number of page operations."""
    operations = 0
    for _ in range(rounds):
        batch = [allocator.open() for _ in range(8)]
        plan = allocator.append(dict.fromkeys(batch, 9 * allocator.page_size + 1))
        operations += len(plan.writes)
        forks = [allocator.fork(sequence) for sequence in batch]
        operations += sum(len(allocator.pages_of(sequence)) for sequence in forks)
        for _ in range(2):
            plan = allocator.append(dict.fromkeys(batch + forks, allocator.page_size))
            operations += len(plan.writes) + len(plan.copies)
        operations += sum(len(allocator.pages_of(sequence)) for sequence in batch + forks)
        allocator.release(*batch, *forks)
    return operations


def lines_run(work: Callable[[], Any]) -> int:
    """Count the lines of Python executed: the same number on any machine, however loaded."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def memory_taken(work: Callable[[], Any]) -> int:
    """Return the peak bytes allocated: they show a list of all pages, even one built in C."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Each takes a busy allocator and performs one operation on it.
def grow(allocator: PageAllocator) -> None:
    allocator.append({allocator.open(): 3 * allocator.page_size})


def fork(allocator: PageAllocator) -> None:
    allocator.fork(0)


def copy_on_write(allocator: PageAllocator) -> None:
    allocator.append({allocator.fork(0): 1})


def release(allocator: PageAllocator) -> None:
    shared, own = allocator.fork(0), allocator.open()
    allocator.append({own: 40})
    allocator.release(shared, own)


def refuse(allocator: PageAllocator) -> None:
    with pytest.raises(OutOfPages):
        allocator.append({0: 10**12})


def extend(allocator: PageAllocator) -> None:
    allocator.extend_pool(2 * allocator.pages)


def look(allocator: PageAllocator) -> None:
    assert allocator.free + allocator.held == allocator.pages - 1
    assert allocator.pages_needed({0: 1}) <= allocator.free
    allocator.check_valid()


def make(allocator: PageAllocator) -> None:
    type(allocator)(allocator.pages, allocator.page_size)


OPERATIONS = [grow, fork, copy_on_write, release, refuse, extend, look, make]


def busy(kind: type[PageAllocator], pages: int) -> PageAllocator:
    """Return an allocator with a few sequences and a few recycled pages."""
    allocator = kind(pages, 16)
    for _ in range(3):
        allocator.append({allocator.open(): 40})
    allocator.append({allocator.open(): 16 * 30})
    allocator.release(3)
    return allocator


def assert_free_of_pool_size(kind: type[PageAllocator], operation: Callable[..., None]) -> None:
    pools = [busy(kind, pages) for pages in (SMALL_POOL, LARGE_POOL)]
    small, large = (memory_taken(lambda p=pool: operation(p)) for pool in pools)
    assert large <= small + 4096, f"{small} bytes, but {large} in a larger pool"
    small, large = (lines_run(lambda p=pool: operation(p)) for pool in pools)
    assert large == small, f"{small} lines, but {large} in a larger pool"
    small, large = (cpu_seconds(lambda p=pool: operation(p)) for pool in pools)
    # one operation may wait a millisecond for the interpreter itself
    assert large <= NOISE * small + 1e-3, f"{small:.2g} s, but {large:.2g} s in a larger pool"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_no_operation_depends_on_the_pool_size(operation: Callable[..., None]) -> None:
    assert_free_of_pool_size(PageAllocator, operation)


def test_the_allocator_does_200000_page_operations_per_second() -> None:
    allocator = PageAllocator(LARGE_POOL, 16)
    operations = serve(allocator, rounds=20)
    seconds = cpu_seconds(lambda: serve(allocator, rounds=20))
    rate = operations / seconds
    print(f"{rate:,.0f} page operations per second")
    assert rate >= OPERATIONS_PER_SECOND


# -- mutation tests -----------------------------------------------------------------------------


class ListsEveryPage(PageAllocator):
    """Builds a list of all free pages, in C: memory shows it."""

    def __init__(self, pages: int, page_size: int) -> None:
        super().__init__(pages, page_size)
        self.everything = list(range(min(pages, 10**6)))


class LooksAtEveryPage(PageAllocator):
    """Searches for a free page one by one, without memory: executed lines show it."""

    def append(self, growth: Any) -> Any:
        page = 1
        while page < min(self.pages, 10**5):
            page += 1
        return super().append(growth)


class CountsEveryPage(PageAllocator):
    """Counts all pages in C, without memory: time shows it."""

    def append(self, growth: Any) -> Any:
        assert sum(range(min(self.pages, 10**6))) > 0
        return super().append(growth)


@pytest.mark.parametrize(
    ("kind", "operation", "seen"),
    [
        (ListsEveryPage, make, "bytes"),
        (LooksAtEveryPage, grow, "lines"),
        (CountsEveryPage, grow, " s,"),
    ],
)
def test_an_allocator_that_scans_its_pool_is_detected(kind, operation, seen) -> None:
    with pytest.raises(AssertionError, match=seen):
        assert_free_of_pool_size(kind, operation)
