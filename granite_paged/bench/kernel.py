"""Decode attention alone: FlexAttention over pages, compared with SDPA over contiguous K and V.

Both get the same lengths; ragged batches are padded for SDPA, which then needs a mask. The floor is
the bytes of K and V of all tokens, at the rate of a large copy. Each call starts with a cold cache,
and time on the host is hidden (`Clock.kernel_seconds`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from granite_paged.bench.cases import Shape
from granite_paged.bench.measure import Clock, Repeats, Samples
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.layers.attention import (
    DecodePlan,
    paged_attention,
    split_attention,
    split_queries,
)
from granite_paged.layers.backend import kernel_refusal
from granite_paged.paging.allocator import PageAllocator
from granite_paged.paging.masks import PADDING, paged_block_mask
from granite_paged.paging.store import PageStore

_FLUSH_BYTES = 2**28  # several times the cache of any GPU
_WARM_UP = 3

Pools = tuple[Tensor, Tensor]
"""K and V of one layer, each [1, Hkv, pages * page_size, D]."""


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Seconds of each repeat.

    Attributes:
        paged: FlexAttention over pages.
        folded: SDPA with the query heads of a group folded into rows.
        grouped: SDPA with `enable_gqa`; empty where lengths differ.
        kv_bytes: bytes of K and V that a call has to read.
    """

    paged: Samples
    folded: Samples
    grouped: Samples
    kv_bytes: int

    @property
    def sdpa(self) -> Samples:
        """Samples of the faster way to call SDPA."""
        ways = [way for way in (self.folded, self.grouped) if way.seconds]
        return min(ways, key=lambda way: way.latency().median)


