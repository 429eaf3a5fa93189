"""Generated block tables, and the way from one to attention's output.

A `History` says what happened to a pool (opened, grown, forked, released); `Paged` carries it out
as the cache does, through allocator, page table and pool, and remembers beside them, contiguously,
what every sequence wrote. `Step` is the tensors of one forward step: laws are stated by replacing
some of them.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.errors import OutOfPages
from granite_paged.geometry import Backend, CacheGeometry
from granite_paged.layers.attention import paged_attention
from granite_paged.paging import masks
from granite_paged.paging.allocator import AppendPlan, PageAllocator
from granite_paged.paging.page_table import PageTable
from granite_paged.paging.pool import KVPool
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
    """One attention layer."""
    return CacheGeometry(
        page_size=page_size,
        attention_layers=(0,),
        mamba_layers=(),
        query_heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )


# -- what is generated --------------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """A new sequence of so many tokens."""

    tokens: int


@dataclass(frozen=True)
class Grow:
    """The `pick`-th open sequence gets more tokens."""

    pick: int
    tokens: int


@dataclass(frozen=True)
class Fork:
    """The `pick`-th open sequence is forked."""

    pick: int


@dataclass(frozen=True)
class Release:
    """The `pick`-th open sequence is closed, unless it is the only one."""

    pick: int


Event = Open | Grow | Fork | Release


@dataclass(frozen=True)
class History:
    """What happened to a pool. It begins with an `Open`, so a sequence is always open."""

    geometry: CacheGeometry
    events: tuple[Event, ...]
    seed: int


def geometries(
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    page_sizes: Sequence[int] = PAGE_SIZES,
    head_dims: Sequence[int] = HEAD_DIMS,
) -> st.SearchStrategy[CacheGeometry]:
    """Head counts, widths and page sizes of one attention layer."""
    return st.builds(
        make_geometry,
        page_size=st.sampled_from(page_sizes),
        group=st.sampled_from(GROUPS),
        kv_heads=st.integers(1, 3),
        head_dim=st.sampled_from(head_dims),
        dtype=st.sampled_from(dtypes),
    )


def events(max_size: int = 8) -> st.SearchStrategy[tuple[Event, ...]]:
    """Ragged lengths, shared pages and holes."""
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
    """Block tables with shuffled pages, as a history that leads to one."""
    return st.builds(History, geometry, events(max_size), st.integers(0, 2**16 - 1))


def additions(rows: int, kind: str) -> st.SearchStrategy[tuple[int, ...]]:
    """New tokens of each row: `decode` one, `prefill` and `chunk` any, `ragged` perhaps none."""
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
        """1 / sqrt(D): scores of about one."""
        return float(self.geometry.head_dim**-0.5)

    @property
    def padding(self) -> Tensor:
        """[B, S] bool"""
        return self.positions < 0

    def replace(self, **tensors: Tensor) -> Step:
        """The same step, but."""
        return dataclasses.replace(self, **tensors)

    def rows(self, rows: Sequence[int]) -> Step:
        """A batch of some of the rows, in any order."""
        index = torch.tensor(rows)
        return self.replace(
            physical=self.physical[index], positions=self.positions[index], query=self.query[index]
        )

    def mask(self) -> BlockMask:
        """The step's BlockMask, by the package under test."""
        return masks.paged_block_mask(
            self.physical,
            self.logical,
            self.positions,
            page_size=self.geometry.page_size,
            group=self.geometry.group,
        )

    def attend(self, *, backend: Backend = "eager", **options: Any) -> Tensor:
        """[B, Hq, S, D], by the package under test."""
        options = {"scale": self.scale, **options}
        return paged_attention(
            self.query, self.keys, self.values, self.mask(), backend=backend, **options
        )


