"""What a runner will take of a device's memory, computed before anything is allocated.

::

    weights     the model's parameters, shared ones once
    rows        Mamba states of all rows; the null row has none
    pages       K and V of all pages, the null page included, and the page tables
    workspace   what the layers of the largest step hold at once
    logits      of the rows of a step
    graphs      workspaces of the matrix library, one a stream, and of our own products
    prefixes    Mamba states that an engine keeps for prompts that begin alike, at most
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from granite_paged.device import available_bytes
from granite_paged.errors import GeometryError, OutOfMemory
from granite_paged.geometry import CacheGeometry, PagedConfig, bucket
from granite_paged.layers.mamba import MambaSizes
from granite_paged.layers.triton import SCRATCH_NUMBERS, SCRATCH_TILES

DEFAULT_SEQUENCES = 256
"""Rows of a runner whose `max_sequences` is not given, where they fit."""

DEFAULT_HOST_TOKENS = 8192
"""Tokens of a pool on the CPU, where attention is dense over the whole pool."""

SCORED_AT_ONCE = 256
"""Tokens whose logits exist at once while continuations are scored."""

_MATRIX_WORKSPACE = 32 * 2**20  # cuBLAS on Hopper: 8 buffers of 4 MiB
_MOST_ELEMENTS = 2**31 - 1  # of one layer's keys: beyond, kernels need slower 64-bit offsets
_ROWS_SHARE = 0.5  # most of the budget that rows may take when pages are not bounded


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, by what they are for."""

    weights: int
    rows: int
    pages: int
    workspace: int
    logits: int
    graphs: int
    prefixes: int = 0

    @property
    def total(self) -> int:
        """All of them: the peak to expect."""
        return sum(asdict(self).values())

    def describe(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(self).items())
        return f"{self.total / 1e9:.2f} GB: {parts}"


@dataclass(frozen=True, slots=True)
class RunnerSizes:
    """How much a runner holds.

    Attributes:
        rows: sequences at once, the null row not counted.
        pages: of each pool, the null page included.
        longest: most tokens a sequence may hold.
    """

    rows: int
    pages: int
    longest: int


def weights_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def row_bytes(model: Any) -> int:
    """Mamba states of one row, over all layers."""
    return sum(
        MambaSizes.of(layer.mamba).state_bytes(model.dtype)
        for layer in model.base_model.layers
        if layer.mamba is not None
    )


def choose_sizes(
    model: Any, config: PagedConfig, geometry: CacheGeometry, free: int
) -> RunnerSizes:
    """Rows and pages for a device with so many bytes free.

    Raises:
        OutOfMemory: if what was asked for, or one row and a page, does not fit.
    """
    per_row, per_page = row_bytes(model), geometry.bytes_per_page
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
            what=f"{rows} rows and {max(pages, 2)} pages need {needed / 1e9:.2f} GB",
            free=free,
            advice="lower PagedConfig.max_sequences or max_tokens",
        )
    held = (pages - 1) * config.page_size
    return RunnerSizes(rows, pages, min(held, _positions(model)))


def make_plan(
    model: Any, config: PagedConfig, geometry: CacheGeometry, sizes: RunnerSizes
) -> MemoryPlan:
    """The plan for a runner of these sizes."""
    width = geometry.pages_for(sizes.longest)
    tables = 4 * ((sizes.rows + 1) * width + sizes.pages)
    logits = max(bucket(sizes.rows), SCORED_AT_ONCE)
    on_gpu = model.device.type == "cuda"
    return MemoryPlan(
        weights=weights_bytes(model),
        rows=sizes.rows * row_bytes(model),
        pages=sizes.pages * geometry.bytes_per_page + tables,
        workspace=_workspace(model, geometry, config.chunk_tokens),
        logits=logits * model.config.vocab_size * model.dtype.itemsize,
        graphs=2 * _MATRIX_WORKSPACE + 4 * (SCRATCH_NUMBERS + SCRATCH_TILES) if on_gpu else 0,
    )


@contextmanager
def memory_refused(device: torch.device, what: str) -> Iterator[None]:
    """Say by name that the device's memory did not do, and give back what was cached."""
    try:
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
        raise GeometryError(f"max_position_embeddings must be positive, {longest} given")
    return int(longest)


def _workspace(model: Any, geometry: CacheGeometry, tokens: int) -> int:
    """The most that a layer of the largest step holds at once, beside the hidden states."""
    item, hidden = model.dtype.itemsize, model.config.hidden_size
    query, key = (heads * geometry.head_dim for heads in (geometry.query_heads, geometry.kv_heads))
    feed_forward = 3 * model.config.shared_intermediate_size
    attention = 5 * query + 2 * key  # projected, folded, answered, unfolded
    widest = item * max(feed_forward + hidden, attention + hidden)
    mixers = [layer.mamba for layer in model.base_model.layers if layer.mamba is not None]
    if mixers:
        widest = max(widest, _scan_bytes(MambaSizes.of(mixers[0]), hidden, item))
    return int(tokens * (widest + 3 * hidden * item))


def _scan_bytes(sizes: MambaSizes, hidden: int, item: int) -> int:
    """Bytes a token that a Mamba layer holds: projected, convolved, gated, decays, chunk states."""
    projected = sizes.inner + sizes.channels + sizes.heads
    per_state = torch.float32.itemsize + item  # what a chunk adds, and what enters it
    states = per_state * sizes.inner * sizes.state_size // min(sizes.chunk_size, 256)
    decays = 2 * torch.float32.itemsize * sizes.heads
    return item * (projected + sizes.channels + 2 * sizes.inner + hidden) + decays + states
