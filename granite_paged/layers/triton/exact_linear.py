"""y = x W^T whose bits do not depend on the other rows, for exact mode.

A tensor core adds the terms of a dot product 16 at a time, in order, whatever the size of the tile
around them and whichever instruction computes it. So tiles may follow the number of rows, as long
as one program adds all terms of an element, from the first to the last: the depth is never split.

With many rows the matrix library (cuBLAS) is faster. It is used for a shape where its result has
the same bits, which is checked once per process (`_agrees`). It too leaves the depth whole there.
Products are rounded to the model's dtype before anything else is done to them, as the library does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.device import shared_memory, stages_that_fit
from granite_paged.layers.triton.linear import (
    Convolution,
    convolve,
    early,
    launch_arguments,
    past_share,
    prefetch,
    wait,
)
from granite_paged.layers.triton.mamba import convolve_step
from granite_paged.layers.triton.pointwise import norm_block, normed, silu, silu_mul

FEW_ROWS = 64
"""Most rows for which kernels start early, fetch weights ahead, and are faster than the library."""

NARROW = 4096
"""Weights with fewer outputs get narrow tiles, so that they occupy the GPU."""


class Tile(NamedTuple):
    """Rows, outputs and terms that a program loads at once, and its warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {
    16: Tile(16, 64, 256, 4, 5),
    32: Tile(32, 64, 128, 4, 5),
    64: Tile(64, 64, 128, 4, 3),
    128: Tile(128, 64, 128, 4, 5),
    2048: Tile(128, 128, 64, 8, 3),
}
NARROW_TILES = {
    16: Tile(16, 16, 512, 2, 6),
    32: Tile(32, 16, 256, 4, 5),
    64: Tile(64, 64, 128, 4, 5),
    128: Tile(64, 64, 128, 4, 5),
    2048: Tile(64, 64, 64, 4, 4),
}
GATED_TILES = {
    16: Tile(16, 32, 256, 2, 5),
    32: Tile(32, 32, 256, 4, 5),
    64: Tile(64, 64, 128, 4, 5),
    128: Tile(64, 64, 128, 4, 5),
    2048: Tile(128, 128, 64, 8, 4),
}
"""Tiles by the most rows that they are for; the last also serves more. Measured on an H100."""


