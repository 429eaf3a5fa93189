"""Faults injected on purpose, one at a time: what a bug in paging would do.

Each is a context manager that patches `granite_paged`'s own parts. The tests prove that each is
detected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from granite_paged.hf import patching
from granite_paged.layers.mamba import MambaRows
from granite_paged.paging import masks
from granite_paged.paging.masks import PADDING
from granite_paged.paging.page_table import UNHELD, PageTable
from granite_paged.paging.pool import KVPool

Fault = Callable[[], contextlib.AbstractContextManager[Any]]


def after_table_write(spoil: Callable[[PageTable], None]) -> contextlib.AbstractContextManager[Any]:
    """Call `spoil` on the device's page table after every write to it."""
    settle = PageTable.settle

    def spoiling(self: PageTable) -> None:
        settle(self)
        if self.physical.shape[1] > 2:
            spoil(self)

    return mock.patch.object(PageTable, "settle", spoiling)


def foreign_page() -> contextlib.AbstractContextManager[Any]:
    """Row 0 reads its second page from the last row."""

    def spoil(table: PageTable) -> None:
        table.physical[0, 1] = table.physical[-1, 1]

    return after_table_write(spoil)


def dropped_page() -> contextlib.AbstractContextManager[Any]:
    """The inverse map loses the owner of row 0's second page."""

    def spoil(table: PageTable) -> None:
        table.logical[table.physical[0, 1].long()] = UNHELD

    return after_table_write(spoil)


def duplicated_page() -> contextlib.AbstractContextManager[Any]:
    """Row 0's table names its first page twice, also in place of its second."""

    def spoil(table: PageTable) -> None:
        table.physical[0, 1] = table.physical[0, 0]

    return after_table_write(spoil)


def crossed_values() -> contextlib.AbstractContextManager[Any]:
    """V is written to the page next to the one that K is written to."""
    write = KVPool.write

    def crossed(self: KVPool, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        size = self._geometry.page_size
        other = (slots ^ size).where(slots // size > 1, slots)
        before = self.values.clone()
        finite = write(self, slots, keys, values)
        by_token = self.values[0].index_select(1, slots)
        self.values.copy_(before)
        self.values[0].index_copy_(1, other.clamp(max=self.values.shape[2] - 1), by_token)
        return finite

    return mock.patch.object(KVPool, "write", crossed)


@contextlib.contextmanager
def stale_tail() -> Iterator[None]:
    """The mask ends at a page instead of a token, so the rest of the last page is attended."""
    mask_mod = masks.paged_mask_mod

    def by_page(physical: Tensor, logical: Tensor, positions: Tensor, **sizes: Any) -> Any:
        size = sizes["page_size"]
        ends = (positions // size * size + size - 1).where(positions != PADDING, positions)
        return mask_mod(physical, logical, ends, **sizes)

    with mock.patch.object(masks, "paged_mask_mod", by_page):
        yield


@contextlib.contextmanager
def partial_page_taken_as_full() -> Iterator[None]:
    """The block lists call every touched page full, so that no mask_mod is applied to it."""
    seen = masks._pages_seen

    def all_whole(positions: Tensor, **sizes: int) -> tuple[Tensor, Tensor]:
        _, touched = seen(positions, **sizes)
        return touched, touched

    with mock.patch.object(masks, "_pages_seen", all_whole):
        yield


@contextlib.contextmanager
def wrong_scale() -> Iterator[None]:
    """Attention scores are scaled by twice the right factor."""
    attention = patching.paged_attention

    def doubled(*args: Any, scale: float, **kwargs: Any) -> Tensor:
        return attention(*args, scale=2 * scale, **kwargs)

    with mock.patch.object(patching, "paged_attention", doubled):
        yield


def shifted_slot() -> contextlib.AbstractContextManager[Any]:
    """Every token is written one slot too far."""
    write = KVPool.write

    def shifted(self: KVPool, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return write(self, (slots + 1).clamp(max=self.keys.shape[2] - 1), keys, values)

    return mock.patch.object(KVPool, "write", shifted)


def unforked_state() -> contextlib.AbstractContextManager[Any]:
    """Mamba states do not move with their rows when rows are forked."""

    def keep(self: MambaRows, rows: Tensor) -> None:
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = states[0][torch.arange(len(rows)) % len(states[0])].flip(0)

    return mock.patch.object(MambaRows, "select_rows", keep)


def stored_nan() -> contextlib.AbstractContextManager[Any]:
    """Pools store NaN and infinity instead of replacing them by 0."""
    return mock.patch.object(torch, "nan_to_num", lambda numbers, *instead: numbers)


SEEN_BY_VERIFY: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        foreign_page,
        dropped_page,
        duplicated_page,
        crossed_values,
        stale_tail,
        wrong_scale,
        shifted_slot,
    )
}