class KernelCase:
    """Tensors of one shape for both kernels.

    ::

        query         [B, Hq, 1, D]
        keys, values  [1, Hkv, pages * page_size, D]   the pool, with random contents
        padded        [B, Hkv, longest, D]             the same tokens, for SDPA
    """

    def __init__(
        self, model: Any, config: PagedConfig, shape: Shape, seed: int, device: torch.device
    ) -> None:
        self._geometry = CacheGeometry.from_config(
            model.config, page_size=config.page_size, dtype=model.dtype
        )
        self._backend = config.backend
        self._scale = float(model.config.attention_multiplier)
        self._lengths = shape.lengths()
        self._draw = torch.Generator(device).manual_seed(seed)
        self._device = device
        self._make_pool()
        self._make_padded(ragged=shape.shortest is not None)
        g = self._geometry
        self._query = self._random(len(self._lengths), g.query_heads, 1, g.head_dim)
        plan = self._split_plan(*self._store.table.physical.shape)
        own = [(self._keys, self._values)]
        self._split = None if plan is None else self.split_calls(plan, own)[0]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of all tokens in one layer."""
        g = self._geometry
        return sum(self._lengths) * g.bytes_per_token // len(g.attention_layers)

    def paged(self) -> Tensor:
        """Attend over pages as a runner's decode step does: [B, Hq, 1, D]."""
        if self._split is not None:
            return self._split()[:, :, None]
        pools = self._keys, self._values
        return paged_attention(
            self._query, *pools, self._block_mask, scale=self._scale, backend=self._backend
        )

    def split_calls(self, plan: DecodePlan, pools: Sequence[Pools]) -> list[Callable[[], Tensor]]:
        """Return the paged call with this plan, once for each pair of pools."""
        from granite_paged.layers.triton.masks import SplitMask  # needs Triton

        rows, kv_heads = torch.arange(len(self._lengths), device=self._device), self._keys.shape[1]
        mask = SplitMask(self._store, plan.parts).fill(rows, self._newest, plan.splits)
        query = self._query[:, :, 0]
        queries = split_queries(query, plan, kv_heads=kv_heads)
        by_group = query.view(len(rows), 1, 1, kv_heads, -1, query.shape[2])
        queries.places.copy_(by_group)  # the kernel that writes K and V does so in a runner
        call = functools.partial(split_attention, queries, scale=self._scale, plan=plan)
        return [functools.partial(call, *pool, mask) for pool in pools]

    def copies(self, count: int) -> list[Pools]:
        """Return `count` copies of K and V."""
        return [(self._keys.clone(), self._values.clone()) for _ in range(count)]

    def sdpa(self) -> Tensor:
        """Attend over padded K and V, with each group folded into query rows: [B, Hq, 1, D]."""
        keys, values = self._padded
        folded = self._query.view(len(keys), keys.shape[1], -1, keys.shape[3])  # [B, Hkv, G, D]
        out = scaled_dot_product_attention(folded, keys, values, self._mask, scale=self._scale)
        return out.reshape(self._query.shape)

    @property
    def padded_by_mask(self) -> bool:
        """Whether lengths differ, so that SDPA needs a mask."""
        return self._mask is not None

    def grouped_sdpa(self) -> Tensor:
        """Do the same with `enable_gqa`, whose fast kernels take no mask."""
        keys, values = self._padded
        return scaled_dot_product_attention(
            self._query, keys, values, scale=self._scale, enable_gqa=True
        )

    def _make_pool(self) -> None:
        g, lengths = self._geometry, torch.tensor(self._lengths)
        store = self._store = self._make_store()
        (pool,) = store.pools.values()
        self._keys, self._values = (
            numbers.normal_(generator=self._draw) for numbers in (pool.keys, pool.values)
        )
        last = (lengths[:, None] - 1).int().to(self._device)
        self._newest = last[:, 0]
        table = store.table
        self._block_mask = paged_block_mask(
            table.physical, table.logical, last, page_size=g.page_size, group=g.group
        )
        tokens = torch.arange(int(lengths.max()), device=self._device).expand(len(lengths), -1)
        self._slots = table.slots(tokens.where(tokens <= last, PADDING), g.page_size)

    def _split_plan(self, rows: int, width: int) -> DecodePlan | None:
        """Return how a runner would split the rows; None if it would not."""
        if kernel_refusal(self._backend, self._device, self._geometry.dtype):
            return None
        return DecodePlan.choose(self._geometry, rows, width, self._device, rows)

    def _make_store(self) -> PageStore:
        """Return one layer's pages, in the order in which an empty pool issues them."""
        lengths = self._lengths
        g = replace(self._geometry, attention_layers=self._geometry.attention_layers[:1])
        allocator = PageAllocator(1 + sum(map(g.pages_for, lengths)), g.page_size)
        width = g.pages_for(max(lengths))
        store = PageStore(g, allocator.pages, self._device, rows=len(lengths), width=width)
        row_of = {allocator.open(): row for row in range(len(lengths))}
        store.apply(allocator.append(dict(zip(row_of, lengths, strict=True))), row_of)
        store.table.settle()
        return store

    def _make_padded(self, *, ragged: bool) -> None:
        g = self._geometry
        shape = (g.kv_heads, *self._slots.shape, g.head_dim)
        self._padded = tuple(
            pool[0][:, self._slots.flatten()].view(shape).transpose(0, 1).contiguous()
            for pool in (self._keys, self._values)
        )
        real = self._slots > 0  # slot 0 is the null page's
        self._mask = real[:, None, None] if ragged else None

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(
            shape, generator=self._draw, device=self._device, dtype=self._geometry.dtype
        )


@torch.inference_mode()
def time_kernels(case: KernelCase, clock: Clock, repeats: Repeats) -> KernelTimes:
    """Time both kernels in turn, each call with a cold cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=clock.device) if clock.gpu else None
    times = KernelTimes(Samples(), Samples(), Samples(), case.kv_bytes)
    calls = [(case.paged, times.paged), (case.sdpa, times.folded)]
    if not case.padded_by_mask:
        calls.append((case.grouped_sdpa, times.grouped))
    for call, _ in calls:
        for _ in range(_WARM_UP):
            call()
    for _ in range(max(repeats.least, repeats.most // 4)):
        for call, samples in calls:
            samples.seconds.append(clock.kernel_seconds(call, flush))
    return times
