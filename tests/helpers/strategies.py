"""Hypothesis strategies for block tables, and the steps from a block table to attention's output.

A `History` lists what happened to a pool (open, grow, fork, release). `PagedSequences` carries it
out as the cache does, through allocator, page table and pool, and also keeps every sequence's K and
V contiguously. `Step` holds the tensors of one forward step: a test states a law by replacing some.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.errors import OutOfPages
from granite_paged.geometry import Backend, CacheGeometry
from granite_paged.layers.attention import paged_attention
from granite_paged.paging import masks
from granite_paged.paging.allocator import AppendPlan, PageAllocator
from granite_paged.paging.pool import KVPool
from granite_paged.paging.store import PageStore
from tests.helpers.reference import attention, sdpa
from tests.helpers.tolerance import ATTENTION_FLOAT64, SDPA_RATIO, relative_error, rounding_floor

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GROUPS = (1, 2, 3, 4, 5, 8)
HEAD_DIMS = (16, 64, 96, 128)
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST_HISTORY = 70  # tokens: several pages of every size but the largest


def make_geometry(
    *,
    page_size: int = 8,
    group: int = 3,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> CacheGeometry:
    """Return the geometry of one attention layer."""
    return CacheGeometry(
        page_size=page_size,
        attention_layers=(0,),
        mamba_layers=(),
        query_heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )


# -- events and strategies ----------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """Open a sequence of `tokens` tokens."""

    tokens: int


@dataclass(frozen=True)
class Grow:
    """Append `tokens` tokens to the `pick`-th open sequence."""

    pick: int
    tokens: int


@dataclass(frozen=True)
class Fork:
    """Fork the `pick`-th open sequence."""

    pick: int


@dataclass(frozen=True)
class Release:
    """Close the `pick`-th open sequence, unless it is the only one."""

    pick: int


Event = Open | Grow | Fork | Release


@dataclass(frozen=True)
class History:
    """The events of a pool. The first is an `Open`, so a sequence is always open."""

    geometry: CacheGeometry
    events: tuple[Event, ...]
    seed: int


def geometries(
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    page_sizes: Sequence[int] = PAGE_SIZES,
    head_dims: Sequence[int] = HEAD_DIMS,
) -> st.SearchStrategy[CacheGeometry]:
    """Draw head counts, head sizes and page sizes of one attention layer."""
    return st.builds(
        make_geometry,
        page_size=st.sampled_from(page_sizes),
        group=st.sampled_from(GROUPS),
        kv_heads=st.integers(1, 3),
        head_dim=st.sampled_from(head_dims),
        dtype=st.sampled_from(dtypes),
    )


def events(max_size: int = 8) -> st.SearchStrategy[tuple[Event, ...]]:
    """Draw events that give ragged lengths, shared pages and holes."""
    tokens, pick = st.integers(0, LONGEST_HISTORY), st.integers(0, 7)
    later = st.one_of(
        st.builds(Open, tokens),
        st.builds(Grow, pick, tokens),
        st.builds(Fork, pick),
        st.builds(Release, pick),
    )
    return st.builds(
        lambda first, rest: (first, *rest),
        st.builds(Open, tokens),
        st.lists(later, min_size=1, max_size=max_size),
    )


def histories(
    geometry: st.SearchStrategy[CacheGeometry], max_size: int = 8
) -> st.SearchStrategy[History]:
    """Draw histories that lead to block tables with shuffled pages."""
    return st.builds(History, geometry, events(max_size), st.integers(0, 2**16 - 1))


def additions(rows: int, kind: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the new tokens of each row: 1 for `decode`, else 1 to 50, or 0 to 50 for `ragged`."""
    if kind == "decode":
        return st.just((1,) * rows)
    fewest = 0 if kind == "ragged" else 1
    return st.tuples(*[st.integers(fewest, 50)] * rows)


