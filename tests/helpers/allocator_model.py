"""The allocator's requests in any order, against a model of what its pages would hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from granite_paged.errors import (
    DoubleFree,
    GeometryError,
    InvalidRequest,
    OutOfPages,
    UnknownSequence,
)
from granite_paged.paging.allocator import AppendPlan, PageAllocator


class AllocatorModel:
    """An allocator under test, with a model of its pages and of what every sequence wrote.

    A page is a list of tokens, and a token is a number that was never written before. The
    allocator's plans are carried out literally, so the lists hold what a device would hold.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self.histories: dict[int, list[int]] = {}
        self.closed: list[int] = []
        # counts of copies and refusals: a walk without any proves little
        self.met: Counter[str] = Counter()
        self._issued: set[int] = set()
        self._written = 0
        self._contents: dict[int, list[int | None]] = {}

    def open(self) -> int:
        """Open an empty sequence."""
        sequence = self.allocator.open()
        self._first_seen(sequence)
        self.histories[sequence] = []
        return sequence

    def fork(self, parent: int) -> int:
        """Fork a sequence: the child begins with the parent's tokens."""
        free = self.allocator.free
        child = self.allocator.fork(parent)
        assert self.allocator.free == free, "a fork took pages"
        self._first_seen(child)
        self.histories[child] = list(self.histories[parent])
        return child

    def share(self, parent: int, pages: int) -> int:
        """Open a sequence that shares at most `pages` whole pages with the parent's start."""
        size, history = self.allocator.page_size, self.histories[parent]
        pages = min(pages, len(history) // size)
        free = self.allocator.free
        child = self.allocator.open(self.allocator.pages_of(parent)[:pages])
        assert self.allocator.free == free, "sharing took pages"
        self._first_seen(child)
        self.histories[child] = history[: pages * size]
        return child

    def append(self, growth: dict[int, int]) -> AppendPlan:
        """Grow sequences, carry out the allocator's plan and write the new tokens."""
        needed, free = self.allocator.pages_needed(growth), self.allocator.free
        plan = self.allocator.append(growth)
        assert self.allocator.free == free - needed, (
            "append took another number of pages than pages_needed() said"
        )
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
        assert self.allocator.free == free + len(freed), (
            "free pages do not agree with the pages that release() returned"
        )
        for sequence in sequences:
            del self.histories[sequence]
            self.closed.append(sequence)
        return freed

    def refuses(
        self, error: type[Exception], request: Callable[..., object], *arguments: Any
    ) -> None:
        """Check that `request(*arguments)` raises `error` and changes nothing."""
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
        """Check the allocator's invariants, and that every sequence reads its own tokens."""
        self.allocator.check_valid()
        assert set(self.allocator.sequences) == set(self.histories), (
            "the open sequences are not those of the model"
        )
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
    """Return all of an allocator's visible state, to prove that nothing changed."""
    return (
        allocator.pages,
        allocator.free,
        allocator.held,
        allocator.tokens,
        [(s, allocator.length(s), allocator.pages_of(s)) for s in allocator.sequences],
        {p: allocator.references(p) for s in allocator.sequences for p in allocator.pages_of(s)},
    )


class AllocatorMachine(RuleBasedStateMachine):
    """Every request that an allocator can get, each followed by `AllocatorModel.check_valid()`."""

    allocator_type: ClassVar[type[PageAllocator]] = PageAllocator
    open_sequences = Bundle("open_sequences")

    @initialize(pages=st.integers(2, 24), page_size=st.integers(1, 5))
    def start(self, pages: int, page_size: int) -> None:
        self.model = AllocatorModel(self.allocator_type(pages, page_size))

    @property
    def allocator(self) -> PageAllocator:
        return self.model.allocator

    @rule(target=open_sequences)
    def open(self) -> int:
        return self.model.open()

    @rule(target=open_sequences, parent=open_sequences)
    def fork(self, parent: int) -> int:
        return self.model.fork(parent)

    @rule(target=open_sequences, parent=open_sequences, tokens=st.integers(1, 4))
    def fork_and_grow(self, parent: int, tokens: int) -> int:
        """Grow both sides of a fork, which copies a page that is not full."""
        self._append({parent: tokens})
        child = self.model.fork(parent)
        self._append({child: 1, parent: 1})
        return child

    @rule(target=open_sequences, parent=open_sequences, pages=st.integers(0, 5))
    def share(self, parent: int, pages: int) -> int:
        return self.model.share(parent, pages)

    @rule(parent=open_sequences, foreign=st.integers(0, 10**6))
    def share_pages_that_cannot_be(self, parent: int, foreign: int) -> None:
        held = self.allocator.pages_of(parent)
        unknown = self.allocator.pages + foreign
        for pages in ((*held, unknown), (*held, 0), (*held, *held[:1], unknown)):
            self.model.refuses(InvalidRequest, self.allocator.open, pages)

    @rule(sequence=open_sequences, tokens=st.integers(0, 12))
    def append(self, sequence: int, tokens: int) -> None:
        self._append({sequence: tokens})

    @rule(growth=st.dictionaries(open_sequences, st.integers(0, 7), max_size=5))
    def append_batch(self, growth: dict[int, int]) -> None:
        self._append(growth)

    @rule(sequence=consumes(open_sequences))
    def release(self, sequence: int) -> None:
        self.model.release(sequence)

    @rule(sequences=st.lists(consumes(open_sequences), max_size=4))
    def release_many(self, sequences: list[int]) -> None:
        self.model.release(*sequences)

    @rule(more=st.integers(0, 3))
    def extend_pool(self, more: int) -> None:
        pages, free = self.allocator.pages, self.allocator.free
        self.allocator.extend_pool(pages + more)
        assert self.allocator.free == free + more

    @rule(less=st.integers(1, 30))
    def shrink_pool(self, less: int) -> None:
        fewer = self.allocator.pages - less
        self.model.refuses(GeometryError, self.allocator.extend_pool, fewer)

    @precondition(lambda self: self.model.closed)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        closed = data.draw(st.sampled_from(self.model.closed))
        self.model.refuses(DoubleFree, self.allocator.release, closed)

    @rule(sequence=open_sequences, others=st.lists(open_sequences, max_size=2))
    def release_twice_in_one_call(self, sequence: int, others: list[int]) -> None:
        named = (*others, sequence, sequence)
        self.model.refuses(DoubleFree, self.allocator.release, *named)

    @rule(known=st.lists(open_sequences, max_size=2, unique=True), foreign=st.integers(1, 10**6))
    def name_a_foreign_sequence(self, known: list[int], foreign: int) -> None:
        issued = len(self.model.histories) + len(self.model.closed)  # ids count up from 0
        for unknown in (issued - 1 + foreign, -foreign):
            growth = dict.fromkeys([*known, unknown], 1)
            self.model.refuses(UnknownSequence, self.allocator.release, *known, unknown)
            self.model.refuses(UnknownSequence, self.allocator.append, growth)
            self.model.refuses(UnknownSequence, self.allocator.fork, unknown)

    @rule(
        sequence=open_sequences,
        tokens=st.integers(-(10**9), -1),
        others=st.lists(open_sequences, max_size=2),
    )
    def append_a_negative_number(self, sequence: int, tokens: int, others: list[int]) -> None:
        growth = {**dict.fromkeys(others, 1), sequence: tokens}
        self.model.refuses(InvalidRequest, self.allocator.append, growth)

    @rule(sequence=open_sequences, others=st.lists(open_sequences, max_size=2))
    def append_more_than_fits(self, sequence: int, others: list[int]) -> None:
        too_many = (self.allocator.pages + 1) * self.allocator.page_size
        growth = {**dict.fromkeys(others, 1), sequence: too_many}
        self.model.refuses(OutOfPages, self.allocator.append, growth)

    def _append(self, growth: dict[int, int]) -> None:
        if self.allocator.pages_needed(growth) <= self.allocator.free:
            self.model.append(growth)
        else:
            self.model.refuses(OutOfPages, self.allocator.append, growth)

    @invariant()
    def everything_agrees(self) -> None:
        self.model.check_valid()


def random_walk(model: AllocatorModel, steps: int, seed: int) -> None:
    """Do what the machine does, without shrinking and a hundred times faster. Check every step."""
    chance = random.Random(seed)
    allocator, histories, closed = model.allocator, model.histories, model.closed
    for _ in range(steps):
        known = list(histories)
        request = chance.random()
        if not known or (request < 0.1 and len(known) < 8):
            model.open()
        elif request < 0.17 and len(known) < 12:
            model.fork(chance.choice(known))
        elif request < 0.2 and len(known) < 12:
            model.share(chance.choice(known), chance.randint(0, 4))
        elif request < 0.72:
            writers = chance.sample(known, chance.randint(1, min(4, len(known))))
            growth = {sequence: chance.randint(0, 9) for sequence in writers}
            if allocator.pages_needed(growth) <= allocator.free:
                model.append(growth)
            else:
                model.refuses(OutOfPages, allocator.append, growth)
        elif request < 0.9:
            model.release(*chance.sample(known, chance.randint(1, min(2, len(known)))))
        elif request < 0.93 and closed:
            again = chance.choice(closed)
            model.refuses(DoubleFree, allocator.release, known[0], again)
        elif request < 0.96:
            twice = chance.choice(known)
            model.refuses(DoubleFree, allocator.release, twice, twice)
        elif request < 0.98:
            model.refuses(InvalidRequest, allocator.append, {known[0]: 1, known[-1]: -1})
        else:
            model.refuses(UnknownSequence, allocator.append, {known[0]: 1, -1: 1})
        model.check_valid()
