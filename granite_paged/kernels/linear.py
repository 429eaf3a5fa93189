"""y = x W^T for few rows, with what stands around it in a decoder layer fused in.

A decode step reads every weight once and computes little with it, so its floor is the weights'
bytes. Around each product stand a normalisation, a gate or a residual sum of a few rows, which as
kernels of their own cost more than their work. Here they ride along::

    norm       x <- x * norm_weight; the row's 1 / rms is a factor on the result: its sum of squares
               is taken from the tiles of x that the product loads anyway
    gated      the weight holds two halves: y = silu(x W1^T) * (x W2^T)
    residual   y <- residual + scale * y, in float32, rounded once
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
"""Beyond, a library's matrix product is faster than reading x once for every block of columns."""


@triton.jit
def _few_rows(
    x_ptr,
    weight_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    x_stride,
    eps,
    scale,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_there, row_there = column < columns, row < rows
    weight_row = weight_ptr + column[:, None] * depth
    second_half = columns * depth
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    gate_by = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        at_there = at < depth
        x_mask = row_there[:, None] if EVEN else row_there[:, None] & at_there[None, :]
        w_mask = column_there[:, None] if EVEN else column_there[:, None] & at_there[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + at[None, :], mask=x_mask, other=0.0)
        if NORM:
            exact = x.to(tl.float32)
            squares += tl.sum(exact * exact, axis=1)
            factor = tl.load(norm_ptr + at, mask=at_there, other=0.0).to(tl.float32)
            x = (exact * factor[None, :]).to(x_ptr.dtype.element_ty)
        w = tl.load(weight_row + at[None, :], mask=w_mask, other=0.0, eviction_policy="evict_first")
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        if GATED:
            w = tl.load(
                weight_row + second_half + at[None, :],
                mask=w_mask,
                other=0.0,
                eviction_policy="evict_first",
            )
            gate_by = tl.dot(x, tl.trans(w), gate_by, input_precision="ieee")
    if NORM:
        inverse = tl.rsqrt(squares / depth + eps)[:, None]
        total *= inverse
        gate_by *= inverse
    if GATED:
        total = total * tl.sigmoid(total) * gate_by
    total *= scale
    place = row[:, None] * columns + column[None, :]
    there = row_there[:, None] & column_there[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _one_row(
    x_ptr,
    weight_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    columns,
    depth,
    eps,
    scale,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_there = column < columns
    weight_row = weight_ptr + column[:, None] * depth
    second_half = columns * depth
    total = tl.zeros([COLUMNS, DEPTH], tl.float32)
    gate_by = tl.zeros([COLUMNS, DEPTH], tl.float32)
    squares = tl.zeros([DEPTH], tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        at_there = at < depth
        w_mask = column_there[:, None] if EVEN else column_there[:, None] & at_there[None, :]
        w = tl.load(weight_row + at[None, :], mask=w_mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + at, mask=at_there, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + at, mask=at_there, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x[None, :]
        if GATED:
            w = tl.load(
                weight_row + second_half + at[None, :],
                mask=w_mask,
                other=0.0,
                eviction_policy="evict_first",
            )
            gate_by += w.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1)
    factor = scale
    if GATED:
        by = tl.sum(gate_by, axis=1)
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / depth + eps)
        y *= inverse
        if GATED:
            by *= inverse
    if GATED:
        y = y * tl.sigmoid(y) * by
    y *= factor
    if RESIDUAL:
        y += tl.load(residual_ptr + column, mask=column_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), mask=column_there)


def tiles(rows: int, columns: int, depth: int, multiprocessors: int) -> dict[str, int]:
    """Block sizes, stages and warps for one product.

    The weights stream past once, so what counts is enough bytes in flight: blocks of columns narrow
    enough for about two programs a multiprocessor, and deep loads.
    """
    if rows == 1:
        narrow = 8 if columns >= 8 * 4 * multiprocessors else 4
        return {"COLUMNS": narrow, "DEPTH": 512, "num_warps": 4, "num_stages": 2}
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    wide = 64 if columns >= 128 * multiprocessors else 32 if columns >= 32 * multiprocessors else 16
    return {
        "ROWS": tall,
        "COLUMNS": wide,
        "DEPTH": 128,
        "num_warps": 4,
        "num_stages": 5 if wide < 64 else 4,
    }


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
    gated: bool = False,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """scale * f(x W^T) + residual for at most `MOST_ROWS` rows or so.

    Args:
        x: [rows, depth], last dimension contiguous.
        weight: [columns, depth], or [2 * columns, depth] if gated.
        norm: [depth], weight of an RMS normalisation of x; None for none.
        eps: of the normalisation.
        residual: [rows, columns] or None. May be `out`.
        scale: factor on the product, before the residual.
        gated: y = silu(first half) * second half.
        out: [rows, columns], where to write.
        options: block sizes in place of those of `tiles`.

    Returns:
        [rows, columns] in x's dtype, or `out`.
    """
    rows, depth = x.shape
    columns = weight.shape[0] // (2 if gated else 1)
    if out is None:
        out = x.new_empty(rows, columns)
    chosen = {**tiles(rows, columns, depth, multiprocessors(x.device)), **options}
    flags = {
        "NORM": norm is not None,
        "GATED": gated,
        "RESIDUAL": residual is not None,
        "EVEN": depth % chosen["DEPTH"] == 0,
    }
    pointers = (x, weight, norm, residual, out)
    blocks = triton.cdiv(columns, chosen["COLUMNS"])
    if rows == 1:
        _one_row[(blocks,)](*pointers, columns, depth, eps, scale, **flags, **chosen)
    else:
        grid = (blocks, triton.cdiv(rows, chosen["ROWS"]))
        sizes = (rows, columns, depth, x.stride(0))
        _few_rows[grid](*pointers, *sizes, eps, scale, **flags, **chosen)
    return out


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 under the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
