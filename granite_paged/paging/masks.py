"""The mask of one step, in the pool's coordinates.

Coordinates::

    folded row         query token * G + member of the group      (attention.py folds so)
    slot               physical page * page_size + offset         (what FlexAttention calls kv_idx)
    position           of a token in its sequence, padding not counted; -1 for padding

The mask_mod is right by itself: it asks whether a slot's page belongs to the row and whether the
slot's position is at or before the query's. The block lists say the same by whole pages, so that a
compiled kernel reads only a sequence's own pages; eager FlexAttention ignores them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.paging.allocator import NULL_PAGE
from granite_paged.paging.page_table import NOBODY

QUERY_BLOCK = 128
"""Folded query rows a block of the mask covers; FlexAttention's own default."""

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
    """Causal attention over the pages of one's own row, decided slot by slot.

    Args:
        physical: [B, width] int32, page table of the rows in this batch, in batch order.
        logical: [pages] int32, inverse map of the whole pool.
        positions: [B, S] int32, of the query tokens; `PADDING` attends to nothing.
        page_size: tokens a page.
        group: query heads a KV head (G).
        visible: [B, positions] bool, for sequences of which some tokens were
            hidden after they had been stored; None where all count.
    """
    # a page of a longer row than this table names lies beyond its end
    last = physical.shape[1] - 1

    def mask_mod(row: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        physical_page = slot // page_size
        logical_page = logical[physical_page]
        named = physical[row, logical_page.clamp(0, last)]
        mine = (logical_page != NOBODY) & (named == physical_page)
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
) -> BlockMask:
    """The BlockMask of one step over a pool of `len(logical) * page_size` slots.

    Args are those of `paged_mask_mod`. Entries of `physical` beyond a row's pages must name a page
    that exists (the null page does): kernels may read ahead of the counts.

    Returns:
        A BlockMask for queries folded to [B, Hkv, S * G, D].
    """
    pages = logical.shape[0]
    # the CPU kernel refuses lists shorter than the pool, though it never reads past the counts
    width = pages if physical.device.type == "cpu" else physical.shape[1]
    whole, touched = _pages_seen(positions, page_size=page_size, group=group)
    if visible is not None:  # any page may hide a token: let the mask_mod look at all of them
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


def split_mask_mod(
    table: Tensor,
    logical: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    page_size: int,
    splits: int,
) -> MaskMod:
    """One token a row, whose pages are shared out over `splits` parts that attend separately.

    A part is a row of the attention: part `row * splits + i` sees the i-th run of the row's logical
    pages, all runs equally long. Together they see what the row sees.

    Args:
        table: [rows of the table, width] int32, logical page -> physical page.
        logical: [pages] int32, inverse map of the whole pool.
        rows: [B] int, rows of the table.
        positions: [B] int32, of the query tokens; `PADDING` attends to nothing.
        page_size: tokens a page.
        splits: parts a row.
    """
    last = table.shape[1] - 1

    def mask_mod(part: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        row = part // splits
        newest = positions[row]
        each = ((newest // page_size + splits) // splits).clamp(min=1)  # pages a part
        physical_page = slot // page_size
        logical_page = logical[physical_page]
        named = table[rows[row], logical_page.clamp(0, last)]
        mine = (logical_page != NOBODY) & (named == physical_page)
        position = logical_page * page_size + slot % page_size
        return mine & (position <= newest) & (logical_page // each == part % splits)

    return mask_mod


def split_block_mask(
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    mask_mod: MaskMod,
    *,
    page_size: int,
    group: int,
    slots: int,
) -> BlockMask:
    """The BlockMask of split rows, over lists that a kernel fills anew at every step.

    Args:
        lists: int32: how many whole pages each part has [parts], which [parts, wide]; whether it
            has the partly filled one [parts], which [parts, wide].
        mask_mod: of `split_mask_mod`.
        page_size: tokens a page.
        group: query heads a KV head.
        slots: of the pool.
    """
    whole_count, whole, partial_count, partial = lists
    return BlockMask.from_kv_blocks(
        kv_num_blocks=partial_count[:, None, None],
        kv_indices=partial[:, None, None],
        full_kv_num_blocks=whole_count[:, None, None],
        full_kv_indices=whole[:, None, None],
        BLOCK_SIZE=(QUERY_BLOCK, page_size),
        mask_mod=mask_mod,
        seq_lengths=(group, slots),
        compute_q_blocks=False,
    )


def _pages_seen(positions: Tensor, *, page_size: int, group: int) -> tuple[Tensor, Tensor]:
    """Logical pages that every row of a query block sees whole, and that any row sees at all.

    Returns two [B, query blocks] int32. Both are counts from logical page 0 on.
    """
    folded = positions.repeat_interleave(group, dim=1)  # [B, S * G]
    missing = -folded.shape[1] % QUERY_BLOCK
    # rows past the end are never stored: they must not decide for the others
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
    """[B, query blocks, width]: each row's pages from logical page `start` on, then null pages."""
    batch, named = physical.shape
    wanted = start[:, :, None] + torch.arange(width, dtype=torch.int32, device=physical.device)
    pages = physical[:, None].expand(batch, start.shape[1], named)
    taken = pages.gather(2, wanted.clamp(max=named - 1).long())
    return taken.where(wanted < named, NULL_PAGE).contiguous()
