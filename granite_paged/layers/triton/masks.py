"""Masks of captured steps: a kernel lists the pages that attention reads, at every step.

The lists stay at fixed addresses, so that a CUDA graph can capture the kernel and attention. Steps
of several shapes share a mask, if one runs after the other. After its last page, a list still names
pages of an earlier step. Kernels stop at the count; one that reads ahead of it reads pages of the
pool.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.paging.masks import (
    QUERY_BLOCK,
    MaskMod,
    PageLists,
    Parts,
    QueryBlocks,
    blocks_of,
    listed_block_mask,
    query_block_mask_mod,
    split_mask_mod,
)
from granite_paged.paging.store import PageStore

_LISTED = 256  # pages that a program lists at once, at most


@triton.jit
def _list_pages(to_ptr, from_ptr, count, W: tl.constexpr):
    for start in range(0, count, W):
        at = start + tl.arange(0, W)
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < count, other=0), mask=at < count)


# -- prompts ------------------------------------------------------------------------------------


@triton.jit
def _list_blocks(
    rows_ptr, positions_ptr, table_ptr, row_ptr, position_ptr,
    whole_count_ptr, whole_ptr, partial_count_ptr, partial_ptr,
    batch, tokens, group, each, page_size, width, QUERIES: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    number, lane = block // each, tl.arange(0, QUERIES)
    token = ((block % each) * QUERIES + lane) // group
    there = token < tl.where(number < batch, tokens, 0)
    position = tl.load(positions_ptr + number * tokens + token, mask=there, other=-1)
    highest = tl.max(position, axis=0)
    # what is not there hides no page: its outputs are never read
    lowest = tl.min(tl.where(there, position, highest), axis=0)
    whole, touched = (lowest + 1) // page_size, (highest + page_size) // page_size
    row = tl.load(rows_ptr + number, mask=number < batch, other=0)
    tl.store(row_ptr + block, row.to(tl.int32))
    tl.store(position_ptr + block * QUERIES + lane, position)
    tl.store(whole_count_ptr + block, whole)
    tl.store(partial_count_ptr + block, touched - whole)
    table, listed = table_ptr + row.to(tl.int64) * width, block.to(tl.int64) * width
    _list_pages(whole_ptr + listed, table, whole, W)
    _list_pages(partial_ptr + listed, table + whole, touched - whole, W)


class QueryBlockMask:
    """The mask of prefill steps whose query blocks attend separately.

    Its shape depends on `blocks` only, not on a step's B and S.

    Args:
        store: whose page table the mask reads.
        blocks: query blocks of all rows together, at most.
    """

    def __init__(self, store: PageStore, blocks: int) -> None:
        self._store = store
        rows = store.table.physical.new_zeros(blocks)
        self._blocks = QueryBlocks(rows, rows.new_zeros(blocks, QUERY_BLOCK))
        self._lists = _no_pages(store, blocks)

    def fill(self, rows: Tensor, positions: Tensor) -> BlockMask:
        """List the pages of a step.

        Args:
            rows: [B] int64, rows of the page table.
            positions: [B, S] int32, of the query tokens; -1 for padding.

        Returns:
            A BlockMask for queries folded to [blocks, Hkv, QUERY_BLOCK, D], of which each row has
            `blocks_of(S, G)` blocks, in order.
        """
        table, geometry = self._store.table, self._store.geometry
        batch, tokens = positions.shape
        width, blocks = table.physical.shape[1], len(self._blocks.rows)
        _list_blocks[(blocks,)](
            rows, positions, table.physical, *self._blocks, *self._lists,
            batch, tokens, geometry.group, blocks_of(tokens, geometry.group), geometry.page_size,
            width, QUERIES=QUERY_BLOCK, W=min(_LISTED, triton.next_power_of_2(width)), num_warps=1,
        )  # fmt: skip
        mask_mod = query_block_mask_mod(
            table.physical, table.logical, self._blocks, page_size=geometry.page_size
        )
        return _block_mask(self._store, self._lists, mask_mod, QUERY_BLOCK)


# -- decode steps -------------------------------------------------------------------------------


@triton.jit
def _list_parts(
    rows_ptr, newest_ptr, table_ptr, row_ptr, position_ptr, first_ptr, end_ptr,
    whole_count_ptr, whole_ptr, partial_count_ptr, partial_ptr,
    batch, splits, page_size, width, W: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    number, split = part // splits, part % splits
    newest = tl.load(newest_ptr + number, mask=number < batch, other=-1)
    row = tl.load(rows_ptr + number, mask=number < batch, other=0)
    pages, whole = (newest + page_size) // page_size, (newest + 1) // page_size
    each = (pages + splits - 1) // splits
    first = split * each
    end = tl.minimum(first + each, pages)
    count = tl.maximum(tl.minimum(end, whole) - first, 0)
    has_partial = (pages > whole) & (first <= whole) & (whole < end)
    tl.store(row_ptr + part, row.to(tl.int32))
    tl.store(position_ptr + part, newest)
    tl.store(first_ptr + part, first)
    tl.store(end_ptr + part, end)
    tl.store(whole_count_ptr + part, count)
    tl.store(partial_count_ptr + part, has_partial.to(tl.int32))
    table, listed = table_ptr + row.to(tl.int64) * width, part.to(tl.int64) * width
    tl.store(partial_ptr + listed, tl.load(table + whole, mask=has_partial, other=0))
    _list_pages(whole_ptr + listed, table + first, count, W)


class SplitMask:
    """The mask of decode steps whose rows' pages are divided over several parts.

    Its shape depends on `parts` only, not on a step's B.

    Args:
        store: whose page table the mask reads.
        parts: parts of all rows together, at most.
    """

    def __init__(self, store: PageStore, parts: int) -> None:
        self._store = store
        count = store.table.physical.new_zeros(parts)
        self._parts = Parts(*(count.clone() for _ in Parts._fields))
        self._lists = _no_pages(store, parts)

    def fill(self, rows: Tensor, newest: Tensor, splits: int) -> BlockMask:
        """Divide each row's pages evenly over `splits` parts, in order, and list them.

        Args:
            rows: [B] int64, rows of the page table.
            newest: [B] int32, position of each row's query token; -1 for padding, without pages.
            splits: parts per row; B * splits are at most the mask's parts.

        Returns:
            A BlockMask for all parts of the mask; see `Parts`.
        """
        table, geometry = self._store.table, self._store.geometry
        width, parts = table.physical.shape[1], len(self._parts.rows)
        _list_parts[(parts,)](
            rows, newest, table.physical, *self._parts, *self._lists,
            len(rows), splits, geometry.page_size, width,
            W=min(_LISTED, triton.next_power_of_2(width)), num_warps=1,
        )  # fmt: skip
        mask_mod = split_mask_mod(
            table.physical, table.logical, self._parts, page_size=geometry.page_size
        )
        return _block_mask(self._store, self._lists, mask_mod, geometry.group)


# -- both ---------------------------------------------------------------------------------------


def _no_pages(store: PageStore, blocks: int) -> PageLists:
    """Return empty lists; each has memory of its own, aligned for the kernels."""
    table = store.table.physical
    count, pages = (blocks,), (blocks, table.shape[1])
    return PageLists(*(table.new_zeros(shape) for shape in (count, pages, count, pages)))


def _block_mask(store: PageStore, lists: PageLists, mask_mod: MaskMod, rows: int) -> BlockMask:
    page_size, slots = store.geometry.page_size, store.pages * store.geometry.page_size
    return listed_block_mask(lists, mask_mod, page_size=page_size, folded_rows=rows, slots=slots)
