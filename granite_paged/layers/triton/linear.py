"""y = x W^T for few rows, fused with the operations around it in a decoder layer.

A decode step reads every weight once and computes little with it, so the bytes of the weights bound
its time. The norm, gate, residual and convolution around a product touch only a few rows: as
kernels of their own they would cost more to launch than to compute. They are part of the product::

    gated      the weight has two halves: y = silu(x W1^T) * (x W2^T)
    residual   y <- residual + scale * y, in float32, rounded once
    conv       some columns are channels of a Mamba layer: y <- silu(causal convolution). Earlier
               inputs come from the channel's ring, which also stores y
    several    three products of the same x are computed as one: a layer's q, k and v
    norm       before an RMS norm, the product also writes y * norm_weight and the sums of squares
               of each block of columns (`DeferredNorm`). The next product multiplies by the row's
               1 / rms, which commutes with it

A tile is computed as W x^T: a Hopper tensor core takes at least 64 rows of its first operand, which
weights always have, and reads both operands from shared memory.

If there are fewer blocks of columns than multiprocessors, the depth is split. The last program of a
tile to finish adds the parts in their order, so results are identical from run to run.

On compute capability 9.0 and later, kernels use programmatic dependent launch (PDL): a kernel
starts before its predecessor finishes, and prefetches the inputs that the predecessor does not
write: weights, the residual, the history of a convolution. Therefore only `x` and its sums of
squares may be written by the kernel right before a product, if it is one of this package.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.device import multiprocessors, shared_memory, stages_that_fit
from granite_paged.layers.triton import SCRATCH_NUMBERS, SCRATCH_TILES
from granite_paged.layers.triton.tiles import tiles

MOST_ROWS = 64
"""Most rows for which these products are used. With more, cuBLAS is faster, since here every block
of columns reads all of x."""


class DeferredNorm(NamedTuple):
    """Rows whose RMS norm is not finished: the consumer multiplies each by its 1 / rms.

    values: [rows, depth], x * norm_weight.
    squares: [parts, rows] float32, sums of squares over parts of each row of x.
    """

    values: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, x: Tensor, parts: int = 1) -> DeferredNorm:
        """Allocate for rows like x [rows, depth], with `parts` sums of squares per row."""
        squares = torch.empty(parts, len(x), dtype=torch.float32, device=x.device)
        return cls(torch.empty_like(x), squares)


class Convolution(NamedTuple):
    """The columns of a product that are convolved, and the inputs of the convolution.

    first: index of the first such column.
    ring: [state rows, channels, width], the last inputs of each channel.
    rows: [rows of the product] int, the state row of each; -1 for padding.
    positions: [rows of the product] int; -1 for padding.
    weight: [channels, width].
    bias: [channels] or None.
    """

    first: int
    ring: Tensor
    rows: Tensor
    positions: Tensor
    weight: Tensor
    bias: Tensor | None


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait until the previous kernel has finished, and let the next one start (PDL)."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers, EARLY: tl.constexpr):
    """Prefetch the 128 bytes at each pointer into the L2 cache."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _rows_of(
    weight_ptr, second_ptr, third_ptr, column, second_from, third_from, depth, SEVERAL: tl.constexpr
):
    """Return pointers to the weights of these columns, which lie in one matrix or in three."""
    pointers = weight_ptr + column * depth
    if SEVERAL:
        second = second_ptr + (column - second_from) * depth
        third = third_ptr + (column - third_from) * depth
        pointers = tl.where(column < second_from, pointers, second)
        pointers = tl.where(column < third_from, pointers, third)
    return pointers


@triton.jit
def _squares(squares_ptr, row, row_there, rows, parts, PARTS: tl.constexpr):
    """Load the sums of squares [PARTS, rows] of a block of rows."""
    part = tl.arange(0, PARTS)
    there = (part < parts)[:, None] & row_there[None, :]
    return tl.load(squares_ptr + part[:, None] * rows + row[None, :], mask=there, other=0.0)


