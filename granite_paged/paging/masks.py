"""The attention mask of one step, in the pool's coordinates.

Coordinates::

    folded row         query token * G + member of the group      (as layers/attention.py folds)
    slot               physical page * page_size + offset         (FlexAttention's kv_idx)
    position           of a token in its sequence, padding not counted; -1 for padding

The mask_mod is complete: it allows a slot if its page belongs to the row and its position is not
after the query's. The block lists say the same by whole pages, so that attention reads only a
sequence's own pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.paging.allocator import NULL_PAGE
from granite_paged.paging.page_table import UNHELD

QUERY_BLOCK = 128
"""Folded query rows per block of the mask, as FlexAttention has by default."""

PADDING = -1
"""Position of a padding token."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def paged_mask_mod(
    physical: Tensor,
    logical: Tensor,
    positions: Tensor,
    *,
    page_size: int,
    group: int,
    visible: Tensor | None = None,
) -> MaskMod:
    """Make the mask_mod of causal attention over the pages of each row.

    Args:
        physical: [B, width] int32, page table of the rows in this batch, in batch order.
        logical: [pages] int32, inverse map of the whole pool.
        positions: [B, S] int32, of the query tokens; `PADDING` attends to nothing.
        page_size: tokens per page.
        group: query heads per KV head (G).
        visible: [B, positions] bool, False for stored tokens that the user's mask hides; None if
            none are hidden.
    """
    # A logical page beyond the table belongs to a longer row.
    last = physical.shape[1] - 1

    def mask_mod(row: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        physical_page = slot // page_size
        logical_page = logical[physical_page]
        named = physical[row, logical_page.clamp(0, last)]
        mine = (logical_page != UNHELD) & (named == physical_page)
        position = logical_page * page_size + slot % page_size
        allowed = mine & (position <= positions[row, folded_row // group])
        if visible is None:
            return allowed
        return allowed & visible[row, position.clamp(0, visible.shape[1] - 1)]

    return mask_mod


def paged_block_mask(
    physical: Tensor,
    logical: Tensor,
    positions: Tensor,
    *,
    page_size: int,
    group: int,
    visible: Tensor | None = None,
    gathers: bool = False,
) -> BlockMask:
    """Make the BlockMask of one step over a pool of `len(logical) * page_size` slots.

    Args are those of `paged_mask_mod`. Every entry of `physical` beyond a row's pages must name a
    page of the pool, such as the null page, because kernels may read past the counts.

    gathers: whether plain PyTorch reads the mask (`layers/gathered.py`). It reads lists up to their
        counts only, so they are as short as that allows, whatever the size of the pool.

    Returns:
        A BlockMask for queries folded to [B, Hkv, S * G, D]. Its full list names all pages of a row
        from logical page 0, also beyond its count.
    """
    pages = logical.shape[0]
    whole, touched = _pages_seen(positions, page_size=page_size, group=group)
    if gathers:
        width = max(1, int(touched.max()))
    else:
        # The CPU kernel refuses lists shorter than the pool, though it reads none past its count.
        width = pages if physical.device.type == "cpu" else physical.shape[1]
    if visible is not None:  # any page may have a hidden token, so the mask_mod decides on all
        whole = torch.zeros_like(whole)
    mask_mod = paged_mask_mod(
        physical, logical, positions, page_size=page_size, group=group, visible=visible
    )
    return BlockMask.from_kv_blocks(
        kv_num_blocks=(touched - whole)[:, None],
        kv_indices=_from_logical_page(physical, whole, width)[:, None],
        full_kv_num_blocks=whole[:, None],
        full_kv_indices=_from_logical_page(physical, torch.zeros_like(whole), width)[:, None],
        BLOCK_SIZE=(QUERY_BLOCK, page_size),
        mask_mod=mask_mod,
        seq_lengths=(positions.shape[1] * group, pages * page_size),
        compute_q_blocks=False,
    )


def blocks_of(tokens: int, group: int) -> int:
    """Return the query blocks that a row of `tokens` tokens fills."""
    return -(-tokens * group // QUERY_BLOCK)


class QueryBlocks(NamedTuple):
    """The query blocks of a prefill step, each of which attends separately.

    Each row of the step fills whole blocks. Folded rows that are missing in its last block, and
    blocks after the last row's, attend to nothing.

    Attributes:
        rows: [blocks] int32, row of the page table.
        positions: [blocks, QUERY_BLOCK] int32, of each folded row; `PADDING` attends to nothing.
    """

    rows: Tensor
    positions: Tensor


def query_block_mask_mod(
    table: Tensor, logical: Tensor, blocks: QueryBlocks, *, page_size: int
) -> MaskMod:
    """Make the mask_mod of a prefill step of separate query blocks.

    Args:
        table: [rows of the table, width] int32, logical page -> physical page.
        logical: [pages] int32, inverse map of the whole pool.
        blocks: which rows and tokens they are of.
        page_size: tokens per page.
    """
    last = table.shape[1] - 1
    rows, positions = blocks

    def mask_mod(block: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        physical_page = slot // page_size
        logical_page = logical[physical_page]
        named = table[rows[block], logical_page.clamp(0, last)]
        mine = (logical_page != UNHELD) & (named == physical_page)
        position = logical_page * page_size + slot % page_size
        return mine & (position <= positions[block, folded_row])

    return mask_mod


class Parts(NamedTuple):
    """The parts of a decode step's rows, each of which attends separately.

    A row's parts see consecutive runs of its logical pages; together they see what the row sees.
    Parts beyond those of the last row see nothing.

    Attributes:
        rows: [parts] int32, row of the page table.
        newest: [parts] int32, position of the row's query token; `PADDING` attends to nothing.
        first, end: [parts] int32, the logical pages that a part sees, `end` excluded.
    """

    rows: Tensor
    newest: Tensor
    first: Tensor
    end: Tensor


def split_mask_mod(table: Tensor, logical: Tensor, parts: Parts, *, page_size: int) -> MaskMod:
    """Make the mask_mod of a decode step whose rows are split into parts.

    Args:
        table: [rows of the table, width] int32, logical page -> physical page.
        logical: [pages] int32, inverse map of the whole pool.
        parts: what each of them sees.
        page_size: tokens per page.
    """
    last = table.shape[1] - 1
    rows, newest, first, end = parts

    def mask_mod(part: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        physical_page = slot // page_size
        logical_page = logical[physical_page]
        named = table[rows[part], logical_page.clamp(0, last)]
        mine = (logical_page >= first[part]) & (logical_page < end[part])  # no page is before 0
        position = logical_page * page_size + slot % page_size
        return mine & (named == physical_page) & (position <= newest[part])

    return mask_mod


class PageLists(NamedTuple):
    """The pages that each query block, or each part, reads; a kernel fills them at every step.

    Attributes:
        whole_count: [blocks] int32, how many pages a block sees whole.
        whole: [blocks, width] int32, which; what follows must name pages of the pool.
        partial_count, partial: the same for pages of which a block sees some slots.
    """

    whole_count: Tensor
    whole: Tensor
    partial_count: Tensor
    partial: Tensor


def listed_block_mask(
    lists: PageLists, mask_mod: MaskMod, *, page_size: int, folded_rows: int, slots: int
) -> BlockMask:
    """Make the BlockMask of query blocks that attend separately.

    Args:
        lists: what each of them reads.
        mask_mod: decides on pages that are seen in part.
        page_size: tokens per page.
        folded_rows: queries of a block.
        slots: slots of the pool.

    Returns:
        A BlockMask for queries [blocks, Hkv, folded_rows, D].
    """
    whole_count, whole, partial_count, partial = (part[:, None, None] for part in lists)
    return BlockMask.from_kv_blocks(
        kv_num_blocks=partial_count,
        kv_indices=partial,
        full_kv_num_blocks=whole_count,
        full_kv_indices=whole,
        BLOCK_SIZE=(QUERY_BLOCK, page_size),
        mask_mod=mask_mod,
        seq_lengths=(folded_rows, slots),
        compute_q_blocks=False,
    )


def _pages_seen(positions: Tensor, *, page_size: int, group: int) -> tuple[Tensor, Tensor]:
    """Count the pages that every row of a query block sees whole, and that any row sees at all.

    Both counts start at logical page 0. Returns two tensors, [B, query blocks] int32.
    """
    folded = positions.repeat_interleave(group, dim=1)  # [B, S * G]
    missing = -folded.shape[1] % QUERY_BLOCK
    # Rows past the end are never stored, so they must not affect the counts.
    first = _pad_end(folded, missing, torch.iinfo(folded.dtype).max)
    last = _pad_end(folded, missing, PADDING)
    blocks = (folded.shape[0], -1, QUERY_BLOCK)
    lowest = first.view(blocks).amin(dim=2)
    highest = last.view(blocks).amax(dim=2)
    return (
        ((lowest + 1) // page_size).int(),
        ((highest + page_size) // page_size).int(),
    )


def _pad_end(tensor: Tensor, columns: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, columns), value=value)


def _from_logical_page(physical: Tensor, start: Tensor, width: int) -> Tensor:
    """List each row's pages from logical page `start`, then null pages: [B, blocks, width]."""
    batch, named = physical.shape
    wanted = start[:, :, None] + torch.arange(width, dtype=torch.int32, device=physical.device)
    pages = physical[:, None].expand(batch, start.shape[1], named)
    taken = pages.gather(2, wanted.clamp(max=named - 1).long())
    return taken.where(wanted < named, NULL_PAGE).contiguous()