# -- carrying it out ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The tensors of one step: queries [B, Hq, S, D], left-padded, over a pool."""

    geometry: CacheGeometry
    physical: Tensor
    logical: Tensor
    positions: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor

    @property
    def scale(self) -> float:
        """1 / sqrt(D), so that scores are about one."""
        return float(self.geometry.head_dim**-0.5)

    @property
    def padding(self) -> Tensor:
        """Whether a query is padding, [B, S] bool."""
        return self.positions < 0

    def replace(self, **tensors: Tensor) -> Step:
        """Return the step with some tensors replaced."""
        return dataclasses.replace(self, **tensors)

    def rows(self, rows: Sequence[int]) -> Step:
        """Return a step of some of the rows, in any order."""
        index = torch.tensor(rows)
        return self.replace(
            physical=self.physical[index], positions=self.positions[index], query=self.query[index]
        )

    def mask(self) -> BlockMask:
        """Build the step's BlockMask by the package under test."""
        return masks.paged_block_mask(
            self.physical,
            self.logical,
            self.positions,
            page_size=self.geometry.page_size,
            group=self.geometry.group,
        )

    def attend(self, *, backend: Backend = "eager", **options: Any) -> Tensor:
        """Compute attention by the package under test, [B, Hq, S, D]."""
        options = {"scale": self.scale, **options}
        return paged_attention(
            self.query, self.keys, self.values, self.mask(), backend=backend, **options
        )


