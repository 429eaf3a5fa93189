"""Norm and gate between matrix products of many rows, and functions that kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from granite_paged.layers.triton.linear import early, wait


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)); x itself above 20, as torch does."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def silu(x):
    """Return x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def normed(x, weight, depth, eps):
    """Return the RMS norm of x [DEPTH], float32, zeros after the first `depth` elements."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / depth + eps)
    return x * inverse * weight.to(tl.float32)


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, depth, eps, groups, EARLY: tl.constexpr, DEPTH: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.arange(0, DEPTH)
    there = at < depth
    start = row.to(tl.int64) * depth
    weight = tl.load(weight_ptr + (row % groups) * depth + at, mask=there, other=0.0)
    wait(EARLY)
    x = tl.load(x_ptr + start + at, mask=there, other=0.0).to(tl.float32)
    out = normed(x, weight, depth, eps)
    tl.store(out_ptr + start + at, out.to(out_ptr.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Return the RMS norm of x [rows, depth], contiguous; each of `groups` parts by itself."""
    rows, depth = x.shape
    depth //= groups
    out = x.new_empty(x.shape)
    chosen = {**norm_block(depth), **early(x.device)}
    _rms_norm[(rows * groups,)](x, weight, out, depth, eps, groups, **chosen)
    return out


def norm_block(depth: int) -> dict[str, int]:
    """Return the block and warps of a kernel that norms rows of `depth` elements."""
    block = int(triton.next_power_of_2(depth))
    return {"DEPTH": block, "num_warps": 4 if block <= 2048 else 8}


@triton.jit
def _silu_mul(x_ptr, out_ptr, columns, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    at = x_ptr + row * 2 * columns + column
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    by = tl.load(at + columns, mask=there, other=0.0).to(tl.float32)
    out = silu(gate) * by
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=there)


def silu_mul(x: Tensor) -> Tensor:
    """Return silu(first half) * second half of each row of x [rows, 2 * columns], contiguous."""
    rows, columns = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, columns)
    block = min(1024, triton.next_power_of_2(columns))
    grid = (rows, triton.cdiv(columns, block))
    _silu_mul[grid](x, out, columns, BLOCK=block, **early(x.device))
    return out