class Paged:
    """Allocator, page table and pool in step; and every sequence's K and V, contiguous.

    Args:
        geometry: of one attention layer.
        seed: of contents and of the order of physical pages.
        scattered: pages dirtied and returned in random order first, so that later sequences get
            shuffled pages full of an earlier owner's tokens.
    """

    def __init__(self, geometry: CacheGeometry, *, seed: int = 0, scattered: int = 6) -> None:
        self.geometry = geometry
        self.allocator = PageAllocator(2, geometry.page_size)
        self.table = PageTable(1, 1, 2, CPU)
        self.pool = KVPool(geometry, 2, CPU)
        self.rows: list[int] = []  # row of the page table -> sequence
        self.keys: dict[int, Tensor] = {}  # sequence -> [Hkv, tokens, D]
        self.values: dict[int, Tensor] = {}
        self._numbers = torch.Generator().manual_seed(seed)
        earlier = [self.open(geometry.page_size) for _ in range(scattered)]
        random.Random(seed).shuffle(earlier)
        for sequence in earlier:
            self.release(sequence)

    @classmethod
    def after(cls, history: History) -> Paged:
        """The pool at the end of a history."""
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
        """An open sequence."""
        return self.rows[number % len(self.rows)]

    def open(self, tokens: int) -> int:
        """A new sequence of so many random tokens."""
        sequence = self.allocator.open()
        self.rows.append(sequence)
        self.keys[sequence] = self.values[sequence] = self._random(self.geometry.kv_heads, 0)
        self.append({sequence: tokens})
        return sequence

    def fork(self, parent: int) -> int:
        """A new sequence with the parent's tokens."""
        child = self.allocator.fork(parent)
        self._select([*self.rows, parent])
        self.rows[-1] = child
        self.keys[child], self.values[child] = self.keys[parent], self.values[parent]
        return child

    def release(self, sequence: int) -> None:
        """Close a sequence. Its row stays in the table, stale, until another one takes it."""
        freed = self.allocator.release(sequence)
        self.table.forget(torch.tensor(freed, dtype=torch.int64))
        kept = [other for other in self.rows if other != sequence]
        self._select([*kept, sequence])
        self.rows = kept
        del self.keys[sequence], self.values[sequence]

    def append(self, growth: dict[int, int]) -> AppendPlan:
        """Grow sequences by random tokens; the pool is extended where it must be."""
        try:
            plan = self.allocator.append(growth)
        except OutOfPages as refusal:
            self._extend(self.allocator.pages + refusal.needed - refusal.free)
            plan = self.allocator.append(growth)
        pages = max(len(self.allocator.pages_of(sequence)) for sequence in self.rows)
        self.table.fit(rows=len(self.rows), width=max(1, pages), pages=self.allocator.pages)
        self._carry_out(plan)
        for sequence, tokens in growth.items():
            self._write(sequence, tokens)
        return plan

    def step(self, added: dict[int, int], *, padding: int = 0) -> Step:
        """Grow sequences and ask for the new tokens' outputs, rows in the order of `added`."""
        self.append(added)
        return self.look(added, padding=padding)

    def look(self, added: dict[int, int], *, padding: int = 0) -> Step:
        """The step that asks for the outputs of each sequence's last tokens."""
        g, columns = self.geometry, max(1, padding + max(added.values()))
        positions = torch.full((len(added), columns), masks.PADDING, dtype=torch.int32)
        for row, (sequence, tokens) in enumerate(added.items()):
            end = self.allocator.length(sequence)
            positions[row, columns - tokens :] = torch.arange(end - tokens, end)
        rows = torch.tensor([self.rows.index(sequence) for sequence in added])
        # as a model hands them over: tokens before heads in memory
        query = self._random(len(added), columns, g.query_heads).transpose(1, 2)
        return Step(
            geometry=g,
            physical=self.table.physical[rows],
            logical=self.table.logical.clone(),
            positions=positions,
            query=query,
            keys=self.pool.keys.clone(),
            values=self.pool.values.clone(),
        )

    def slots(self, sequence: int) -> Tensor:
        """[tokens] int64: where the sequence's tokens lie, from the allocator alone."""
        at = torch.arange(self.allocator.length(sequence))
        pages = torch.tensor(self.allocator.pages_of(sequence), dtype=torch.int64)
        return pages[at // self.geometry.page_size] * self.geometry.page_size + (
            at % self.geometry.page_size
        )

    def unread_slots(self, sequences: Iterable[int]) -> Tensor:
        """[slots] bool: free pages, others' pages, the null page and tails of partial pages."""
        unread = torch.ones(self.pool.keys.shape[2], dtype=torch.bool)
        for sequence in sequences:
            unread[self.slots(sequence)] = False
        return unread

    def check_valid(self) -> None:
        """Prove that allocator, page table and pool agree."""
        self.allocator.check_valid()
        self.table.check_valid(self.allocator, self.rows)
        for stored in (self.pool.keys, self.pool.values):
            assert stored.isfinite().all(), "the pool holds NaN or infinity"
        for sequence in self.rows:
            slots = self.slots(sequence)
            where = f"sequence {sequence}: the pool holds other"
            assert torch.equal(self.pool.keys[0][:, slots], self.keys[sequence]), f"{where} keys"
            assert torch.equal(self.pool.values[0][:, slots], self.values[sequence]), (
                f"{where} values"
            )

    def _write(self, sequence: int, tokens: int) -> None:
        k, v = (self._random(self.geometry.kv_heads, tokens) for _ in range(2))
        self.keys[sequence] = torch.cat([self.keys[sequence], k], dim=1)
        self.values[sequence] = torch.cat([self.values[sequence], v], dim=1)
        start = self.allocator.length(sequence) - tokens
        # before them a token of padding, which may be anything and goes to the null page
        nan = k.new_full((len(k), 1, k.shape[2]), torch.nan)
        slots = torch.nn.functional.pad(self.slots(sequence)[start:], (1, 0))
        padded = (torch.cat([nan, new], dim=1)[None] for new in (k, v))
        self.pool.write(slots, *padded)

    def _carry_out(self, plan: AppendPlan) -> None:
        if plan.writes:
            rows = torch.tensor([self.rows.index(write.sequence) for write in plan.writes])
            logical = torch.tensor([write.logical_page for write in plan.writes])
            physical = torch.tensor([write.physical_page for write in plan.writes])
            self.table.write(rows, logical, physical)
        if plan.copies:
            sources, targets = torch.tensor(plan.copies).unbind(1)
            self.pool.copy_pages(sources, targets)

    def _extend(self, pages: int) -> None:
        self.allocator.extend_pool(pages)
        self.pool.resize(pages)

    def _select(self, sequences: Sequence[int]) -> None:
        self.table.select_rows(torch.tensor([self.rows.index(s) for s in sequences]))
        self.rows = list(sequences)

    def _random(self, *shape: int) -> Tensor:
        numbers = torch.randn(
            *shape, self.geometry.head_dim, generator=self._numbers, dtype=torch.float64
        )
        return numbers.to(self.geometry.dtype)