class PagedSequences:
    """An allocator, page table and pool kept in step, and a contiguous copy of every K and V.

    Args:
        geometry: one attention layer.
        seed: seeds the contents and the order of physical pages.
        scattered: number of pages that are first written and released in random order, so that
            later sequences get shuffled pages full of an earlier owner's tokens.
    """

    def __init__(self, geometry: CacheGeometry, *, seed: int = 0, scattered: int = 6) -> None:
        self.geometry = geometry
        self.allocator = PageAllocator(2, geometry.page_size)
        self.store = PageStore(geometry, 2, CPU)
        self.rows: list[int] = []  # row of the page table -> sequence
        self.keys: dict[int, Tensor] = {}  # sequence -> [Hkv, tokens, D]
        self.values: dict[int, Tensor] = {}
        self._numbers = torch.Generator().manual_seed(seed)
        earlier = [self._begin() for _ in range(scattered)]
        self.append(dict.fromkeys(earlier, geometry.page_size))
        random.Random(seed).shuffle(earlier)
        for sequence in earlier:
            self.release(sequence)

    @property
    def pool(self) -> KVPool:
        """The one layer's pool."""
        return self.store.pools[0]

    @classmethod
    def after(cls, history: History) -> PagedSequences:
        """Return the state at the end of a history."""
        paged = cls(history.geometry, seed=history.seed)
        for event in history.events:
            paged.happen(event)
        return paged

    def happen(self, event: Event) -> None:
        """Carry out one event."""
        match event:
            case Open(tokens):
                self.open(tokens)
            case Grow(pick, tokens):
                self.append({self.pick(pick): tokens})
            case Fork(pick):
                self.fork(self.pick(pick))
            case Release(pick) if len(self.rows) > 1:
                self.release(self.pick(pick))

    def pick(self, number: int) -> int:
        """Return the `number`-th open sequence (modulo their number)."""
        return self.rows[number % len(self.rows)]

    def open(self, tokens: int) -> int:
        """Open a sequence of `tokens` random tokens."""
        sequence = self._begin()
        self.append({sequence: tokens})
        return sequence

    def fork(self, parent: int) -> int:
        """Fork a sequence: the child begins with the parent's tokens."""
        child = self.allocator.fork(parent)
        self._select([*self.rows, parent])
        self.rows[-1] = child
        self.keys[child], self.values[child] = self.keys[parent], self.values[parent]
        return child

    def release(self, sequence: int) -> None:
        """Close a sequence. Its stale row stays in the table until another sequence takes it."""
        freed = self.allocator.release(sequence)
        self.store.forget(freed)
        kept = [other for other in self.rows if other != sequence]
        self._select([*kept, sequence])
        self.rows = kept
        del self.keys[sequence], self.values[sequence]

    def append(self, growth: dict[int, int]) -> AppendPlan:
        """Grow sequences by random tokens, and extend the pool if it is too small."""
        try:
            plan = self.allocator.append(growth)
        except OutOfPages as refusal:
            self.allocator.extend_pool(self.allocator.pages + refusal.needed - refusal.free)
            plan = self.allocator.append(growth)
        rows = len(self.rows)
        width = max([1, *(len(self.allocator.pages_of(sequence)) for sequence in self.rows)])
        self.store.resize(pages=self.allocator.pages, rows=rows, width=width)
        self.store.apply(plan, {sequence: row for row, sequence in enumerate(self.rows)})
        self.store.table.settle()
        for sequence, tokens in growth.items():
            self._write(sequence, tokens)
        return plan

    def step(self, added: dict[int, int], *, padding: int = 0) -> Step:
        """Grow sequences, and return the step of the new tokens, rows in the order of `added`."""
        self.append(added)
        return self.look(added, padding=padding)

    def look(self, added: dict[int, int], *, padding: int = 0) -> Step:
        """Return the step that computes each sequence's last tokens."""
        g, columns = self.geometry, max(1, padding + max(added.values()))
        positions = torch.full((len(added), columns), masks.PADDING, dtype=torch.int32)
        for row, (sequence, tokens) in enumerate(added.items()):
            end = self.allocator.length(sequence)
            positions[row, columns - tokens :] = torch.arange(end - tokens, end)
        rows = torch.tensor([self.rows.index(sequence) for sequence in added])
        # in a model's layout: tokens before heads in memory
        query = self._random(len(added), columns, g.query_heads).transpose(1, 2)
        return Step(
            geometry=g,
            physical=self.store.table.physical[rows],
            logical=self.store.table.logical.clone(),
            positions=positions,
            query=query,
            keys=self.pool.keys.clone(),
            values=self.pool.values.clone(),
        )

    def slots(self, sequence: int) -> Tensor:
        """Return the slots of the sequence's tokens, [tokens] int64, from the allocator alone."""
        at = torch.arange(self.allocator.length(sequence))
        pages = torch.tensor(self.allocator.pages_of(sequence), dtype=torch.int64)
        return pages[at // self.geometry.page_size] * self.geometry.page_size + (
            at % self.geometry.page_size
        )

    def unread_slots(self, sequences: Iterable[int]) -> Tensor:
        """Return the slots that these sequences must not read, [slots] bool.

        They are free pages, other sequences' pages, the null page and tails of partial pages.
        """
        unread = torch.ones(self.pool.keys.shape[2], dtype=torch.bool)
        for sequence in sequences:
            unread[self.slots(sequence)] = False
        return unread

    def check_valid(self) -> None:
        """Check that allocator, page table, pool and the contiguous copies agree."""
        self.store.check_valid(self.allocator, self.rows)
        for stored in (self.pool.keys, self.pool.values):
            assert stored.isfinite().all(), "the pool holds NaN or infinity"
        for sequence in self.rows:
            slots = self.slots(sequence)
            where = f"sequence {sequence}: the pool holds other"
            assert torch.equal(self.pool.keys[0][:, slots], self.keys[sequence]), f"{where} keys"
            assert torch.equal(self.pool.values[0][:, slots], self.values[sequence]), (
                f"{where} values"
            )

    def _begin(self) -> int:
        sequence = self.allocator.open()
        self.rows.append(sequence)
        self.keys[sequence] = self.values[sequence] = self._random(self.geometry.kv_heads, 0)
        return sequence

    def _write(self, sequence: int, tokens: int) -> None:
        k, v = self._random(2, self.geometry.kv_heads, tokens)
        self.keys[sequence] = torch.cat([self.keys[sequence], k], dim=1)
        self.values[sequence] = torch.cat([self.values[sequence], v], dim=1)
        start = self.allocator.length(sequence) - tokens
        # preceded by a padding token with arbitrary contents, which goes to the null page
        nan = k.new_full((len(k), 1, k.shape[2]), torch.nan)
        slots = torch.nn.functional.pad(self.slots(sequence)[start:], (1, 0))
        padded = (torch.cat([nan, new], dim=1)[None] for new in (k, v))
        self.pool.write(slots, *padded)

    def _select(self, sequences: Sequence[int]) -> None:
        self.store.table.select_rows(torch.tensor([self.rows.index(s) for s in sequences]))
        self.rows = list(sequences)

    def _random(self, *shape: int) -> Tensor:
        numbers = torch.randn(
            *shape, self.geometry.head_dim, generator=self._numbers, dtype=torch.float64
        )
        return numbers.to(self.geometry.dtype)


