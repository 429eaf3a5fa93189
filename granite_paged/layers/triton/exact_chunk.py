"""A chunk of Mamba-2 in exact mode: its formulas, for one token and for several.

A state is only ever stored at the sequence's own multiples of `EXACT_CHUNK` tokens. The inputs
since then are kept in `recent`, and every step computes from them::

    ssm      [rows, heads, head_dim, state_size] float32     state after the last whole chunk
    recent   [rows, EXACT_CHUNK, channels + heads]            its successors: x, B and C after the
                                                              convolution, and dt before its bias
    y_i  =  exp(a_i) C_i . ssm  +  sum over j <= i of exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  D x_i

a is the sum of dt A from the start of the chunk. It is computed in integers, in units of
1 / `UNIT`, so its value does not depend on the order of the sum. Decode (`exact_step.py`) and
prefill (`exact_scan.py`) evaluate this with the same products; a tensor core sums each element in
the same order in tiles of any size. Formulas: Dao and Gu 2024, "Transformers are SSMs", section 6.
"""

from __future__ import annotations

import triton
import triton.language as tl

from granite_paged.layers.mamba import MambaSizes
from granite_paged.layers.triton.pointwise import softplus

UNIT = tl.constexpr(2.0**40)
"""Sums of dt A are integers in units of its inverse. 64 terms of at least -2**15 fit 62 bits."""

LOWEST = tl.constexpr(-32768.0)
"""Least dt A. exp of it is 0 in float32."""


@triton.jit
def _fixed(dt, rate):
    """Return dt * rate as integers, in units of 1 / UNIT."""
    return (tl.maximum(dt * rate, LOWEST) * UNIT).to(tl.int64)


@triton.jit
def _plain(sums):
    """Return sums of `_fixed` as float32."""
    return sums.to(tl.float32) * (1.0 / UNIT)


@triton.jit
def sums_of(dt, rate):
    """Return the cumulative sums of dt * rate [L], and the last of them, as float32."""
    fixed = _fixed(dt, rate)
    return _plain(tl.cumsum(fixed, axis=0)), _plain(tl.sum(fixed, axis=0))


@triton.jit
def time_step(raw, bias, low, high):
    return tl.minimum(tl.maximum(softplus(raw.to(tl.float32) + bias), low), high)


@triton.jit
def added_by(x, b, dt, sums, whole):
    """Return what a chunk of x [L, P] and b [L, N] adds to the state, [N, P]."""
    to_end = tl.exp(whole - sums) * dt
    scaled = (x.to(tl.float32) * to_end[:, None]).to(x.dtype)
    return tl.dot(tl.trans(b), scaled, input_precision="ieee")


@triton.jit
def advanced(state, whole, added):
    """Return the state after a chunk."""
    return tl.fma(state, tl.zeros_like(state) + tl.exp(whole), added)


@triton.jit
def similarity_of(c, b):
    """Return the products of c [M, N] and b [L, N], [M, L]."""
    return tl.dot(c, tl.trans(b), input_precision="ieee")


@triton.jit
def outputs_of(c, similar, x, state, dt, sums, to_sums, causal):
    """Return the outputs [M, P] of M of a chunk's tokens.

    c [M, N], x [L, P], state [N, P] in their dtype; similar [M, L], of `similarity_of`;
    dt, sums [L]; to_sums [M]; causal [M, L].
    """
    carried = tl.dot(c, state, input_precision="ieee") * tl.exp(to_sums)[:, None]
    since = tl.where(causal, to_sums[:, None] - sums[None, :], float("-inf"))
    weight = tl.exp(since) * dt[None, :] * similar
    return tl.dot(weight.to(x.dtype), x, carried, input_precision="ieee")


def blocks_of(sizes: MambaSizes, chunk: int, most: int = 1 << 30) -> tuple[dict[str, int], int]:
    """Return a kernel's block sizes, and the parts of a head: at most `most` elements each.

    chunk: tokens of a chunk.
    """
    whole = max(16, int(triton.next_power_of_2(sizes.head_dim)))
    state = max(16, int(triton.next_power_of_2(sizes.state_size)))
    part = min(most, whole)
    return {"L": chunk, "P": part, "N": state}, whole // part
