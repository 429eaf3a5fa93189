"""Mamba-2 in Triton, several tokens per row, computed by chunks. `mamba.py` gives the layouts.

Four kernels: the convolution (`convolution.py`); the state that each chunk adds; the recurrence
over chunks; the output. For a single chunk, the second kernel also does the third one's work.
Decays are float32; operands of matrix products have the model's dtype. The similarities C B^T of a
chunk's tokens are the same for all heads of a group: the second kernel computes them once.

Each kernel is started before the one in front of it has finished (`linear.early`). It waits for
that one before it uses its results, and does first what depends on earlier kernels only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import REPLAYED, MambaSizes, MambaState, ScanWeights
from granite_paged.layers.triton.convolution import RING_BLOCK, convolve, store_last
from granite_paged.layers.triton.linear import early, wait
from granite_paged.layers.triton.pointwise import silu, softplus

_OUTPUT_REGISTERS = 168
"""Registers per thread of `_chunk_outputs`, so that three programs fit a multiprocessor of 65,536.
Measured on an H100: a prompt of 512 tokens takes 4.54 ms with it, and 4.78 without."""


@triton.jit
def _entering_state(
    held, recent_ptr, times_ptr, positions_ptr, batch, row, head, rate, p, n, there,
    tokens, heads, head_dim, state_size, groups, REPLAYED: tl.constexpr,
):  # fmt: skip
    """Return elements [P, N] of a row's state, after the inputs that are to be replayed.

    held: pointers to them. p, n: their places in the head and in the state. there: which exist.
    """
    state = tl.load(held, mask=there, other=0.0)
    if REPLAYED > 0:
        first = tl.load(positions_ptr + batch * tokens).to(tl.int32)
        pending = tl.where((first >= 0) & (row >= 0), first % REPLAYED, 0)
        inner = heads * head_dim
        width = inner + groups * state_size
        x_at = head * head_dim + p
        b_at = inner + head // (heads // groups) * state_size + n
        for slot in range(pending):
            line = row * REPLAYED + slot
            dt = tl.load(times_ptr + line * 2 * heads + head)
            x = tl.load(recent_ptr + line * width + x_at, mask=p < head_dim, other=0.0)
            b = tl.load(recent_ptr + line * width + b_at, mask=n < state_size, other=0.0)
            new = (dt * x.to(tl.float32))[:, None] * b.to(tl.float32)[None, :]
            state = state * tl.exp(dt * rate) + new
    return state


@triton.jit
def _similarity(
    convolved_ptr, similarity_ptr, batch, chunk, number,
    tokens, chunks, inner, state_size, groups,
    PAIRS: tl.constexpr, SIZE: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Store C B^T of two blocks of a chunk's tokens: those of B are not after those of C."""
    group, pair = number // PAIRS, number % PAIRS
    part = 0
    for later in tl.static_range(1, SIZE // L):
        part += (pair >= later * (later + 1) // 2).to(tl.int32)
    to = part * L + tl.arange(0, L)
    at = (pair - part * (part + 1) // 2) * L + tl.arange(0, L)
    n, left = tl.arange(0, N), tokens - chunk * SIZE
    first = batch.to(tl.int64) * tokens + chunk * SIZE
    channels, b_at = inner + 2 * groups * state_size, inner + group * state_size + n
    c = tl.load(
        convolved_ptr + (first + to)[:, None] * channels + (b_at + groups * state_size)[None, :],
        mask=(to < left)[:, None] & (n < state_size)[None, :],
        other=0.0,
    )
    b = tl.load(
        convolved_ptr + (first + at)[None, :] * channels + b_at[:, None],
        mask=(at < left)[None, :] & (n < state_size)[:, None],
        other=0.0,
    )
    place = ((batch * chunks + chunk) * groups + group).to(tl.int64) * SIZE * SIZE
    place += to[:, None] * SIZE + at[None, :]
    tl.store(similarity_ptr + place, tl.dot(c, b, input_precision="ieee"))


@triton.jit
def _chunk_states(
    convolved_ptr, projected_ptr, positions_ptr, dt_bias_ptr, a_log_ptr,
    dt_ptr, decay_ptr, similarity_ptr, states_ptr,
    ssm_ptr, recent_ptr, times_ptr, rows_ptr, ring_ptr,
    tokens, chunks, heads, head_dim, state_size, groups, low, high, stride,
    ONE: tl.constexpr, REPLAYED: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    EARLY: tl.constexpr, PAIRS: tl.constexpr,
    SIZE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute a chunk's dt, the cumulative sum of dt * A, and what the chunk adds to the state.

    Programs beyond the heads compute similarities, and store the inputs of the row's last tokens in
    its ring. With `ONE` chunk, this also updates the row's state, and stores the state that entered
    at `states_ptr`.
    """
    batch, chunk, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    if head >= heads:
        wait(EARLY)
        blocks = groups * PAIRS
        if head < heads + blocks:
            _similarity(
                convolved_ptr, similarity_ptr, batch, chunk, head - heads,
                tokens, chunks, inner, state_size, groups, PAIRS, SIZE, L, N,
            )  # fmt: skip
        elif chunk == 0:
            store_last(
                projected_ptr, ring_ptr, rows_ptr, positions_ptr, batch, head - heads - blocks,
                tokens, inner, channels, stride, WIDTH, C,
            )  # fmt: skip
        return
    first = batch.to(tl.int64) * tokens
    s = chunk * SIZE + tl.arange(0, SIZE)
    is_token = tl.load(positions_ptr + first + s, mask=s < tokens, other=-1) >= 0
    raw = tl.load(
        projected_ptr + (first + s) * stride + inner + channels + head, mask=s < tokens, other=0.0
    ).to(tl.float32)
    dt = softplus(raw + tl.load(dt_bias_ptr + head).to(tl.float32))
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
    at, there = p[:, None] * state_size + n[None, :], p_there[:, None] & n_there[None, :]
    if ONE:
        row = tl.load(rows_ptr + batch).to(tl.int64)
        is_row = row + tl.zeros([P], tl.int64) >= 0  # -1 is padding
        stored = there & is_row[:, None]
        held = ssm_ptr + (row * heads + head) * head_dim * state_size + at
        state = _entering_state(
            held, recent_ptr, times_ptr, positions_ptr, batch, row, head, rate, p, n, stored,
            tokens, heads, head_dim, state_size, groups, REPLAYED,
        )  # fmt: skip
    wait(EARLY)
    added = tl.zeros([P, N], tl.float32)
    for start in range(0, SIZE, L):
        line = start + tl.arange(0, L)
        here = chunk * SIZE + line < tokens
        token = (first + chunk * SIZE + line) * channels
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
        to_end = tl.exp(whole - tl.load(decay_ptr + by_head + line))
        to_end *= tl.load(dt_ptr + by_head + line)
        scaled = (x.to(tl.float32) * to_end[None, :]).to(b.dtype)
        added = tl.dot(scaled, b, added, input_precision="ieee")
    place = ((batch * chunks + chunk) * heads + head).to(tl.int64) * head_dim * state_size
    if ONE:
        tl.store(states_ptr + place + at, state.to(states_ptr.dtype.element_ty), mask=there)
        tl.store(held, state * tl.exp(whole) + added, mask=stored)
    else:
        tl.store(states_ptr + place + at, added, mask=there)


@triton.jit
def _pass_on(
    states_ptr, entering_ptr, ssm_ptr, recent_ptr, times_ptr, rows_ptr, positions_ptr, a_log_ptr,
    decay_ptr, tokens, chunks, heads, head_dim, state_size, groups,
    REPLAYED: tl.constexpr, EARLY: tl.constexpr,
    SIZE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the state that enters each chunk; the state after the last chunk goes to the row."""
    batch, head = tl.program_id(0), tl.program_id(1)
    p, n = tl.program_id(2) * P + tl.arange(0, P), tl.arange(0, N)
    at = p[:, None] * state_size + n[None, :]
    there = (p < head_dim)[:, None] & (n < state_size)[None, :]
    row = tl.load(rows_ptr + batch).to(tl.int64)
    is_row = row + tl.zeros([P], tl.int64) >= 0  # -1 is padding
    stored = there & is_row[:, None]
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    held = ssm_ptr + (row * heads + head) * head_dim * state_size + at
    state = _entering_state(
        held, recent_ptr, times_ptr, positions_ptr, batch, row, head, rate, p, n, stored,
        tokens, heads, head_dim, state_size, groups, REPLAYED,
    )  # fmt: skip
    ends = decay_ptr + (batch * heads + head).to(tl.int64) * chunks * SIZE + SIZE - 1
    place = (batch * chunks * heads + head).to(tl.int64) * head_dim * state_size + at
    wait(EARLY)
    next_added, next_end = tl.load(states_ptr + place, mask=there, other=0.0), tl.load(ends)
    for chunk in range(chunks):  # loads what the next chunk needs before it stores this one's
        added, end, entering = next_added, next_end, entering_ptr + place
        step = tl.minimum(chunk + 1, chunks - 1) - chunk  # 0 at the last chunk, else 1
        place += step * heads * head_dim * state_size
        next_added = tl.load(states_ptr + place, mask=there, other=0.0)
        next_end = tl.load(ends + (chunk + step) * SIZE)
        tl.store(entering, state.to(entering_ptr.dtype.element_ty), mask=there)
        state = state * tl.exp(end) + added
    tl.store(held, state, mask=stored)


@triton.jit
def _chunk_outputs(
    convolved_ptr, projected_ptr, dt_ptr, decay_ptr, similarity_ptr, entering_ptr, skip_ptr,
    gated_ptr, times_ptr, rows_ptr, positions_ptr,
    tokens, chunks, heads, head_dim, state_size, groups, stride,
    ONE: tl.constexpr, REPLAYED: tl.constexpr, EARLY: tl.constexpr,
    SIZE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute (masked, decayed C B^T) (dt x) + (decayed C . state) + D x, times silu(gate)."""
    batch, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = SIZE // L
    chunk, part = part // parts, part % parts
    inner = heads * head_dim
    channels = inner + 2 * groups * state_size
    first = batch.to(tl.int64) * tokens + chunk * SIZE
    left = tokens - chunk * SIZE  # tokens from the start of this chunk to the end of the row
    p, n, group = tl.arange(0, P), tl.arange(0, N), head // (heads // groups)
    p_there, n_there = p < head_dim, n < state_size
    to = part * L + tl.arange(0, L)
    to_there = to < left
    column = (head * head_dim + p)[None, :]
    token_there = to_there[:, None] & p_there[None, :]
    gate = tl.load(
        projected_ptr + (first + to)[:, None] * stride + column, mask=token_there, other=0.0
    )
    c_at = inner + (groups + group) * state_size + n
    c = tl.load(
        convolved_ptr + (first + to)[:, None] * channels + c_at[None, :],
        mask=to_there[:, None] & n_there[None, :],
        other=0.0,
    )
    if ONE:  # of several chunks, the last kernel computed only the entering states
        wait(EARLY)
    by_head = (batch * heads + head).to(tl.int64) * chunks * SIZE + chunk * SIZE
    decay = tl.load(decay_ptr + by_head + to)
    similar = ((batch * chunks + chunk) * groups + group).to(tl.int64) * SIZE * SIZE
    similar += to[:, None] * SIZE
    out = tl.zeros([L, P], tl.float32)
    for start in range(0, (part + 1) * L, L):
        at = start + tl.arange(0, L)
        x = tl.load(
            convolved_ptr + (first + at)[:, None] * channels + column,
            mask=(at < left)[:, None] & p_there[None, :],
            other=0.0,
        )
        later = decay[:, None] - tl.load(decay_ptr + by_head + at)[None, :]
        causal = to[:, None] >= at[None, :]
        weight = tl.exp(tl.where(causal, later, -float("inf")))
        weight *= tl.load(dt_ptr + by_head + at)[None, :]
        weight *= tl.load(similarity_ptr + similar + at[None, :])
        out = tl.dot(weight.to(x.dtype), x, out, input_precision="ieee")
    x = tl.load(
        convolved_ptr + (first + to)[:, None] * channels + column, mask=token_there, other=0.0
    )
    out += tl.load(skip_ptr + head).to(tl.float32) * x.to(tl.float32)
    if not ONE:
        wait(EARLY)
    place = ((batch * chunks + chunk) * heads + head).to(tl.int64) * head_dim * state_size
    entering = tl.load(
        entering_ptr + place + p[None, :] * state_size + n[:, None],
        mask=p_there[None, :] & n_there[:, None],
        other=0.0,
    )
    out += tl.dot(c, entering, input_precision="ieee") * tl.exp(decay)[:, None]
    out *= silu(gate.to(tl.float32))
    place = (first + to)[:, None] * inner + column
    tl.store(gated_ptr + place, out.to(gated_ptr.dtype.element_ty), mask=token_there)
    if REPLAYED > 0:  # the row's state is of its last token now: nothing is left to be replayed
        row = tl.load(rows_ptr + batch).to(tl.int64)
        held = times_ptr + (row * 2 * REPLAYED + tl.arange(0, 2 * REPLAYED)) * heads + head
        if (row >= 0) & (tl.load(positions_ptr + batch * tokens) >= 0):
            tl.store(held, tl.zeros([2 * REPLAYED], tl.float32))


def scan(
    sizes: MambaSizes,
    projected: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: ScanWeights,
    state: MambaState,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute convolution, scan and gate for S tokens in each of B rows; update the state in place.

    Args:
        sizes: the layer's sizes.
        projected: [B * S, inner + channels + heads], the output of `in_proj`.
        positions: [B, S] int, contiguous; -1 for padding, on either side of a row; on the right
            only if `state` keeps inputs.
        weight, bias: of the convolution, [channels, width] and [channels] or None.
        weights: the layer's parameters of the recurrence.
        state: the layer's states of all rows; `state.rows` [B] int selects the batch's.
        mask: [B, S], zero at padding that has a position (inside a sequence); None without such.

    Returns:
        [B * S, inner] gated output in projected's dtype; arbitrary finite values at padding.
    """
    convolved = convolve(sizes, projected, positions, weight, bias, state)
    if mask is not None:
        convolved *= mask.view(-1, 1)
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
    similarity = state.ssm.new_empty(batch, chunks, sizes.groups, size, size)
    entering = convolved.new_empty(batch, chunks, sizes.heads, sizes.head_dim, sizes.state_size)
    # of one chunk, only the state that enters it is stored
    states = entering if chunks == 1 else torch.empty_like(entering, dtype=state.ssm.dtype)
    shape = (tokens, chunks, sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups)
    stride, starts = projected.shape[1], early(projected.device)
    blocks = {
        "SIZE": size,
        "L": block,
        "P": max(16, triton.next_power_of_2(sizes.head_dim)),
        "N": max(16, triton.next_power_of_2(sizes.state_size)),
    }
    inputs, replayed = (state.recent, state.times), 0 if state.times is None else REPLAYED
    parts, rings = size // block, triton.cdiv(sizes.channels, RING_BLOCK)
    pairs = parts * (parts + 1) // 2  # of a block of C, and a block of B that is not after it
    _chunk_states[(batch, chunks, sizes.heads + sizes.groups * pairs + rings)](
        convolved, projected, positions, *weights[:2], dt[0], dt[1], similarity, states,
        state.ssm, *inputs, state.rows, state.conv,
        *shape, *sizes.time_step_limit, stride,
        ONE=chunks == 1, REPLAYED=replayed, WIDTH=sizes.conv_width, C=RING_BLOCK, PAIRS=pairs,
        **blocks, num_warps=8 if chunks == 1 else 4, num_stages=1, **starts,
    )  # fmt: skip
    if chunks > 1:
        lines = max(1, 1024 // blocks["N"])
        _pass_on[(batch, sizes.heads, triton.cdiv(sizes.head_dim, lines))](
            states, entering, state.ssm, *inputs, state.rows, positions, weights.a_log, dt[1],
            *shape, REPLAYED=replayed, SIZE=size, P=lines, N=blocks["N"], **starts,
        )  # fmt: skip
    gated = projected.new_empty(batch * tokens, sizes.inner)
    _chunk_outputs[(batch, chunks * parts, sizes.heads)](
        convolved, projected, dt[0], dt[1], similarity, entering, weights.skip, gated,
        state.times, state.rows, positions, *shape, stride,
        ONE=chunks == 1, REPLAYED=replayed, **blocks,
        num_warps=4, num_stages=1, maxnreg=_OUTPUT_REGISTERS, **starts,
    )  # fmt: skip
    return gated


def chunk_of(sizes: MambaSizes, tokens: int) -> int:
    """Return the tokens per chunk of the kernels.

    That is the model's chunk size, rounded down to a power of two, from 16 to 256; less for short
    prompts.
    """
    size = 1 << (sizes.chunk_size.bit_length() - 1)
    return int(max(16, min(size, 256, triton.next_power_of_2(tokens))))