# -- expected outputs ---------------------------------------------------------------------------


def error_bound(dtype: torch.dtype, terms: int, *, sdpa_error: float, roundings: int = 1) -> float:
    """Return the largest relative error of a right answer.

    It is SDPA's own error, or at least that of float32 sums in any order plus `roundings` roundings
    to a half type (each at most half its eps): SDPA may happen to be exact.
    """
    if dtype == torch.float64:
        return ATTENTION_FLOAT64
    floor = rounding_floor(torch.float32, terms)
    if dtype != torch.float32:
        floor += roundings * torch.finfo(dtype).eps / 2
    return max(SDPA_RATIO * sdpa_error, floor)


def assert_right(
    paged: PagedSequences, step: Step, added: dict[int, int], out: Tensor, *, roundings: int = 1
) -> None:
    """Check every row against float64 attention over its own tokens; padding must be zero."""
    assert out.shape == step.query.shape
    assert out.dtype == step.query.dtype
    assert not out.transpose(1, 2)[step.padding].any(), "padding attended to something"
    for row, (sequence, tokens) in enumerate(added.items()):
        if not tokens:
            continue
        keys, values = paged.keys[sequence], paged.values[sequence]
        query = step.query[row, :, -tokens:]
        inputs = (query, keys, values, keys.shape[1] - tokens, step.scale)
        exact = attention(*inputs)
        error = relative_error(out[row, :, -tokens:], exact)
        bound = error_bound(
            paged.geometry.dtype,
            keys.shape[1] + keys.shape[2],
            sdpa_error=relative_error(sdpa(*inputs), exact),
            roundings=roundings,
        )
        assert error <= bound, (
            f"row {row}: paged's relative error against float64 is {error:.2g}, the bound from "
            f"SDPA's own error is {bound:.2g}; tests/unit/test_masks.py tells masks from sums"
        )


def assert_same_outputs(actual: Tensor, expected: Tensor) -> None:
    """Check that two float64 runs differ only in the order of their sums."""
    assert actual.dtype == torch.float64
    norm = expected.norm()
    difference = (actual - expected).norm()
    # both are right, and each has its own rounding error
    assert difference <= 2 * ATTENTION_FLOAT64 * norm, (
        f"relative difference {difference / norm:.2g} exceeds {2 * ATTENTION_FLOAT64:.2g}"
    )


def move_pages(step: Step, seed: int) -> Step:
    """Return the step with its pages moved at random; the null page stays where it is."""
    pages, page_size = len(step.logical), step.geometry.page_size
    generator = torch.Generator().manual_seed(seed)
    target = torch.cat([torch.zeros(1), 1 + torch.randperm(pages - 1, generator=generator)]).long()
    source = target.argsort()
    slots = (source[:, None] * page_size + torch.arange(page_size)).flatten()
    return step.replace(
        physical=target[step.physical.long()].int(),
        logical=step.logical[source],
        keys=step.keys[:, :, slots],
        values=step.values[:, :, slots],
    )


# -- what a mask allows --------------------------------------------------------------------------


def allowed_slots(mask: BlockMask) -> Tensor:
    """Evaluate the mask_mod on every pair, [B, folded rows, slots] bool."""
    batch, _, rows, slots = mask.shape
    return mask.mask_mod(
        torch.arange(batch)[:, None, None],
        torch.tensor(0),
        torch.arange(rows)[None, :, None],
        torch.arange(slots)[None, None, :],
    ).expand(batch, rows, slots)


