"""Mamba-2 in Triton, one token per row. `layers.mamba` defines what it computes.

::

    projected   [B * S, inner + channels + heads]    gate | x, B, C | dt, the output of `in_proj`
    gated       [B * S, inner]                       y * silu(gate), for the norm and `out_proj`
    conv ring   [rows, channels, width]              slot `position % width`
    ssm         [rows, heads, head_dim, state_size]  float32
    recent      [rows, REPLAYED, inner + groups * state_size]   x and B, slot `position % REPLAYED`
    times       [rows, REPLAYED, 2, heads]           float32, their dt, and its sums so far

Up to `MOST_ROWS` rows, the convolution is part of the product with `in_proj`; with more, a kernel
of its own. (As part of the step, whose programs would each repeat it for B and C, it made decode
steps of 128 rows half again as slow on an H100.) In a step, each program owns a block of one head's
state. With `Kept.REPLAY`, it reads the state and replays the inputs since it was stored; only the
last token of `REPLAYED` stores it again, the others store their inputs, which are much smaller.
Otherwise every step stores the state. `scan.py` computes several tokens per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    apply_mask_to_padding_states,
)

from granite_paged.layers.mamba import (
    REPLAYED,
    MambaSizes,
    MambaState,
    ScanWeights,
    norm_groups,
)
from granite_paged.layers.triton.linear import (
    MOST_ROWS,
    Convolution,
    DeferredNorm,
    convolve,
    early,
    past_share,
    wait,
)
from granite_paged.layers.triton.pointwise import rms_norm, silu, softplus
from granite_paged.layers.triton.scan import scan


class StepBlock(NamedTuple):
    """How the kernel of a step is cut into programs.

    elements: elements of a head whose states one program holds.
    warps: warps of a program.
    registers: limit per thread, so that more programs fit a multiprocessor; None for no limit.
    """

    elements: int
    warps: int
    registers: int | None = None


STORING = StepBlock(32, 8)
"""Where every step stores the state: the fastest of those measured on an H200, 1 to 128 rows."""

REPLAYING_FEW, REPLAYING_MANY = StepBlock(32, 2, 168), StepBlock(64, 4)
"""Where inputs are replayed: for up to `MOST_ROWS` rows, and for more. Of 16 to 64 elements and 1
to 8 warps, these were as fast as any on an H100 at 1, 8, 32 and at 128 rows."""


@triton.jit
def _convolve_one(
    projected_ptr, ring_ptr, rows_ptr, positions_ptr, weight_ptr, bias_ptr,
    first, channels, stride, WIDTH: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Convolve one row's channels in place, as a product of few rows does by itself."""
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
    """Replace the columns of `conv` by silu of their convolution; one token per row."""
    channels, width = conv.weight.shape
    _convolve_one[(len(projected), triton.cdiv(channels, 512))](
        projected, *conv[1:], conv.first, channels, projected.stride(0),
        WIDTH=width, BIAS=conv.bias is not None, C=512,
    )  # fmt: skip


@triton.jit
def _replayed(
    state, recent, times, rate, heads, width, head, x_at, b_at, x_there, b_there, pending,
    REPLAYED: tl.constexpr,
):  # fmt: skip
    """Return the state [P, N] after `pending` inputs of a row, and the sum of their dt.

    A tensor core adds them: the sum over inputs of x (w B), w their dt and decay. x has its dtype
    already; w B is the sum of two numbers of this dtype, so each input comes twice.

    recent, times: pointers to the row's inputs. x_at [P], b_at [N]: columns of the program's x, B.
    """
    line = tl.arange(0, 2 * REPLAYED)
    slot = line % REPLAYED
    known = slot < pending
    at = times + slot * 2 * heads + head
    dt = tl.load(at, mask=known, other=0.0)
    sums = tl.load(at + heads, mask=known, other=0.0)
    whole = tl.load(times + (pending - 1) * 2 * heads + heads + head, mask=pending > 0, other=0.0)
    x = tl.load(
        recent + slot[None, :] * width + x_at[:, None],
        mask=known[None, :] & x_there[:, None],
        other=0.0,
    )
    b = tl.load(
        recent + slot[:, None] * width + b_at[None, :],
        mask=known[:, None] & b_there[None, :],
        other=0.0,
    )
    weighted = b.to(tl.float32) * (dt * tl.exp((whole - sums) * rate))[:, None]
    rounded = weighted.to(b.dtype)
    rest = (weighted - rounded.to(tl.float32)).to(b.dtype)
    terms = tl.where((line < REPLAYED)[:, None], rounded, rest)
    return tl.dot(x, terms, state * tl.exp(whole * rate), input_precision="ieee"), whole


