"""Which sequence holds which page.

Invariant: a page is the null page, free, or held by one or more sequences. Free + held = usable
pages, and a page's reference count is the number of sequences whose list contains it.

::

    pages      0        1 .. total-1
               null     recycled stack | held by sequences | never issued yet
    sequence   length in tokens, and a list of pages: logical page i holds its tokens
               [i * page_size, (i + 1) * page_size)

This module runs on the host and without torch. No operation's cost grows with the pool: a counter
stands for never-issued pages, recycled ones are a stack, and only held pages have an entry. A
refused request changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from granite_paged.errors import (
    BrokenInvariant,
    DoubleFree,
    GeometryError,
    InvalidRequest,
    OutOfPages,
    UnknownSequence,
    require,
)
from granite_paged.geometry import pages_for

NULL_PAGE = 0
"""Page that takes the writes of padding. No sequence owns it and no query attends to it."""


class PageWrite(NamedTuple):
    """Set entry `logical_page` of a sequence's page table to `physical_page`."""

    sequence: int
    logical_page: int
    physical_page: int


class PageCopy(NamedTuple):
    """Copy page `source` to `target`, before `target` is read or written (copy-on-write)."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """What the device has to do before the tokens of an `append` are written."""

    writes: list[PageWrite]
    copies: list[PageCopy]


@dataclass(slots=True)
class _Sequence:
    length: int
    pages: list[int]


class PageAllocator:
    """The owner of the pages `1 .. pages - 1` of a pool, `page_size` tokens each.

    Args:
        pages: pages of the pool, the null page included; at least 2.
        page_size: tokens per page; at least 1.

    Raises:
        GeometryError: if either is too small.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 2:
            raise GeometryError(
                f"a pool needs at least 2 pages, one of them the null page, got {pages}"
            )
        if page_size < 1:
            raise GeometryError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self._pages = pages
        self._never_issued = NULL_PAGE + 1  # first page that no sequence ever held
        self._recycled: list[int] = []
        self._references: dict[int, int] = {}  # held page -> number of sequences holding it
        self._sequences: dict[int, _Sequence] = {}
        self._next_sequence = 0

    # -- looking --------------------------------------------------------------------------------

    @property
    def pages(self) -> int:
        """Pages of the pool, the null page included."""
        return self._pages

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._recycled) + self._pages - self._never_issued

    @property
    def held(self) -> int:
        """Pages that at least one sequence holds."""
        return len(self._references)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences. A token in a shared page counts once for each sequence."""
        return sum(sequence.length for sequence in self._sequences.values())

    @property
    def sequences(self) -> tuple[int, ...]:
        """Ids of the open sequences, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Return the number of tokens of a sequence."""
        return self._get(sequence).length

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """Return the physical pages of a sequence, in logical order."""
        return tuple(self._get(sequence).pages)

    def references(self, page: int) -> int:
        """Return the number of sequences that hold a page."""
        return self._references.get(page, 0)

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that `tokens` tokens of one sequence take."""
        return pages_for(tokens, self.page_size)

    def pages_needed(self, growth: Mapping[int, int]) -> int:
        """Return the number of free pages that `append(growth)` takes, copies included."""
        needed = 0
        sharers: Counter[int] = Counter()  # shared last page -> sequences about to write into it
        for sequence_id, tokens in growth.items():
            sequence = self._get(sequence_id)
            if tokens < 0:
                raise InvalidRequest(f"sequence {sequence_id} cannot grow by {tokens} tokens")
            needed += self.pages_for(sequence.length + tokens) - len(sequence.pages)
            if tokens and self._writes_shared_page(sequence):
                sharers[sequence.pages[-1]] += 1
        # of r holders of a page, at most r - 1 need a copy: the last one left owns the original
        return needed + sum(
            min(writers, self._references[page] - 1) for page, writers in sharers.items()
        )

    # -- changing -------------------------------------------------------------------------------

    def open(self, pages: Iterable[int] = ()) -> int:
        """Start a sequence and return its id. Ids are never reused.

        Args:
            pages: full pages of other sequences that this one begins with.

        Raises:
            InvalidRequest: for a page that no sequence holds, or one named twice.
        """
        shared = list(pages)
        if len(set(shared)) < len(shared) or not self._references.keys() >= set(shared):
            raise InvalidRequest(
                f"pages {shared} cannot be shared: a sequence must hold each, and none may repeat"
            )
        sequence = self._next_sequence
        self._next_sequence += 1
        self._sequences[sequence] = _Sequence(len(shared) * self.page_size, shared)
        for page in shared:
            self._references[page] += 1
        return sequence

    def append(self, growth: Mapping[int, int]) -> AppendPlan:
        """Grow sequences, all of them or none.

        Args:
            growth: sequence -> number of new tokens.

        Raises:
            OutOfPages: with the numbers of pages needed and free.
            UnknownSequence: for an id that is not open.
            InvalidRequest: for a negative number of tokens.
        """
        needed = self.pages_needed(growth)
        if needed > self.free:
            raise OutOfPages(needed=needed, free=self.free)
        plan = AppendPlan([], [])
        for sequence_id, tokens in growth.items():
            if tokens:
                self._grow(sequence_id, self._sequences[sequence_id], tokens, plan)
        return plan

    def fork(self, parent: int) -> int:
        """Open a sequence with the parent's tokens, which shares all of its pages."""
        source = self._get(parent)
        child = self.open(source.pages)
        self._sequences[child].length = source.length
        return child

    def release(self, *sequences: int) -> list[int]:
        """Close sequences, and return the pages that became free.

        Raises:
            DoubleFree: for a sequence that is closed already, or named twice.
            UnknownSequence: for an id that was never issued.
        """
        for sequence_id, times in Counter(sequences).items():
            self._get(sequence_id)
            if times > 1:
                raise DoubleFree(sequence_id)
        freed: list[int] = []
        for sequence_id in sequences:
            for page in self._sequences.pop(sequence_id).pages:
                self._drop(page, freed)
        self._recycled.extend(freed)
        return freed

    def extend_pool(self, pages: int) -> None:
        """Raise the number of pages to `pages`. Issued pages keep their numbers."""
        if pages < self._pages:
            raise GeometryError(f"a pool of {self._pages} pages cannot shrink to {pages}")
        self._pages = pages

    # -- proving --------------------------------------------------------------------------------

    def check_valid(self) -> None:
        """Prove the invariant, in time proportional to the held pages. Raises BrokenInvariant."""
        incidence = Counter(page for s in self._sequences.values() for page in s.pages)
        require(incidence == Counter(self._references), "reference counts differ from the tables")
        recycled = set(self._recycled)
        require(len(recycled) == len(self._recycled), "a page is free twice")
        require(not recycled & incidence.keys(), "a page is free and held")
        issued = set(range(NULL_PAGE + 1, self._never_issued))
        require(recycled | incidence.keys() == issued, "a page is lost, or out of range")
        require(self.free + self.held == self._pages - 1, "free + held is not the pool")
        for sequence_id, s in self._sequences.items():
            if len(s.pages) != self.pages_for(s.length):
                raise BrokenInvariant(f"sequence {sequence_id}: pages/length")
            if len(set(s.pages)) != len(s.pages):
                raise BrokenInvariant(f"sequence {sequence_id}: a page twice")

    # -- details --------------------------------------------------------------------------------

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            if 0 <= sequence < self._next_sequence:
                raise DoubleFree(sequence) from None
            raise UnknownSequence(sequence) from None

    def _writes_shared_page(self, sequence: _Sequence) -> bool:
        partly_filled = sequence.length % self.page_size != 0
        return partly_filled and self._references[sequence.pages[-1]] > 1

    def _grow(self, sequence_id: int, sequence: _Sequence, tokens: int, plan: AppendPlan) -> None:
        if self._writes_shared_page(sequence):
            self._unshare_last_page(sequence_id, sequence, plan)
        sequence.length += tokens
        for logical_page in range(len(sequence.pages), self.pages_for(sequence.length)):
            page = self._take()
            sequence.pages.append(page)
            plan.writes.append(PageWrite(sequence_id, logical_page, page))

    def _unshare_last_page(self, sequence_id: int, sequence: _Sequence, plan: AppendPlan) -> None:
        shared, own = sequence.pages[-1], self._take()
        self._references[shared] -= 1
        sequence.pages[-1] = own
        plan.copies.append(PageCopy(shared, own))
        plan.writes.append(PageWrite(sequence_id, len(sequence.pages) - 1, own))

    def _take(self) -> int:
        if self._recycled:
            page = self._recycled.pop()
        else:
            page = self._never_issued
            self._never_issued += 1
        self._references[page] = 1
        return page

    def _drop(self, page: int, freed: list[int]) -> None:
        references = self._references[page] - 1
        if references:
            self._references[page] = references
        else:
            del self._references[page]
            freed.append(page)
