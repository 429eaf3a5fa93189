"""Write new K and V into pages; list the pages that each part of a decode step reads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.paging.masks import split_block_mask, split_mask_mod
from granite_paged.paging.store import PageStore


@triton.jit
def _write_pages(
    keys_ptr, values_ptr, key_pool_ptr, value_pool_ptr, rows_ptr, positions_ptr, table_ptr,
    nonfinite_ptr, tokens, kv_heads, head_dim, page_size, width, slots, key_stride, value_stride,
    D: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions_ptr + token)
    if position < 0:
        return
    row = tl.load(rows_ptr + token // tokens).to(tl.int64)
    page = tl.load(table_ptr + row * width + position // page_size).to(tl.int64)
    slot = page * page_size + position % page_size
    d = tl.arange(0, D)
    there = d < head_dim
    source = head * head_dim + d
    target = (head.to(tl.int64) * slots + slot) * head_dim + d
    token = token.to(tl.int64)
    key = tl.load(keys_ptr + token * key_stride + source, mask=there, other=0.0)
    value = tl.load(values_ptr + token * value_stride + source, mask=there, other=0.0)
    # x - x is 0 for every finite x, and NaN for infinities and NaN
    bad_key, bad_value = (key - key) != 0, (value - value) != 0
    tl.store(key_pool_ptr + target, tl.where(bad_key, 0.0, key), mask=there)
    tl.store(value_pool_ptr + target, tl.where(bad_value, 0.0, value), mask=there)
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
) -> None:
    """Write K and V of new tokens to the slots that the page table names. Skip padding.

    NaN and infinity are stored as 0 and their row is flagged, so a pool holds finite numbers only:
    a masked weight of 0 times a NaN would be a NaN.

    Args:
        keys, values: [B * S, Hkv * D] each; each row is contiguous.
        pools: keys and values, [1, Hkv, slots, D] each.
        rows: [B] int, rows of the page table.
        positions: [B, S] int; -1 for padding.
        table: [rows, width] int32, logical page -> physical page.
        nonfinite: [rows] uint8, set to 1 where a value was NaN or infinite.
        page_size: tokens per page.
    """
    _, kv_heads, slots, head_dim = pools[0].shape
    tokens = positions.shape[1]
    _write_pages[(positions.numel(), kv_heads)](
        keys, values, *pools, rows, positions, table, nonfinite,
        tokens, kv_heads, head_dim, page_size, table.shape[1], slots,
        keys.stride(0), values.stride(0), D=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip


@triton.jit
def _split_pages(
    rows_ptr, positions_ptr, table_ptr, whole_count_ptr, whole_ptr, partial_count_ptr, partial_ptr,
    splits, page_size, width, wide, W: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    batch, split = part // splits, part % splits
    tokens = tl.load(positions_ptr + batch) + 1
    pages = (tokens + page_size - 1) // page_size
    whole = tokens // page_size
    each = (pages + splits - 1) // splits
    first = split * each
    end = tl.minimum(first + each, pages)
    count = tl.maximum(tl.minimum(end, whole) - first, 0)
    has_partial = (pages > whole) & (first <= whole) & (whole < end)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    table = table_ptr + row * width
    tl.store(whole_count_ptr + part, count)
    tl.store(partial_count_ptr + part, has_partial.to(tl.int32))
    tl.store(
        partial_ptr + part.to(tl.int64) * wide, tl.load(table + whole, mask=has_partial, other=0)
    )
    for start in range(0, wide, W):
        at = start + tl.arange(0, W)
        page = tl.load(table + first + at, mask=at < count, other=0)
        tl.store(whole_ptr + part.to(tl.int64) * wide + at, page, mask=at < wide)


def split_pages(
    rows: Tensor,
    positions: Tensor,
    table: Tensor,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    splits: int,
    page_size: int,
) -> None:
    """Divide each row's pages evenly over `splits` parts, in order.

    Args:
        rows: [B] int, rows of the page table.
        positions: [B] int, position of the newest token; -1 for padding, which has no pages.
        table: [rows, width] int32, logical page -> physical page.
        lists: int32 tensors to write: the number of full pages of each part [B * splits] and their
            names [B * splits, wide]; 1 for the part with the partly filled page, else 0
            [B * splits], and that page's name [B * splits, wide], in the first column only.
        splits: parts per row.
        page_size: tokens per page.
    """
    whole_count, whole, partial_count, partial = lists
    wide = whole.shape[-1]
    _split_pages[(len(rows) * splits,)](
        rows, positions, table, whole_count, whole, partial_count, partial,
        splits, page_size, table.shape[1], wide, W=min(256, triton.next_power_of_2(wide)),
        num_warps=1,
    )  # fmt: skip


class SplitMask:
    """The BlockMask of decode steps whose rows are split over several parts.

    Its page lists stay at fixed addresses and are filled again at every step, so a CUDA graph can
    capture both.

    Args:
        store: whose page table the mask reads.
        batch: rows of a step (B).
        splits: parts per row.
    """

    def __init__(self, store: PageStore, batch: int, splits: int) -> None:
        self._store, self._splits = store, splits
        wide = triton.cdiv(store.table.physical.shape[1], splits)
        count = store.table.physical.new_zeros(batch * splits)
        pages = store.table.physical.new_zeros(batch * splits, wide)
        self._lists = count, pages, count.clone(), pages.clone()  # each aligned for the kernels

    def fill(self, rows: Tensor, newest: Tensor) -> BlockMask:
        """Write the lists of a step, and return its mask over all slots of a pool.

        Args:
            rows: [B] int64, rows of the page table.
            newest: [B] int32, position of each row's query token; -1 for padding.

        Returns:
            A BlockMask for B * splits rows; see `split_mask_mod`.
        """
        table, geometry = self._store.table, self._store.geometry
        page_size = geometry.page_size
        split_pages(rows, newest, table.physical, self._lists, self._splits, page_size)
        mask_mod = split_mask_mod(
            table.physical, table.logical, rows, newest, page_size=page_size, splits=self._splits
        )
        return split_block_mask(
            self._lists,
            mask_mod,
            page_size=page_size,
            group=geometry.group,
            slots=self._store.pages * page_size,
        )
