"""The device's copy of what a `PageAllocator` decides: page table and pools, driven together.

The allocator decides on the host which pages a sequence has, and returns plans. A `PageStore`
carries them out. Its two users, `hf/cache.py` and `runner/runner.py`, keep their policy: which
sequence has which row, when a pool grows, what is refused.

::

    allocator.append(growth)  ->  AppendPlan   ->  store.apply(plan, row_of)
    allocator.release(...)    ->  freed pages  ->  store.forget(pages)
                                                   store.table.settle(), before a step reads it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from granite_paged.device import host_copy, one_memory_error, to_device
from granite_paged.errors import require
from granite_paged.geometry import CacheGeometry
from granite_paged.paging.allocator import AppendPlan, PageAllocator
from granite_paged.paging.page_table import PageTable
from granite_paged.paging.pool import KVPool


class PageContents(NamedTuple):
    """K and V of some pages in host memory, layer by layer: [pages, Hkv, page_size, D] each."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(part.nbytes for part in (*self.keys, *self.values))


class PageStore:
    """Page table and K/V pools of all attention layers, on one device.

    Args:
        geometry: sizes of the model.
        pages: pages of each pool, the null page included.
        rows, width: of the page table.

    Attributes:
        table: the page table.
        pools: attention layer -> its pool.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        pages: int,
        device: torch.device,
        *,
        rows: int = 1,
        width: int = 1,
    ) -> None:
        self.geometry = geometry
        self.table = PageTable(rows, width, pages, device)
        self.pools = {layer: KVPool(geometry, pages, device) for layer in geometry.attention_layers}
        self._device = device

    @property
    def pages(self) -> int:
        """Pages of each pool, the null page included."""
        return len(self.table.logical)

    def apply(self, plan: AppendPlan, row_of: Mapping[int, int]) -> None:
        """Carry out what `PageAllocator.append` planned.

        Args:
            plan: the allocator's.
            row_of: sequence -> row of the page table.
        """
        for sequence, logical_page, physical_page in plan.writes:
            self.table.write(row_of[sequence], logical_page, physical_page)
        if plan.copies:
            sources, targets = to_device(
                self._device, *torch.tensor(plan.copies, dtype=torch.int64).unbind(1)
            )
            for pool in self.pools.values():
                pool.copy_pages(sources, targets)

    def forget(self, pages: Iterable[int]) -> None:
        """Take note that no sequence holds these pages: what `PageAllocator.release` returned."""
        self.table.forget(pages)

    def save(self, pages: Sequence[int]) -> PageContents:
        """Copy K and V of these pages to host memory."""
        (index,) = to_device(self._device, torch.tensor(pages, dtype=torch.int64))
        saved = [pool.read_pages(index) for pool in self.pools.values()]
        return PageContents([host_copy(k) for k, _ in saved], [host_copy(v) for _, v in saved])

    def load(self, pages: Sequence[int], contents: PageContents) -> None:
        """Put saved K and V into these pages, as many as were saved."""
        (index,) = to_device(self._device, torch.tensor(pages, dtype=torch.int64))
        for pool, *parts in zip(self.pools.values(), *contents, strict=True):
            keys, values = (part.to(self._device, non_blocking=True) for part in parts)
            pool.write_pages(index, keys, values)

    def resize(self, *, pages: int, rows: int, width: int) -> None:
        """Have `pages` pages, and a page table of at least `rows` x `width` entries.

        Raises:
            torch.OutOfMemoryError: if the device has too little memory. The pools have the pages
                that they had; those that had grown keep the memory for more.
        """
        held = self.pages
        try:
            with one_memory_error():
                for pool in self.pools.values():
                    pool.resize(pages)
                self.table.fit(rows=rows, width=width, pages=pages)
        except torch.OutOfMemoryError:
            for pool in self.pools.values():
                pool.resize(held)
            raise

    def check_valid(self, allocator: PageAllocator, sequences: Sequence[int]) -> None:
        """Prove that table and pools agree with the allocator; sequences: of each row.

        Raises:
            BrokenInvariant: says what does not.
        """
        allocator.check_valid()
        self.table.check_valid(allocator, sequences)
        sizes = {self.pages, *(pool.pages for pool in self.pools.values())}
        require(sizes == {allocator.pages}, "a pool of another size than the allocator's")
