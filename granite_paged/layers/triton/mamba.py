"""Mamba-2 in Triton: one token per row, or many by chunks. `layers.mamba` is the definition.

::

    projected   [B * S, inner + channels + heads]    gate | x, B, C | dt, as `in_proj` leaves it
    gated       [B * S, inner]                       y * silu(gate), for norm and `out_proj`
    conv ring   [rows, channels, width]              slot `position % width`
    ssm         [rows, heads, head_dim, state_size]  float32

One token: the convolution rides along with `in_proj`; then a program owns a block of one head's
state, and reads and writes it once.

Many tokens: convolution; a state for each chunk; the recurrence over chunks; the output. Decays are
float32, matrix products take operands of the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import MambaSizes, MambaState, ScanWeights, norm_groups
from granite_paged.layers.triton.linear import (
    Convolution,
    DeferredNorm,
    convolve,
    early,
    past_share,
    wait,
)
from granite_paged.layers.triton.pointwise import rms_norm

STATE_BLOCK = 32
"""Elements of a head whose states one program of a decode step holds: the fastest at every batch
from 1 to 128 on an H200 (`nox -s tune`)."""


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _convolve_one(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr,
    first, channels, stride, WIDTH: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One row's channels, in place. What a product of few rows does itself."""
    batch = tl.program_id(0) + tl.arange(0, 1)
    column = first + tl.program_id(1) * C + tl.arange(0, C)
    place = projected_ptr + batch.to(tl.int64)[:, None] * stride + column[None, :]
    there = (column < first + channels)[None, :]
    new = tl.load(place, mask=there, other=0.0)
    past, newest, takes_in, last = past_share(
        ring_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr,
        batch, batch >= 0, column, first, channels, WIDTH, BIAS,
    )  # fmt: skip
    out = convolve(new, past, newest, takes_in, last, column, first, channels)
    tl.store(place, out.to(projected_ptr.dtype.element_ty), mask=there)


def convolve_step(projected: Tensor, conv: Convolution) -> None:
    """silu of the convolution in place of the columns that `conv` names, one token a row."""
    channels, width = conv.weight.shape
    _convolve_one[(len(projected), triton.cdiv(channels, 512))](
        projected, *conv[1:], conv.first, channels, projected.stride(0),
        WIDTH=width, BIAS=conv.bias is not None, C=512,
    )  # fmt: skip