@triton.jit
def _product(
    x_ptr, weight_ptr, out_ptr,
    ring_ptr, state_ptr, positions_ptr, conv_weight_ptr, conv_bias_ptr,
    rows, columns, depth, scale, conv_first, channels,
    GATED: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_there, row_there = column < columns, row < rows
    weight_row = weight_ptr + column.to(tl.int64)[:, None] * depth
    second_row = weight_ptr + (columns + column).to(tl.int64)[:, None] * depth
    x_row = x_ptr + row.to(tl.int64)[None, :] * depth
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    gate_by = tl.zeros([COLUMNS, ROWS], tl.float32)
    if EARLY:
        for start in range(0, depth, DEPTH):
            ahead = tl.minimum(start + tl.arange(0, DEPTH // 64) * 64, depth - 1)
            prefetch(tl.where(column_there[:, None], weight_row, weight_ptr) + ahead, EARLY)
            if GATED:
                prefetch(tl.where(column_there[:, None], second_row, weight_ptr) + ahead, EARLY)
    if WIDTH > 0:
        past, newest, takes_in, last = past_share(
            ring_ptr, state_ptr, positions_ptr, conv_weight_ptr, conv_bias_ptr,
            row, row_there, column, conv_first, channels, WIDTH, BIAS,
        )  # fmt: skip
    wait(EARLY)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        at_there = at < depth
        x = tl.load(x_row + at[:, None], mask=row_there[None, :] & at_there[:, None], other=0.0)
        w_mask = column_there[:, None] & at_there[None, :]
        w = tl.load(weight_row + at[None, :], mask=w_mask, other=0.0)
        total = tl.dot(w, x, total, input_precision="ieee")
        if GATED:
            w = tl.load(second_row + at[None, :], mask=w_mask, other=0.0)
            gate_by = tl.dot(w, x, gate_by, input_precision="ieee")
    place = row.to(tl.int64)[None, :] * columns + column[:, None]
    there = row_there[None, :] & column_there[:, None]
    rounded = (total * scale).to(out_ptr.dtype.element_ty)
    if GATED:
        gate_by = gate_by.to(out_ptr.dtype.element_ty).to(tl.float32)
        rounded = (silu(rounded.to(tl.float32)) * gate_by).to(out_ptr.dtype.element_ty)
    if WIDTH > 0:
        rounded = tl.trans(rounded)
        convolved = convolve(rounded, past, newest, takes_in, last, column, conv_first, channels)
        rounded = tl.trans(convolved.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + place, rounded, mask=there)


@triton.jit
def _add_norm(
    x_ptr, hidden_ptr, weight_ptr, out_ptr, depth, scale, eps,
    EARLY: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, DEPTH)
    there = at < depth
    place = tl.program_id(0).to(tl.int64) * depth + at
    weight = tl.load(weight_ptr + at, mask=there, other=0.0)
    wait(EARLY)
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    held = tl.load(hidden_ptr + place, mask=there, other=0.0).to(tl.float32)
    rounded = tl.fma(x, tl.zeros_like(x) + scale, held).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + place, rounded, mask=there)
    out = normed(rounded.to(tl.float32), weight, depth, eps)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=there)


def add_norm(hidden: Tensor, x: Tensor, weight: Tensor, *, scale: float, eps: float) -> Tensor:
    """Add scale * x to `hidden` in place, and return the RMS norm of the sum.

    hidden, x: [rows, depth], contiguous; weight: [depth].
    """
    rows, depth = x.shape
    out = torch.empty_like(hidden)
    _add_norm[(rows,)](
        x, hidden, weight, out, depth, scale, eps, **norm_block(depth), **_early(x)
    )  # fmt: skip
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T.

    Args:
        x: [rows, depth], contiguous, float16 or bfloat16.
        weight: [columns, depth].

    Returns:
        [rows, columns] in x's dtype.
    """
    if _library_has(x, weight):
        return torch.mm(x, weight.T)
    return fused_product(x, weight)


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return silu(first half) * second half of x W^T.

    Args:
        x: [rows, depth], contiguous, float16 or bfloat16.
        weight: [2 * columns, depth].

    Returns:
        [rows, columns] in x's dtype.
    """
    if _library_has(x, weight):
        return silu_mul(torch.mm(x, weight.T))
    return fused_product(x, weight, gated=True)


def convolved_product(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """Return x W^T, some of whose columns are convolved; one token per row.

    x, weight: as for `product`.
    """
    if _library_has(x, weight):
        projected = torch.mm(x, weight.T)
        convolve_step(projected, conv)
        return projected
    return fused_product(x, weight, conv=conv)


def fused_product(
    x: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    gated: bool = False,
    conv: Convolution | None = None,
) -> Tensor:
    """Compute `product` in one kernel with what follows.

    Args:
        x, weight: as for `product`, or for `gated_product`.
        scale: factor on the product, before it is rounded; 1 if gated.
        gated: whether the weight has two halves.
        conv: a convolution of some of the result's columns, for one token per row; or None.

    Returns:
        [rows, columns] in x's dtype.
    """
    rows, depth = x.shape
    columns = len(weight) // (2 if gated else 1)
    out = x.new_empty(rows, columns)
    tile = _tile(rows, columns, gated=gated)
    stage = (tile.rows + tile.columns * (1 + gated)) * tile.depth * x.itemsize
    stages = stages_that_fit(tile.stages, stage, shared_memory(x.device))
    pointers, numbers, constants = launch_arguments(conv)
    options = {**constants, "num_warps": tile.warps, "num_stages": stages, **_early(x)}
    _product[(triton.cdiv(columns, tile.columns), triton.cdiv(rows, tile.rows))](
        x, weight, out, *pointers, rows, columns, depth, scale, *numbers, GATED=gated,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, **options,
    )  # fmt: skip
    return out


def _library_has(x: Tensor, weight: Tensor) -> bool:
    """Return whether the matrix library gives the bits of `fused_product` for these shapes."""
    return len(x) > FEW_ROWS and x.is_cuda and _agrees(*x.shape, len(weight), x.dtype, x.device)


@functools.cache
def _agrees(rows: int, depth: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Compare the library's product with ours once, on random numbers.

    A single sum in another order would show: of millions of elements, most would differ. Must be
    called before a graph is captured.
    """
    numbers = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(n, depth, generator=numbers, device=device).to(dtype) for n in (rows, columns)
    )
    return torch.equal(torch.mm(x, weight.T), fused_product(x, weight))


def _tile(rows: int, columns: int, *, gated: bool) -> Tile:
    tiles = GATED_TILES if gated else NARROW_TILES if columns < NARROW else TILES
    return tiles[next((most for most in tiles if rows <= most), max(tiles))]


def _early(x: Tensor) -> dict[str, bool]:
    return early(x.device) if len(x) <= FEW_ROWS else {"EARLY": False}
