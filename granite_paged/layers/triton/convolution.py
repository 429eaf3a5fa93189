"""The causal convolution of a Mamba layer in Triton, several tokens per row, and its rings.

`layers/triton/mamba.py` gives the layouts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import MambaSizes, MambaState
from granite_paged.layers.triton.linear import early, wait
from granite_paged.layers.triton.pointwise import silu

RING_BLOCK = 256
"""Channels whose inputs one program stores."""


@triton.jit
def _convolve(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr, out_ptr,
    tokens, inner, channels, stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    batch = tl.program_id(0)
    s = tl.program_id(1) * S + tl.arange(0, S)
    c = tl.program_id(2) * C + tl.arange(0, C)
    s_there, c_there = s < tokens, c < channels
    row = tl.load(rows_ptr + batch).to(tl.int64)
    positions = positions_ptr + batch * tokens
    position = tl.load(positions + s, mask=s_there, other=-1)
    first = batch.to(tl.int64) * tokens
    token = (first + s) * stride
    inputs = projected_ptr + inner + c[None, :]
    total = tl.zeros([S, C], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + c, mask=c_there, other=0.0).to(tl.float32)[None, :]
    place = (first + s)[:, None] * channels + c[None, :]
    start = tl.program_id(1) * S
    inside = (start >= WIDTH - 1) & (start + S <= tokens)
    if inside:  # padding is at the ends of a row only, so all columns between two tokens are tokens
        oldest = tl.load(positions + start - (WIDTH - 1))
        inside = (oldest >= 0) & (tl.load(positions + start + S - 1) >= 0)
    if inside:
        for age in tl.static_range(WIDTH):
            tap = tl.load(weight_ptr + c * WIDTH + (WIDTH - 1 - age), mask=c_there, other=0.0)
            x = tl.load(inputs + (token - age * stride)[:, None], mask=c_there[None, :], other=0.0)
            total += x.to(tl.float32) * tap.to(tl.float32)[None, :]
        tl.store(out_ptr + place, silu(total).to(out_ptr.dtype.element_ty), mask=c_there[None, :])
        return
    for age in tl.static_range(WIDTH):
        before = s - age
        is_here = (before >= 0) & s_there
        if age > 0:
            is_here &= tl.load(positions + before, mask=is_here, other=-1) >= 0
        wanted = position - age
        here = tl.load(
            inputs + (token - age * stride)[:, None],
            mask=is_here[:, None] & c_there[None, :],
            other=0.0,
        ).to(tl.float32)
        if age > 0:
            stored = (wanted >= 0) & s_there & (is_here == 0)
            ring = ring_ptr + row * channels * WIDTH + c[None, :] * WIDTH
            here += tl.load(
                ring + (wanted % WIDTH)[:, None],
                mask=stored[:, None] & c_there[None, :],
                other=0.0,
            ).to(tl.float32)
        tap = tl.load(weight_ptr + c * WIDTH + (WIDTH - 1 - age), mask=c_there, other=0.0)
        total += here * tap.to(tl.float32)[None, :]
    total = silu(total)
    tl.store(
        out_ptr + place,
        total.to(out_ptr.dtype.element_ty),
        mask=s_there[:, None] & c_there[None, :],
    )


@triton.jit
def store_last(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr, batch, block,
    tokens, inner, channels, stride, WIDTH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Store a row's last `WIDTH` inputs of a block of channels in the slots of their positions."""
    row = tl.load(rows_ptr + batch).to(tl.int64)
    c = block * C + tl.arange(0, C)
    there = c < channels
    positions = positions_ptr + batch * tokens
    last = tl.full([], -1, tl.int32)
    column = tl.full([], 0, tl.int32)
    for start in range(0, tokens, 1024):
        s = start + tl.arange(0, 1024)
        position = tl.load(positions + s, mask=s < tokens, other=-1).to(tl.int32)
        highest = tl.max(position, axis=0)
        if highest > last:
            column = tl.max(tl.where(position == highest, s, -1), axis=0)
            last = highest
    for age in tl.static_range(WIDTH):
        at = column - age + tl.zeros([C], tl.int32)  # the same for every channel
        known = there & (at >= 0)
        position = tl.load(positions + at, mask=known, other=-1)
        token = (batch.to(tl.int64) * tokens + at) * stride
        new = tl.load(projected_ptr + token + inner + c, mask=known, other=0.0)
        slot = ring_ptr + row * channels * WIDTH + c * WIDTH + position % WIDTH
        tl.store(slot, new, mask=known & (position >= 0))


@triton.jit
def _store_ring(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr,
    tokens, inner, channels, stride, WIDTH: tl.constexpr, EARLY: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    store_last(
        projected_ptr, ring_ptr, rows_ptr, positions_ptr, tl.program_id(0), tl.program_id(1),
        tokens, inner, channels, stride, WIDTH, C,
    )  # fmt: skip


def convolve(
    sizes: MambaSizes,
    projected: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: MambaState,
) -> Tensor:
    """Compute the causal convolution over S tokens in each of B rows, and its activation.

    Args:
        sizes: the layer's sizes.
        projected: [B * S, inner + channels + heads], the output of `in_proj`.
        positions: [B, S] int, contiguous; -1 for padding, on either side of a row.
        weight, bias: [channels, width] and [channels] or None.
        state: the layer's states of all rows; the rings of `state.rows` [B] are read, not written.

    Returns:
        [B * S, channels] in projected's dtype.
    """
    batch, tokens = positions.shape
    convolved = projected.new_empty(batch * tokens, sizes.channels)
    length, block = 16, 64
    grid = (batch, triton.cdiv(tokens, length), triton.cdiv(sizes.channels, block))
    _convolve[grid](
        projected, state.conv, state.rows, positions, weight, bias, convolved,
        tokens, sizes.inner, sizes.channels, projected.shape[1],
        WIDTH=sizes.conv_width, BIAS=bias is not None, S=length, C=block,
        num_warps=2, **early(projected.device),
    )  # fmt: skip
    return convolved


def store_ring(sizes: MambaSizes, projected: Tensor, positions: Tensor, state: MambaState) -> None:
    """Store each row's last inputs in its rings. Arguments are those of `convolve`."""
    batch, tokens = positions.shape
    _store_ring[(batch, triton.cdiv(sizes.channels, RING_BLOCK))](
        projected, state.conv, state.rows, positions,
        tokens, sizes.inner, sizes.channels, projected.shape[1],
        WIDTH=sizes.conv_width, C=RING_BLOCK, **early(projected.device),
    )  # fmt: skip