@triton.jit
def _step(
    projected_ptr, ssm_ptr, rows_ptr, positions_ptr,
    dt_bias_ptr, a_log_ptr, skip_ptr, norm_ptr, gated_ptr, squares_ptr,
    heads, head_dim, state_size, groups, low, high, NORM: tl.constexpr, EXACT: tl.constexpr,
    EARLY: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # neighbours in the grid are neighbours in memory
    head, part, batch = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    squares_at = tl.program_id(0) * tl.num_programs(1) + batch
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    position = tl.load(positions_ptr + batch).to(tl.int32)
    p = part * P + tl.arange(0, P)
    n = tl.arange(0, N)
    p_there, n_there = p < head_dim, n < state_size
    out = gated_ptr + batch.to(tl.int64) * inner + head * head_dim + p
    if position < 0:
        wait(EARLY)
        tl.store(out, tl.zeros([P], tl.float32).to(gated_ptr.dtype.element_ty), mask=p_there)
        if NORM:
            tl.store(squares_ptr + squares_at, 0.0)
        return
    row = tl.load(rows_ptr + batch).to(tl.int64)
    # whoever wrote states and weights has long ended: only `projected` is the last kernel's
    place = (row * heads + head) * head_dim * state_size + p[:, None] * state_size + n[None, :]
    there = p_there[:, None] & n_there[None, :]
    if EXACT:
        state = tl.load(ssm_ptr + place, eviction_policy="evict_first")
    else:
        state = tl.load(ssm_ptr + place, mask=there, other=0.0, eviction_policy="evict_first")
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    skip = tl.load(skip_ptr + head).to(tl.float32)
    wait(EARLY)
    projected = projected_ptr + batch.to(tl.int64) * (inner + channels + heads)
    b_at = inner + inner + head // (heads // groups) * state_size + n
    x = tl.load(projected + inner + head * head_dim + p, mask=p_there, other=0.0).to(tl.float32)
    b = tl.load(projected + b_at, mask=n_there, other=0.0).to(tl.float32)
    c = tl.load(projected + b_at + groups * state_size, mask=n_there, other=0.0).to(tl.float32)
    raw = tl.load(projected + inner + channels + head).to(tl.float32)
    dt = _softplus(raw + dt_bias)
    if position == 0:
        dt = tl.minimum(tl.maximum(dt, low), high)
    state = state * tl.exp(dt * rate) + (dt * x)[:, None] * b[None, :]
    if EXACT:
        tl.store(ssm_ptr + place, state, eviction_policy="evict_first")
    else:
        tl.store(ssm_ptr + place, state, mask=there, eviction_policy="evict_first")
    y = tl.sum(state * c[None, :], axis=1) + skip * x
    gate = tl.load(projected + head * head_dim + p, mask=p_there, other=0.0).to(tl.float32)
    y = tl.where(p_there, y * _silu(gate), 0.0)
    if NORM:
        tl.store(squares_ptr + squares_at, tl.sum(y * y, axis=0))
        y *= tl.load(norm_ptr + head * head_dim + p, mask=p_there, other=0.0).to(tl.float32)
    tl.store(out, y.to(gated_ptr.dtype.element_ty), mask=p_there)


def mix(mixer: Any, hidden: Tensor, positions: Tensor, state: MambaState) -> Tensor:
    """`layers.mamba.mix` with these kernels between the projections, without its mask.

    hidden [B, S, hidden]; positions [B, S], -1 for padding. Returns [B, S, hidden].
    """
    gated = gated_scan(mixer, mixer.in_proj(hidden).flatten(0, 1), positions, state)
    norm, groups = mixer.norm, norm_groups(mixer)
    normed = rms_norm(gated, norm.weight, norm.variance_epsilon, groups)
    mixed: Tensor = mixer.out_proj(normed).view(hidden.shape)
    return mixed


def gated_scan(mixer: Any, projected: Tensor, positions: Tensor, state: MambaState) -> Tensor:
    """From what `in_proj` gave, [B * S, ...], to the gated output before its norm, [B * S, inner].

    One token a row or many; the convolution of one is done in place of `projected`.
    """
    sizes, weights = MambaSizes.of(mixer), ScanWeights.of(mixer)
    if positions.shape[1] > 1:
        conv = conv_weight(mixer), mixer.conv1d.bias
        return scan(sizes, projected, positions.contiguous(), *conv, weights, state)
    newest = positions[:, 0].contiguous()
    convolve_step(projected, convolution(mixer, newest, state))
    gated = step(sizes, projected, newest, weights, state)
    assert isinstance(gated, Tensor)
    return gated


def convolution(mixer: Any, positions: Tensor, state: MambaState) -> Convolution:
    """Of one token a row, at positions [B]."""
    assert state.rows is not None
    inner, bias = MambaSizes.of(mixer).inner, mixer.conv1d.bias
    return Convolution(inner, state.conv, state.rows, positions, conv_weight(mixer), bias)


def conv_weight(mixer: Any) -> Tensor:
    """[channels, width]"""
    weight: Tensor = mixer.conv1d.weight
    return weight.view(weight.shape[0], weight.shape[2])


def step(
    sizes: MambaSizes,
    projected: Tensor,
    positions: Tensor,
    weights: ScanWeights,
    state: MambaState,
    norm: Tensor | None = None,
) -> Tensor | DeferredNorm:
    """One token for each of B rows: recurrence and gate in one kernel.

    Args:
        sizes: of the layer.
        projected: [B, inner + channels + heads], what `in_proj` gave, its channels convolved.
        positions: [B] int, -1 for padding, which reads and writes no state.
        weights: of the layer's recurrence.
        state: of the layer, all rows; `state.rows` [B] int names the batch's, -1 for padding.
        norm: [inner], weight of the norm that the result goes through next, or None.

    Returns:
        [B, inner] in projected's dtype, gated, before its norm if there is one; zeros at padding.
    """
    batch = positions.shape[0]
    gated = projected.new_empty(batch, sizes.inner)
    wide = int(triton.next_power_of_2(sizes.state_size))
    block = min(STATE_BLOCK, int(triton.next_power_of_2(sizes.head_dim)))
    parts = int(triton.cdiv(sizes.head_dim, block))
    squares = None if norm is None else state.ssm.new_empty(sizes.heads * parts, batch)
    _step[(sizes.heads * parts, batch)](
        projected, state.ssm, state.rows, positions,
        *weights, norm, gated, squares,
        sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *_limits(sizes),
        NORM=norm is not None, EXACT=parts * block == sizes.head_dim and wide == sizes.state_size,
        PARTS=parts, P=block, N=wide, num_warps=8, **early(projected.device),
    )  # fmt: skip
    return gated if squares is None else DeferredNorm(gated, squares)


def _limits(sizes: MambaSizes) -> tuple[float, float]:
    low, high = sizes.time_step_limit
    return float(low), float(high)


# -- many tokens --------------------------------------------------------------------------------


@triton.jit
def _convolve(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr, out_ptr,
    tokens, inner, channels, stride,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
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
    if inside:  # padding is on either side: tokens at both ends are tokens between
        oldest = tl.load(positions + start - (WIDTH - 1))
        inside = (oldest >= 0) & (tl.load(positions + start + S - 1) >= 0)
    if inside:
        for age in tl.static_range(WIDTH):
            tap = tl.load(weight_ptr + c * WIDTH + (WIDTH - 1 - age), mask=c_there, other=0.0)
            x = tl.load(inputs + (token - age * stride)[:, None], mask=c_there[None, :], other=0.0)
            total += x.to(tl.float32) * tap.to(tl.float32)[None, :]
        tl.store(out_ptr + place, _silu(total).to(out_ptr.dtype.element_ty), mask=c_there[None, :])
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
    total = _silu(total)
    tl.store(
        out_ptr + place,
        total.to(out_ptr.dtype.element_ty),
        mask=s_there[:, None] & c_there[None, :],
    )


@triton.jit
def _store_ring(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr,
    tokens, inner, channels, stride, WIDTH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The inputs of the last `WIDTH` columns go to the slots of their positions."""
    batch = tl.program_id(0)
    row = tl.load(rows_ptr + batch).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
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
def _chunk_states(
    convolved_ptr, projected_ptr, positions_ptr, dt_bias_ptr, a_log_ptr,
    dt_ptr, decay_ptr, states_ptr,
    tokens, chunks, heads, head_dim, state_size, groups, low, high, stride,
    SIZE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dt and the running sum of dt * A of a chunk; what the chunk adds to the state."""
    batch, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    first = batch.to(tl.int64) * tokens
    s = chunk * SIZE + tl.arange(0, SIZE)
    is_token = tl.load(positions_ptr + first + s, mask=s < tokens, other=-1) >= 0
    raw = tl.load(
        projected_ptr + (first + s) * stride + inner + channels + head, mask=s < tokens, other=0.0
    ).to(tl.float32)
    dt = _softplus(raw + tl.load(dt_bias_ptr + head).to(tl.float32))
    dt = tl.where(is_token, tl.minimum(tl.maximum(dt, low), high), 0.0)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    decay = tl.cumsum(dt * rate, axis=0)
    whole = tl.sum(dt * rate, axis=0)
    by_head = (batch * heads + head).to(tl.int64) * chunks * SIZE + chunk * SIZE
    tl.store(dt_ptr + by_head + tl.arange(0, SIZE), dt)
    tl.store(decay_ptr + by_head + tl.arange(0, SIZE), decay)
    tl.debug_barrier()

    p, n, group = tl.arange(0, P), tl.arange(0, N), head // (heads // groups)
    p_there, n_there = p < head_dim, n < state_size
    added = tl.zeros([P, N], tl.float32)
    for start in range(0, SIZE, L):
        at = start + tl.arange(0, L)
        here = chunk * SIZE + at < tokens
        token = (first + chunk * SIZE + at) * channels
        x = tl.load(
            convolved_ptr + token[None, :] + (head * head_dim + p)[:, None],
            mask=p_there[:, None] & here[None, :],
            other=0.0,
        )
        b = tl.load(
            convolved_ptr + token[:, None] + (inner + group * state_size + n)[None, :],
            mask=here[:, None] & n_there[None, :],
            other=0.0,
        )
        to_end = tl.exp(whole - tl.load(decay_ptr + by_head + at)) * tl.load(dt_ptr + by_head + at)
        scaled = (x.to(tl.float32) * to_end[None, :]).to(b.dtype)
        added = tl.dot(scaled, b, added, input_precision="ieee")
    place = ((batch * chunks + chunk) * heads + head).to(tl.int64) * head_dim * state_size
    there = p_there[:, None] & n_there[None, :]
    tl.store(states_ptr + place + p[:, None] * state_size + n[None, :], added, mask=there)


@triton.jit
def _pass_on(
    states_ptr, entering_ptr, ssm_ptr, rows_ptr, decay_ptr, chunks, heads, elements,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds: the state that enters it. The last goes to the row."""
    batch, head = tl.program_id(0), tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + batch).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    there = (at < elements) & (row >= 0)  # row -1: nobody's
    held = ssm_ptr + (row * heads + head) * elements + at
    state = tl.load(held, mask=there, other=0.0)
    ends = decay_ptr + (batch * heads + head).to(tl.int64) * chunks * SIZE + SIZE - 1
    for chunk in range(chunks):
        place = ((batch * chunks + chunk) * heads + head).to(tl.int64) * elements + at
        added = tl.load(states_ptr + place, mask=at < elements, other=0.0)
        entering = state.to(entering_ptr.dtype.element_ty)
        tl.store(entering_ptr + place, entering, mask=at < elements)
        state = state * tl.exp(tl.load(ends + chunk * SIZE)) + added
    tl.store(held, state, mask=there)


@triton.jit
def _chunk_outputs(
    convolved_ptr, projected_ptr, dt_ptr, decay_ptr, entering_ptr, skip_ptr, gated_ptr,
    tokens, chunks, heads, head_dim, state_size, groups, stride,
    SIZE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(decayed C . state) + (masked, decayed C B^T) (dt x) + D x, times silu(gate)."""
    batch, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = SIZE // L
    chunk, part = part // parts, part % parts
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    first = batch.to(tl.int64) * tokens + chunk * SIZE
    left = tokens - chunk * SIZE  # tokens from this chunk's first on
    p, n, group = tl.arange(0, P), tl.arange(0, N), head // (heads // groups)
    p_there, n_there = p < head_dim, n < state_size
    to = part * L + tl.arange(0, L)
    to_there = to < left
    by_head = (batch * heads + head).to(tl.int64) * chunks * SIZE + chunk * SIZE
    decay = tl.load(decay_ptr + by_head + to)
    b_at = inner + group * state_size + n
    c = tl.load(
        convolved_ptr + (first + to)[:, None] * channels + (b_at + groups * state_size)[None, :],
        mask=to_there[:, None] & n_there[None, :],
        other=0.0,
    )
    place = ((batch * chunks + chunk) * heads + head).to(tl.int64) * head_dim * state_size
    entering = tl.load(
        entering_ptr + place + p[None, :] * state_size + n[:, None],
        mask=p_there[None, :] & n_there[:, None],
        other=0.0,
    )
    out = tl.dot(c, entering, input_precision="ieee") * tl.exp(decay)[:, None]
    for start in range(0, (part + 1) * L, L):
        at = start + tl.arange(0, L)
        here = at < left
        b = tl.load(
            convolved_ptr + (first + at)[None, :] * channels + b_at[:, None],
            mask=here[None, :] & n_there[:, None],
            other=0.0,
        )
        x = tl.load(
            convolved_ptr + (first + at)[:, None] * channels + (head * head_dim + p)[None, :],
            mask=here[:, None] & p_there[None, :],
            other=0.0,
        )
        later = decay[:, None] - tl.load(decay_ptr + by_head + at)[None, :]
        causal = to[:, None] >= at[None, :]
        weight = tl.exp(tl.where(causal, later, -float("inf")))
        weight *= tl.load(dt_ptr + by_head + at)[None, :]
        weight *= tl.dot(c, b, input_precision="ieee")
        out = tl.dot(weight.to(x.dtype), x, out, input_precision="ieee")
    token_there = to_there[:, None] & p_there[None, :]
    column = (head * head_dim + p)[None, :]
    x = tl.load(
        convolved_ptr + (first + to)[:, None] * channels + column, mask=token_there, other=0.0
    )
    out += tl.load(skip_ptr + head).to(tl.float32) * x.to(tl.float32)
    gate = tl.load(
        projected_ptr + (first + to)[:, None] * stride + column, mask=token_there, other=0.0
    )
    out *= _silu(gate.to(tl.float32))
    place = (first + to)[:, None] * inner + column
    tl.store(gated_ptr + place, out.to(gated_ptr.dtype.element_ty), mask=token_there)


def scan(
    sizes: MambaSizes,
    projected: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: ScanWeights,
    state: MambaState,
) -> Tensor:
    """Many tokens for each of B rows. Args as in `step`, with projected [B * S, ...] and positions
    [B, S]; returns [B * S, inner], gated, arbitrary finite values at padding.
    """
    batch, tokens = positions.shape
    stride = projected.shape[1]
    convolved = projected.new_empty(batch * tokens, sizes.channels)
    width, has_bias = sizes.conv_width, bias is not None
    block = 64
    grid = (batch, triton.cdiv(tokens, 16), triton.cdiv(sizes.channels, block))
    _convolve[grid](
        projected, state.conv, state.rows, positions, weight, bias, convolved,
        tokens, sizes.inner, sizes.channels, stride,
        WIDTH=width, BIAS=has_bias, S=16, C=block, num_warps=2,
    )  # fmt: skip
    _store_ring[(batch, triton.cdiv(sizes.channels, 256))](
        projected, state.conv, state.rows, positions,
        tokens, sizes.inner, sizes.channels, stride, WIDTH=width, C=256,
    )  # fmt: skip
    return _scan(sizes, projected, convolved, positions, weights, state)


def _scan(
    sizes: MambaSizes,
    projected: Tensor,
    convolved: Tensor,
    positions: Tensor,
    weights: ScanWeights,
    state: MambaState,
) -> Tensor:
    batch, tokens = positions.shape
    size = chunk_of(sizes, tokens)
    block = min(64, size)
    chunks = int(triton.cdiv(tokens, size))
    dt = state.ssm.new_empty(2, batch, sizes.heads, chunks * size)
    states = state.ssm.new_empty(batch, chunks, sizes.heads, sizes.head_dim, sizes.state_size)
    shape = (tokens, chunks, sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups)
    stride = projected.shape[1]
    blocks = {
        "SIZE": size,
        "L": block,
        "P": max(16, triton.next_power_of_2(sizes.head_dim)),
        "N": max(16, triton.next_power_of_2(sizes.state_size)),
    }
    _chunk_states[(batch, chunks, sizes.heads)](
        convolved, projected, positions, *weights[:2], dt[0], dt[1], states,
        *shape, *_limits(sizes), stride, **blocks, num_warps=4, num_stages=1,
    )  # fmt: skip
    elements = sizes.head_dim * sizes.state_size
    entering = torch.empty_like(states, dtype=convolved.dtype)
    _pass_on[(batch, sizes.heads, triton.cdiv(elements, 1024))](
        states, entering, state.ssm, state.rows, dt[1], chunks, sizes.heads, elements,
        SIZE=size, BLOCK=1024,
    )  # fmt: skip
    gated = projected.new_empty(batch * tokens, sizes.inner)
    _chunk_outputs[(batch, chunks * (size // block), sizes.heads)](
        convolved, projected, dt[0], dt[1], entering, weights.skip, gated,
        *shape, stride, **blocks, num_warps=4, num_stages=1,
    )  # fmt: skip
    return gated


def chunk_of(sizes: MambaSizes, tokens: int) -> int:
    """Tokens a chunk: the model's own size where kernels can have it, no more than there are."""
    size = 1 << (sizes.chunk_size.bit_length() - 1)
    return int(max(16, min(size, 256, triton.next_power_of_2(tokens))))
