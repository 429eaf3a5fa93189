"""The memory that a runner will use, computed before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from granite_paged.device import available_bytes, one_memory_error
from granite_paged.errors import GeometryError, OutOfMemory
from granite_paged.geometry import CacheGeometry, PagedConfig, bucket
from granite_paged.layers.backend import triton_refusal
from granite_paged.layers.mamba import EXACT_CHUNK, Kept, MambaSizes, mixers
from granite_paged.layers.triton import SCRATCH_NUMBERS, SCRATCH_TILES

DEFAULT_SEQUENCES = 256
"""Rows of a runner if `max_sequences` is not given and they fit."""

DEFAULT_HOST_TOKENS = 8192
"""Tokens of a CPU pool if `max_tokens` is not given."""

SCORED_AT_ONCE = 256
"""Tokens per batch of logits while continuations are scored."""

_MATRIX_WORKSPACE = 32 * 2**20  # bytes per stream; cuBLAS on Hopper takes 8 buffers of 4 MiB
_MOST_ELEMENTS = 2**31 - 1  # most elements of a layer's keys; more need slower 64-bit offsets
_ROWS_SHARE = 0.5  # largest share of the budget for rows if `max_tokens` is not given


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory by purpose, in bytes.

    Attributes:
        weight_bytes: the model's parameters and buffers, shared ones once.
        row_bytes: Mamba states of all rows; the null row has none.
        page_bytes: K and V of all pages, the null page included, and the page tables.
        workspace_bytes: intermediate tensors of the largest step.
        logit_bytes: logits of one step.
        graph_bytes: workspaces of cuBLAS and of the products in `layers/triton`.
        prefix_bytes: Mamba states that an engine keeps for shared prefixes, at most.
    """

    weight_bytes: int
    row_bytes: int
    page_bytes: int
    workspace_bytes: int
    logit_bytes: int
    graph_bytes: int
    prefix_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum: the peak to expect."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class RunnerSizes:
    """Capacity of a runner.

    Attributes:
        rows: sequences at once, without the null row.
        pages: pages of each pool, the null page included.
        longest: most tokens of a sequence.
    """

    rows: int
    pages: int
    longest: int


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers; a shared one counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def kept_inputs(model: Any, config: PagedConfig) -> Kept:
    """Return which inputs rows keep beside their Mamba states."""
    if model.device.type != "cuda":
        return Kept.NOTHING
    if config.exact:
        return Kept.CHUNK
    return Kept.NOTHING if triton_refusal(model, config.backend) else Kept.REPLAY


def row_bytes(model: Any, config: PagedConfig) -> int:
    """Return the bytes of one row's Mamba states, over all layers."""
    sizes, kept = map(MambaSizes.of, mixers(model).values()), kept_inputs(model, config)
    return sum(each.state_bytes(model.dtype, kept) for each in sizes)


