"""Histories of pages, written so that a diff shows which sequence held which page when.

A difference means that pages go elsewhere. If that is intended (another order of reuse, say), the
commit that rewrites these tables says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from torch import Tensor
from transformers import GraniteMoeHybridConfig

from granite_paged import PagedCache, PagedConfig
from granite_paged.errors import GranitePagedError
from granite_paged.hf.step import CacheStep
from granite_paged.paging.allocator import NULL_PAGE, AppendPlan, PageAllocator
from granite_paged.paging.page_table import UNHELD, PageTable
from granite_paged.paging.store import PageStore
from tests.helpers.strategies import make_geometry
from tests.helpers.tiny_models import FLAVOURS, SIZES

CPU = torch.device("cpu")


# -- histories of the allocator -----------------------------------------------------------------


class AllocatorRecorder:
    """Runs an allocator with its page table, and records every operation."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(pages, page_size)
        self.store = PageStore(make_geometry(page_size=page_size), pages, CPU)
        self.rows: list[int] = []  # row of the table -> sequence
        self._lines = [f"{pages} pages of {page_size} tokens, page {NULL_PAGE} is the null page"]
        self._number = 0

    def open(self) -> None:
        self._step("open", self._open)

    def append(self, **growth: int) -> None:
        """Grow sequences: `append(s0=5, s2=1)` adds 5 tokens to sequence 0, 1 to sequence 2."""
        tokens = {int(name.removeprefix("s")): count for name, count in growth.items()}
        what = ", ".join(f"sequence {s} by {count}" for s, count in tokens.items())
        self._step(f"append to {what}", lambda: self._append(tokens))

    def fork(self, parent: int) -> None:
        self._step(f"fork sequence {parent}", lambda: self._fork(parent))

    def release(self, *sequences: int) -> None:
        self._step(f"release sequence {_numbers(sequences)}", lambda: self._release(sequences))

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _open(self) -> str:
        self.rows.append(self.allocator.open())
        self.store.resize(pages=self.allocator.pages, rows=len(self.rows), width=1)
        return f"sequence {self.rows[-1]}"

    def _append(self, growth: dict[int, int]) -> str:
        plan = self.allocator.append(growth)
        width = max(len(self.allocator.pages_of(sequence)) for sequence in self.rows)
        self.store.resize(pages=self.allocator.pages, rows=len(self.rows), width=width)
        self.store.apply(plan, {sequence: row for row, sequence in enumerate(self.rows)})
        return _plan(plan)

    def _fork(self, parent: int) -> str:
        index = [*range(len(self.rows)), self.rows.index(parent)]
        self.rows.append(self.allocator.fork(parent))
        self.store.table.select_rows(torch.tensor(index))
        return f"sequence {self.rows[-1]}"

    def _release(self, sequences: tuple[int, ...]) -> str:
        freed = self.allocator.release(*sequences)
        self.store.forget(freed)
        kept = [row for row, sequence in enumerate(self.rows) if sequence not in sequences]
        self.store.table.select_rows(torch.tensor(kept).long())
        self.rows = [self.rows[row] for row in kept]
        return f"freed {_numbers(freed)}"

    def _step(self, what: str, operation: Callable[[], str]) -> None:
        self._number += 1
        try:
            outcome = operation()
        except GranitePagedError as refusal:
            outcome = f"refused, {type(refusal).__name__}"
        self.store.check_valid(self.allocator, self.rows)
        self._lines += [
            "",
            f"{self._number}. {what}: {outcome}",
            *map("   {}".format, self._state()),
        ]

    def _state(self) -> Iterable[str]:
        allocator = self.allocator
        yield f"free {allocator.free}, held {allocator.held}"
        for row, sequence in enumerate(self.rows):
            yield _row(sequence, row, allocator, self.store.table)
        yield from _pages(allocator, self.store.table)


def _row(sequence: int, row: int, allocator: PageAllocator, table: PageTable) -> str:
    held = len(allocator.pages_of(sequence))
    named = _numbers(table.physical[row, :held].tolist())
    return f"sequence {sequence} has length {allocator.length(sequence)}, pages {named}"


