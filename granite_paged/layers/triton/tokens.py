"""The two ends of a decode step: from tokens to hidden states, and from logits to tokens.

::

    tokens [rows] int64     next input token per row: a step reads it first and writes it last
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.triton.linear import DeferredNorm, early, wait

BLOCK = 8192
"""Most logits of a row that a program loads at once."""


@triton.jit
def _embed(
    tokens_ptr, rows_ptr, table_ptr, norm_ptr, hidden_ptr, normed_ptr, squares_ptr,
    depth, multiplier, EARLY: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0)
    at = tl.arange(0, DEPTH)
    there = at < depth
    norm = tl.load(norm_ptr + at, mask=there, other=0.0).to(tl.float32)
    wait(EARLY)
    token = tl.load(tokens_ptr + tl.load(rows_ptr + batch)).to(tl.int64)
    embedded = tl.load(table_ptr + token * depth + at, mask=there, other=0.0).to(tl.float32)
    hidden = (embedded * multiplier).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + batch * depth + at, hidden, mask=there)
    exact = hidden.to(tl.float32)
    normed = (exact * norm).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + batch * depth + at, normed, mask=there)
    tl.store(squares_ptr + batch, tl.sum(exact * exact, axis=0))


def embed(
    tokens: Tensor, rows: Tensor, table: Tensor, multiplier: float, norm: Tensor
) -> tuple[Tensor, DeferredNorm]:
    """Return the hidden states of each row's token, also as a `DeferredNorm`.

    Args:
        tokens: [rows] int64, input token of every row.
        rows: [B] int64, the rows of the batch.
        table: [vocabulary, hidden], the embeddings.
        multiplier: factor on the embeddings, applied before they are rounded.
        norm: [hidden], weight of the first RMS norm.

    Returns:
        [B, hidden] in the table's dtype, and its `DeferredNorm`.
    """
    batch, depth = len(rows), table.shape[1]
    hidden = table.new_empty(batch, depth)
    normed = DeferredNorm.empty(hidden)
    _embed[(batch,)](
        tokens, rows, table, norm, hidden, *normed, depth, multiplier,
        DEPTH=triton.next_power_of_2(depth), num_warps=4, **early(table.device),
    )  # fmt: skip
    return hidden, normed


@triton.jit
def _write_argmax(
    logits_ptr, rows_ptr, tokens_ptr, nonfinite_ptr,
    columns, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0)
    row = tl.load(rows_ptr + batch)
    logits = logits_ptr + batch.to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    place = tl.minimum(at, columns - 1)  # a valid token even if no logit is above -inf
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    is_bad = tl.zeros([BLOCK], tl.int1)
    wait(EARLY)
    for start in range(0, columns, BLOCK):
        column = start + at
        inside = column < columns
        value = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        is_better = value > highest
        highest = tl.where(is_better, value, highest)
        place = tl.where(is_better, column, place)
        is_bad |= inside & ((value - value) != 0)  # NaN for infinities and NaN
    is_best = highest == tl.max(highest, axis=0)
    tl.store(tokens_ptr + row, tl.min(tl.where(is_best, place, columns - 1), axis=0))
    if tl.max(is_bad.to(tl.int32), axis=0) > 0:
        tl.store(nonfinite_ptr + row, 1)


def write_argmax(logits: Tensor, rows: Tensor, tokens: Tensor, nonfinite: Tensor) -> None:
    """Set `tokens[rows[i]]` to the argmax of `logits[i]`: the first of equals, never a NaN.

    Args:
        logits: [B, vocabulary], contiguous.
        rows: [B] int64; a row that is named twice gets one of its tokens.
        tokens: [rows] int64, input token of every row; written in place.
        nonfinite: [rows] uint8, set to 1 where a logit is NaN or infinite.
    """
    batch, columns = logits.shape
    block = min(BLOCK, int(triton.next_power_of_2(columns)))
    _write_argmax[(batch,)](
        logits, rows, tokens, nonfinite, columns, BLOCK=block, num_warps=16, **early(logits.device)
    )
