"""How many ragged sequences fit a budget of memory: in pages, and padded into one batch.

Counted, not run: the allocator hands out the pages that a run would. A sequence costs its K and V
and, in a hybrid model, one row of Mamba states, which no paging makes smaller.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from granite_paged.bench.roofline import ModelSizes
from granite_paged.geometry import CacheGeometry
from granite_paged.paging.allocator import PageAllocator


@dataclass(frozen=True, slots=True)
class Capacity:
    """Sequences that fit, and the bytes they take."""

    sequences: int
    bytes: int


def paged_capacity(
    geometry: CacheGeometry, sizes: ModelSizes, budget: int, *, longest: int, seed: int
) -> Capacity:
    """Sequences of 1 .. `longest` tokens, drawn from `seed`, until the next one does not fit."""
    draw = random.Random(seed)
    allocator = PageAllocator(max(2, budget // geometry.bytes_per_page), geometry.page_size)
    taken, count = geometry.bytes_per_page, 0  # the null page
    while True:
        length = draw.randint(1, longest)
        cost = geometry.pages_for(length) * geometry.bytes_per_page + sizes.state_bytes
        if taken + cost > budget or not allocator.free:
            return Capacity(count, taken)
        allocator.append({allocator.open(): length})
        taken, count = taken + cost, count + 1


def padded_capacity(sizes: ModelSizes, budget: int, *, longest: int) -> Capacity:
    """The same sequences as one batch, each padded to the longest."""
    cost = longest * sizes.kv_bytes + sizes.state_bytes
    return Capacity(budget // cost, budget // cost * cost)
