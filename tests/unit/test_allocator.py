"""The page allocator: no page is lost, and none gets two owners by accident."""

from __future__ import annotations

import subprocess
import sys

import pytest

from granite_paged.errors import (
    BrokenInvariant,
    DoubleFree,
    GeometryError,
    InvalidRequest,
    OutOfPages,
    UnknownSequence,
)
from granite_paged.paging.allocator import NULL_PAGE, PageAllocator, PageCopy, PageWrite
from tests.helpers.allocator_model import AllocatorModel


def make(pages: int = 11, page_size: int = 4) -> tuple[AllocatorModel, PageAllocator]:
    """Return an allocator and its model; by default it has ten usable pages of four tokens."""
    model = AllocatorModel(PageAllocator(pages, page_size))
    return model, model.allocator


def opened(model: AllocatorModel, *lengths: int) -> list[int]:
    sequences = [model.open() for _ in lengths]
    model.append(dict(zip(sequences, lengths, strict=True)))
    return sequences


# -- taking and giving back ---------------------------------------------------------------------


def test_only_the_null_page_of_a_new_pool_is_taken() -> None:
    _, allocator = make(pages=11)
    assert (allocator.pages, allocator.free, allocator.held) == (11, 10, 0)


def test_the_null_page_is_never_allocated() -> None:
    model, allocator = make(pages=11)
    (everything,) = opened(model, 40)
    assert allocator.free == 0
    assert NULL_PAGE not in allocator.pages_of(everything)
    assert allocator.references(NULL_PAGE) == 0


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (40, 10)]
)
def test_a_sequence_holds_the_pages_its_tokens_need(tokens: int, pages: int) -> None:
    model, allocator = make()
    (sequence,) = opened(model, tokens)
    assert len(allocator.pages_of(sequence)) == pages
    assert allocator.free == 10 - pages


@pytest.mark.parametrize("steps", [[1] * 13, [3, 5, 4, 1], [13], [0, 13, 0]], ids=str)
def test_the_order_of_growth_does_not_matter(steps: list[int]) -> None:
    model, allocator = make()
    (sequence,) = opened(model, 0)
    for tokens in steps:
        model.append({sequence: tokens})
    assert allocator.length(sequence) == 13
    assert len(allocator.pages_of(sequence)) == 4
    model.check_valid()


def test_the_plan_names_each_new_page_once() -> None:
    _, allocator = make()
    sequence = allocator.open()
    allocator.append({sequence: 3})
    plan = allocator.append({sequence: 6})
    first, second, third = allocator.pages_of(sequence)
    assert plan.writes == [PageWrite(sequence, 1, second), PageWrite(sequence, 2, third)]
    assert first not in {second, third}


def test_release_returns_the_freed_pages() -> None:
    model, allocator = make()
    first, second = opened(model, 9, 4)
    pages = allocator.pages_of(first)
    assert sorted(model.release(first)) == sorted(pages)
    assert allocator.sequences == (second,)
    assert (allocator.free, allocator.held, allocator.tokens) == (9, 1, 4)


def test_recycled_pages_are_used_before_new_ones() -> None:
    """The part of the pool that is ever touched then stays small."""
    model, allocator = make()
    (first,) = opened(model, 12)
    pages = set(allocator.pages_of(first))
    model.release(first)
    (second,) = opened(model, 12)
    assert set(allocator.pages_of(second)) == pages


def test_releasing_nothing_does_nothing() -> None:
    model, allocator = make()
    opened(model, 5)
    assert model.release() == []
    assert allocator.held == 2


def test_ids_are_never_reused() -> None:
    model, _ = make()
    seen = set()
    for _ in range(5):
        (sequence,) = opened(model, 1)
        model.release(sequence)
        seen.add(sequence)
    assert len(seen) == 5


def test_extending_the_pool_moves_no_page() -> None:
    model, allocator = make(pages=3)
    (sequence,) = opened(model, 8)
    pages = allocator.pages_of(sequence)
    allocator.extend_pool(5)
    model.append({sequence: 8})
    assert allocator.pages_of(sequence)[:2] == pages
    assert (allocator.pages, allocator.free) == (5, 0)
    model.check_valid()


def test_importing_the_allocator_does_not_import_torch() -> None:
    """The allocator runs on the host only; of the package it imports only errors.py."""
    code = (
        "import sys, types, importlib.util as u;"
        "package = types.ModuleType('granite_paged');"
        "package.__path__ = [sys.argv[1]];"
        "sys.modules['granite_paged'] = package;"
        "import granite_paged.paging.allocator;"
        "print('torch' in sys.modules)"
    )
    folder = str(__import__("granite_paged").__path__[0])
    run = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


# -- forks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 3, 4, 10])
def test_a_fork_shares_every_page_and_takes_none(length: int) -> None:
    model, allocator = make()
    (parent,) = opened(model, length)
    free = allocator.free
    child = model.fork(parent)
    assert allocator.pages_of(child) == allocator.pages_of(parent)
    assert allocator.length(child) == length
    assert allocator.free == free
    assert {allocator.references(page) for page in allocator.pages_of(parent)} <= {2}


