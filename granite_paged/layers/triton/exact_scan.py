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

import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import EXACT_CHUNK, MambaSizes, MambaState, ScanWeights
from granite_paged.layers.triton.linear import early, wait
from granite_paged.layers.triton.pointwise import silu, softplus
from granite_paged.layers.triton.scan import convolve_tokens

UNIT = tl.constexpr(2.0**40)
"""Sums of dt A are integers in units of its inverse. 64 terms of at least -2**15 fit 62 bits."""

LOWEST = tl.constexpr(-32768.0)
"""Least dt A. exp of it is 0 in float32."""


@triton.jit
def _sums(dt, rate):
    """Return the cumulative sums of dt * rate [L], in units of 1 / UNIT."""
    return tl.cumsum(_fixed(dt, rate), axis=0)


@triton.jit
def _fixed(dt, rate):
    return (tl.maximum(dt * rate, LOWEST) * UNIT).to(tl.int64)


@triton.jit
def _decay(difference):
    """Return exp of a difference of sums."""
    return tl.exp(difference.to(tl.float32) * (1.0 / UNIT))


@triton.jit
def _time_step(raw, bias, low, high):
    return tl.minimum(tl.maximum(softplus(raw.to(tl.float32) + bias), low), high)


@triton.jit
def _next_state(state, x, b, dt, sums, whole):
    """Return the state [N, P] after a chunk of x [L, P] and b [L, N]."""
    to_end = _decay(whole - sums) * dt
    scaled = (x.to(tl.float32) * to_end[:, None]).to(x.dtype)
    added = tl.dot(tl.trans(b), scaled, input_precision="ieee")
    return tl.fma(state, tl.zeros_like(state) + _decay(whole), added)


@triton.jit
def _outputs(c, b, x, state, dt, sums, to_sums, causal):
    """Return the outputs [M, P] of M of a chunk's tokens.

    c [M, N], b [L, N], x [L, P], state [N, P]; dt, sums [L]; to_sums [M]; causal [M, L].
    """
    carried = tl.dot(c, state.to(c.dtype), input_precision="ieee")
    carried = carried * _decay(to_sums)[:, None]
    since = tl.where(causal, to_sums[:, None] - sums[None, :], 0)
    weight = tl.where(causal, _decay(since), 0.0) * dt[None, :]
    weight = weight * tl.dot(c, tl.trans(b), input_precision="ieee")
    return tl.dot(weight.to(x.dtype), x, carried, input_precision="ieee")


