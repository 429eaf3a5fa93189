"""Count the ragged sequences that fit a memory budget, in pages and padded into one batch.

Nothing runs: the allocator issues the pages that a run would use. A sequence costs its K and V
and, in a hybrid model, one row of Mamba states, whose size does not depend on paging.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from granite_paged.bench.roofline import ModelSizes
from granite_paged.geometry import CacheGeometry
from granite_paged.paging.allocator import PageAllocator


@dataclass(frozen=True, slots=True)
class Capacity:
    """Number of sequences that fit, and the bytes that they use."""

    sequences: int
    bytes: int


def paged_capacity(
    geometry: CacheGeometry, sizes: ModelSizes, budget: int, *, longest: int, seed: int
) -> Capacity:
    """Count sequences of 1 to `longest` tokens, drawn from `seed`, until one does not fit."""
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
    """Count the sequences that fit as one batch in which each is padded to `longest` tokens."""
    cost = longest * sizes.kv_bytes + sizes.state_bytes
    return Capacity(budget // cost, budget // cost * cost)
