"""Paged attention whose bits do not depend on the other queries, for exact mode.

Each query reads its row's keys from the first on, `KEYS` at a time, in order::

    weights   exp(score - highest so far), rounded to the model's dtype
    sums      of weights, and of weights times values, both by a matrix product: its order of terms
              is the same in tiles of any size

A block that is masked for one query of a tile but not for another leaves the first unchanged: the
weights are 0 and the highest score stays.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

KEYS = 64
"""Keys per block. The bits depend on it."""

QUERIES, FEW_QUERIES = 64, 16
"""Folded queries per program, with several tokens per row and with one."""


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, rows_ptr, positions_ptr, table_ptr, out_ptr,
    tokens, head_dim, key_stride, value_stride, width, scale, query_heads, group, page_size,
    M: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    batch, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    folded = tile * M + tl.arange(0, M)
    s, g, d = folded // group, folded % group, tl.arange(0, D)
    position = tl.load(positions_ptr + batch * tokens + s, mask=s < tokens, other=-1).to(tl.int32)
    is_token, d_there = position >= 0, d < head_dim
    last = tl.max(position, axis=0)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    place = (batch.to(tl.int64) * tokens + s) * query_heads + head * group + g
    place = place[:, None] * head_dim + d[None, :]
    there = is_token[:, None] & d_there[None, :]
    query = tl.load(query_ptr + place, mask=there, other=0.0)
    keys = key_ptr + head.to(tl.int64) * key_stride
    values = value_ptr + head.to(tl.int64) * value_stride
    highest = tl.full([M], float("-inf"), tl.float32)
    sums = tl.zeros([M, 16], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    ones = tl.full([KEYS, 16], 1.0, query.dtype)
    for start in range(0, last + 1, KEYS):
        t = start + tl.arange(0, KEYS)
        known = t <= last
        page = tl.load(table_ptr + row * width + t // page_size, mask=known, other=0).to(tl.int64)
        slot = (page * page_size + t % page_size) * head_dim
        key = tl.load(
            keys + slot[None, :] + d[:, None], mask=known[None, :] & d_there[:, None], other=0.0
        )
        value = tl.load(
            values + slot[:, None] + d[None, :],
            mask=known[:, None] & d_there[None, :],
            other=0.0,
        )
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(t[None, :] <= position[:, None], score, float("-inf"))
        peak = tl.maximum(highest, tl.max(score, axis=1))
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a query of padding has no key
        weight = tl.exp(score - base[:, None]).to(query.dtype)
        rescale = tl.exp(highest - base)[:, None]
        sums = tl.dot(weight, ones, sums * rescale, input_precision="ieee")
        out = tl.dot(weight, value, out * rescale, input_precision="ieee")
        highest = peak
    total = tl.max(sums, axis=1)  # its columns are equal
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    all_there = (s < tokens)[:, None] & d_there[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=all_there)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    head_dim: int,
    page_size: int,
    scale: float,
) -> Tensor:
    """Compute causal attention of each row over its own pages.

    Args:
        query: [B * S, Hq * D], contiguous.
        keys, values: [1, Hkv, slots, D], the pool, with this step's tokens written; each head's
            part is contiguous.
        rows: [B] int, rows of the page table.
        positions: [B, S] int, contiguous; -1 for padding.
        table: [rows, width] int32, logical page -> physical page.
        head_dim: D.
        page_size: tokens per page.
        scale: factor on the scores.

    Returns:
        [B * S, Hq * D]; zeros for padding.
    """
    kv_heads = keys.shape[1]
    batch, tokens = positions.shape
    query_heads = query.shape[1] // head_dim
    group = query_heads // kv_heads
    out = query.new_empty(query.shape)
    block = QUERIES if tokens > 1 else FEW_QUERIES
    grid = (batch, triton.cdiv(tokens * group, block), kv_heads)
    _attend[grid](
        query, keys, values, rows, positions, table, out,
        tokens, head_dim, keys.stride(1), values.stride(1), table.shape[1], scale, query_heads,
        group, page_size,
        M=block, KEYS=KEYS, D=max(16, int(triton.next_power_of_2(head_dim))),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