# -- judging it ---------------------------------------------------------------------------------


def error_bound(dtype: torch.dtype, terms: int, *, sdpa_error: float, roundings: int = 1) -> float:
    """Largest relative error of a right answer.

    SDPA's own, or where SDPA happens to be exact: float32 sums in any order, and so many roundings
    to a half type (each at most half its eps) on the way out.
    """
    if dtype == torch.float64:
        return ATTENTION_FLOAT64
    floor = rounding_floor(torch.float32, terms)
    if dtype != torch.float32:
        floor += roundings * torch.finfo(dtype).eps / 2
    return max(SDPA_RATIO * sdpa_error, floor)


def assert_right(
    paged: Paged, step: Step, added: dict[int, int], out: Tensor, *, roundings: int = 1
) -> None:
    """Every row is what float64 says from the row's own contiguous tokens, and padding is zero."""
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
        assert error <= bound, f"row {row}: error {error:.2g}, {bound:.2g} is allowed"


def assert_same_outputs(actual: Tensor, expected: Tensor) -> None:
    """Of two float64 runs that differ in the order of sums."""
    assert actual.dtype == torch.float64
    norm = expected.norm()
    difference = (actual - expected).norm()
    # two right answers, each off by its own rounding
    assert difference <= 2 * ATTENTION_FLOAT64 * norm, f"{difference / norm:.2g} apart"