def _pages(allocator: PageAllocator, table: PageTable) -> Iterable[str]:
    """Show the inverse map and the reference counts, one column per page."""
    logical = table.logical.tolist()
    holders = [allocator.references(page) for page in range(len(logical))]
    yield f"page          {_columns(range(len(logical)))}"
    yield f"logical page  {_columns('-' if place == UNHELD else place for place in logical)}"
    yield f"held by       {_columns(count or '-' for count in holders)}"


def _plan(plan: AppendPlan) -> str:
    parts = [
        *(f"copy page {source} to {target}" for source, target in plan.copies),
        *(f"table[{sequence}, {place}] = {page}" for sequence, place, page in plan.writes),
    ]
    return "; ".join(parts) or "nothing to do"


def _columns(cells: Iterable[object]) -> str:
    return " ".join(f"{cell:>2}" for cell in cells)


def _numbers(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers)) or "none"


def test_sequences_grow_page_by_page(golden_table: SnapshotAssertion) -> None:
    recorder = AllocatorRecorder(pages=8, page_size=4)

    recorder.open()
    recorder.append(s0=3)
    recorder.append(s0=1)
    recorder.open()
    recorder.append(s0=1, s1=9)
    recorder.append(s0=0, s1=3)

    assert golden_table == recorder.text()


def test_forks_share_pages_until_they_write(golden_table: SnapshotAssertion) -> None:
    recorder = AllocatorRecorder(pages=10, page_size=4)

    recorder.open()
    recorder.append(s0=6)
    recorder.fork(0)
    recorder.fork(0)
    recorder.append(s1=1)
    recorder.append(s0=1, s2=4)
    recorder.fork(2)
    recorder.release(2)
    recorder.append(s3=1)

    assert golden_table == recorder.text()


def test_a_fork_at_a_page_boundary_copies_nothing(golden_table: SnapshotAssertion) -> None:
    recorder = AllocatorRecorder(pages=6, page_size=4)

    recorder.open()
    recorder.append(s0=8)
    recorder.fork(0)
    recorder.append(s0=1, s1=1)

    assert golden_table == recorder.text()


def test_released_pages_are_reused_last_first(golden_table: SnapshotAssertion) -> None:
    recorder = AllocatorRecorder(pages=9, page_size=2)

    for tokens in (4, 3, 5):
        recorder.open()
        recorder.append(**{f"s{recorder.rows[-1]}": tokens})
    recorder.release(1)
    recorder.release(2, 0)
    recorder.open()
    recorder.append(s3=11)

    assert golden_table == recorder.text()


def test_refused_requests_change_nothing(golden_table: SnapshotAssertion) -> None:
    recorder = AllocatorRecorder(pages=5, page_size=4)

    recorder.open()
    recorder.append(s0=14)
    recorder.append(s0=3)
    recorder.append(s0=-1)
    recorder.fork(0)
    recorder.append(s0=1, s1=1)
    recorder.release(1, 1)
    recorder.append(s7=1)
    recorder.release(1)
    recorder.release(1)

    assert golden_table == recorder.text()


@pytest.mark.parametrize("seed", [0, 1])
def test_random_schedule(seed: int, golden_table: SnapshotAssertion) -> None:
    recorder, draw = AllocatorRecorder(pages=12, page_size=4), random.Random(seed)

    recorder.open()
    for _ in range(24):
        _random_operation(recorder, draw)()

    assert golden_table == recorder.text()


def _random_operation(recorder: AllocatorRecorder, draw: random.Random) -> Callable[[], None]:
    if not recorder.rows:
        return recorder.open
    # of all methods, only random() gives the same numbers in every version of Python
    chance, sequence = draw.random(), recorder.rows[int(draw.random() * len(recorder.rows))]
    if chance < 0.6:
        return partial(recorder.append, **{f"s{sequence}": 1 + int(draw.random() * 7)})
    if chance < 0.8:
        return partial(recorder.fork, sequence)
    return partial(recorder.release, sequence) if chance < 0.95 else recorder.open


# -- steps of a cache ---------------------------------------------------------------------------


