"""y = x W^T whose bits do not depend on the other rows, for exact mode.

A tensor core adds the terms of a dot product 16 at a time, in order, whatever the size of the tile
around them. So tiles may follow the number of rows; only the order of the sums must not. It is::

    depth    part 0 | part 1 | ...      each part summed in order, then the parts in order

The number of parts follows from the weight alone (`parts_of`). With few rows, a program computes
one part of a tile, so that a narrow weight still occupies the GPU, and `finish` adds the parts.
With many rows, one program computes all parts of its tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.device import shared_memory, stages_that_fit
from granite_paged.layers.triton.linear import early, prefetch, wait
from granite_paged.layers.triton.pointwise import silu

FEW_ROWS = 128
"""Most rows whose parts are computed by programs of their own."""

NARROW = 4096
"""Weights with fewer outputs are summed in parts."""

PARTS = 4
"""Parts of the sums of a narrow weight."""

PART_STEP = 256
"""A part of a sum is a multiple of this many terms: of the longest block that a tile loads."""


class Tile(NamedTuple):
    """Rows, outputs and terms that a program loads at once, and its warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {
    16: Tile(16, 64, 256, 4, 4),
    32: Tile(32, 64, 128, 4, 4),
    64: Tile(64, 64, 128, 4, 3),
    128: Tile(128, 64, 128, 4, 3),
}
"""Tile for each number of few rows, rounded up."""

MANY_ROWS, MANY_ROWS_GATED = Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3)


