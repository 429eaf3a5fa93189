"""Write new K and V into pages, and queries to where attention reads them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_pages(
    keys_ptr, values_ptr, key_pool_ptr, value_pool_ptr, rows_ptr, positions_ptr, table_ptr,
    nonfinite_ptr, query_ptr, placed_ptr, tokens, kv_heads, head_dim, page_size, width,
    to_key_head, to_value_head, key_stride, value_stride, query_stride, group,
    to_row, to_token, to_copy, to_head, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    token, head, copy = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number, source = token // tokens, token.to(tl.int64)
    position = tl.load(positions_ptr + token)
    if position < 0:
        return
    d = tl.arange(0, D)
    there = d < head_dim
    if G > 0:
        member = tl.arange(0, G)
        within = member[:, None] * head_dim + d[None, :]
        mask = (member < group)[:, None] & there[None, :]
        first = query_ptr + source * query_stride + head * group * head_dim
        placed = placed_ptr + number.to(tl.int64) * to_row + (token % tokens) * to_token
        placed += head.to(tl.int64) * to_head + copy * to_copy
        tl.store(placed + within, tl.load(first + within, mask=mask, other=0.0), mask=mask)
    if copy > 0:
        return
    row = tl.load(rows_ptr + number).to(tl.int64)
    page = tl.load(table_ptr + row * width + position // page_size).to(tl.int64)
    slot = page * page_size + position % page_size
    key_target = key_pool_ptr + head.to(tl.int64) * to_key_head + slot * head_dim + d
    value_target = value_pool_ptr + head.to(tl.int64) * to_value_head + slot * head_dim + d
    key = tl.load(keys_ptr + source * key_stride + head * head_dim + d, mask=there, other=0.0)
    value = tl.load(values_ptr + source * value_stride + head * head_dim + d, mask=there, other=0.0)
    # x - x is 0 for every finite x, and NaN for infinities and NaN
    bad_key, bad_value = (key - key) != 0, (value - value) != 0
    tl.store(key_target, tl.where(bad_key, 0.0, key), mask=there)
    tl.store(value_target, tl.where(bad_value, 0.0, value), mask=there)
    if tl.max((bad_key | bad_value).to(tl.int32), axis=0) > 0:
        tl.store(nonfinite_ptr + row, 1)


def write_pages(
    keys: Tensor,
    values: Tensor,
    pools: tuple[Tensor, Tensor],
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    nonfinite: Tensor,
    page_size: int,
    queries: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write K and V of new tokens to the slots that the page table names. Skip padding.

    NaN and infinity are stored as 0 and their row is flagged, so a pool holds finite numbers only:
    a masked weight of 0 times a NaN would be a NaN.

    Args:
        keys, values: [B * S, Hkv * D] each; each row is contiguous.
        pools: keys and values, [1, Hkv, slots, D] each; each head's part is contiguous.
        rows: [B] int, rows of the page table.
        positions: [B, S] int; -1 for padding.
        table: [rows, width] int32, logical page -> physical page.
        nonfinite: [rows] uint8, set to 1 where a value was NaN or infinite.
        page_size: tokens per page.
        queries: queries [B * S, Hq * D] and their places [B, S, copies, Hkv, G, D], of which the
            last two dimensions are contiguous; None if they stay where they are.
    """
    _, kv_heads, _, head_dim = pools[0].shape
    tokens = positions.shape[1]
    query, places = queries or (keys, keys.new_empty(1, 1, 1, kv_heads, 0, head_dim))
    group = places.shape[4]
    _write_pages[(positions.numel(), kv_heads, places.shape[2])](
        keys, values, *pools, rows, positions, table, nonfinite, query, places,
        tokens, kv_heads, head_dim, page_size, table.shape[1],
        pools[0].stride(1), pools[1].stride(1),
        keys.stride(0), values.stride(0), query.stride(0), group, *places.stride()[:4],
        D=triton.next_power_of_2(head_dim), G=triton.next_power_of_2(group) if group else 0,
        num_warps=1,
    )  # fmt: skip