def test_a_shared_page_is_freed_by_its_last_holder() -> None:
    model, allocator = make()
    (parent,) = opened(model, 6)
    child = model.fork(parent)
    assert model.release(parent) == []
    assert len(model.release(child)) == 2
    assert allocator.free == 10


def test_releasing_both_holders_at_once_frees_each_page_once() -> None:
    model, allocator = make()
    (parent,) = opened(model, 6)
    freed = model.release(parent, model.fork(parent))
    assert len(freed) == len(set(freed)) == 2
    allocator.check_valid()


@pytest.mark.parametrize("writer", ["parent", "child"])
def test_writing_into_a_shared_page_copies_it_first(writer: str) -> None:
    model, allocator = make()
    (parent,) = opened(model, 6)
    child = model.fork(parent)
    shared = allocator.pages_of(parent)[-1]
    writes, waits = (parent, child) if writer == "parent" else (child, parent)
    plan = model.append({writes: 1})
    own = allocator.pages_of(writes)[-1]
    assert plan.copies == [PageCopy(shared, own)]
    assert plan.writes == [PageWrite(writes, 1, own)]
    assert allocator.pages_of(waits)[-1] == shared != own
    model.check_valid()


def test_full_shared_pages_are_never_copied() -> None:
    model, allocator = make()
    (parent,) = opened(model, 8)
    child = model.fork(parent)
    assert model.append({child: 1}).copies == []
    assert allocator.pages_of(child)[:2] == allocator.pages_of(parent)


def test_the_last_of_several_writers_keeps_the_original() -> None:
    """Of r holders that all write, r - 1 copy: no page is wasted, and no two write to one."""
    model, allocator = make()
    (parent,) = opened(model, 6)
    family = [parent, model.fork(parent), model.fork(parent)]
    growth = dict.fromkeys(family, 1)
    assert allocator.pages_needed(growth) == 2
    assert len(model.append(growth).copies) == 2
    last_pages = {allocator.pages_of(sequence)[-1] for sequence in family}
    assert len(last_pages) == 3
    model.check_valid()


def test_a_fork_that_does_not_grow_copies_nothing() -> None:
    model, _ = make()
    (parent,) = opened(model, 6)
    child = model.fork(parent)
    plan = model.append({parent: 0, child: 0})
    assert (plan.writes, plan.copies) == ([], [])


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_pages_needed_counts_copies_on_write(tokens: int) -> None:
    model, allocator = make()
    (parent,) = opened(model, 6)
    child = model.fork(parent)
    growth = {parent: tokens, child: tokens}
    needed, free = allocator.pages_needed(growth), allocator.free
    model.append(growth)
    assert allocator.free == free - needed


def test_a_copy_that_does_not_fit_is_refused() -> None:
    model, allocator = make(pages=3)
    (parent,) = opened(model, 6)
    child = model.fork(parent)
    assert allocator.free == 0
    model.refuses(OutOfPages, allocator.append, {child: 1})


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "page_size"), [(1, 4), (0, 4), (-5, 4), (8, 0), (8, -1)])
def test_a_pool_too_small_to_use_is_refused(pages: int, page_size: int) -> None:
    with pytest.raises(GeometryError):
        PageAllocator(pages, page_size)


def test_a_double_free_is_refused() -> None:
    """Seen in transformers' continuous batching: a block freed twice is issued to two owners."""
    model, allocator = make()
    first, _ = opened(model, 5, 5)
    model.release(first)
    model.refuses(DoubleFree, allocator.release, first)
    model.check_valid()


def test_a_double_free_is_refused_after_pages_are_reused() -> None:
    """The pages have another owner by then."""
    model, allocator = make()
    (first,) = opened(model, 40)
    model.release(first)
    (heir,) = opened(model, 40)
    model.refuses(DoubleFree, allocator.release, first)
    assert len(allocator.pages_of(heir)) == 10


def test_a_double_free_of_a_shared_page_is_refused() -> None:
    """Seen in vLLM: it drops the other owner's reference, and the page is reissued in use."""
    model, allocator = make()
    (parent,) = opened(model, 6)
    child = model.fork(parent)
    model.release(child)
    model.refuses(DoubleFree, allocator.release, child)
    assert {allocator.references(page) for page in allocator.pages_of(parent)} == {1}


def test_a_reference_count_never_falls_below_zero() -> None:
    """Seen in vLLM: a double free is accepted with a count of -1."""
    model, allocator = make()
    (sequence,) = opened(model, 4)
    (page,) = allocator.pages_of(sequence)
    model.release(sequence)
    model.refuses(DoubleFree, allocator.release, sequence)
    assert allocator.references(page) == 0


@pytest.mark.parametrize("twice_first", [True, False])
def test_a_call_that_names_an_id_twice_is_refused(twice_first: bool) -> None:
    """Seen in torch PagedAttention.erase([0, 0]): the pages enter the free list twice."""
    model, allocator = make()
    first, second = opened(model, 5, 5)
    named = (first, first, second) if twice_first else (second, first, first)
    model.refuses(DoubleFree, allocator.release, *named)
    assert allocator.sequences == (first, second)


