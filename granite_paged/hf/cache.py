"""A transformers `Cache`: pages for attention layers, rows for Mamba layers.

A step, in the order of its calls::

    begin_step   host    tokens that each row adds -> allocator (all rows or none)
                 copy    entries of the page table; positions
                 device  copy-on-write, page table, slots, BlockMask
    write        device  K and V into the pool; the pool goes to FlexAttention
    end_step     host    refuse NaN, count the columns

Rows of the batch are sequences of the allocator. transformers counts columns (`get_seq_length`),
pages hold tokens: see `padding.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from granite_paged.device import available_bytes
from granite_paged.errors import (
    CacheReleased,
    GeometryError,
    GranitePagedError,
    InvalidRequest,
    NonFinite,
    NotPatched,
    OutOfPages,
    OutOfRows,
    require,
)
from granite_paged.geometry import CacheGeometry, PagedConfig, bucket
from granite_paged.hf.layer_views import LayerViews
from granite_paged.hf.padding import PaddedBatch, PaddedStep
from granite_paged.hf.step import CacheStep, check_has_kernel, make_step
from granite_paged.layers.backend import attention_backend
from granite_paged.layers.mamba import MambaRows
from granite_paged.paging.allocator import PageAllocator
from granite_paged.paging.masks import PADDING
from granite_paged.paging.store import PageStore

_GROWTH = 1.5  # a pool that is too small grows by half, so a long decode reallocates rarely


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """An attention layer's place in the cache: it writes into its pool and returns the pool."""

    is_sliding = False
    supports_early_init = False
    is_initialized = False  # of the tensors that transformers would offload or zero

    def __init__(self, cache: PagedCache, layer: int) -> None:
        self._cache = cache
        self._layer = layer

    @property
    def keys(self) -> Tensor | None:
        """A copy of the keys, [B, Hkv, columns, D], zero at padding; None before the first step."""
        return self._cache.gather(self._cache.store.pools[self._layer].keys)

    @property
    def values(self) -> Tensor | None:
        """A copy of the values; see `keys`."""
        return self._cache.gather(self._cache.store.pools[self._layer].values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write K and V [B, Hkv, S, D]; return the pool's, [1, Hkv, slots, D] each."""
        return self._cache.write(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        """Return the number of columns so far, padding included."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """Return -1: pages limit the cache, not a length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Raise NotPatched: a patched model gets its masks from the cache."""
        raise _not_patched()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise NotPatched: on a patched model, the cache makes the pools before a layer runs."""
        raise _not_patched()


class PagedCache(LayerViews):
    """K and V in pages, Mamba states in rows.

    Args:
        model_config: the model's transformers config.
        config: page size, memory and so on; see `PagedConfig`.
        device: of the model.
        dtype: of the model, and so of K and V.

    Attributes:
        allocator: which sequence holds which page.
        store: page table and pools on the device.
        checked_for: config and dtype of the model that last proved to have this geometry.

    Raises:
        UnsupportedModel: for a model of another type.
        GeometryError: for sizes that cannot be paged, or that do not fit into memory.
    """

    is_compileable = False  # `generate()` must neither build masks nor compile around this cache
    is_croppable = False
    checked_for: tuple[Any, torch.dtype | None] = (None, None)
    _step: CacheStep | None
    _failure: str

    def __init__(
        self,
        model_config: Any,
        config: PagedConfig | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = PagedConfig.checked(config)
        self.geometry = CacheGeometry.from_config(
            model_config, page_size=self.config.page_size, dtype=dtype
        )
        self.device = device
        backend = attention_backend(self.config.backend, device, dtype, self.geometry.head_dim)
        self._compiled = backend == "compiled"
        self._page_limit = _page_limit(self.geometry, self.config, device)
        pages = self._page_limit if self.config.max_tokens else 2
        self.allocator = PageAllocator(pages, self.config.page_size)
        self.store = PageStore(self.geometry, pages, device)
        self._rows, self._columns, self._step, self._failure = [], PaddedBatch(), None, ""
        paged = {i: PagedLayer(self, i) for i in self.geometry.attention_layers}
        rows = {i: MambaRows() for i in self.geometry.mamba_layers}
        layers: dict[int, PagedLayer | MambaRows] = {**paged, **rows}
        super().__init__(layers=[layers[i] for i in sorted(layers)])
        self._mamba_layers = list(rows.values())

    @classmethod
    def for_model(cls, model: Any, config: PagedConfig | None = None) -> PagedCache:
        """Make an empty cache for a live model, for one or more `generate()` calls in turn."""
        return cls(model.config, config, device=model.device, dtype=model.dtype)

    # -- one step -------------------------------------------------------------------------------

    def begin_step(
        self, batch: int, columns: int, attention_mask: Tensor | None = None
    ) -> CacheStep:
        """Make room for the next columns and decide where each token goes.

        Args:
            batch: rows (B); the first step of an empty cache decides how many there are.
            columns: new columns, padding included (S).
            attention_mask: [B, columns so far + S], zero for padding; None if there is none.

        Raises:
            OutOfPages, OutOfRows: with what is needed and free. The cache is as it was.
            PaddingError: for padding on the right, or a mask that disagrees with the cache's past.
            PromptError: for no rows or no columns.
            InvalidRequest: for a batch or mask of another shape.
            CannotBeExact: in exact mode on a GPU, for a mask that hides stored tokens.
            CacheReleased: after a step that failed or was interrupted, until `reset()`.
        """
        self._check_usable()
        fresh = not self._rows
        if not fresh and batch != len(self._rows):
            raise InvalidRequest(
                f"the cache holds {len(self._rows)} rows, the batch has {batch}: "
                "send the same rows, or reset() the cache"
            )
        started = [self.allocator.length(s) > 0 for s in self._rows] or [False] * batch
        new = self._columns.check(attention_mask, columns, started)
        if self.config.exact:
            check_has_kernel(new, self.device)
        if fresh:
            self._check_rows(batch)
            self._rows = [self.allocator.open() for _ in range(batch)]
        try:
            self._step = self._plan_step(new)
        except GranitePagedError:  # refused before anything changed
            if fresh:
                self._close_rows()
            raise
        except BaseException:
            self.fail_step("a step of this cache could not be prepared")
            raise
        return self._step

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's K and V of the step, [B, Hkv, S, D] each.

        Returns:
            The pool's keys and values, [1, Hkv, slots, D] each.

        Raises:
            NotPatched: outside a step.
        """
        pool = self.store.pools[layer]
        finite = pool.write(self.step.slots, keys, values)
        if self.config.check_finite:
            self.step.finite[layer] = finite.all()
        return pool.keys, pool.values

    @property
    def in_step(self) -> bool:
        """Whether a step was begun and has neither ended nor failed."""
        return self._step is not None

    @property
    def step(self) -> CacheStep:
        """The step that is open. Raises NotPatched if there is none."""
        if self._step is None:
            raise _not_patched()
        return self._step

    def end_step(self) -> None:
        """Close a step whose forward pass returned.

        Raises:
            NonFinite: names the layers; the cache's sequences are released.
        """
        step, self._step = self._step, None
        if step is None:
            return
        try:
            step.check_finite()
        except NonFinite:
            self.fail_step("a step met NaN or infinity")
            raise
        self._columns.extend(step.columns)

    def fail_step(self, reason: str) -> None:
        """Close a step that did not finish: only some layers stored its tokens."""
        self.reset()
        self._failure = reason

    # -- what transformers asks of a cache ------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns so far, by which `generate()` slices its inputs."""
        return self._columns.count

    def reset(self) -> None:
        """Release every sequence and keep the pools."""
        self._close_rows()
        self._step, self._failure, self._columns = None, "", PaddedBatch()
        for layer in self._mamba_layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row `beam_idx[i]` was. Rows share pages until they write."""
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork every row into `repeats` neighbours."""
        self._select_rows([row for row in range(len(self._rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order. indices: [n] int, or [B] bool."""
        if indices.dtype != torch.bool:
            self._select_rows(indices.tolist())
        elif len(indices) == len(self._rows):
            self._select_rows(indices.nonzero().flatten().tolist())
        else:
            raise InvalidRequest(
                f"a selection of {len(indices)} rows does not fit a cache of {len(self._rows)}: "
                "give one bool for each"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Raise InvalidRequest: Mamba states cannot go back, so pages must not either."""
        raise InvalidRequest(
            "a paged cache cannot be cropped; fork it before the tokens you may drop"
        )

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first step."""
        return len(self._rows) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has rows."""
        return bool(self._rows)

    def __repr__(self) -> str:
        return (
            f"PagedCache({len(self._rows)} sequences, {self.allocator.tokens} tokens, "
            f"{self.allocator.held} of {self.allocator.pages - 1} pages of {self.config.page_size})"
        )

    # -- memory ---------------------------------------------------------------------------------

    @property
    def sequences(self) -> tuple[int, ...]:
        """The allocator's sequence of each row."""
        return tuple(self._rows)

    def reserve(self, tokens: Sequence[int]) -> None:
        """Size the pools for rows of these lengths, up to the budget."""
        pages = [self.geometry.pages_for(n) for n in tokens]
        self._fit(pages=min(1 + sum(pages), self._page_limit), width=max(pages, default=1))

    def check_valid(self) -> None:
        """Prove that allocator, page table and pools agree. Raises BrokenInvariant."""
        ours = sorted(self._rows) == sorted(self.allocator.sequences)
        require(ours, "a sequence without a row")
        self.store.check_valid(self.allocator, self._rows)

    # -- details --------------------------------------------------------------------------------

    def _close_rows(self) -> None:
        self.store.forget(self.allocator.release(*self._rows))
        self._rows = []

    def _check_usable(self) -> None:
        if self._step is not None:  # KeyboardInterrupt bypasses the hooks that close a step
            self.fail_step("a step of this cache was interrupted")
        if self._failure:
            raise CacheReleased(f"{self._failure}; call reset() and start over")

    def _check_rows(self, needed: int) -> None:
        if self.config.max_sequences is not None and needed > self.config.max_sequences:
            raise OutOfRows(needed=needed, rows=self.config.max_sequences)

    def _plan_step(self, new: PaddedStep) -> CacheStep:
        positions = new.positions([self.allocator.length(s) for s in self._rows])
        added = (positions != PADDING).sum(dim=1).tolist()
        growth = dict(zip(self._rows, added, strict=True))
        self._make_room(growth)
        row_of = {sequence: row for row, sequence in enumerate(self._rows)}
        self.store.apply(self.allocator.append(growth), row_of)
        self.store.table.settle()
        compiled, exact = self._compiled, self.config.exact
        return make_step(self.store, self._columns, new, positions, compiled=compiled, exact=exact)

    def _make_room(self, growth: dict[int, int]) -> None:
        allocator = self.allocator
        needed = allocator.pages_needed(growth)
        width = max(self.geometry.pages_for(allocator.length(s) + n) for s, n in growth.items())
        missing, pages = needed - allocator.free, allocator.pages
        if missing > 0:
            room = self._page_limit - pages
            if missing > room:
                raise OutOfPages(needed=needed, free=allocator.free + room, advice=self._advice())
            ample = int(_GROWTH * pages) if self._columns.count else 0
            pages = min(max(pages + missing, ample), self._page_limit)
        self._fit(pages=pages, width=width)

    def _advice(self) -> str:
        lever = "memory_fraction" if self.config.max_tokens is None else "max_tokens"
        return f"raise PagedConfig.{lever}, or run fewer or shorter sequences at once"

    def _fit(self, *, pages: int, width: int) -> None:
        """Have at least `pages` pages, and room for every row to name `width` of them."""
        held, rows = self.allocator.pages, len(self._rows)
        pages = max(pages, held)
        if self._compiled:  # sizes that recur, so that kernels do
            pages = min(bucket(pages, steps=8), self._page_limit)
            rows, width = bucket(rows), bucket(width)
        try:
            self.store.resize(pages=pages, rows=rows, width=width)
        except torch.OutOfMemoryError:
            raise OutOfPages(
                needed=pages - held, free=self.allocator.free, advice=self._advice()
            ) from None
        self.allocator.extend_pool(pages)

    def _select_rows(self, rows: list[int]) -> None:
        self._check_usable()
        held = len(self._rows)
        if rows == list(range(held)):
            return
        _check_selection(rows, held)
        self._check_rows(len(rows))
        selected: list[int] = []
        kept: set[int] = set()
        for row in rows:
            sequence = self._rows[row]
            selected.append(self.allocator.fork(sequence) if sequence in kept else sequence)
            kept.add(sequence)
        self.store.forget(self.allocator.release(*set(self._rows).difference(kept)))
        self._rows = selected
        index = torch.tensor(rows, device=self.device)
        self.store.table.select_rows(index)
        self._columns.select_rows(index)
        for layer in self._mamba_layers:
            layer.select_rows(index)


def _not_patched() -> NotPatched:
    return NotPatched(
        "a PagedCache works on a patched model only: use `with paged(model): ...` or patch(model)"
    )


def _check_selection(rows: Sequence[int], held: int) -> None:
    wrong = [row for row in rows if not 0 <= row < held]
    if wrong or not rows:
        raise InvalidRequest(
            f"{f'row {wrong[0]}' if wrong else 'no row'} cannot be kept: "
            f"name some of the {held} rows by 0 to {held - 1}, or reset() the cache"
        )


def _page_limit(geometry: CacheGeometry, config: PagedConfig, device: torch.device) -> int:
    """Return the largest number of pages of a pool, the null page included."""
    memory = available_bytes(device)
    if config.max_tokens is None:
        return max(2, int(config.memory_fraction * memory) // geometry.bytes_per_page)
    pages = 1 + geometry.pages_for(config.max_tokens)
    if pages * geometry.bytes_per_page > memory:
        raise GeometryError(
            f"max_tokens {config.max_tokens} needs {pages * geometry.bytes_per_page / 1e9:.1f} GB "
            f"of K and V, got {memory / 1e9:.1f} GB; lower PagedConfig.max_tokens"
        )
    return pages