def move_pages(step: Step, seed: int) -> Step:
    """The same tokens in other physical pages: page p moves to `target[p]`; the null page stays."""
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


# -- what a mask says ---------------------------------------------------------------------------


def allowed_slots(mask: BlockMask) -> Tensor:
    """[B, folded rows, slots] bool: the mask_mod asked about every pair."""
    batch, _, rows, slots = mask.shape
    return mask.mask_mod(
        torch.arange(batch)[:, None, None],
        torch.tensor(0),
        torch.arange(rows)[None, :, None],
        torch.arange(slots)[None, None, :],
    ).expand(batch, rows, slots)


def partial_pages(mask: BlockMask) -> Tensor:
    """[B, query blocks, pages] int: how often a page is listed for the mask_mod to decide."""
    return _listed(mask, mask.kv_num_blocks, mask.kv_indices)


def whole_pages(mask: BlockMask) -> Tensor:
    """[B, query blocks, pages] int: how often a page is listed as allowed throughout."""
    return _listed(mask, mask.full_kv_num_blocks, mask.full_kv_indices)


def assert_unlisted_pages_hold_nothing(step: Step) -> None:
    """Dropping what is not listed drops nothing that the mask_mod allows."""
    mask = step.mask()
    listed = partial_pages(mask) + whole_pages(mask) > 0
    needed = _by_block(mask, padded_rows_allow=False).any(dim=4).any(dim=2)
    assert not (needed & ~listed).any(), "the mask_mod allows what no list names"


def assert_whole_pages_are_allowed(step: Step) -> None:
    """Every slot of a page listed whole is allowed to every row of the block."""
    mask = step.mask()
    allowed = _by_block(mask, padded_rows_allow=True).all(dim=4).all(dim=2)
    assert allowed[whole_pages(mask) > 0].all(), "a page is listed whole that is not"


def assert_no_page_is_listed_twice(step: Step) -> None:
    """Neither in one list nor once in each."""
    mask = step.mask()
    assert (partial_pages(mask) + whole_pages(mask)).max() <= 1, "a page is listed twice"


def _listed(mask: BlockMask, counts: Tensor, indices: Tensor) -> Tensor:
    pages = mask.shape[-1] // mask.BLOCK_SIZE[1]
    listed = torch.zeros(*counts[:, 0].shape, pages, dtype=torch.int64)
    within = torch.arange(indices.shape[-1]) < counts[:, 0, :, None]
    return listed.scatter_add(2, indices[:, 0].long(), within.long())


def _by_block(mask: BlockMask, *, padded_rows_allow: bool) -> Tensor:
    """[B, query blocks, rows of a block, pages, page_size] bool: what the mask_mod allows."""
    allowed, (block_rows, page_size) = allowed_slots(mask), mask.BLOCK_SIZE
    missing = -allowed.shape[1] % block_rows
    padded = torch.nn.functional.pad(allowed, (0, 0, 0, missing), value=padded_rows_allow)
    pages = mask.shape[-1] // page_size
    return padded.view(len(allowed), -1, block_rows, pages, page_size)


# -- contents without tensors -------------------------------------------------------------------