@triton.jit
def _product(
    x_ptr, weight_ptr, residual_ptr, out_ptr, rows, columns, depth, part_depth, scale,
    ALONE: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile. ALONE: only the part of this program, as float32 [parts, rows, columns]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_there, row_there = column < columns, row < rows
    weight_row = weight_ptr + column.to(tl.int64)[:, None] * depth
    second_row = weight_ptr + (columns + column).to(tl.int64)[:, None] * depth
    x_row = x_ptr + row.to(tl.int64)[None, :] * depth
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    gate_by = tl.zeros([COLUMNS, ROWS], tl.float32)
    if EARLY:
        begin = tl.program_id(2) * part_depth
        for start in range(begin, tl.minimum(begin + PARTS * part_depth, depth), DEPTH):
            chunk = tl.minimum(start + tl.arange(0, DEPTH // 64) * 64, depth - 1)
            prefetch(weight_row + chunk[None, :], EARLY)
            if GATED:
                prefetch(second_row + chunk[None, :], EARLY)
    wait(EARLY)
    for part in tl.static_range(PARTS):
        first = (tl.program_id(2) + part) * part_depth
        end = tl.minimum(first + part_depth, depth)
        share = tl.zeros([COLUMNS, ROWS], tl.float32)
        for start in range(first, end, DEPTH):
            at = start + tl.arange(0, DEPTH)
            at_there = at < depth
            x = tl.load(x_row + at[:, None], mask=row_there[None, :] & at_there[:, None], other=0.0)
            w_mask = column_there[:, None] & at_there[None, :]
            w = tl.load(weight_row + at[None, :], mask=w_mask, other=0.0)
            share = tl.dot(w, x, share, input_precision="ieee")
            if GATED:
                w = tl.load(second_row + at[None, :], mask=w_mask, other=0.0)
                gate_by = tl.dot(w, x, gate_by, input_precision="ieee")
        total += share
    there = row_there[None, :] & column_there[:, None]
    place = row.to(tl.int64)[None, :] * columns + column[:, None]
    if ALONE:
        tl.store(out_ptr + tl.program_id(2) * rows * columns + place, total, mask=there)
        return
    if GATED:
        total = silu(total) * gate_by
    if RESIDUAL:
        held = tl.load(residual_ptr + place, mask=there, other=0.0).to(tl.float32)
        total = tl.fma(total, scale, held)
    else:
        total *= scale
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _finish(
    parts_ptr, residual_ptr, norm_ptr, normed_ptr, rows, columns, scale, eps,
    PARTS: tl.constexpr, EARLY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the parts of a product to the residual, in place, and compute the RMS norm of the sum."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COLUMNS)
    there = at < columns
    place = row * columns + at
    weight = tl.load(norm_ptr + at, mask=there, other=0.0).to(tl.float32)
    held = tl.load(residual_ptr + place, mask=there, other=0.0).to(tl.float32)
    wait(EARLY)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * rows * columns + place, mask=there, other=0.0)
    rounded = tl.fma(total, scale, held).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + place, rounded, mask=there)
    x = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
    normed = x * inverse * weight
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=there)


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, depth, eps, groups, EARLY: tl.constexpr, DEPTH: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, DEPTH)
    there = at < depth
    start = row.to(tl.int64) * depth
    weight = tl.load(weight_ptr + (row % groups) * depth + at, mask=there, other=0.0)
    wait(EARLY)
    x = tl.load(x_ptr + start + at, mask=there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / depth + eps)
    out = x * inverse * weight.to(tl.float32)
    tl.store(out_ptr + start + at, out.to(out_ptr.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Return the RMS norm of x [rows, depth], contiguous; each of `groups` parts by itself."""
    rows, depth = x.shape
    out = torch.empty_like(x)
    block = int(triton.next_power_of_2(depth // groups))
    _rms_norm[(rows * groups,)](
        x, weight, out, depth // groups, eps, groups,
        DEPTH=block, num_warps=_norm_warps(block), **_early(x),
    )  # fmt: skip
    return out


def product(x: Tensor, weight: Tensor, *, scale: float = 1.0, gated: bool = False) -> Tensor:
    """Return scale * x W^T, or silu(first half) * second half of it if gated.

    Args:
        x: [rows, depth], contiguous, float16 or bfloat16.
        weight: [columns, depth], or [2 * columns, depth] if gated.
        scale: factor on the result; 1 if gated.
        gated: whether the weight has two halves.

    Returns:
        [rows, columns] in x's dtype.
    """
    columns = len(weight) // (2 if gated else 1)
    out = x.new_empty(len(x), columns)
    _launch(x, weight, None, out, scale, gated=gated, parts=1)
    return out


def add_product(
    hidden: Tensor, x: Tensor, weight: Tensor, *, scale: float, norm: Tensor, eps: float
) -> Tensor:
    """Add scale * x W^T to `hidden` in place, and return the RMS norm of the sum.

    Args:
        hidden: [rows, columns], contiguous; the sum is rounded once, from float32.
        x: [rows, depth], contiguous.
        weight: [columns, depth].
        scale: factor on the product.
        norm: [columns], weight of the norm.
        eps: epsilon of the norm.

    Returns:
        [rows, columns], normed.
    """
    rows, columns = hidden.shape
    parts = parts_of(weight)
    if rows > FEW_ROWS:
        _launch(x, weight, hidden, hidden, scale, gated=False, parts=parts)
        return rms_norm(hidden, norm, eps)
    shares = hidden.new_empty(parts, rows, columns, dtype=torch.float32)
    _launch(x, weight, None, shares, 1.0, gated=False, parts=parts, alone=True)
    normed = torch.empty_like(hidden)
    block = int(triton.next_power_of_2(columns))
    _finish[(rows,)](
        shares, hidden, norm, normed, rows, columns, scale, eps,
        PARTS=parts, COLUMNS=block, num_warps=_norm_warps(block), **early(x.device),
    )  # fmt: skip
    return normed


def parts_of(weight: Tensor) -> int:
    """Return the parts in which products with a weight [columns, depth] are summed."""
    columns, depth = weight.shape
    return int(triton.cdiv(depth, _part_depth(depth, PARTS))) if columns < NARROW else 1


def _part_depth(depth: int, parts: int) -> int:
    return int(triton.cdiv(depth, parts * PART_STEP)) * PART_STEP


def _early(x: Tensor) -> dict[str, bool]:
    """Start kernels early where they are short. Waiting programs of many rows would be in the way.

    x: [rows, ...].
    """
    return early(x.device) if len(x) <= FEW_ROWS else {"EARLY": False}


def _norm_warps(block: int) -> int:
    return 4 if block <= 2048 else 8


def _launch(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor,
    scale: float,
    *,
    gated: bool,
    parts: int,
    alone: bool = False,
) -> None:
    rows, depth = x.shape
    columns = len(weight) // (2 if gated else 1)
    tile = _tile(rows, gated=gated)
    stage = (tile.rows + tile.columns * (1 + gated)) * tile.depth * x.itemsize
    stages = stages_that_fit(tile.stages, stage, shared_memory(x.device))
    grid = (
        triton.cdiv(columns, tile.columns),
        triton.cdiv(rows, tile.rows),
        parts if alone else 1,
    )
    part_depth = _part_depth(depth, PARTS) if parts > 1 else int(triton.cdiv(depth, 256)) * 256
    _product[grid](
        x, weight, residual, out, rows, columns, depth, part_depth, scale,
        ALONE=alone, PARTS=1 if alone else parts, GATED=gated, RESIDUAL=residual is not None,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=stages, **_early(x),
    )  # fmt: skip


def _tile(rows: int, *, gated: bool) -> Tile:
    if rows > FEW_ROWS:
        return MANY_ROWS_GATED if gated else MANY_ROWS
    tile = TILES[max(16, int(triton.next_power_of_2(rows)))]
    return tile._replace(depth=min(tile.depth, 128)) if gated else tile