@triton.jit
def _step(
    projected_ptr, ssm_ptr, recent_ptr, times_ptr, rows_ptr, positions_ptr,
    dt_bias_ptr, a_log_ptr, skip_ptr, norm_ptr, gated_ptr, squares_ptr,
    heads, head_dim, state_size, groups, low, high, NORM: tl.constexpr, EXACT: tl.constexpr,
    REPLAYED: tl.constexpr,
    EARLY: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # programs that are adjacent in the grid read adjacent memory
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
    # states and weights may be read before the wait: only `projected` is the last kernel's result
    place = (row * heads + head) * head_dim * state_size + p[:, None] * state_size + n[None, :]
    there = p_there[:, None] & n_there[None, :]
    if EXACT:
        state = tl.load(ssm_ptr + place, eviction_policy="evict_first")
    else:
        state = tl.load(ssm_ptr + place, mask=there, other=0.0, eviction_policy="evict_first")
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    rate = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    skip = tl.load(skip_ptr + head).to(tl.float32)
    group, x_at = head // (heads // groups), head * head_dim + p
    if REPLAYED > 0:
        width = inner + groups * state_size
        own = position % REPLAYED
        kept, times = recent_ptr + row * REPLAYED * width, times_ptr + row * REPLAYED * 2 * heads
        state, whole = _replayed(
            state, kept, times, rate, heads, width, head, x_at, inner + group * state_size + n,
            p_there, n_there, own, REPLAYED,
        )  # fmt: skip
    wait(EARLY)
    projected = projected_ptr + batch.to(tl.int64) * (inner + channels + heads)
    b_at = inner + inner + group * state_size + n
    new_x = tl.load(projected + inner + x_at, mask=p_there, other=0.0)
    new_b = tl.load(projected + b_at, mask=n_there, other=0.0)
    x, b = new_x.to(tl.float32), new_b.to(tl.float32)
    c = tl.load(projected + b_at + groups * state_size, mask=n_there, other=0.0).to(tl.float32)
    raw = tl.load(projected + inner + channels + head).to(tl.float32)
    dt = softplus(raw + dt_bias)
    if position == 0:
        dt = tl.minimum(tl.maximum(dt, low), high)
    state = state * tl.exp(dt * rate) + (dt * x)[:, None] * b[None, :]
    stores = True
    if REPLAYED > 0:
        stores = own == REPLAYED - 1
        if not stores:
            mine = kept + own * width
            tl.store(mine + x_at, new_x, mask=p_there)
            if part == 0:
                tl.store(times + own * 2 * heads + head, dt)
                tl.store(times + (own * 2 + 1) * heads + head, whole + dt)
                if head % (heads // groups) == 0:
                    tl.store(mine + inner + group * state_size + n, new_b, mask=n_there)
    if stores:
        if EXACT:
            tl.store(ssm_ptr + place, state, eviction_policy="evict_first")
        else:
            tl.store(ssm_ptr + place, state, mask=there, eviction_policy="evict_first")
    y = tl.sum(state * c[None, :], axis=1) + skip * x
    gate = tl.load(projected + x_at, mask=p_there, other=0.0).to(tl.float32)
    y = tl.where(p_there, y * silu(gate), 0.0)
    if NORM:
        tl.store(squares_ptr + squares_at, tl.sum(y * y, axis=0))
        y *= tl.load(norm_ptr + x_at, mask=p_there, other=0.0).to(tl.float32)
    tl.store(out, y.to(gated_ptr.dtype.element_ty), mask=p_there)


def mamba_forward(
    mixer: Any, hidden: Tensor, positions: Tensor, state: MambaState, mask: Tensor | None = None
) -> Tensor:
    """Run a Mamba layer as `layers.mamba.mamba_forward` does, with the same arguments."""
    hidden = apply_mask_to_padding_states(hidden, mask)
    gated = gated_scan(mixer, mixer.in_proj(hidden).flatten(0, 1), positions, state, mask)
    norm, groups = mixer.norm, norm_groups(mixer)
    normed = rms_norm(gated, norm.weight, norm.variance_epsilon, groups)
    mixed: Tensor = mixer.out_proj(normed).view(hidden.shape)
    return mixed


def gated_scan(
    mixer: Any,
    projected: Tensor,
    positions: Tensor,
    state: MambaState,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the gated output [B * S, inner], before its norm, from the output of `in_proj`.

    With one token per row, `projected` [B * S, ...] is overwritten by its convolution.
    """
    sizes, weights = MambaSizes.of(mixer), ScanWeights.of(mixer)
    if positions.shape[1] > 1:
        conv = conv_weight(mixer), mixer.conv1d.bias
        return scan(sizes, projected, positions.contiguous(), *conv, weights, state, mask)
    newest = positions[:, 0].contiguous()
    convolve_step(projected, convolution(mixer, newest, state))
    gated = step(sizes, projected, newest, weights, state)
    assert isinstance(gated, Tensor)
    return gated


def convolution(mixer: Any, positions: Tensor, state: MambaState) -> Convolution:
    """Return the layer's convolution for one token per row, at positions [B]."""
    assert state.rows is not None
    inner, bias = MambaSizes.of(mixer).inner, mixer.conv1d.bias
    return Convolution(inner, state.conv, state.rows, positions, conv_weight(mixer), bias)


def conv_weight(mixer: Any) -> Tensor:
    """Return the weight of the convolution, [channels, width]."""
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
    """Compute recurrence and gate for one token in each of B rows, in one kernel.

    Args:
        sizes: the layer's sizes.
        projected: [B, inner + channels + heads], the output of `in_proj`, its channels convolved.
        positions: [B] int; -1 for padding, which reads and writes no state.
        weights: the layer's parameters of the recurrence.
        state: the layer's states of all rows; `state.rows` [B] int selects the batch's, -1 for
            padding.
        norm: [inner], weight of the RMS norm that follows, or None.

    Returns:
        [B, inner] gated output in projected's dtype, zeros at padding; a `DeferredNorm` of it if
        `norm` is given.
    """
    batch = positions.shape[0]
    gated = projected.new_empty(batch, sizes.inner)
    wide = max(16, int(triton.next_power_of_2(sizes.state_size)))
    cut = _cut(batch, replays=state.times is not None)
    block = min(cut.elements, max(16, int(triton.next_power_of_2(sizes.head_dim))))
    parts = int(triton.cdiv(sizes.head_dim, block))
    squares = None if norm is None else state.ssm.new_empty(sizes.heads * parts, batch)
    options = {"num_warps": cut.warps, **early(projected.device)}
    if cut.registers is not None:
        options["maxnreg"] = cut.registers
    _step[(sizes.heads * parts, batch)](
        projected, state.ssm, state.recent, state.times, state.rows, positions,
        *weights, norm, gated, squares,
        sizes.heads, sizes.head_dim, sizes.state_size, sizes.groups, *sizes.time_step_limit,
        NORM=norm is not None, EXACT=parts * block == sizes.head_dim and wide == sizes.state_size,
        REPLAYED=0 if state.times is None else REPLAYED,
        PARTS=parts, P=block, N=wide, **options,
    )  # fmt: skip
    return gated if squares is None else DeferredNorm(gated, squares)


def _cut(rows: int, *, replays: bool) -> StepBlock:
    if not replays:
        return STORING
    return REPLAYING_FEW if rows <= MOST_ROWS else REPLAYING_MANY