@triton.jit
def past_share(
    ring_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr, row, row_there, column,
    first, channels, WIDTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return the share of a convolution that comes from earlier tokens and the bias.

    [rows, columns] float32. For `convolve`, also returns where the newest input goes in the ring,
    a mask of those to be stored, and the last tap [columns].
    """
    channel = column - first
    is_channel = (channel >= 0) & (channel < channels)
    position = tl.load(positions_ptr + row, mask=row_there, other=-1).to(tl.int32)
    state = tl.load(rows_ptr + row, mask=row_there, other=0).to(tl.int64)
    there = (row_there & (position >= 0))[:, None] & is_channel[None, :]
    ring = ring_ptr + (state[:, None] * channels + channel[None, :]) * WIDTH
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for age in tl.static_range(1, WIDTH):
        slot = ((position - age + WIDTH) % WIDTH)[:, None]
        known = there & (position >= age)[:, None]
        past = tl.load(ring + slot, mask=known, other=0.0).to(tl.float32)
        tap = tl.load(weight_ptr + channel * WIDTH + WIDTH - 1 - age, mask=is_channel, other=0.0)
        total += past * tap.to(tl.float32)[None, :]
    last = tl.load(weight_ptr + channel * WIDTH + WIDTH - 1, mask=is_channel, other=0.0)
    return total, ring + (position % WIDTH)[:, None], there, last.to(tl.float32)


@triton.jit
def convolve(y, past, newest, there, last, column, first, channels):
    """Store y [rows, columns] in the ring, and return y with its channels convolved, in float32.

    Arguments after y come from `past_share`. Channels pass through silu; other columns stay as
    they are.
    """
    is_channel = (column >= first) & (column < first + channels)
    total = past + y.to(tl.float32) * last[None, :]
    tl.store(newest, y, mask=there)
    return tl.where(is_channel[None, :], total * tl.sigmoid(total), y.to(tl.float32))


@triton.jit
def _few_rows(
    x_ptr, weight_ptr, second_ptr, third_ptr, squares_ptr, residual_ptr, norm_ptr,
    out_ptr, normed_ptr, out_squares_ptr,
    ring_ptr, state_ptr, positions_ptr, conv_weight_ptr, conv_bias_ptr,
    partial_ptr, arrived_ptr, rows, columns, depth, second_from, third_from, eps, scale, parts,
    conv_first, channels,
    SEVERAL: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    block, row_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column_there, row_there = column < columns, row < rows
    weight_row = _rows_of(
        weight_ptr, second_ptr, third_ptr, tl.where(column_there, column, 0),
        second_from, third_from, depth, SEVERAL,
    )[:, None]  # fmt: skip
    second_half = columns * depth
    each = tl.cdiv(tl.cdiv(depth, DEPTH), SPLITS) * DEPTH
    first, end = split * each, tl.minimum(split * each + each, depth)
    for start in range(first, end, DEPTH):
        line = tl.minimum(start + tl.arange(0, DEPTH // 64) * 64, depth - 1)
        prefetch(weight_row + line[None, :], EARLY)
        if GATED:
            prefetch(weight_row + second_half + line[None, :], EARLY)
    place = row[:, None] * columns + column[None, :]
    there = row_there[:, None] & column_there[None, :]
    if RESIDUAL:
        held = tl.load(residual_ptr + place, mask=there, other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + column, mask=column_there, other=0.0).to(tl.float32)
    if WIDTH > 0:
        past, newest, takes_in, last = past_share(
            ring_ptr, state_ptr, positions_ptr, conv_weight_ptr, conv_bias_ptr,
            row, row_there, column, conv_first, channels, WIDTH, BIAS,
        )  # fmt: skip
    wait(EARLY)
    if PARTS > 0:
        squares = _squares(squares_ptr, row, row_there, rows, parts, PARTS)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    gate_by = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(first, end, DEPTH):
        at = start + tl.arange(0, DEPTH)
        x_mask, w_mask = row_there[:, None], column_there[:, None]
        if not EVEN:
            x_mask &= (at < depth)[None, :]
            w_mask &= (at < depth)[None, :]
        x = tl.load(x_ptr + row[:, None] * depth + at[None, :], mask=x_mask, other=0.0)
        w = tl.load(weight_row + at[None, :], mask=w_mask, other=0.0)
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
        if GATED:
            w = tl.load(weight_row + second_half + at[None, :], mask=w_mask, other=0.0)
            gate_by = tl.dot(w, tl.trans(x), gate_by, input_precision="ieee")
    total, gate_by = tl.trans(total), tl.trans(gate_by)
    if SPLITS > 1:
        tile = block * tl.num_programs(1) + row_block
        size: tl.constexpr = 2 * ROWS * COLUMNS
        first_part = partial_ptr + tile.to(tl.int64) * SPLITS * size
        cell = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(first_part + split * size + cell, total)
        if GATED:
            tl.store(first_part + split * size + ROWS * COLUMNS + cell, gate_by)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrived_ptr + tile, 0)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        gate_by = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.static_range(SPLITS):
            theirs = first_part + part * size + cell
            total += tl.load(theirs, cache_modifier=".cg")
            if GATED:
                gate_by += tl.load(theirs + ROWS * COLUMNS, cache_modifier=".cg")
    if PARTS > 0:
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / depth + eps)[:, None]
        total *= inverse
        gate_by *= inverse
    if GATED:
        total = total * tl.sigmoid(total) * gate_by
    total *= scale
    if RESIDUAL:
        total += held.to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty)
    if WIDTH > 0:
        total = convolve(rounded, past, newest, takes_in, last, column, conv_first, channels)
        rounded = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, rounded, mask=there)
    if NORM:
        exact = tl.where(there, rounded.to(tl.float32), 0.0)
        normed = exact * norm[None, :]
        tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=there)
        sums = tl.sum(exact * exact, axis=1)
        tl.store(out_squares_ptr + block * rows + row, sums, mask=row_there)


@triton.jit
def _one_row(
    x_ptr, weight_ptr, second_ptr, third_ptr, squares_ptr, residual_ptr, norm_ptr,
    out_ptr, normed_ptr, out_squares_ptr,
    ring_ptr, state_ptr, positions_ptr, conv_weight_ptr, conv_bias_ptr,
    columns, depth, second_from, third_from, eps, scale, parts, conv_first, channels,
    SEVERAL: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    column_there = column < columns
    at = tl.arange(0, DEPTH)
    at_there = at < depth
    w_mask = column_there[:, None] & at_there[None, :]
    weight_row = _rows_of(
        weight_ptr, second_ptr, third_ptr, column, second_from, third_from, depth, SEVERAL
    )
    weight = weight_row[:, None] + at[None, :]
    w = tl.load(weight, mask=w_mask, other=0.0)
    if GATED:
        v = tl.load(weight + columns * depth, mask=w_mask, other=0.0)
    if RESIDUAL:
        held = tl.load(residual_ptr + column, mask=column_there, other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + column, mask=column_there, other=0.0).to(tl.float32)
    if WIDTH > 0:
        row = tl.arange(0, 1)
        past, newest, takes_in, last = past_share(
            ring_ptr, state_ptr, positions_ptr, conv_weight_ptr, conv_bias_ptr,
            row, row == 0, column, conv_first, channels, WIDTH, BIAS,
        )  # fmt: skip
    wait(EARLY)
    x = tl.load(x_ptr + at, mask=at_there, other=0.0).to(tl.float32)
    y = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    inverse = 1.0
    if PARTS > 0:
        part = tl.arange(0, PARTS)
        squares = tl.load(squares_ptr + part, mask=part < parts, other=0.0)
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / depth + eps)
    y *= inverse
    if GATED:
        y = y * tl.sigmoid(y) * (tl.sum(v.to(tl.float32) * x[None, :], axis=1) * inverse)
    y *= scale
    if RESIDUAL:
        y += held.to(tl.float32)
    rounded = y.to(out_ptr.dtype.element_ty)
    if WIDTH > 0:
        convolved = convolve(
            rounded[None, :], past, newest, takes_in, last, column, conv_first, channels
        )
        rounded = tl.sum(convolved, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, rounded, mask=column_there)
    if NORM:
        exact = tl.where(column_there, rounded.to(tl.float32), 0.0)
        normed = (exact * norm).to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + column, normed, mask=column_there)
        tl.store(out_squares_ptr + block, tl.sum(exact * exact, axis=0))


@triton.jit
def _prenorm(
    x_ptr, norm_ptr, out_ptr, squares_ptr, depth, EARLY: tl.constexpr, DEPTH: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, DEPTH)
    there = at < depth
    weight = tl.load(norm_ptr + at, mask=there, other=0.0).to(tl.float32)
    wait(EARLY)
    x = tl.load(x_ptr + row * depth + at, mask=there, other=0.0).to(tl.float32)
    out = (x * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * depth + at, out, mask=there)
    tl.store(squares_ptr + row, tl.sum(x * x, axis=0))


def linear(
    x: Tensor | DeferredNorm,
    weight: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    eps: float = 0.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
    gated: bool = False,
    norm: Tensor | None = None,
    conv: Convolution | None = None,
    out: Tensor | None = None,
    **options: int,
) -> tuple[Tensor, DeferredNorm | None]:
    """Compute scale * f(x W^T) + residual, for up to about `MOST_ROWS` rows.

    Args:
        x: [rows, depth] contiguous, or a `DeferredNorm` of such rows.
        weight: [columns, depth], or [2 * columns, depth] if gated; or three weights, whose columns
            together are those of the result.
        eps: epsilon of the norm, if x is a `DeferredNorm`.
        residual: [rows, columns] or None; not a result of the kernel right before. May be `out`.
        scale: factor on the product, applied before the residual is added.
        gated: whether y = silu(first half) * second half.
        norm: [columns], weight of the RMS norm that follows, or None.
        conv: a convolution of some of the result's columns, or None.
        out: [rows, columns] to write to, or None.
        options: kernel options that replace those of `tiles`.

    Returns:
        [rows, columns] in x's dtype (`out` if given), and its `DeferredNorm` if `norm` is given.
    """
    values, squares = x if isinstance(x, DeferredNorm) else (x, None)
    rows, depth = values.shape
    weights = weight if isinstance(weight, tuple) else (weight, None, None)
    widths = [len(each) for each in weights if each is not None]
    columns = sum(widths) // (2 if gated else 1)
    out = values.new_empty(rows, columns) if out is None else out
    fitting = tiles(rows, columns, depth, gated, multiprocessors(values.device))
    chosen: dict[str, Any] = {**fitting, **options}
    blocks = int(triton.cdiv(columns, chosen["COLUMNS"]))
    after = None if norm is None else DeferredNorm.empty(out, blocks)
    parts = 0 if squares is None else len(squares)
    convolved, extent, constants = launch_arguments(conv)
    chosen |= {
        **constants,
        "SEVERAL": len(widths) > 1,
        "PARTS": int(triton.next_power_of_2(parts)) if parts else 0,
        "GATED": gated,
        "RESIDUAL": residual is not None,
        "NORM": norm is not None,
        **early(values.device),
    }
    before = (values, *weights, squares, residual, norm)
    pointers = (*before, out, *(after or (None, None)), *convolved)
    starts = (widths[0], sum(widths[:2]))
    numbers = (columns, depth, *starts, eps, scale, parts, *extent)
    if rows == 1:
        _one_row[(blocks,)](*pointers, *numbers, **chosen)
    else:
        _launch_few_rows(values, blocks, pointers, numbers, chosen)
    return out, after


def launch_arguments(
    conv: Convolution | None,
) -> tuple[tuple[Any, ...], tuple[int, int], dict[str, Any]]:
    """Return the pointers, numbers and constants that a product's kernel takes of a convolution."""
    if conv is None:
        return (None,) * 5, (0, 0), {"WIDTH": 0, "BIAS": False}
    constants = {"WIDTH": conv.weight.shape[1], "BIAS": conv.bias is not None}
    return conv[1:], (conv.first, len(conv.weight)), constants


def _launch_few_rows(
    x: Tensor,
    blocks: int,
    pointers: tuple[Any, ...],
    numbers: tuple[Any, ...],
    chosen: dict[str, Any],
) -> None:
    """Run `_few_rows`, with stages that fit shared memory and splits that fit the scratch."""
    rows, depth = x.shape
    stage = (chosen["ROWS"] + chosen["COLUMNS"] * (1 + chosen["GATED"])) * chosen["DEPTH"]
    memory = shared_memory(x.device)
    stages = stages_that_fit(chosen.get("num_stages", 3), stage * x.itemsize, memory)
    row_blocks = int(triton.cdiv(rows, chosen["ROWS"]))
    shared = scratch(x.device)
    tile = 2 * chosen["ROWS"] * chosen["COLUMNS"]
    fits = shared.holds(blocks * row_blocks, chosen["SPLITS"] * tile)
    splits = chosen["SPLITS"] if fits else 1
    chosen |= {"num_stages": stages, "SPLITS": splits, "EVEN": depth % chosen["DEPTH"] == 0}
    grid = (blocks, row_blocks, splits)
    _few_rows[grid](*pointers, shared.parts, shared.arrived, rows, *numbers, **chosen)


def prenorm(x: Tensor, norm: Tensor) -> DeferredNorm:
    """Return x [rows, depth] as a `DeferredNorm`, as a product with `norm` would leave it."""
    rows, depth = x.shape
    after = DeferredNorm.empty(x)
    block = int(triton.next_power_of_2(depth))
    _prenorm[(rows,)](x, norm, *after, depth, DEPTH=block, num_warps=4, **early(x.device))
    return after


@functools.cache
def early(device: torch.device) -> dict[str, bool]:
    """Return the launch options for programmatic dependent launch, where the device has it."""
    can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": can, "launch_pdl": True} if can else {"EARLY": False}


class Scratch:
    """Memory for the parts of split products, shared by the kernels of one stream.

    `arrived` counts the finished parts of each tile; it is 0 between kernels. The owner of a CUDA
    graph must keep the scratch alive that its kernels use.
    """

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(SCRATCH_NUMBERS, device=device)
        self.arrived = torch.zeros(SCRATCH_TILES, dtype=torch.int32, device=device)

    def holds(self, tiles: int, numbers: int) -> bool:
        """Return whether `tiles` tiles of `numbers` numbers each fit."""
        return tiles <= SCRATCH_TILES and tiles * numbers <= SCRATCH_NUMBERS


_SCRATCH: weakref.WeakValueDictionary[torch.device, Scratch] = weakref.WeakValueDictionary()


def scratch(device: torch.device) -> Scratch:
    """Return the device's scratch; allocate it if no reference to one is left."""
    held = _SCRATCH.get(device)
    if held is None:
        held = _SCRATCH[device] = Scratch(device)
    return held
