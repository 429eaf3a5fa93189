"""Mamba-2 in exact mode, one token per row: from the state before its chunk (`exact_chunk.py`)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.mamba import MambaSizes, MambaState, ScanWeights
from granite_paged.layers.triton.exact_chunk import (
    added_by,
    advanced,
    blocks_of,
    outputs_of,
    similarity_of,
    sums_of,
    time_step,
)
from granite_paged.layers.triton.exact_linear import convolved_product
from granite_paged.layers.triton.linear import early, wait
from granite_paged.layers.triton.mamba import convolution
from granite_paged.layers.triton.pointwise import silu

STEP_PART, STEP_WARPS = 64, 4
"""Most elements of a head for a program of `_step`, and its warps; measured on an H100."""


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
    line, n, m = tl.arange(0, L), tl.arange(0, N), tl.arange(0, M)
    p = tl.program_id(2) * P + tl.arange(0, P)
    p_there, n_there = p < head_dim, n < state_size
    row = tl.load(rows_ptr + batch).to(tl.int64)
    position = tl.load(positions_ptr + batch).to(tl.int32)
    x_at = head * head_dim + p
    gated = gated_ptr + batch.to(tl.int64) * inner + x_at
    if (row < 0) | (position < 0):
        tl.store(gated, tl.zeros([P], gated_ptr.dtype.element_ty), mask=p_there)
        return
    own = position % L
    is_old, is_own = line < own, line == own
    causal = (m[:, None] >= 0) & (line <= own)[None, :]
    b_at = inner + head // (heads // groups) * state_size + n
    kept = recent_ptr + row * L * width
    lines = kept + line[:, None] * width
    projected = projected_ptr + batch.to(tl.int64) * stride
    new, mine = projected + inner, kept + own * width
    old_x, old_b = is_old[:, None] & p_there[None, :], is_old[:, None] & n_there[None, :]
    held = ssm_ptr + (row * heads + head) * head_dim * state_size
    held_there = n_there[:, None] & p_there[None, :]
    state = tl.load(held + p[None, :] * state_size + n[:, None], mask=held_there, other=0.0)
    x = tl.load(lines + x_at[None, :], mask=old_x, other=0.0)
    b = tl.load(lines + b_at[None, :], mask=old_b, other=0.0)
    raw = tl.load(kept + line * width + channels + head, mask=is_old, other=0.0)
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    skip = tl.load(skip_ptr + head).to(tl.float32)
    wait(EARLY)  # what was loaded before is no result of the last kernel
    gate = tl.load(projected + x_at, mask=p_there, other=0.0).to(tl.float32)
    new_x = tl.load(new + x_at, mask=p_there, other=0.0)
    new_b = tl.load(new + b_at, mask=n_there, other=0.0)
    new_c = tl.load(new + b_at + groups * state_size, mask=n_there, other=0.0)
    new_raw = tl.load(new + channels + head)
    x = tl.where(is_own[:, None], new_x[None, :], x)
    b = tl.where(is_own[:, None], new_b[None, :], b)
    c = tl.zeros([M, N], new_c.dtype) + new_c[None, :]
    raw = tl.where(is_own, new_raw, raw)
    dt = tl.where(line <= own, time_step(raw, bias, low, high), 0.0)
    sums, whole = sums_of(dt, rate)
    to_sums = tl.zeros([M], tl.float32) + whole
    out = outputs_of(c, similarity_of(c, b), x, state.to(c.dtype), dt, sums, to_sums, causal)
    out = tl.max(out, axis=0)  # its rows are equal
    out = tl.fma(new_x.to(tl.float32), tl.zeros_like(out) + skip, out) * silu(gate)
    tl.store(gated, out.to(gated_ptr.dtype.element_ty), mask=p_there)
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
            dt = time_step(raw, bias, low, high)
            sums, whole = sums_of(dt, rate)
            added = added_by(x, b, dt, sums, whole)
            tl.store(held, advanced(state, whole, added), mask=held_there)


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
    projected = convolved_product(normed, mixer.in_proj.weight, conv)
    return step(MambaSizes.of(mixer), projected, positions, ScanWeights.of(mixer), state)


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
    blocks, parts = blocks_of(sizes, recent.shape[1], STEP_PART)
    _step[(batch, sizes.heads, parts)](
        projected, recent, state.ssm, state.rows, positions, *weights, gated,
        sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit,
        projected.shape[1],
        M=16, num_warps=STEP_WARPS, **blocks, **early(projected.device),
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
    blocks, _ = blocks_of(sizes, recent.shape[2])
    together = 8
    _close[(layers, len(positions), triton.cdiv(sizes.heads, together))](
        recent, ssm, rows, positions, dt_bias, a_log, state_rows,
        sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit,
        HEADS=together, num_warps=8, **blocks, **early(ssm.device),
    )  # fmt: skip