@pytest.mark.parametrize("foreign", [-1, 2, 10**9])
@pytest.mark.parametrize("request_name", ["append", "fork", "release", "length", "pages_of"])
def test_an_id_that_was_never_issued_is_refused(foreign: int, request_name: str) -> None:
    model, allocator = make()
    known, _ = opened(model, 3, 3)
    requests = {
        "append": ({known: 1, foreign: 1},),
        "fork": (foreign,),
        "release": (known, foreign),
        "length": (foreign,),
        "pages_of": (foreign,),
    }
    model.refuses(UnknownSequence, getattr(allocator, request_name), *requests[request_name])


@pytest.mark.parametrize("request_name", ["append", "fork", "length", "pages_of"])
def test_a_closed_sequence_is_refused(request_name: str) -> None:
    model, allocator = make()
    closed, _ = opened(model, 3, 3)
    model.release(closed)
    argument = {closed: 1} if request_name == "append" else closed
    model.refuses(DoubleFree, getattr(allocator, request_name), argument)


@pytest.mark.parametrize("tokens", [-1, -4, -(10**12)])
def test_negative_growth_is_refused(tokens: int) -> None:
    """Seen in vLLM: asking for a negative number of pages inflates the pool."""
    model, allocator = make()
    first, second = opened(model, 5, 5)
    model.refuses(InvalidRequest, allocator.append, {first: 3, second: tokens})
    assert allocator.free == 6


@pytest.mark.parametrize("tokens", [33, 10**6, 10**30])
def test_growth_that_does_not_fit_is_refused_with_numbers(tokens: int) -> None:
    model, allocator = make()
    (sequence,) = opened(model, 8)
    model.refuses(OutOfPages, allocator.append, {sequence: tokens})
    with pytest.raises(OutOfPages) as refusal:
        allocator.append({sequence: tokens})
    assert (refusal.value.needed, refusal.value.free) == (-(-tokens // 4), 8)


def test_a_batch_is_allocated_whole_or_not_at_all() -> None:
    model, allocator = make()
    first, second = opened(model, 4, 4)
    model.refuses(OutOfPages, allocator.append, {first: 16, second: 20})
    assert len(model.append({first: 16, second: 16}).writes) == 8


def test_the_last_free_page_can_be_allocated() -> None:
    model, allocator = make()
    (sequence,) = opened(model, 36)
    assert allocator.pages_needed({sequence: 4}) == allocator.free == 1
    assert allocator.pages_needed({sequence: 5}) == 2
    model.append({sequence: 4})
    assert allocator.free == 0


def test_pages_needed_changes_nothing() -> None:
    model, allocator = make()
    (parent,) = opened(model, 6)
    growth = {parent: 3, model.fork(parent): 90}
    answers = [allocator.pages_needed(growth) for _ in range(3)]
    assert len(set(answers)) == 1
    model.check_valid()


@pytest.mark.parametrize("pages", [10, 2, 0, -1])
def test_a_pool_cannot_shrink(pages: int) -> None:
    model, allocator = make(pages=11)
    model.refuses(GeometryError, allocator.extend_pool, pages)


# -- sharing whole pages ------------------------------------------------------------------------


def test_a_sequence_can_start_with_shared_pages() -> None:
    allocator = PageAllocator(10, 4)
    owner = allocator.open()
    allocator.append({owner: 10})
    shared = allocator.pages_of(owner)[:2]

    heir = allocator.open(shared)

    assert (allocator.length(heir), allocator.pages_of(heir)) == (8, shared)
    assert [allocator.references(page) for page in allocator.pages_of(owner)] == [2, 2, 1]
    assert allocator.release(owner) == [3]
    assert allocator.release(heir) == list(shared)
    allocator.check_valid()


@pytest.mark.parametrize("pages", [(9,), (0,), (1, 1), (1, 9)])
def test_unheld_pages_cannot_be_shared(pages: tuple[int, ...]) -> None:
    allocator = PageAllocator(10, 4)
    allocator.append({allocator.open(): 4})
    with pytest.raises(InvalidRequest, match="cannot be shared"):
        allocator.open(pages)
    assert allocator.sequences == (0,)
    assert allocator.open() == 1


# -- proving ------------------------------------------------------------------------------------


def test_a_length_that_does_not_fit_the_pages_is_found() -> None:
    allocator = PageAllocator(5, 4)
    sequence = allocator.open()
    allocator.append({sequence: 8})
    allocator.check_valid()
    for wrong in (4, 9):
        allocator._sequences[sequence].length = wrong
        with pytest.raises(BrokenInvariant, match="pages/length"):
            allocator.check_valid()


def test_a_page_twice_in_one_sequence_is_found() -> None:
    allocator = PageAllocator(5, 4)
    sequence = allocator.open()
    allocator.append({sequence: 8})
    first, second = allocator.pages_of(sequence)
    allocator._sequences[sequence].pages[1] = first  # all counts agree with that
    allocator._references = {first: 2}
    allocator._recycled.append(second)
    with pytest.raises(BrokenInvariant, match="a page twice"):
        allocator.check_valid()
