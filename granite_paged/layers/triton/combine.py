"""Combine what the parts of split rows found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COMBINED = 8192  # numbers that four warps combine


@triton.jit
def _combine(
    parts_ptr, logsumexp_ptr, out_ptr, splits, heads, head_dim,
    TINY: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    split, d = tl.arange(0, SPLITS), tl.arange(0, D)
    there, d_there = split < splits, d < head_dim
    part = (row * splits + split).to(tl.int64) * heads + head
    share = tl.load(logsumexp_ptr + part, mask=there, other=-float("inf"))
    highest = tl.max(share, axis=0)
    weight = tl.exp(share - tl.where(highest == -float("inf"), 0.0, highest))
    found = tl.load(
        parts_ptr + part[:, None] * head_dim + d[None, :],
        mask=there[:, None] & d_there[None, :],
        other=0.0,
    ).to(tl.float32)
    total = tl.maximum(tl.sum(weight, axis=0), TINY)
    out = tl.sum(found * weight[:, None], axis=0) / total
    place = (row * heads + head).to(tl.int64) * head_dim + d
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=d_there)


def combine(parts: Tensor, logsumexp: Tensor, batch: int, splits: int) -> Tensor:
    """Combine the parts of rows, each weighted by its share of the row's softmax.

    Args:
        parts: [parts, Hkv, G, D], `splits` of each row one after the other; there may be more.
        logsumexp: [parts, Hkv, G] float32; -inf for a part without pages.
        batch: rows (B).
        splits: parts per row.

    Returns:
        [B, Hq, D] in the dtype of `parts`; zeros where no part has pages.
    """
    heads, head_dim = parts[0, ..., 0].numel(), parts.shape[-1]
    out = parts.new_empty(batch, heads, head_dim)
    sizes = {"SPLITS": triton.next_power_of_2(splits), "D": triton.next_power_of_2(head_dim)}
    _combine[(batch, heads)](
        parts.contiguous(), logsumexp.contiguous(), out, splits, heads, head_dim,
        TINY=torch.finfo(torch.float32).tiny, **sizes,
        num_warps=4 if sizes["SPLITS"] * sizes["D"] <= _COMBINED else 8,
    )  # fmt: skip
    return out
