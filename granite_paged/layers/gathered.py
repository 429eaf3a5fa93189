"""Attention over gathered pages, in plain PyTorch: for the CPU, float64 and debugging.

Each row's pages are copied next to each other, in logical order, and SDPA attends to them. So cost
and memory follow the longest row of the batch, whatever the size of the pool::

    pool   [1, Hkv, slots, D]  ->  [B, Hkv, tokens, D]

The block lists say which pages a row has. The mask_mod decides on every one of their tokens.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from granite_paged.paging.allocator import NULL_PAGE

MASKED_AT_ONCE = 2**22
"""Most (query, token) pairs for which the mask_mod is computed at once. It keeps several 64-bit
integers per pair."""


def gathered_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float
) -> Tensor:
    """Compute attention of each row over its own pages.

    Args:
        query: [B, Hq, S, D].
        keys, values: [1, Hkv, slots, D], the pool.
        mask: from `paged_block_mask`, for at least B rows and S tokens.
        scale: factor on the scores.

    Returns:
        [B, Hq, S, D] in the query's dtype, computed in single precision at least. Zeros for
        padding; NaN where a query attends to a token whose K or V is not finite.
    """
    exact = torch.promote_types(query.dtype, torch.float32)  # in half, weights would round too
    gathered = _gathered(mask, query, group=query.shape[1] // keys.shape[1])
    own_keys, own_values = (gathered.take(pool).to(exact) for pool in (keys, values))
    finite = (own_keys.isfinite() & own_values.isfinite()).all(3)  # [B, Hkv, tokens]
    sound = bool(finite.all())
    if not sound:  # SDPA would spread them to queries that do not attend to them: 0 * NaN is NaN
        own_keys, own_values = (
            tensor.where(finite[..., None], 0) for tensor in (own_keys, own_values)
        )
    out = scaled_dot_product_attention(
        query.to(exact),
        own_keys,
        own_values,
        attn_mask=gathered.bias(exact),
        scale=scale,
        enable_gqa=True,
    )
    out = out.masked_fill(gathered.attends_to_nothing, 0)
    if not sound:
        out = out.masked_fill(_attends_to_any(~finite, gathered.allowed, query), torch.nan)
    return out.to(query.dtype)


@dataclass
class _Gathered:
    """What the attention layers of one step share.

    Attributes:
        pages: [B, n] int64, each row's pages in logical order, then null pages.
        allowed: [B, S, tokens] bool, which tokens of these pages a query attends to.
        page_size: tokens per page.
        attends_to_nothing: [B, 1, S, 1] bool, True for padding.
    """

    pages: Tensor
    allowed: Tensor
    page_size: int
    attends_to_nothing: Tensor
    _bias: Tensor | None = None

    def take(self, pool: Tensor) -> Tensor:
        """Copy the pages of a pool [1, Hkv, slots, D] to [B, Hkv, tokens, D]."""
        by_page = pool[0].view(pool.shape[1], -1, self.page_size, pool.shape[3])
        taken = by_page.index_select(1, self.pages.flatten())
        by_row = taken.view(pool.shape[1], self.pages.shape[0], -1, pool.shape[3])
        return by_row.transpose(0, 1)[:, :, : self.allowed.shape[2]]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return [B, 1, S, tokens], 0 where attention is allowed and -inf elsewhere.

        None means that all of it is allowed.
        """
        if self._bias is None and not bool(self.allowed.all()):
            zeros = torch.zeros(self.allowed.shape, dtype=dtype, device=self.allowed.device)
            self._bias = zeros.masked_fill_(~self.allowed, -torch.inf)[:, None]
        return self._bias


_STEPS: weakref.WeakKeyDictionary[BlockMask, _Gathered] = weakref.WeakKeyDictionary()


def _gathered(mask: BlockMask, query: Tensor, *, group: int) -> _Gathered:
    """Return what the layers of a mask's step share; the first layer computes it."""
    if mask not in _STEPS:
        _STEPS[mask] = _gather(mask, query.shape[0], query.shape[2], group)
    return _STEPS[mask]


def _gather(mask: BlockMask, batch: int, tokens: int, group: int) -> _Gathered:
    page_size = mask.BLOCK_SIZE[1]
    listed, counts = mask.full_kv_indices, mask.full_kv_num_blocks
    assert listed is not None
    assert counts is not None
    held = (mask.kv_num_blocks + counts)[:batch, 0].amax(dim=1, keepdim=True)  # [B, 1]
    place = torch.arange(max(1, int(held.max())), device=held.device)
    # Beyond its count, a row may list a page that it once had, or has in another place.
    pages = listed[:batch, 0, 0, : len(place)].where(place < held, NULL_PAGE).long()
    offset = torch.arange(page_size, device=pages.device)
    slots = (pages[:, :, None] * page_size + offset).flatten(1)  # [B, n * page_size]
    allowed = _allowed(mask, slots, tokens, group)
    longest = int(allowed.any((0, 1)).nonzero().amax()) + 1 if bool(allowed.any()) else 1
    allowed = allowed[:, :, :longest].contiguous()
    return _Gathered(pages, allowed, page_size, ~allowed.any(2)[:, None, :, None])


def _allowed(mask: BlockMask, slots: Tensor, tokens: int, group: int) -> Tensor:
    """Apply the mask_mod to the tokens in `slots` [B, n]: [B, tokens, n] bool."""
    device, (batch, width) = slots.device, slots.shape
    row = torch.arange(batch, device=device)[:, None, None]
    folded_row = group * torch.arange(tokens, device=device)[None, :, None]
    some = max(1, MASKED_AT_ONCE // (batch * width))
    parts = torch.split(folded_row, some, dim=1)
    return torch.cat([mask.mask_mod(row, row, part, slots[:, None]) for part in parts], dim=1)


def _attends_to_any(tokens: Tensor, allowed: Tensor, query: Tensor) -> Tensor:
    """Return [B, Hq, S, 1] bool: whether a query attends to any of `tokens` [B, Hkv, n] bool."""
    meets = (allowed[:, None] & tokens[:, :, None]).any(3, keepdim=True)  # [B, Hkv, S, 1]
    return meets.repeat_interleave(query.shape[1] // tokens.shape[1], dim=1)
