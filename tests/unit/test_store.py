"""The page store: page table and pools of all layers, driven by an allocator's plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import PageAllocator
from granite_paged.paging.pool import KVPool
from granite_paged.paging.store import PageStore
from tests.helpers.memory_errors import MEMORY_ERRORS
from tests.helpers.strategies import CPU, make_geometry

GEOMETRY = dataclasses.replace(make_geometry(page_size=4), attention_layers=(1, 4))


def make(pages: int = 9) -> tuple[PageAllocator, PageStore]:
    return PageAllocator(pages, 4), PageStore(GEOMETRY, pages, CPU, rows=2, width=4)


def numbered(store: PageStore) -> list[torch.Tensor]:
    """Fill the pools with different numbers, and return copies of them."""
    for layer, pool in store.pools.items():
        for sign, stored in ((1, pool.keys), (-1, pool.values)):
            stored.copy_(sign * (layer + torch.arange(stored.numel()).view(stored.shape)))
    return tensors(store)


def tensors(store: PageStore) -> list[torch.Tensor]:
    return [t.clone() for pool in store.pools.values() for t in (pool.keys, pool.values)]


def grown(allocator: PageAllocator, store: PageStore, growth: dict[int, int]) -> None:
    store.apply(allocator.append(growth), {sequence: sequence for sequence in growth})


def test_a_new_store_has_a_table_of_one_entry_until_it_grows() -> None:
    store = PageStore(GEOMETRY, 9, CPU)
    assert store.table.physical.shape == (1, 1)
    assert store.pages == 9


def test_a_plan_reaches_the_table_when_it_settles() -> None:
    allocator, store = make()
    sequence = allocator.open()
    grown(allocator, store, {sequence: 9})
    assert not store.table.physical.any()
    store.table.settle()
    assert store.table.physical[0].tolist() == [1, 2, 3, 0]
    store.check_valid(allocator, [sequence])


def test_a_copy_on_write_copies_the_page_in_every_layer() -> None:
    allocator, store = make()
    parent = allocator.open()
    grown(allocator, store, {parent: 6})
    child = allocator.fork(parent)
    store.table.copy_row(0, torch.tensor([1]))
    before = numbered(store)
    grown(allocator, store, {child: 1})
    for was, now in zip(before, tensors(store), strict=True):
        assert torch.equal(now[:, :, 12:16], was[:, :, 8:12]), "page 3 is a copy of page 2"
        assert torch.equal(now[:, :, :12], was[:, :, :12])
        assert torch.equal(now[:, :, 16:], was[:, :, 16:])
    store.check_valid(allocator, [parent, child])


def test_forgotten_pages_leave_the_inverse_map() -> None:
    allocator, store = make()
    first, second = allocator.open(), allocator.open()
    grown(allocator, store, {first: 8, second: 3})
    store.forget(allocator.release(first))
    store.table.settle()
    assert store.table.logical.tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, -1]


def test_saved_pages_can_be_loaded_elsewhere() -> None:
    _, store = make()
    before = numbered(store)
    contents = store.save([5, 2])
    assert contents.nbytes == 2 * GEOMETRY.bytes_per_page
    store.load([1, 7], contents)
    for was, now in zip(before, tensors(store), strict=True):
        expected = was.clone()
        expected[:, :, 4:8], expected[:, :, 28:32] = was[:, :, 20:24], was[:, :, 8:12]
        assert torch.equal(now, expected)


def test_a_store_that_cannot_grow_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, store = make()
    before, resize = numbered(store), KVPool.resize

    def refuse(self: Any, pages: int) -> None:
        if pages > 9 and self is store.pools[4]:
            raise MEMORY_ERRORS["driver"]
        resize(self, pages)

    monkeypatch.setattr(KVPool, "resize", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        store.resize(pages=20, rows=2, width=4)
    for was, now in zip(before, tensors(store), strict=True):
        assert torch.equal(now, was)
    store.check_valid(allocator, [])


def test_check_valid_names_a_pool_of_the_wrong_size() -> None:
    allocator, store = make()
    store.pools[4].resize(10)
    with pytest.raises(BrokenInvariant, match="a pool of another size"):
        store.check_valid(allocator, [])