class Ledger:
    """An allocator beside a model of it: pages as lists of tokens, and what every sequence wrote.

    A token is a number that was never written before. The plans of the allocator under test are
    carried out literally on the pages: what a device would hold is what the lists hold.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self.histories: dict[int, list[int]] = {}
        self.closed: list[int] = []
        self.met: Counter[str] = Counter()  # copies and refusals: a walk without any proves little
        self._issued: set[int] = set()
        self._written = 0
        self._contents: dict[int, list[int | None]] = {}

    def open(self) -> int:
        """A new sequence."""
        sequence = self.allocator.open()
        self._first_seen(sequence)
        self.histories[sequence] = []
        return sequence

    def fork(self, parent: int) -> int:
        """A new sequence with the parent's tokens."""
        free = self.allocator.free
        child = self.allocator.fork(parent)
        assert self.allocator.free == free, "a fork took pages"
        self._first_seen(child)
        self.histories[child] = list(self.histories[parent])
        return child

    def share(self, parent: int, pages: int) -> int:
        """A new sequence that begins with so many whole pages of the parent's, if it has them."""
        size, history = self.allocator.page_size, self.histories[parent]
        pages = min(pages, len(history) // size)
        free = self.allocator.free
        child = self.allocator.open(self.allocator.pages_of(parent)[:pages])
        assert self.allocator.free == free, "sharing took pages"
        self._first_seen(child)
        self.histories[child] = history[: pages * size]
        return child

    def append(self, growth: dict[int, int]) -> AppendPlan:
        """Grow sequences, carry the plan out, write the tokens."""
        needed, free = self.allocator.pages_needed(growth), self.allocator.free
        plan = self.allocator.append(growth)
        assert self.allocator.free == free - needed, "append took other than it said it needs"
        self.met["copy"] += len(plan.copies)
        for copy in plan.copies:
            self._contents[copy.target] = list(self._page(copy.source))
        for sequence, tokens in growth.items():
            self._write(sequence, tokens)
        return plan

    def release(self, *sequences: int) -> list[int]:
        """Close sequences."""
        free = self.allocator.free
        freed = self.allocator.release(*sequences)
        assert self.allocator.free == free + len(freed), "other pages were freed than were said"
        for sequence in sequences:
            del self.histories[sequence]
            self.closed.append(sequence)
        return freed

    def refuses(
        self, error: type[Exception], request: Callable[..., object], *arguments: Any
    ) -> None:
        """A request is refused by name and changes nothing."""
        before = state_of(self.allocator)
        try:
            request(*arguments)
        except error:
            pass
        else:
            raise AssertionError(f"{error.__name__} was not raised")
        assert state_of(self.allocator) == before, "a refused request changed something"
        self.met[error.__name__] += 1

    def check_valid(self) -> None:
        """Prove that every sequence reads its own tokens."""
        self.allocator.check_valid()
        assert set(self.allocator.sequences) == set(self.histories), "other sequences are open"
        for sequence, history in self.histories.items():
            assert self.allocator.length(sequence) == len(history), "a length is wrong"
            read: list[int | None] = []
            for page in self.allocator.pages_of(sequence):
                read.extend(self._page(page))
            assert read[: len(history)] == history, f"sequence {sequence} reads other tokens"

    def _first_seen(self, sequence: int) -> None:
        assert sequence not in self._issued, "an id was issued twice"
        self._issued.add(sequence)

    def _write(self, sequence: int, tokens: int) -> None:
        history, size = self.histories[sequence], self.allocator.page_size
        pages = self.allocator.pages_of(sequence)
        for at in range(len(history), len(history) + tokens):
            self._written += 1
            self._page(pages[at // size])[at % size] = self._written
            history.append(self._written)

    def _page(self, page: int) -> list[int | None]:
        return self._contents.setdefault(page, [None] * self.allocator.page_size)


def state_of(allocator: PageAllocator) -> object:
    """All that can be seen of an allocator, to say that nothing of it changed."""
    return (
        allocator.pages,
        allocator.free,
        allocator.held,
        allocator.tokens,
        [(s, allocator.length(s), allocator.pages_of(s)) for s in allocator.sequences],
        {p: allocator.references(p) for s in allocator.sequences for p in allocator.pages_of(s)},
    )