def choose_sizes(
    model: Any, config: PagedConfig, geometry: CacheGeometry, free: int
) -> RunnerSizes:
    """Choose rows and pages for a device with `free` bytes of free memory.

    Raises:
        OutOfMemory: if the rows and tokens of `config`, or one row and one page, do not fit.
    """
    per_row, per_page = row_bytes(model, config), geometry.bytes_per_page
    budget = int(config.memory_fraction * free)
    rows = config.max_sequences or DEFAULT_SEQUENCES
    if config.max_sequences is None and per_row:
        rows = max(1, min(rows, int(_ROWS_SHARE * budget) // per_row))
    on_host = model.device.type == "cpu"
    tokens = config.max_tokens or (DEFAULT_HOST_TOKENS if on_host else None)
    if tokens is not None:
        pages = 1 + geometry.pages_for(tokens)
    else:
        per_layer = geometry.kv_heads * geometry.head_dim * geometry.page_size
        pages = min((budget - rows * per_row) // per_page, _MOST_ELEMENTS // per_layer)
    needed = rows * per_row + max(pages, 2) * per_page
    if needed > free or pages < 2:
        raise OutOfMemory(
            what=f"{rows} rows and {max(pages, 2)} pages of {config.page_size} tokens need "
            f"{needed / 1e9:.2f} GB",
            free=free,
            advice="lower PagedConfig.page_size, max_sequences or max_tokens",
        )
    held = (pages - 1) * config.page_size
    return RunnerSizes(rows, pages, min(held, _positions(model)))


def plan_memory(
    model: Any, config: PagedConfig, geometry: CacheGeometry, sizes: RunnerSizes
) -> MemoryPlan:
    """Return the memory plan of a runner with these sizes."""
    width = geometry.pages_for(sizes.longest)
    tables = 4 * ((sizes.rows + 1) * width + sizes.pages)
    logits = max(bucket(sizes.rows), SCORED_AT_ONCE)
    on_gpu = model.device.type == "cuda"
    return MemoryPlan(
        weight_bytes=weight_bytes(model),
        row_bytes=sizes.rows * row_bytes(model, config),
        page_bytes=sizes.pages * geometry.bytes_per_page + tables,
        workspace_bytes=_workspace_bytes(model, config, geometry),
        logit_bytes=logits * model.config.vocab_size * model.dtype.itemsize,
        graph_bytes=2 * _MATRIX_WORKSPACE + 4 * (SCRATCH_NUMBERS + SCRATCH_TILES) if on_gpu else 0,
    )


@contextmanager
def memory_refused(device: torch.device, what: str) -> Iterator[None]:
    """Turn every error that says that memory ran out into `OutOfMemory`; release cached memory.

    what: the subject of the message, such as "a step".
    """
    try:
        with one_memory_error():
            yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise OutOfMemory(
            what=f"{what} did not fit",
            free=available_bytes(device),
            advice="lower PagedConfig.chunk_tokens, max_sequences or memory_fraction",
        ) from None


def _positions(model: Any) -> int:
    longest = model.config.max_position_embeddings
    if longest < 1:
        raise GeometryError(f"max_position_embeddings must be positive, got {longest}")
    return int(longest)


def _workspace_bytes(model: Any, config: PagedConfig, geometry: CacheGeometry) -> int:
    """Return the most bytes that a layer's intermediate tensors take in a step."""
    tokens, kept = config.chunk_tokens, kept_inputs(model, config)
    item, hidden = model.dtype.itemsize, model.config.hidden_size
    query, key = (heads * geometry.head_dim for heads in (geometry.query_heads, geometry.kv_heads))
    feed_forward = 3 * model.config.shared_intermediate_size
    attention = 5 * query + 2 * key  # projections, then query folded, output, unfolded
    widest = item * max(feed_forward + hidden, attention + hidden)
    for mixer in mixers(model).values():
        widest = max(widest, _scan_bytes(MambaSizes.of(mixer), hidden, item, kept))
    return int(tokens * (widest + 3 * hidden * item))


def _scan_bytes(sizes: MambaSizes, hidden: int, item: int, kept: Kept) -> int:
    """Return the bytes per token of a Mamba layer's intermediate tensors.

    They are: projected, convolved, gated and mixed channels; decays; chunk states; similarities of
    a chunk's tokens, which exact mode computes where it needs them.
    """
    projected = sizes.inner + sizes.channels + sizes.heads
    per_state = torch.float32.itemsize + item  # added by a chunk, and entering it
    exact = kept is Kept.CHUNK
    chunk = EXACT_CHUNK if exact else min(sizes.chunk_size, 256)
    states = per_state * sizes.ssm_elements // chunk
    decays = 2 * torch.float32.itemsize * sizes.heads
    similarities = 0 if exact else torch.float32.itemsize * sizes.groups * chunk
    channels = projected + sizes.channels + 2 * sizes.inner + hidden
    return item * channels + decays + states + similarities
