"""Mamba-2 in exact mode, several tokens per row: in the sequence's own chunks; `exact_chunk.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import MambaSizes, MambaState, ScanWeights
from granite_paged.layers.triton.convolution import store_ring
from granite_paged.layers.triton.exact_chunk import (
    added_by,
    advanced,
    blocks_of,
    outputs_of,
    similarity_of,
    sums_of,
    time_step,
)
from granite_paged.layers.triton.exact_linear import product
from granite_paged.layers.triton.mamba import conv_weight
from granite_paged.layers.triton.pointwise import silu


@triton.jit
def _last(positions_ptr, tokens, COLUMNS: tl.constexpr):
    """Return the highest of `tokens` positions."""
    highest = tl.full([COLUMNS], -1, tl.int32)
    for start in range(0, tokens, COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        found = tl.load(positions_ptr + s, mask=s < tokens, other=-1).to(tl.int32)
        highest = tl.maximum(highest, found)
    return tl.max(highest, axis=0)


@triton.jit
def _lines(
    projected_ptr, ring_ptr, recent_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr, lines_ptr,
    tokens, inner, channels, heads, stride, height,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, L: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write what the chunks of each row read: its recent inputs, then those of its new tokens.

    Line 0 is the first token of the chunk in which the row's first token lies. Lines after the last
    token are zeros.
    """
    batch = tl.program_id(0)
    line = tl.program_id(1) * S + tl.arange(0, S)
    at = tl.program_id(2) * C + tl.arange(0, C)
    width = channels + heads
    is_channel, at_there = at < channels, at < width
    row = tl.load(rows_ptr + batch).to(tl.int64)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    if (row < 0) | (first < 0):
        return
    behind = first % L
    s = line - behind
    position = first + s
    is_new = (s >= 0) & (s < tokens)
    is_new &= tl.load(positions + s, mask=is_new, other=-1) >= 0
    projected = projected_ptr + batch.to(tl.int64) * tokens * stride + inner
    source = s[:, None].to(tl.int64) * stride + at[None, :]
    new_there = is_new[:, None] & at_there[None, :]
    conv_there = is_new[:, None] & is_channel[None, :]
    newest = tl.load(projected + source, mask=new_there, other=0.0)
    total = tl.zeros([S, C], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + at, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for age in tl.static_range(1, WIDTH):
        known = conv_there & (s >= age)[:, None]
        x = tl.load(projected + source - age * stride, mask=known, other=0.0).to(tl.float32)
        if tl.program_id(1) * S < behind + age:
            slot = ((position - age + WIDTH) % WIDTH)[:, None]
            stored = conv_there & ((s < age) & (position >= age))[:, None]
            ring = ring_ptr + row * channels * WIDTH + at[None, :] * WIDTH
            x += tl.load(ring + slot, mask=stored, other=0.0).to(tl.float32)
        tap = tl.load(weight_ptr + at * WIDTH + (WIDTH - 1 - age), mask=is_channel, other=0.0)
        total += x * tap.to(tl.float32)[None, :]
    tap = tl.load(weight_ptr + at * WIDTH + WIDTH - 1, mask=is_channel, other=0.0)
    total = total + newest.to(tl.float32) * tap.to(tl.float32)[None, :]
    found = tl.where(is_channel[None, :], silu(total).to(newest.dtype), newest)
    found = tl.where(new_there, found, 0.0)
    if tl.program_id(1) * S < behind:
        kept = recent_ptr + (row * L + line)[:, None] * width + at[None, :]
        is_old = (s < 0)[:, None] & at_there[None, :]
        found += tl.load(kept, mask=is_old, other=0.0)
    place = (batch.to(tl.int64) * height + line)[:, None] * width + at[None, :]
    tl.store(lines_ptr + place, found, mask=(line < height)[:, None] & at_there[None, :])


@triton.jit
def _chunk_states(
    lines_ptr, rows_ptr, positions_ptr, dt_bias_ptr, a_log_ptr, times_ptr, sums_ptr, states_ptr,
    tokens, heads, head_dim, state_size, groups, low, high, height,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a chunk's dt, its cumulative sums of dt A, and what the chunk adds to the state."""
    batch, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + batch)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    last = _last(positions, tokens, COLUMNS)
    start = first // L * L + chunk * L
    if (row < 0) | (first < 0) | (start > last):
        return
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    width = channels + heads
    line, p, n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    p_there, n_there = p < head_dim, n < state_size
    lines = lines_ptr + (batch.to(tl.int64) * height + chunk * L) * width
    b_at = inner + head // (heads // groups) * state_size
    raw = tl.load(lines + line * width + channels + head)
    x = tl.load(
        lines + line[:, None] * width + (head * head_dim + p)[None, :],
        mask=p_there[None, :],
        other=0.0,
    )
    b = tl.load(
        lines + line[:, None] * width + (b_at + n)[None, :], mask=n_there[None, :], other=0.0
    )
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    dt = tl.where(start + line <= last, time_step(raw, bias, low, high), 0.0)
    sums, whole = sums_of(dt, rate)
    by_head = (batch.to(tl.int64) * heads + head) * height + chunk * L + line
    tl.store(times_ptr + by_head, dt)
    tl.store(sums_ptr + by_head, sums)
    place = (batch.to(tl.int64) * (height // L) + chunk) * heads + head
    place = place * head_dim * state_size + p[None, :] * state_size + n[:, None]
    there = n_there[:, None] & p_there[None, :]
    tl.store(states_ptr + place, added_by(x, b, dt, sums, whole), mask=there)


@triton.jit
def _pass_on(
    states_ptr, entering_ptr, ssm_ptr, rows_ptr, positions_ptr, sums_ptr,
    tokens, heads, elements, height,
    L: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the state that enters each chunk; the state after the last whole one is stored."""
    batch, head = tl.program_id(0), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = at < elements
    row = tl.load(rows_ptr + batch).to(tl.int64)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    if (row < 0) | (first < 0):
        return
    last = _last(positions, tokens, COLUMNS)
    held = ssm_ptr + (row * heads + head) * elements + at
    state = tl.load(held, mask=there, other=0.0)
    sums = sums_ptr + (batch.to(tl.int64) * heads + head) * height + L - 1
    place = (batch.to(tl.int64) * (height // L) * heads + head) * elements + at
    for start in range(first // L * L, last + 1, L):
        tl.store(entering_ptr + place, state.to(entering_ptr.dtype.element_ty), mask=there)
        if start + L <= last + 1:
            added = tl.load(states_ptr + place, mask=there, other=0.0)
            state = advanced(state, tl.load(sums), added)
        sums += L
        place += heads * elements
    tl.store(held, state, mask=there)


@triton.jit
def _chunk_outputs(
    projected_ptr, lines_ptr, entering_ptr, rows_ptr, positions_ptr, times_ptr, sums_ptr,
    skip_ptr, gated_ptr,
    tokens, heads, head_dim, state_size, groups, stride, height,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the gated outputs of one head of a chunk."""
    batch, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + batch)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    if (row < 0) | (first < 0):
        return
    line, p, n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    s = chunk * L - first % L + line  # the column of each line's token
    is_new = (s >= 0) & (s < tokens)
    is_new &= tl.load(positions + s, mask=is_new, other=-1) >= 0
    if tl.max(is_new.to(tl.int32), axis=0) == 0:
        return
    inner = heads * head_dim
    width = inner + 2 * groups * state_size + heads
    p_there, n_there = p < head_dim, n < state_size
    lines = lines_ptr + (batch.to(tl.int64) * height + chunk * L) * width
    at = line[:, None] * width
    b_at = at + (inner + head // (heads // groups) * state_size + n)[None, :]
    x_at = (head * head_dim + p)[None, :]
    x = tl.load(lines + at + x_at, mask=p_there[None, :], other=0.0)
    b = tl.load(lines + b_at, mask=n_there[None, :], other=0.0)
    c = tl.load(lines + b_at + groups * state_size, mask=n_there[None, :], other=0.0)
    place = (batch.to(tl.int64) * (height // L) + chunk) * heads + head
    entering = tl.load(
        entering_ptr + place * head_dim * state_size + p[None, :] * state_size + n[:, None],
        mask=n_there[:, None] & p_there[None, :],
        other=0.0,
    )
    by_head = (batch.to(tl.int64) * heads + head) * height + chunk * L + line
    dt, sums = tl.load(times_ptr + by_head), tl.load(sums_ptr + by_head)
    causal = line[:, None] >= line[None, :]
    out = outputs_of(c, similarity_of(c, b), x, entering, dt, sums, sums, causal)
    there = is_new[:, None] & p_there[None, :]
    column = batch.to(tl.int64) * tokens + s
    gate = tl.load(projected_ptr + column[:, None] * stride + x_at, mask=there, other=0.0)
    skip = tl.zeros_like(out) + tl.load(skip_ptr + head).to(tl.float32)
    out = tl.fma(x.to(tl.float32), skip, out) * silu(gate.to(tl.float32))
    place = column[:, None] * inner + x_at
    tl.store(gated_ptr + place, out.to(gated_ptr.dtype.element_ty), mask=there)


@triton.jit
def _keep(
    lines_ptr, recent_ptr, rows_ptr, positions_ptr, tokens, width, height,
    L: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keep the inputs of each row's last chunk."""
    batch = tl.program_id(0)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    if (row < 0) | (first < 0):
        return
    last = _last(positions, tokens, COLUMNS)
    line, at = tl.arange(0, L), tl.program_id(1) * W + tl.arange(0, W)
    there = (at < width)[None, :] & (line <= last % L)[:, None]
    begin = batch.to(tl.int64) * height + (last // L - first // L) * L
    place = line[:, None] * width + at[None, :]
    found = tl.load(lines_ptr + begin * width + place, mask=there, other=0.0)
    tl.store(recent_ptr + row * L * width + place, found, mask=there)


def gated_scan(mixer: Any, normed: Tensor, positions: Tensor, state: MambaState) -> Tensor:
    """Compute the gated output of S tokens in each of B rows; update the state.

    Args:
        mixer: a `GraniteMoeHybridMambaLayer`, for its weights.
        normed: [B * S, hidden].
        positions: [B, S] int, contiguous; -1 for padding, on the right only.
        state: as for `scan`.

    Returns:
        [B * S, inner] before its norm; arbitrary at padding.
    """
    projected, conv = product(normed, mixer.in_proj.weight), (conv_weight(mixer), mixer.conv1d.bias)
    return scan(MambaSizes.of(mixer), projected, positions, *conv, ScanWeights.of(mixer), state)


def scan(
    sizes: MambaSizes,
    projected: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: ScanWeights,
    state: MambaState,
) -> Tensor:
    """Compute convolution, scan and gate for S tokens in each of B rows; update the state.

    Args:
        sizes: the layer's sizes.
        projected: [B * S, inner + channels + heads], the output of `in_proj`.
        positions: [B, S] int, contiguous; -1 for padding, on the right only.
        weight, bias: of the convolution, [channels, width] and [channels] or None.
        weights: the layer's parameters of the recurrence.
        state: the layer's states of all rows, with the inputs since they were stored;
            `state.rows` [B] int selects the batch's.

    Returns:
        [B * S, inner] gated output in projected's dtype; arbitrary at padding.
    """
    batch, tokens = positions.shape
    recent, stride = state.recent, projected.shape[1]
    assert recent is not None
    gated = projected.new_empty(batch * tokens, sizes.inner)
    shape = (sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit)
    chunk, width = recent.shape[1:]
    chunks = int(triton.cdiv(tokens, chunk)) + 1
    height = chunks * chunk
    lines = projected.new_empty(batch, height, width)
    _lines[(batch, triton.cdiv(height, 16), triton.cdiv(width, 64))](
        projected, state.conv, recent, state.rows, positions, weight, bias, lines,
        tokens, sizes.inner, sizes.channels, sizes.heads, stride, height,
        WIDTH=sizes.conv_width, BIAS=bias is not None, L=chunk, S=16, C=64, num_warps=2,
    )  # fmt: skip
    store_ring(sizes, projected, positions, state)
    times = state.ssm.new_empty(2, batch, sizes.heads, height)
    states = state.ssm.new_empty(batch, chunks, sizes.heads, sizes.head_dim, sizes.state_size)
    blocks, _ = blocks_of(sizes, chunk)
    where = state.rows, positions
    _chunk_states[(batch, chunks, sizes.heads)](
        lines, *where, *weights[:2], *times, states,
        tokens, *shape, height, COLUMNS=256, num_warps=4, **blocks,
    )  # fmt: skip
    entering = torch.empty_like(states, dtype=projected.dtype)
    elements = sizes.head_dim * sizes.state_size
    _pass_on[(batch, sizes.heads, triton.cdiv(elements, 1024))](
        states, entering, state.ssm, *where, times[1],
        tokens, sizes.heads, elements, height,
        L=chunk, BLOCK=1024, COLUMNS=256, num_warps=4,
    )  # fmt: skip
    _chunk_outputs[(batch, chunks, sizes.heads)](
        projected, lines, entering, *where, *times, weights.skip, gated,
        tokens, *shape[:4], stride, height, num_warps=4, **blocks,
    )  # fmt: skip
    _keep[(batch, triton.cdiv(width, 64))](
        lines, recent, state.rows, positions, tokens, width, height,
        L=chunk, W=64, COLUMNS=256, num_warps=4,
    )  # fmt: skip
    return gated