class CacheRecorder:
    """Runs a `PagedCache` without a model, and records what the layers would receive."""

    def __init__(self, page_size: int, max_tokens: int) -> None:
        config = GraniteMoeHybridConfig(**{**SIZES, **FLAVOURS["dense"]})
        self.cache = PagedCache(
            config,
            PagedConfig(page_size=page_size, max_tokens=max_tokens),
            device=CPU,
            dtype=torch.float32,
        )
        self._lines = [
            f"{self.cache.allocator.pages} pages of {page_size} tokens, "
            f"{self.cache.geometry.group} query heads a KV head"
        ]

    def step(self, what: str, mask: Tensor, columns: int) -> None:
        """Run a step. The mask covers all columns so far."""
        step = self.cache.begin_step(len(mask), columns, mask.long())
        self.cache.end_step()
        self._write(what, [*self._slots(step, columns), *self._tables(), *_blocks(step)])

    def reorder(self, *rows: int) -> None:
        self.cache.reorder_cache(torch.tensor(rows))
        self._write(f"rows become {_numbers(rows)}", self._tables())

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _write(self, what: str, lines: Iterable[str]) -> None:
        self.cache.check_valid()
        self._lines += ["", what, *map("   {}".format, lines)]

    def _slots(self, step: CacheStep, columns: int) -> Iterable[str]:
        for row, slots in enumerate(step.slots.view(-1, columns).tolist()):
            yield f"row {row}: writes slots {_runs(slots)}"

    def _tables(self) -> Iterable[str]:
        allocator, table = self.cache.allocator, self.cache.store.table
        for row, sequence in enumerate(self.cache.sequences):
            yield f"row {row}: {_row(sequence, row, allocator, table)}"
        yield from _pages(allocator, table)


def _blocks(step: CacheStep) -> Iterable[str]:
    """The pages that each block of query rows reads: the lists up to their counts."""
    mask = step.block_mask
    yield f"{mask.shape[-2]} query rows in blocks of {mask.BLOCK_SIZE[0]}"
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    counts = torch.stack([mask.full_kv_num_blocks, mask.kv_num_blocks], dim=-1)[:, 0]
    for row, blocks in enumerate(counts.tolist()):
        for block, (whole, part) in enumerate(blocks):
            seen_whole = mask.full_kv_indices[row, 0, block, :whole].tolist()
            seen_in_part = mask.kv_indices[row, 0, block, :part].tolist()
            yield (
                f"row {row}, block {block}: whole pages {_numbers(seen_whole)}; "
                f"masked pages {_numbers(seen_in_part)}"
            )


def _runs(slots: list[int]) -> str:
    """Abbreviate runs: 0 0 8 9 10 -> 'padding x2, 8..10'."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][-1] + bool(slot):
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return ", ".join(map(_run, runs))


def _run(slots: list[int]) -> str:
    if not slots[0]:
        return f"padding x{len(slots)}"
    return f"{slots[0]}..{slots[-1]}" if len(slots) > 1 else f"{slots[0]}"


def _ragged(*lengths: int, width: int) -> Tensor:
    """Return a left-padded mask, [B, width]."""
    return torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]


def _decoded(mask: Tensor, columns: int = 1) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), columns)], dim=1)


def test_ragged_prefill_then_decode(golden_table: SnapshotAssertion) -> None:
    recorder = CacheRecorder(page_size=4, max_tokens=64)
    mask = _ragged(10, 4, 7, width=10)

    recorder.step("prefill 10, 4 and 7 tokens", mask, columns=10)
    for number in (1, 2):
        mask = _decoded(mask)
        recorder.step(f"decode, step {number}", mask, columns=1)

    assert golden_table == recorder.text()


def test_prefill_of_several_query_blocks(golden_table: SnapshotAssertion) -> None:
    recorder = CacheRecorder(page_size=16, max_tokens=256)
    mask = _ragged(100, 50, width=100)

    recorder.step("chunk 1, tokens 0 to 63; row 1 starts at column 50", mask[:, :64], columns=64)
    recorder.step("chunk 2, the rest", mask, columns=36)

    assert golden_table == recorder.text()


def test_beams_share_all_pages_but_the_last(golden_table: SnapshotAssertion) -> None:
    recorder = CacheRecorder(page_size=4, max_tokens=64)
    mask = _ragged(6, 5, 9, width=9)

    recorder.step("prefill 6, 5 and 9 tokens", mask, columns=9)
    rows = (2, 2, 0)
    recorder.reorder(*rows)
    recorder.step("decode", _decoded(mask[list(rows)]), columns=1)

    assert golden_table == recorder.text()
