"""Ragged sequences in shuffled pages of a GPU pool, and the error of attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from granite_paged.layers.attention import paged_attention
from granite_paged.paging.allocator import PageAllocator
from granite_paged.paging.masks import PADDING, paged_block_mask
from granite_paged.paging.store import PageStore
from tests.helpers import reference
from tests.helpers.strategies import make_geometry


@dataclass
class PagedCase:
    """Sequences of `lengths` tokens; the queries are the last `queries` tokens of each."""

    lengths: tuple[int, ...]
    queries: int
    page_size: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    pool_pages: int = 0  # 0: as many as the sequences need
    device: str = "cuda"

    def __post_init__(self) -> None:
        self.scale = self.head_dim**-0.5
        self.draw = torch.Generator(self.device).manual_seed(len(self.lengths) + self.queries)
        needed = 3 + sum(-(-n // self.page_size) for n in self.lengths)
        pages = self.pool_pages or needed
        allocator = PageAllocator(needed, self.page_size)
        sequences = [allocator.open() for _ in self.lengths]
        allocator.append(dict(zip(sequences, self.lengths, strict=True)))
        # spread over the whole pool, its last page included, so that offsets exceed 32 bits
        place = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(0)) + 1
        place[place == pages - 1] = place[0].clone()
        place[0] = pages - 1
        self.pages = [place[torch.tensor(allocator.pages_of(s)) - 1] for s in sequences]
        width = max(len(own) for own in self.pages)
        self.store = PageStore(
            make_geometry(
                page_size=self.page_size,
                group=self.group,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
            ),
            pages,
            torch.device(self.device),
            rows=len(self.lengths),
            width=width,
        )
        for row, own in enumerate(self.pages):
            for logical_page, page in enumerate(own.tolist()):
                self.store.table.write(row, logical_page, page)
        self.store.table.settle()
        (pool,) = self.store.pools.values()
        self.keys, self.values = (
            numbers.normal_(generator=self.draw) for numbers in (pool.keys, pool.values)
        )
        self.query = self.random(len(self.lengths), self.kv_heads * self.group, self.queries)
        self.positions = torch.full((len(self.lengths), self.queries), PADDING, dtype=torch.int32)
        for row, n in enumerate(self.lengths):
            new = min(self.queries, n)
            self.positions[row, self.queries - new :] = torch.arange(n - new, n)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(
            *shape, self.head_dim, device=self.device, dtype=self.dtype, generator=self.draw
        )

    def slots(self, row: int) -> Tensor:
        """Return the slots of a row's tokens, in order."""
        offsets = torch.arange(self.page_size)
        slots = (self.pages[row][:, None] * self.page_size + offsets).flatten()
        return slots[: self.lengths[row]].to(self.device)

    def ours(self) -> Tensor:
        mask = paged_block_mask(
            self.store.table.physical,
            self.store.table.logical,
            self.positions.to(self.device),
            page_size=self.page_size,
            group=self.group,
        )
        return paged_attention(self.query, self.keys, self.values, mask, scale=self.scale)

    def errors(self) -> tuple[float, float]:
        """Return our RMS error and that of SDPA against float64, relative to the answer."""
        ours = self.ours()
        squares = [0.0, 0.0, 0.0]
        for row, n in enumerate(self.lengths):
            new = min(self.queries, n)
            slots = self.slots(row)
            k, v = self.keys[0].index_select(1, slots), self.values[0].index_select(1, slots)
            q = self.query[row, :, self.queries - new :]
            exact = reference.attention(q, k, v, n - new, self.scale)
            sdpa = reference.sdpa(q, k, v, n - new, self.scale)
            mine = ours[row, :, self.queries - new :]
            for i, answer in enumerate((mine - exact, sdpa - exact, exact)):
                squares[i] += float(answer.double().square().sum())
        return (squares[0] / squares[2]) ** 0.5, (squares[1] / squares[2]) ** 0.5