@triton.jit
def _chunks(
    projected_ptr, convolved_ptr, recent_ptr, ssm_ptr, rows_ptr, positions_ptr,
    dt_bias_ptr, a_log_ptr, skip_ptr, gated_ptr,
    tokens, heads, head_dim, state_size, groups, low, high, stride,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute one head of one row, chunk after chunk. Its tokens are its first columns."""
    batch, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    if (row < 0) | (first < 0):
        return
    last = first
    for start in range(0, tokens, COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        found = tl.load(positions + s, mask=s < tokens, other=-1).to(tl.int32)
        last = tl.maximum(last, tl.max(found, axis=0))

    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    width = channels + heads
    group = head // (heads // groups)
    line, p, n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    p_there, n_there = p < head_dim, n < state_size
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    skip = tl.load(skip_ptr + head).to(tl.float32)
    held = ssm_ptr + (row * heads + head) * head_dim * state_size
    held = held + p[None, :] * state_size + n[:, None]
    held_there = n_there[:, None] & p_there[None, :]
    state = tl.load(held, mask=held_there, other=0.0)

    for chunk in range(first // L, last // L + 1):
        t = chunk * L + line
        is_old, there = t < first, t <= last
        column = batch.to(tl.int64) * tokens + (t - first)
        old_line = recent_ptr + (row * L + line) * width
        source = tl.where(is_old, old_line, convolved_ptr + column * channels)[:, None]
        x_at = (head * head_dim + p)[None, :]
        b_at = (inner + group * state_size + n)[None, :]
        x = tl.load(source + x_at, mask=there[:, None] & p_there[None, :], other=0.0)
        b = tl.load(source + b_at, mask=there[:, None] & n_there[None, :], other=0.0)
        is_new = there & (t >= first)
        c = tl.load(
            source + b_at + groups * state_size, mask=is_new[:, None] & n_there[None, :], other=0.0
        )
        new_raw = projected_ptr + column * stride + inner + channels + head
        raw = tl.load(tl.where(is_old, old_line + channels + head, new_raw), mask=there, other=0.0)
        dt = tl.where(there, _time_step(raw, bias, low, high), 0.0)
        sums = _sums(dt, rate)
        causal = line[:, None] >= line[None, :]
        out = _outputs(c, b, x, state, dt, sums, sums, causal)
        new_there = is_new[:, None] & p_there[None, :]
        gate = tl.load(projected_ptr + column[:, None] * stride + x_at, mask=new_there, other=0.0)
        out = tl.fma(x.to(tl.float32), tl.zeros_like(out) + skip, out) * silu(gate.to(tl.float32))
        out_at = gated_ptr + column[:, None] * inner + x_at
        tl.store(out_at, out.to(gated_ptr.dtype.element_ty), mask=new_there)
        if chunk * L + L <= last + 1:
            whole = tl.sum(_fixed(dt, rate), axis=0)
            state = _next_state(state, x, b, dt, sums, whole)
    if last + 1 >= (first // L + 1) * L:
        tl.store(held, state, mask=held_there)


@triton.jit
def _keep(
    projected_ptr, convolved_ptr, recent_ptr, rows_ptr, positions_ptr,
    tokens, inner, channels, heads, stride,
    L: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keep the inputs of each row's last, unfinished chunk."""
    batch = tl.program_id(0)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    positions = positions_ptr + batch * tokens
    first = tl.load(positions).to(tl.int32)
    if (row < 0) | (first < 0):
        return
    last = first
    for start in range(0, tokens, COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        found = tl.load(positions + s, mask=s < tokens, other=-1).to(tl.int32)
        last = tl.maximum(last, tl.max(found, axis=0))
    line, at = tl.arange(0, L), tl.program_id(1) * W + tl.arange(0, W)
    t = last // L * L + line
    is_new = (t >= first) & (t <= last)
    column = (batch.to(tl.int64) * tokens + (t - first))[:, None]
    is_dt = (at >= channels) & (at < channels + heads)
    convolved = convolved_ptr + column * channels + at[None, :]
    projected = projected_ptr + column * stride + (inner + at)[None, :]
    there = is_new[:, None] & (at < channels + heads)[None, :]
    found = tl.load(tl.where(is_dt[None, :], projected, convolved), mask=there, other=0.0)
    kept = recent_ptr + (row * L + line)[:, None] * (channels + heads) + at[None, :]
    tl.store(kept, found, mask=there)


@triton.jit
def _convolved(
    projected_ptr, ring_ptr, weight_ptr, bias_ptr, channel, there, position, inner,
    WIDTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Convolve channels of one token, after silu; also return its own inputs."""
    total = tl.zeros([channel.shape[0]], tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + channel, mask=there, other=0.0).to(tl.float32)
    newest = tl.load(projected_ptr + inner + channel, mask=there, other=0.0)
    for age in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + channel * WIDTH + (WIDTH - 1 - age), mask=there, other=0.0)
        if age == 0:
            x = newest.to(tl.float32)
        else:
            known = there & (position >= age)
            slot = (position - age + WIDTH) % WIDTH
            x = tl.load(ring_ptr + channel * WIDTH + slot, mask=known, other=0.0).to(tl.float32)
        total += x * tap.to(tl.float32)
    return silu(total).to(newest.dtype), newest


@triton.jit
def _step(
    projected_ptr, ring_ptr, recent_ptr, ssm_ptr, rows_ptr, positions_ptr,
    conv_weight_ptr, conv_bias_ptr, dt_bias_ptr, a_log_ptr, skip_ptr, gated_ptr,
    heads, head_dim, state_size, groups, low, high, stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
    L: tl.constexpr, M: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute one head of one row's next token."""
    batch, head = tl.program_id(0), tl.program_id(1)
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    width = channels + heads
    group = head // (heads // groups)
    line, p, n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    p_there, n_there = p < head_dim, n < state_size
    row = tl.load(rows_ptr + batch).to(tl.int64)
    position = tl.load(positions_ptr + batch).to(tl.int32)
    out_at = gated_ptr + batch.to(tl.int64) * inner + head * head_dim + p
    if (row < 0) | (position < 0):
        tl.store(out_at, tl.zeros([P], gated_ptr.dtype.element_ty), mask=p_there)
        return
    own = position % L
    is_old, is_own, there = line < own, line == own, line <= own
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    skip = tl.load(skip_ptr + head).to(tl.float32)
    held = ssm_ptr + (row * heads + head) * head_dim * state_size
    held = held + p[None, :] * state_size + n[:, None]
    held_there = n_there[:, None] & p_there[None, :]
    state = tl.load(held, mask=held_there, other=0.0)
    kept = recent_ptr + (row * L + line) * width
    x_at, b_at = head * head_dim + p, inner + group * state_size + n
    x = tl.load(kept[:, None] + x_at[None, :], mask=is_old[:, None] & p_there[None, :], other=0.0)
    b = tl.load(kept[:, None] + b_at[None, :], mask=is_old[:, None] & n_there[None, :], other=0.0)
    raw = tl.load(kept + channels + head, mask=is_old, other=0.0)
    wait(EARLY)
    projected = projected_ptr + batch.to(tl.int64) * stride
    ring = ring_ptr + row * channels * WIDTH
    new_x, in_x = _convolved(
        projected, ring, conv_weight_ptr, conv_bias_ptr, x_at, p_there, position, inner,
        WIDTH, BIAS,
    )  # fmt: skip
    new_b, in_b = _convolved(
        projected, ring, conv_weight_ptr, conv_bias_ptr, b_at, n_there, position, inner,
        WIDTH, BIAS,
    )  # fmt: skip
    c_at = b_at + groups * state_size
    new_c, in_c = _convolved(
        projected, ring, conv_weight_ptr, conv_bias_ptr, c_at, n_there, position, inner,
        WIDTH, BIAS,
    )  # fmt: skip
    new_raw = tl.load(projected + inner + channels + head)
    x = tl.where(is_own[:, None], new_x[None, :], x)
    b = tl.where(is_own[:, None], new_b[None, :], b)
    raw = tl.where(is_own, new_raw, raw)
    dt = tl.where(there, _time_step(raw, bias, low, high), 0.0)
    sums = _sums(dt, rate)
    whole = tl.sum(_fixed(dt, rate), axis=0)
    m = tl.arange(0, M)
    c = tl.zeros([M, N], new_c.dtype) + new_c[None, :]
    causal = (m[:, None] >= 0) & there[None, :]
    to_sums = tl.zeros([M], tl.int64) + whole
    out = _outputs(c, b, x, state, dt, sums, to_sums, causal)
    out = tl.sum(tl.where(m[:, None] == 0, out, 0.0), axis=0)
    gate = tl.load(projected + x_at, mask=p_there, other=0.0)
    x32 = new_x.to(tl.float32)
    out = tl.fma(x32, tl.zeros_like(out) + skip, out) * silu(gate.to(tl.float32))
    tl.store(out_at, out.to(gated_ptr.dtype.element_ty), mask=p_there)

    mine = recent_ptr + (row * L + own) * width
    slot = position % WIDTH
    tl.store(mine + x_at, new_x, mask=p_there)
    tl.store(mine + channels + head, new_raw)
    tl.store(ring + x_at * WIDTH + slot, in_x, mask=p_there)
    if head % (heads // groups) == 0:
        tl.store(mine + b_at, new_b, mask=n_there)
        tl.store(mine + c_at, new_c, mask=n_there)
        tl.store(ring + b_at * WIDTH + slot, in_b, mask=n_there)
        tl.store(ring + c_at * WIDTH + slot, in_c, mask=n_there)
    if own == L - 1:
        tl.store(held, _next_state(state, x, b, dt, sums, whole), mask=held_there)


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
        [B * S, inner] gated output in projected's dtype; zeros at padding.
    """
    batch, tokens = positions.shape
    recent = state.recent
    gated = projected.new_zeros(batch * tokens, sizes.inner)
    blocks = _blocks(sizes)
    stride = projected.shape[1]
    if tokens == 1:
        _step[(batch, sizes.heads)](
            projected, state.conv, recent, state.ssm, state.rows, positions,
            weight, bias, *weights, gated,
            sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit,
            stride, WIDTH=sizes.conv_width, BIAS=bias is not None, M=16,
            num_warps=4, **blocks, **early(projected.device),
        )  # fmt: skip
        return gated
    convolved = convolve_tokens(sizes, projected, positions, weight, bias, state)
    _chunks[(batch, sizes.heads)](
        projected, convolved, recent, state.ssm, state.rows, positions, *weights, gated,
        tokens, sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups,
        *sizes.time_step_limit, stride, COLUMNS=256, num_warps=4, **blocks,
    )  # fmt: skip
    _keep[(batch, triton.cdiv(sizes.channels + sizes.heads, 64))](
        projected, convolved, recent, state.rows, positions,
        tokens, sizes.inner, sizes.channels, sizes.heads, stride,
        L=EXACT_CHUNK, W=64, COLUMNS=256, num_warps=4,
    )  # fmt: skip
    return gated


def _blocks(sizes: MambaSizes) -> dict[str, Any]:
    return {
        "L": EXACT_CHUNK,
        "P": max(16, int(triton.next_power_of_2(sizes.head_dim))),
        "N": max(16, int(triton.next_power_of_2(sizes.state_size))),
    }
