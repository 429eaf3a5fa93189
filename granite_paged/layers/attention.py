"""Attention of a batch of queries over the pool: fold the group, call FlexAttention, unfold.

Where no fused kernel runs, `gathered.py` computes the same in plain PyTorch.

In decode kernels, `enable_gqa` refuses group sizes that are no power of two, and repeating K and V
would copy the cache. So the G query heads of a KV head are folded into the rows of its query::

    [B, Hq, S, D]  ->  [B, Hkv, S * G, D]      row = token * G + head in group
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

from granite_paged.device import has_tma, multiprocessors, shared_memory, stages_that_fit
from granite_paged.errors import GeometryError
from granite_paged.geometry import Backend, CacheGeometry
from granite_paged.layers.backend import (
    COMPILING,
    SMALLEST_KERNEL_BLOCK,
    attention_backend,
    check_compilable,
)
from granite_paged.layers.gathered import gathered_attention
from granite_paged.layers.tuning import TUNED, DecodeConstants, PrefillConstants
from granite_paged.paging.masks import QUERY_BLOCK, blocks_of

_T = TypeVar("_T")

WIDEST_TUNED_HEAD = 128
"""Most elements per head for which the tuned number of stages fits a multiprocessor."""

UNTUNED_BLOCK = 64
"""Query rows and tokens per block where nothing is tuned. It fits every dtype and head size."""

_QUERY_BYTES = UNTUNED_BLOCK * WIDEST_TUNED_HEAD * 2  # shared memory for a block of queries

RECOMPILE_LIMIT = 1024
"""Most compilations of one function per process. Dynamo's default of 8 counts all models, dtypes
and shapes together, and a call beyond the limit fails."""


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    backend: Backend = "auto",
    options: FlexKernelOptions | None = None,
) -> Tensor:
    """Compute causal attention of each row over its own pages.

    Args:
        query: [B, Hq, S, D].
        keys, values: [1, Hkv, pages * page_size, D], the pool, with this step's tokens written.
        block_mask: from `paged_block_mask`, for at least B rows and S query tokens.
        scale: factor on the scores (the model's `attention_multiplier`).
        backend: see `Backend`. Inside a traced region the call is always compiled.
        options: kernel options for FlexAttention that replace those of `kernel_options`.

    Returns:
        [B, Hq, S, D]; zeros for padding queries.

    Raises:
        GeometryError: if the mask is for another pool, or for fewer rows or tokens; if compiled,
            for float64 and for pages or heads that the fused kernel cannot compute.
    """
    if not torch.compiler.is_compiling():
        _check_mask(query, keys, block_mask)
    compiling = torch.compiler.is_compiling()
    if not compiling and _is_eager(backend, query):
        return gathered_attention(query, keys, values, block_mask, scale)
    _check_compilable(query, block_mask)
    folded = _fold(query, keys.shape[1], block_mask.shape)
    if compiling:
        out = _fused(folded, keys, values, block_mask, scale, options)
    else:
        options = options or _device_options(block_mask, keys)
        out = _call_compiled(_fused, folded, keys, values, block_mask, scale, options)
    return _unfold(out, query.shape)


def _is_eager(backend: Backend, query: Tensor) -> bool:
    return attention_backend(backend, query.device, query.dtype, query.shape[3]) == "eager"


def _check_mask(query: Tensor, keys: Tensor, mask: BlockMask) -> None:
    """Check that the mask is for this pool, and for enough rows and tokens."""
    batch, _, rows, slots = mask.shape
    needed = query.shape[2] * (query.shape[1] // keys.shape[1])
    if slots != keys.shape[2] or batch < query.shape[0] or rows < needed:
        raise GeometryError(
            f"a mask of {batch} sequences, {rows} folded rows and {slots} slots does not fit "
            f"{query.shape[0]} sequences, {needed} rows and a pool of {keys.shape[2]} slots: "
            "make it with the same batch, page size and pool"
        )


def _fold(query: Tensor, kv_heads: int, mask_shape: tuple[int, ...]) -> Tensor:
    """[B, Hq, S, D] -> [rows, Hkv, S * G, D], padded with zeros to the mask's rows and tokens"""
    batch, query_heads, _, head_dim = query.shape
    group = query_heads // kv_heads
    by_group = query.view(batch, kv_heads, group, -1, head_dim).transpose(2, 3)  # [B, Hkv, S, G, D]
    folded = by_group.reshape(batch, kv_heads, -1, head_dim)
    more_rows, more_tokens = mask_shape[0] - batch, mask_shape[2] - folded.shape[2]
    if more_rows or more_tokens:
        folded = torch.nn.functional.pad(folded, (0, 0, 0, more_tokens, 0, 0, 0, more_rows))
    return folded


def _unfold(out: Tensor, shape: torch.Size) -> Tensor:
    """[rows, Hkv, S * G, D] -> [B, Hq, S, D]"""
    batch, query_heads, tokens, head_dim = shape
    group = query_heads // out.shape[1]
    by_group = out[:batch, :, : tokens * group].reshape(batch, -1, tokens, group, head_dim)
    return by_group.transpose(2, 3).reshape(batch, query_heads, tokens, head_dim)


# -- captured steps -------------------------------------------------------------------------------


class Queries(NamedTuple):
    """Queries of a captured step, where FlexAttention reads them.

    FlexAttention is compiled for every shape, and takes seconds for each. Here the shape is the
    mask's, so that steps of many batches and lengths share a compiled kernel.

    Attributes:
        tensor: [B', Hkv, rows, D], as the mask has it. Rows without a token may hold anything:
            they attend to nothing.
        places: [B, S, copies, Hkv, G, D], a view of `tensor`: where each token's queries are.
    """

    tensor: Tensor
    places: Tensor


def block_queries(like: Tensor, mask: BlockMask, *, kv_heads: int) -> Queries:
    """Return room for the queries of all rows, one after the other, in blocks of `QUERY_BLOCK`.

    Args:
        like: [B, S, Hq, D].
        mask: from `QueryBlockMask`.
        kv_heads: KV heads (Hkv).
    """
    batch, tokens, heads, head_dim = like.shape
    blocks = like.new_empty(kv_heads, mask.shape[0], QUERY_BLOCK, head_dim).transpose(0, 1)
    places = _by_token(blocks, batch, tokens, heads // kv_heads)
    return Queries(blocks, places[:, :, None])


def block_attention(
    queries: Queries, keys: Tensor, values: Tensor, mask: BlockMask, *, scale: float
) -> Tensor:
    """Compute causal attention of each row over its own pages, in separate blocks of queries.

    Args:
        queries: from `block_queries`, written.
        keys, values: [1, Hkv, slots, D], the pool, with this step's tokens written.
        mask: from `QueryBlockMask`.
        scale: factor on the scores.

    Returns:
        [B, S, Hq, D]; zeros for padding queries.
    """
    batch, tokens, _, kv_heads, group, head_dim = queries.places.shape
    options = _device_options(mask, keys)
    out = _call_compiled(_fused, queries.tensor, keys, values, mask, scale, options)
    by_token = _by_token(out, batch, tokens, group)
    return by_token.reshape(batch, tokens, kv_heads * group, head_dim)


def _by_token(blocks: Tensor, batch: int, tokens: int, group: int) -> Tensor:
    """View what rows fill of [blocks, Hkv, QUERY_BLOCK, D], as [B, S, Hkv, G, D].

    In memory, the blocks of a head follow each other: a token's queries may lie in two of them.
    """
    _, kv_heads, _, head_dim = blocks.shape
    each = blocks_of(tokens, group)
    used = blocks.transpose(0, 1)[:, : batch * each]
    by_row = used.reshape(kv_heads, batch, each * QUERY_BLOCK, head_dim)
    filled = by_row[:, :, : tokens * group].view(kv_heads, batch, tokens, group, head_dim)
    return filled.permute(1, 2, 0, 3, 4)


# -- decode -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a decode step's attention is laid out on a GPU.

    Attributes:
        parts: parts of all rows together; those that no row has are computed too.
        splits: parts that each row's pages are divided into, computed independently.
        block: tokens per block of FlexAttention's kernel.
        warps, stages: warps per program and stages of its load pipeline.
    """

    parts: int
    splits: int
    block: int
    warps: int
    stages: int

    @classmethod
    def choose(
        cls, geometry: CacheGeometry, batch: int, pages: int, device: torch.device, most: int
    ) -> DecodePlan:
        """Return the tuned plan for `batch` rows of at most `pages` pages each.

        Blocks are halved until their pipeline fits the device's shared memory.

        most: rows of the largest step that shares the compiled kernel; `batch` or more.
        """
        constants = TUNED.for_batch(batch)
        plan = cls.from_constants(constants, geometry, batch, pages, device, most)
        memory, block = shared_memory(device), plan.block
        per_token = plan.stages * _kv_bytes(1, geometry.head_dim, geometry.dtype.itemsize)
        while block > SMALLEST_KERNEL_BLOCK and per_token * block > memory:
            block //= 2
        return replace(plan, block=block)

    @classmethod
    def from_constants(
        cls,
        constants: DecodeConstants,
        geometry: CacheGeometry,
        batch: int,
        pages: int,
        device: torch.device,
        most: int,
    ) -> DecodePlan:
        """Return the plan that these constants give, whether or not it fits the device.

        FlexAttention's own split (SPLIT_KV) divides the *pool*, of which a sequence is a small
        part, so rows are split before the call: into as many parts as give each multiprocessor
        `parts_per_multiprocessor` programs. More parts cost more to combine than they gain.

        The number of parts is the same for all batches whose rows are split, and for all others,
        since FlexAttention is compiled for each number. A part that no row has ends at once.
        """
        programs = int(constants.parts_per_multiprocessor * multiprocessors(device))
        parts = programs // geometry.kv_heads
        splits = max(1, min(pages, parts // batch))
        return cls(
            parts=parts if splits > 1 else most,
            splits=splits,
            block=min(constants.block, geometry.page_size),
            warps=constants.warps,
            stages=constants.stages,
        )

    def options(self) -> FlexKernelOptions:
        """Return the options for `flex_attention(kernel_options=...)`.

        FlexAttention's decode kernel would leave more to other kernels: it does not divide its
        sums. And it did not compile for pools that need 64-bit offsets (torch 2.11).
        """
        return {
            "BLOCK_M": SMALLEST_KERNEL_BLOCK,
            "BLOCK_N": self.block,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "FORCE_USE_FLEX_ATTENTION": True,
        }


def _kv_bytes(block: int, head_dim: int, itemsize: int) -> int:
    """Return the bytes of K and V of a block of tokens."""
    return 2 * block * head_dim * itemsize


def split_queries(like: Tensor, plan: DecodePlan, *, kv_heads: int) -> Queries:
    """Return room for the queries of all parts, [parts, Hkv, G, D].

    Args:
        like: [B, Hq, D].
        plan: how rows are split: each has a copy for each of its parts.
        kv_heads: KV heads (Hkv).
    """
    batch, heads, head_dim = like.shape
    tensor = like.new_empty(plan.parts, kv_heads, heads // kv_heads, head_dim)
    used = tensor[: batch * plan.splits]
    return Queries(tensor, used.view(batch, 1, plan.splits, *tensor.shape[1:]))


def split_attention(
    queries: Queries,
    keys: Tensor,
    values: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    plan: DecodePlan,
) -> Tensor:
    """Compute attention of one token per row, in `plan.splits` parts that are then combined.

    Args:
        queries: from `split_queries`, written.
        keys, values: [1, Hkv, slots, D], the pool.
        mask: from `SplitMask`, for `plan.parts` parts.
        scale: factor on the scores.
        plan: from `DecodePlan.choose`.

    Returns:
        [B, Hq, D]; zeros for padding.
    """
    batch, *_, head_dim = queries.places.shape
    arguments = (queries.tensor, keys, values, mask, scale, plan.options())
    if plan.splits == 1:
        return _call_compiled(_fused, *arguments)[:batch].view(batch, -1, head_dim)
    from granite_paged.layers.triton.combine import combine  # needs Triton

    return combine(*_call_compiled(_attend_parts, *arguments), batch, plan.splits)


def _attend_parts(
    parts: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: BlockMask,
    scale: float,
    options: FlexKernelOptions,
) -> tuple[Tensor, Tensor]:
    """Return what each part finds [parts, Hkv, G, D], and the logsumexp of its scores."""
    out, aux = flex_attention(
        parts,
        keys,
        values,
        block_mask=mask,
        scale=scale,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


# -- compiled -----------------------------------------------------------------------------------


def _fused(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: BlockMask,
    scale: float,
    options: FlexKernelOptions | None,
) -> Tensor:
    if options is None and query.is_cuda:
        options = kernel_options(mask, keys)
    out = flex_attention(query, keys, values, block_mask=mask, scale=scale, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


def kernel_options(mask: BlockMask, pool: Tensor) -> FlexKernelOptions:
    """Return the options of FlexAttention's CUDA kernels for a pool [1, Hkv, slots, D].

    A block must not span two pages. For half precision and heads of up to `WIDEST_TUNED_HEAD`,
    block sizes, warps and stages are measured (`tuning.py`). Otherwise warps and stages are
    FlexAttention's defaults, which fit a multiprocessor. Pools that need 64-bit offsets use its
    main kernel: its decode kernel did not compile for them with torch 2.11.
    """
    page_size, prefill = mask.BLOCK_SIZE[1], mask.shape[2] > SMALLEST_KERNEL_BLOCK
    if prefill and pool.dtype.itemsize == 2 and pool.shape[3] <= WIDEST_TUNED_HEAD:
        options = prefill_options(TUNED.prefill, page_size)
    else:
        rows = UNTUNED_BLOCK if prefill else SMALLEST_KERNEL_BLOCK
        options = {"BLOCK_N": min(UNTUNED_BLOCK, page_size), "BLOCK_M": rows}
    if pool.numel() >= 2**31:
        options["FORCE_USE_FLEX_ATTENTION"] = True
    return options


def _device_options(mask: BlockMask, pool: Tensor) -> FlexKernelOptions | None:
    """Return `kernel_options` as this GPU can use them, or None where nothing is tuned.

    If shared memory requires it, stages are fewer. Not for traced regions: it asks the device.
    """
    options = kernel_options(mask, pool)
    stages = options.get("num_stages")
    if not pool.is_cuda or stages is None:
        return None
    block = _kv_bytes(options["BLOCK_N"], pool.shape[3], pool.itemsize)
    fewer = stages_that_fit(stages, block, shared_memory(pool.device) - _QUERY_BYTES)
    return on_device({**options, "num_stages": fewer}, pool.device)


def on_device(options: FlexKernelOptions, device: torch.device) -> FlexKernelOptions:
    """Return tuned options that load K and V by TMA where the device has it."""
    return {**options, "USE_TMA": has_tma(device)}


def prefill_options(constants: PrefillConstants, page_size: int) -> FlexKernelOptions:
    """Return the kernel options that these constants give for this page size."""
    return {
        "BLOCK_M": constants.BLOCK_M,
        "BLOCK_N": min(constants.BLOCK_N, page_size),
        "num_warps": constants.warps,
        "num_stages": constants.stages,
    }


def _call_compiled(function: Callable[..., _T], *args: Any) -> _T:
    """Call a function that is compiled once per shape. Callers bucket shapes, so these are few.

    Dynamic shapes are off: once page or group sizes have varied in a process, dynamo would make
    them symbols too, and FlexAttention then fails or returns wrong values (torch 2.11).
    """
    limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
    with COMPILING, torch._dynamo.config.patch(limits):
        compiled: Callable[..., _T] = _compiled(function)
        return compiled(*args)


@functools.cache
def _compiled(function: Callable[..., _T]) -> Callable[..., _T]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _check_compilable(query: Tensor, mask: BlockMask) -> None:
    page_size, head_dim = mask.BLOCK_SIZE[1], query.shape[3]
    check_compilable(query.device, query.dtype, page_size=page_size, head_dim=head_dim)
