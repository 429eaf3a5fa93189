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
from typing import Any, TypeVar, cast

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


# -- decode -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How a decode step's attention is laid out on a GPU.

    Attributes:
        splits: parts that each row's pages are divided into, computed independently.
        block: tokens per block of FlexAttention's kernel.
        warps, stages: warps per program and stages of its load pipeline.
    """

    splits: int
    block: int
    warps: int
    stages: int

    @classmethod
    def choose(
        cls, geometry: CacheGeometry, batch: int, pages: int, device: torch.device
    ) -> DecodePlan:
        """Return the tuned plan for `batch` rows of at most `pages` pages each.

        Blocks are halved until their pipeline fits the device's shared memory.
        """
        plan = cls.from_constants(TUNED.for_batch(batch), geometry, batch, pages, device)
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
    ) -> DecodePlan:
        """Return the plan that these constants give, whether or not it fits the device.

        FlexAttention's own split (SPLIT_KV) divides the *pool*, of which a sequence is a small
        part, so rows are split before the call: into as many parts as give each multiprocessor
        `parts_per_multiprocessor` programs. More parts cost more to combine than they gain.
        """
        parts = int(constants.parts_per_multiprocessor * multiprocessors(device))
        return cls(
            splits=max(1, min(pages, parts // max(1, batch * geometry.kv_heads))),
            block=min(constants.block, geometry.page_size),
            warps=constants.warps,
            stages=constants.stages,
        )

    def options(self, *, beyond_32_bits: bool) -> FlexKernelOptions:
        """Return the options for `flex_attention(kernel_options=...)`.

        Split rows use FlexAttention's decode kernel. Whole rows use its main kernel: the decode
        kernel would need a second kernel that divides its sums.

        beyond_32_bits: whether the pool has 2**31 elements or more; see `kernel_options`.
        """
        options: dict[str, Any] = {
            "BLOCK_M": SMALLEST_KERNEL_BLOCK,
            "BLOCK_N": self.block,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        if beyond_32_bits or self.splits == 1:
            options["FORCE_USE_FLEX_ATTENTION"] = True
        else:
            options["SPLIT_KV"] = 1  # works, but is missing from torch's list of options
        return cast("FlexKernelOptions", options)


def _kv_bytes(block: int, head_dim: int, itemsize: int) -> int:
    """Return the bytes of K and V of a block of tokens."""
    return 2 * block * head_dim * itemsize


def split_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    plan: DecodePlan,
) -> Tensor:
    """Compute attention of one token per row, in `plan.splits` parts that are then combined.

    Args:
        query: [B, Hq, D].
        keys, values: [1, Hkv, slots, D], the pool.
        mask: from `split_block_mask`, for B * splits rows.
        scale: factor on the scores.
        plan: from `DecodePlan.choose`.

    Returns:
        [B, Hq, D]; zeros for padding.
    """
    return _call_compiled(_attend_split, query, keys, values, mask, scale, plan)


def _attend_split(
    query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float, plan: DecodePlan
) -> Tensor:
    batch, _, head_dim = query.shape
    by_group = query.view(batch, 1, keys.shape[1], -1, head_dim)  # [B, 1, Hkv, G, D]
    parts = by_group.expand(-1, plan.splits, -1, -1, -1).reshape(-1, *by_group.shape[2:])
    options = plan.options(beyond_32_bits=keys.numel() >= 2**31)
    attend = functools.partial(
        flex_attention, parts, keys, values, block_mask=mask, scale=scale, kernel_options=options
    )
    if plan.splits == 1:
        return attend().reshape(query.shape)
    out, aux = attend(return_aux=AuxRequest(lse=True))
    return combined(out, aux.lse, plan.splits)


def combined(parts: Tensor, logsumexp: Tensor, splits: int) -> Tensor:
    """Combine the parts of rows, each weighted by its share of the row's softmax.

    Args:
        parts: [B * splits, Hkv, G, D].
        logsumexp: [B * splits, Hkv, G] float32; -inf for a part without pages.
        splits: parts per row.

    Returns:
        [B, Hq, D] in the dtype of `parts`; zeros where no part has pages.
    """
    rows, kv_heads, group, head_dim = parts.shape
    by_part = parts.reshape(rows // splits, splits, kv_heads * group, head_dim).float()
    # expanded to the shape of the parts: Inductor fuses reductions over the same elements
    shares = logsumexp.reshape(*by_part.shape[:-1], 1).expand(by_part.shape)
    highest = shares.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weight = (shares - highest).exp()
    total = weight.sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((by_part * weight).sum(dim=1) / total).to(parts.dtype)


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
