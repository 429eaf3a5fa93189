"""Mamba-2 whose bits do not depend on how a sequence is cut into steps, for exact mode.

A state is only ever stored at the sequence's own multiples of `EXACT_CHUNK` tokens. The inputs
since then are kept in `recent`, and every step computes from them::

    ssm      [rows, heads, head_dim, state_size] float32     state after the last whole chunk
    recent   [rows, EXACT_CHUNK, channels + heads]            its successors: x, B and C after the
                                                              convolution, and dt before its bias
    y_i  =  exp(a_i) C_i . ssm  +  sum over j <= i of exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  D x_i

a is the sum of dt A from the start of the chunk. It is computed in integers, in units of
1 / `UNIT`, so its value does not depend on the order of the sum. Decode and prefill evaluate
this with the same products; a tensor core sums each element in the same order in tiles of any size.
Formulas: Dao and Gu 2024, "Transformers are SSMs", section 6.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import EXACT_CHUNK, MambaSizes, MambaState, ScanWeights
from granite_paged.layers.triton.exact_linear import fused_product, product
from granite_paged.layers.triton.linear import early, wait
from granite_paged.layers.triton.mamba import conv_weight, convolution
from granite_paged.layers.triton.pointwise import silu, softplus
from granite_paged.layers.triton.scan import store_ring

UNIT = tl.constexpr(2.0**40)
"""Sums of dt A are integers in units of its inverse. 64 terms of at least -2**15 fit 62 bits."""

LOWEST = tl.constexpr(-32768.0)
"""Least dt A. exp of it is 0 in float32."""

STEP_PART, STEP_WARPS = 64, 4
"""Most elements of a head for a program of `_step`, and its warps; measured on an H100."""


@triton.jit
def _fixed(dt, rate):
    """Return dt * rate as integers, in units of 1 / UNIT."""
    return (tl.maximum(dt * rate, LOWEST) * UNIT).to(tl.int64)


@triton.jit
def _plain(sums):
    """Return sums of `_fixed` as float32."""
    return sums.to(tl.float32) * (1.0 / UNIT)


@triton.jit
def _sums(dt, rate):
    """Return the cumulative sums of dt * rate [L], and the last of them, as float32."""
    fixed = _fixed(dt, rate)
    return _plain(tl.cumsum(fixed, axis=0)), _plain(tl.sum(fixed, axis=0))


@triton.jit
def _time_step(raw, bias, low, high):
    return tl.minimum(tl.maximum(softplus(raw.to(tl.float32) + bias), low), high)


@triton.jit
def _added(x, b, dt, sums, whole):
    """Return what a chunk of x [L, P] and b [L, N] adds to the state, [N, P]."""
    to_end = tl.exp(whole - sums) * dt
    scaled = (x.to(tl.float32) * to_end[:, None]).to(x.dtype)
    return tl.dot(tl.trans(b), scaled, input_precision="ieee")


@triton.jit
def _advanced(state, whole, added):
    """Return the state after a chunk."""
    return tl.fma(state, tl.zeros_like(state) + tl.exp(whole), added)


@triton.jit
def _outputs(c, b, x, state, dt, sums, to_sums, causal):
    """Return the outputs [M, P] of M of a chunk's tokens.

    c [M, N], b [L, N], x [L, P], state [N, P] in their dtype; dt, sums [L]; to_sums [M];
    causal [M, L].
    """
    carried = tl.dot(c, state, input_precision="ieee") * tl.exp(to_sums)[:, None]
    since = tl.where(causal, to_sums[:, None] - sums[None, :], float("-inf"))
    weight = tl.exp(since) * dt[None, :]
    weight = weight * tl.dot(c, tl.trans(b), input_precision="ieee")
    return tl.dot(weight.to(x.dtype), x, carried, input_precision="ieee")


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
    source = s[:, None] * stride + at[None, :]
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
    dt = tl.where(start + line <= last, _time_step(raw, bias, low, high), 0.0)
    sums, whole = _sums(dt, rate)
    by_head = (batch.to(tl.int64) * heads + head) * height + chunk * L + line
    tl.store(times_ptr + by_head, dt)
    tl.store(sums_ptr + by_head, sums)
    place = (batch.to(tl.int64) * (height // L) + chunk) * heads + head
    place = place * head_dim * state_size + p[None, :] * state_size + n[:, None]
    there = n_there[:, None] & p_there[None, :]
    tl.store(states_ptr + place, _added(x, b, dt, sums, whole), mask=there)


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
            state = _advanced(state, tl.load(sums), added)
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
    out = _outputs(c, b, x, entering, dt, sums, sums, line[:, None] >= line[None, :])
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


@triton.jit
def _step(
    projected_ptr, recent_ptr, ssm_ptr, rows_ptr, positions_ptr,
    dt_bias_ptr, a_log_ptr, skip_ptr, gated_ptr,
    heads, head_dim, state_size, groups, low, high, stride, EARLY: tl.constexpr,
    L: tl.constexpr, M: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute a part of one head of one row's next token, and keep the token's inputs."""
    batch, head = tl.program_id(0), tl.program_id(1)
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    width = channels + heads
    group = head // (heads // groups)
    line, n = tl.arange(0, L), tl.arange(0, N)
    p = tl.program_id(2) * P + tl.arange(0, P)
    p_there, n_there = p < head_dim, n < state_size
    row = tl.load(rows_ptr + batch).to(tl.int64)
    position = tl.load(positions_ptr + batch).to(tl.int32)
    out_at = gated_ptr + batch.to(tl.int64) * inner + head * head_dim + p
    if (row < 0) | (position < 0):
        tl.store(out_at, tl.zeros([P], gated_ptr.dtype.element_ty), mask=p_there)
        return
    own = position % L
    is_old, is_own = line < own, line == own
    held = ssm_ptr + (row * heads + head) * head_dim * state_size
    held_there = n_there[:, None] & p_there[None, :]
    state = tl.load(held + p[None, :] * state_size + n[:, None], mask=held_there, other=0.0)
    kept = recent_ptr + row * L * width
    x_at, b_at = head * head_dim + p, inner + group * state_size + n
    old_x, old_b = is_old[:, None] & p_there[None, :], is_old[:, None] & n_there[None, :]
    x = tl.load(kept + line[:, None] * width + x_at[None, :], mask=old_x, other=0.0)
    b = tl.load(kept + line[:, None] * width + b_at[None, :], mask=old_b, other=0.0)
    raw = tl.load(kept + line * width + channels + head, mask=is_old, other=0.0)
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    skip = tl.load(skip_ptr + head).to(tl.float32)
    wait(EARLY)
    gate = tl.load(projected_ptr + batch.to(tl.int64) * stride + x_at, mask=p_there, other=0.0)
    new = projected_ptr + batch.to(tl.int64) * stride + inner
    new_x = tl.load(new + x_at, mask=p_there, other=0.0)
    new_b = tl.load(new + b_at, mask=n_there, other=0.0)
    new_c = tl.load(new + b_at + groups * state_size, mask=n_there, other=0.0)
    new_raw = tl.load(new + channels + head)
    x = tl.where(is_own[:, None], new_x[None, :], x)
    b = tl.where(is_own[:, None], new_b[None, :], b)
    raw = tl.where(is_own, new_raw, raw)
    dt = tl.where(line <= own, _time_step(raw, bias, low, high), 0.0)
    sums, whole = _sums(dt, rate)
    m = tl.arange(0, M)
    c = tl.zeros([M, N], new_c.dtype) + new_c[None, :]
    causal = (m[:, None] >= 0) & (line <= own)[None, :]
    entering = state.to(c.dtype)
    out = _outputs(c, b, x, entering, dt, sums, tl.zeros([M], tl.float32) + whole, causal)
    out = tl.max(out, axis=0)  # its rows are equal
    out = tl.fma(new_x.to(tl.float32), tl.zeros_like(out) + skip, out) * silu(gate.to(tl.float32))
    tl.store(out_at, out.to(gated_ptr.dtype.element_ty), mask=p_there)
    mine = kept + own * width
    tl.store(mine + x_at, new_x, mask=p_there)
    tl.store(mine + channels + head, new_raw)
    if (head % (heads // groups) == 0) & (tl.program_id(2) == 0):
        tl.store(mine + b_at, new_b, mask=n_there)


@triton.jit
def _close(
    recent_ptr, ssm_ptr, rows_ptr, positions_ptr, dt_bias_ptr, a_log_ptr,
    state_rows, heads, head_dim, state_size, groups, low, high, EARLY: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute the states of `HEADS` heads of one layer where a row's token ended its chunk."""
    layer, batch = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    position = tl.load(positions_ptr + batch).to(tl.int32)
    wait(EARLY)
    if (row < 0) | (position < 0) | (position % L != L - 1):
        return
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    width = channels + heads
    row = layer.to(tl.int64) * state_rows + row
    line, p, n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    p_there, n_there = p < head_dim, n < state_size
    lines = recent_ptr + row * L * width + line[:, None] * width
    for number in range(HEADS):
        head = tl.program_id(2) * HEADS + number
        if head < heads:
            group = head // (heads // groups)
            held = ssm_ptr + (row * heads + head) * head_dim * state_size
            held += p[None, :] * state_size + n[:, None]
            held_there = n_there[:, None] & p_there[None, :]
            state = tl.load(held, mask=held_there, other=0.0)
            x_at, b_at = head * head_dim + p, inner + group * state_size + n
            x = tl.load(lines + x_at[None, :], mask=p_there[None, :], other=0.0)
            b = tl.load(lines + b_at[None, :], mask=n_there[None, :], other=0.0)
            raw = tl.load(recent_ptr + row * L * width + line * width + channels + head)
            bias = tl.load(dt_bias_ptr + layer * heads + head).to(tl.float32)
            rate = -tl.exp(tl.load(a_log_ptr + layer * heads + head).to(tl.float32))
            dt = _time_step(raw, bias, low, high)
            sums, whole = _sums(dt, rate)
            added = _added(x, b, dt, sums, whole)
            tl.store(held, _advanced(state, whole, added), mask=held_there)


def gated_step(mixer: Any, normed: Tensor, positions: Tensor, state: MambaState) -> Tensor:
    """Compute the gated output of one token in each of B rows. `close_chunks` must follow.

    Args:
        mixer: a `GraniteMoeHybridMambaLayer`, for its weights.
        normed: [B, hidden].
        positions: [B] int; -1 for padding.
        state: as for `scan`.

    Returns:
        [B, inner] before its norm; zeros at padding.
    """
    conv = convolution(mixer, positions, state)
    projected = fused_product(normed, mixer.in_proj.weight, conv=conv)
    return step(MambaSizes.of(mixer), projected, positions, ScanWeights.of(mixer), state)


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


def step(
    sizes: MambaSizes,
    projected: Tensor,
    positions: Tensor,
    weights: ScanWeights,
    state: MambaState,
) -> Tensor:
    """Compute recurrence and gate for one token in each of B rows, and keep the token's inputs.

    After all layers, `close_chunks` must follow.

    Args:
        sizes: the layer's sizes.
        projected: [B, inner + channels + heads], the output of `in_proj`, its channels convolved.
        positions: [B] int; -1 for padding.
        weights: the layer's parameters of the recurrence.
        state: as for `scan`.

    Returns:
        [B, inner] gated output in projected's dtype; zeros at padding.
    """
    batch, recent = len(positions), state.recent
    assert recent is not None
    gated = projected.new_empty(batch, sizes.inner)
    blocks, parts = _blocks(sizes, STEP_PART)
    _step[(batch, sizes.heads, parts)](
        projected, recent, state.ssm, state.rows, positions, *weights, gated,
        sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit,
        projected.shape[1], M=16, num_warps=STEP_WARPS, **blocks, **early(projected.device),
    )  # fmt: skip
    return gated


def close_chunks(
    sizes: MambaSizes,
    positions: Tensor,
    rows: Tensor,
    ssm: Tensor,
    recent: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
) -> None:
    """Store the states of all layers after rows whose last token ended a chunk.

    Args:
        sizes: of every layer.
        positions: [B] int, of the last token of each row; -1 for padding.
        rows: [B] int, the state row of each; -1 for padding.
        ssm, recent: states and inputs of all layers, [layers, rows, ...], see `MambaState`.
        dt_bias, a_log: [layers, heads].
    """
    layers, state_rows = ssm.shape[:2]
    blocks, _ = _blocks(sizes)
    together = 8
    _close[(layers, len(positions), triton.cdiv(sizes.heads, together))](
        recent, ssm, rows, positions, dt_bias, a_log, state_rows,
        sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit,
        HEADS=together, num_warps=8, **blocks, **early(ssm.device),
    )  # fmt: skip


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
    width, chunks = recent.shape[2], int(triton.cdiv(tokens, EXACT_CHUNK)) + 1
    height = chunks * EXACT_CHUNK
    lines = projected.new_empty(batch, height, width)
    _lines[(batch, triton.cdiv(height, 16), triton.cdiv(width, 64))](
        projected, state.conv, recent, state.rows, positions, weight, bias, lines,
        tokens, sizes.inner, sizes.channels, sizes.heads, stride, height,
        WIDTH=sizes.conv_width, BIAS=bias is not None, L=EXACT_CHUNK, S=16, C=64, num_warps=2,
    )  # fmt: skip
    store_ring(sizes, projected, positions, state)
    times = state.ssm.new_empty(2, batch, sizes.heads, height)
    states = state.ssm.new_empty(batch, chunks, sizes.heads, sizes.head_dim, sizes.state_size)
    blocks, _ = _blocks(sizes)
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
        L=EXACT_CHUNK, BLOCK=1024, COLUMNS=256, num_warps=4,
    )  # fmt: skip
    _chunk_outputs[(batch, chunks, sizes.heads)](
        projected, lines, entering, *where, *times, weights.skip, gated,
        tokens, *shape[:4], stride, height, num_warps=4, **blocks,
    )  # fmt: skip
    _keep[(batch, triton.cdiv(width, 64))](
        lines, recent, state.rows, positions, tokens, width, height,
        L=EXACT_CHUNK, W=64, COLUMNS=256, num_warps=4,
    )  # fmt: skip
    return gated


def _blocks(sizes: MambaSizes, most: int = 1 << 30) -> tuple[dict[str, int], int]:
    """Return the kernel's block sizes, and the parts of a head: at most `most` elements each."""
    whole = max(16, int(triton.next_power_of_2(sizes.head_dim)))
    state = max(16, int(triton.next_power_of_2(sizes.state_size)))
    part = min(most, whole)
    return {"L": EXACT_CHUNK, "P": part, "N": state}, whole // part