def partial_pages(mask: BlockMask) -> Tensor:
    """Count how often each page is listed as partial, [B, query blocks, pages]."""
    return _listed(mask, mask.kv_num_blocks, mask.kv_indices)


def whole_pages(mask: BlockMask) -> Tensor:
    """Count how often each page is listed as whole, [B, query blocks, pages]."""
    return _listed(mask, mask.full_kv_num_blocks, mask.full_kv_indices)


def assert_unlisted_pages_hold_nothing(step: Step) -> None:
    """Check that the mask_mod allows no slot of an unlisted page."""
    mask = step.mask()
    listed = partial_pages(mask) + whole_pages(mask) > 0
    needed = _by_block(mask, padded_rows_allow=False).any(dim=4).any(dim=2)
    assert not (needed & ~listed).any(), "the mask_mod allows slots of a page that no list names"


def assert_whole_pages_are_allowed(step: Step) -> None:
    """Check that every row of a block may read every slot of a page that is listed whole."""
    mask = step.mask()
    allowed = _by_block(mask, padded_rows_allow=True).all(dim=4).all(dim=2)
    assert allowed[whole_pages(mask) > 0].all(), (
        "a page is listed as whole, but the mask_mod hides some of its slots"
    )


def assert_query_blocks_show_the_same(step: Step, more: int) -> None:
    """Check the mask of a step's query blocks, and `more` of padding, against that of its rows.

    The lists must be right whatever an earlier step left in them.
    """
    kernels = pytest.importorskip("granite_paged.layers.triton.masks")
    batch, tokens = step.positions.shape
    group = step.geometry.group
    rows = torch.arange(batch) + 2  # the table has rows of others before and after
    table = torch.ones(batch + 4, step.physical.shape[1], dtype=torch.int32)
    table[rows] = step.physical
    each = masks.blocks_of(tokens, group)
    blocks, used = batch * each + more, batch * each
    maps = SimpleNamespace(physical=table, logical=step.logical)
    store: Any = SimpleNamespace(table=maps, geometry=step.geometry, pages=len(step.logical))
    shared, mask = kernels.QueryBlockMask(store, blocks), step.mask()
    shared.fill(rows.flip(0), step.positions.flip(0))
    by_block = shared.fill(rows, step.positions)
    assert by_block.shape == (blocks, 1, masks.QUERY_BLOCK, mask.shape[3])
    allowed = allowed_slots(by_block)
    found = allowed[:used].reshape(batch, each * masks.QUERY_BLOCK, -1)
    assert torch.equal(found[:, : tokens * group], allowed_slots(mask))
    assert not found[:, tokens * group :].any()
    assert not allowed[used:].any()
    for listed in (whole_pages, partial_pages):
        assert torch.equal(listed(by_block)[:used].view(batch, each, -1), listed(mask))
        assert not listed(by_block)[used:].any()


def assert_no_page_is_listed_twice(step: Step) -> None:
    """Check that no page is listed twice, in one list or once in each."""
    mask = step.mask()
    assert (partial_pages(mask) + whole_pages(mask)).max() <= 1, "a page is listed twice"


def _listed(mask: BlockMask, counts: Tensor, indices: Tensor) -> Tensor:
    pages = mask.shape[-1] // mask.BLOCK_SIZE[1]
    listed = torch.zeros(*counts[:, 0].shape, pages, dtype=torch.int64)
    within = torch.arange(indices.shape[-1]) < counts[:, 0, :, None]
    return listed.scatter_add(2, indices[:, 0].long(), within.long())


def _by_block(mask: BlockMask, *, padded_rows_allow: bool) -> Tensor:
    """Evaluate the mask_mod by block, [B, query blocks, rows of a block, pages, page_size]."""
    allowed, (block_rows, page_size) = allowed_slots(mask), mask.BLOCK_SIZE
    missing = -allowed.shape[1] % block_rows
    padded = torch.nn.functional.pad(allowed, (0, 0, 0, missing), value=padded_rows_allow)
    pages = mask.shape[-1] // page_size
    return padded.view(len(allowed), -1, block_rows, pages, page_size)
