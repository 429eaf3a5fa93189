"""The page table: the device's copy of which sequence holds which page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import NULL_PAGE, PageAllocator
from granite_paged.paging.page_table import UNHELD, PageTable
from tests.helpers.strategies import CPU, PagedSequences, make_geometry


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def written(table: PageTable, *entries: tuple[int, int, int]) -> PageTable:
    """The table with these entries: row, logical page, physical page."""
    for entry in entries:
        table.write(*entry)
    table.settle()
    return table


def test_every_entry_of_a_new_table_is_the_null_page() -> None:
    """Seen in intel-xpu-backend-for-triton: an entry of -1 reaches a kernel."""
    table = PageTable(2, 3, 5, CPU)
    assert table.physical.tolist() == [[NULL_PAGE] * 3] * 2
    assert table.logical.tolist() == [UNHELD] * 5


def test_a_written_entry_appears_in_both_maps() -> None:
    table = written(PageTable(2, 3, 6, CPU), (0, 2, 5), (1, 0, 3))
    assert table.physical.tolist() == [[0, 0, 5], [3, 0, 0]]
    assert table.logical.tolist() == [UNHELD, UNHELD, UNHELD, 0, UNHELD, 2]


class CopiesToMeta(TorchDispatchMode):
    """Counts copies from the host to another device, for which `meta` stands."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        devices = {str(one.device) for one in tensors}
        self.count += isinstance(out, torch.Tensor) and out.is_meta and "cpu" in devices
        return out


def test_all_changes_reach_the_device_in_one_copy() -> None:
    table = PageTable(2, 3, 6, torch.device("meta"))
    for entry in [(0, 2, 5), (1, 0, 3), (0, 0, 1)]:
        table.write(*entry)
    table.forget([2, 4])
    with CopiesToMeta() as copies:
        table.settle()
        table.settle()  # nothing is left
    assert copies.count == 1


def test_a_forgotten_page_leaves_the_inverse_map() -> None:
    """Seen in torch PagedAttention.erase: chained advanced indexing writes to a copy, and the
    inverse map outlives its owner."""
    table = written(PageTable(1, 2, 4, CPU), (0, 0, 2), (0, 1, 3))
    table.forget([2, 3])
    table.settle()
    assert table.logical.tolist() == [UNHELD] * 4


@pytest.mark.parametrize("pages", [(), (2,)])
def test_forgetting_some_pages_leaves_the_others(pages: tuple[int, ...]) -> None:
    table = written(PageTable(1, 2, 4, CPU), (0, 0, 2), (0, 1, 3))
    table.forget(pages)
    table.settle()
    assert table.logical[3] == 1


@pytest.mark.parametrize(
    ("rows", "width", "pages"), [(4, 2, 5), (2, 7, 5), (2, 2, 50), (9, 9, 9), (1, 1, 1)]
)
def test_growing_a_table_keeps_its_entries(rows: int, width: int, pages: int) -> None:
    table = written(PageTable(2, 2, 5, CPU), (0, 1, 4), (1, 0, 2), (1, 1, 3))
    before, held = table.physical.clone(), table.logical.clone()
    table.fit(rows=rows, width=width, pages=pages)
    assert table.physical.shape >= (max(rows, 2), max(width, 2))
    assert len(table.logical) == max(pages, 5)
    assert torch.equal(table.physical[:2, :2], before)
    assert torch.equal(table.logical[:5], held)
    assert table.physical.count_nonzero() == before.count_nonzero(), "new entries name pages"
    assert (table.logical[5:] == UNHELD).all()


@pytest.mark.parametrize(("asked", "width"), [(4, 4), (5, 8), (8, 8), (9, 9)])
def test_a_table_that_is_too_narrow_doubles(asked: int, width: int) -> None:
    table = PageTable(1, 4, 5, CPU)
    table.fit(rows=2, width=asked, pages=5)
    assert table.physical.shape == (2, width)


def test_slots_follow_the_table_and_padding_goes_to_the_null_page() -> None:
    table = written(PageTable(3, 2, 9, CPU), (0, 0, 3), (0, 1, 5), (1, 0, 7), (2, 0, 1), (2, 1, 4))
    positions = torch.tensor([[0, 3, 4, 7], [1, -1, 2, -1]])
    assert table.slots(positions, 4).tolist() == [[12, 15, 20, 23], [29, 0, 30, 0]]
    assert table.slots(positions, 4, index(2, 1)).tolist() == [[4, 7, 16, 19], [29, 0, 30, 0]]
    assert table.slots(positions[:1, :2], 4).dtype == torch.int64


def test_a_table_that_fits_is_not_reallocated() -> None:
    """A captured graph holds its address."""
    table = PageTable(4, 4, 9, CPU)
    before = table.physical.data_ptr(), table.logical.data_ptr()
    table.fit(rows=3, width=4, pages=9)
    assert (table.physical.data_ptr(), table.logical.data_ptr()) == before


def test_a_long_decode_rarely_reallocates() -> None:
    table = PageTable(1, 1, 2, CPU)
    addresses = set()
    kept = []  # keeps the tensors alive, so that no address is used again
    for width in range(1, 1001):
        table.fit(rows=1, width=width, pages=2)
        addresses.add(table.physical.data_ptr())
        kept.append(table.physical)
    assert len(addresses) <= 1 + (1000).bit_length()


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1], [1], [], [1, 1, 1, 1]], ids=str)
def test_select_rows_moves_whole_rows(rows: list[int]) -> None:
    table = written(PageTable(2, 2, 5, CPU), (0, 0, 4), (0, 1, 2), (1, 0, 3))
    before = table.physical.clone()
    table.select_rows(index(*rows))
    assert torch.equal(table.physical, before[rows])


def test_the_table_takes_four_bytes_per_entry() -> None:
    assert PageTable(3, 5, 7, CPU).nbytes == 4 * (3 * 5 + 7)


def test_a_table_that_matches_the_allocator_is_valid() -> None:
    paged = PagedSequences(make_geometry(page_size=4))
    paged.fork(paged.open(10))
    paged.open(3)
    paged.store.table.check_valid(paged.allocator, paged.rows)
    assert (paged.store.table.logical >= 0).sum() == paged.allocator.held


def test_a_stale_entry_or_inverse_is_found() -> None:
    allocator = PageAllocator(5, 4)
    sequence = allocator.open()
    writes = [write[1:] for write in allocator.append({sequence: 8}).writes]
    table = written(PageTable(1, 2, 5, CPU), *((0, *write) for write in writes))
    table.check_valid(allocator, [sequence])
    table.physical[0, 1] = NULL_PAGE
    with pytest.raises(BrokenInvariant, match="row 0: page table is stale"):
        table.check_valid(allocator, [sequence])
    table = written(PageTable(1, 2, 5, CPU), *((0, *write) for write in writes))
    table.logical[4] = 0  # a page that no sequence holds
    with pytest.raises(BrokenInvariant, match="page 4: the inverse map says 0"):
        table.check_valid(allocator, [sequence])


@pytest.mark.parametrize("entry", [(0, 2, 1), (2, 0, 1), (0, 0, 4)], ids=str)
def test_writing_past_the_table_is_refused(entry: tuple[int, int, int]) -> None:
    """Seen in torch PagedAttention.assign: an unreserved position wraps around to another
    sequence's page."""
    table = PageTable(2, 2, 4, CPU)
    with pytest.raises(IndexError, match="outside a table of 2 x 2 entries and 4 pages"):
        table.write(*entry)
    table.settle()
    assert table.physical.tolist() == [[NULL_PAGE] * 2] * 2


@pytest.mark.parametrize("rows", [1, 64])
def test_the_table_keeps_no_tensors_beyond_its_entries(rows: int) -> None:
    """`nbytes` counts every tensor of the table: it keeps no second copy."""
    table = PageTable(rows, 8, 100, CPU)
    tensors = [value for value in vars(table).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) == table.nbytes


def test_a_page_twice_in_a_row_is_refused() -> None:
    """Seen in vLLM: one physical page twice in a row; an inverse map can only mean one place."""
    allocator = PageAllocator(5, 4)
    sequence = allocator.open()
    allocator.append({sequence: 8})
    allocator._sequences[sequence].pages[1] = allocator._sequences[sequence].pages[0]
    with pytest.raises(AssertionError):
        allocator.check_valid()


# -- pending changes ----------------------------------------------------------------------------


@given(st.data())
def test_batched_changes_equal_single_changes(data: st.DataObject) -> None:
    rows, width, pages = 3, 4, 6
    at_once, one_by_one = (PageTable(rows, width, pages, CPU) for _ in range(2))
    row, place, page = (st.integers(0, most - 1) for most in (rows, width, pages))
    for _ in range(data.draw(st.integers(0, 12))):
        match data.draw(st.sampled_from(["write", "forget", "clear", "copy", "settle"])):
            case "write":
                entry = data.draw(st.tuples(row, place, page))
                at_once.write(*entry)
                one_by_one.write(*entry)
            case "forget":
                freed = data.draw(st.lists(page, unique=True))
                at_once.forget(freed)
                one_by_one.forget(freed)
            case "clear":
                cleared = data.draw(row)
                at_once.clear_rows([cleared], index(cleared))
                one_by_one.clear_rows([cleared], index(cleared))
            case "copy":
                source, target = data.draw(row), data.draw(row)
                at_once.copy_row(source, index(target))
                one_by_one.copy_row(source, index(target))
            case "settle":
                at_once.settle()
        one_by_one.settle()
    at_once.settle()
    assert torch.equal(at_once.physical, one_by_one.physical)
    assert torch.equal(at_once.logical, one_by_one.logical)


def test_the_last_of_several_writes_to_an_entry_counts() -> None:
    table = PageTable(1, 1, 4, CPU)
    for page in (1, 3, 2):
        table.write(0, 0, page)
    table.forget([1, 3])
    table.settle()
    assert table.physical.tolist() == [[2]]
    assert table.logical.tolist() == [UNHELD, UNHELD, 0, UNHELD]


def test_selecting_rows_settles_first() -> None:
    """A pending entry names its row by the number it has now."""
    table = PageTable(2, 1, 4, CPU)
    table.write(1, 0, 3)
    table.select_rows(index(1, 0))
    assert table.physical.tolist() == [[3], [NULL_PAGE]]
