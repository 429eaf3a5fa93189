"""The allocator under any order of requests, beside a model of what its pages would hold."""

from __future__ import annotations

import os
import random
from typing import ClassVar

import pytest
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
from granite_paged.paging.allocator import PageAllocator
from tests.helpers.strategies import Ledger

DEEP_STEPS = int(os.environ.get("GRANITE_PAGED_DEEP_STEPS", "5000"))
"""Steps of the random walk; `nox -s property` asks for a million."""


class AllocatorMachine(RuleBasedStateMachine):
    """Every request an allocator can get; after each, `Ledger.check_valid`."""

    allocator_type: ClassVar[type[PageAllocator]] = PageAllocator
    open_sequences = Bundle("open_sequences")

    @initialize(pages=st.integers(2, 24), page_size=st.integers(1, 5))
    def start(self, pages: int, page_size: int) -> None:
        self.ledger = Ledger(self.allocator_type(pages, page_size))

    @property
    def allocator(self) -> PageAllocator:
        return self.ledger.allocator

    @rule(target=open_sequences)
    def open(self) -> int:
        return self.ledger.open()

    @rule(target=open_sequences, parent=open_sequences)
    def fork(self, parent: int) -> int:
        return self.ledger.fork(parent)

    @rule(target=open_sequences, parent=open_sequences, pages=st.integers(0, 5))
    def share(self, parent: int, pages: int) -> int:
        return self.ledger.share(parent, pages)

    @rule(parent=open_sequences, foreign=st.integers(0, 10**6))
    def share_pages_that_cannot_be(self, parent: int, foreign: int) -> None:
        held = self.allocator.pages_of(parent)
        unknown = self.allocator.pages + foreign
        for pages in ((*held, unknown), (*held, 0), (*held, *held[:1], unknown)):
            self.ledger.refuses(InvalidRequest, self.allocator.open, pages)

    @rule(sequence=open_sequences, tokens=st.integers(0, 12))
    def append(self, sequence: int, tokens: int) -> None:
        self._append({sequence: tokens})

    @rule(growth=st.dictionaries(open_sequences, st.integers(0, 7), max_size=5))
    def append_batch(self, growth: dict[int, int]) -> None:
        self._append(growth)

    @rule(sequence=consumes(open_sequences))
    def release(self, sequence: int) -> None:
        self.ledger.release(sequence)

    @rule(sequences=st.lists(consumes(open_sequences), max_size=4))
    def release_many(self, sequences: list[int]) -> None:
        self.ledger.release(*sequences)

    @rule(more=st.integers(0, 3))
    def extend_pool(self, more: int) -> None:
        pages, free = self.allocator.pages, self.allocator.free
        self.allocator.extend_pool(pages + more)
        assert self.allocator.free == free + more

    @rule(less=st.integers(1, 30))
    def shrink_pool(self, less: int) -> None:
        fewer = self.allocator.pages - less
        self.ledger.refuses(GeometryError, self.allocator.extend_pool, fewer)

    @precondition(lambda self: self.ledger.closed)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        closed = data.draw(st.sampled_from(self.ledger.closed))
        self.ledger.refuses(DoubleFree, self.allocator.release, closed)

    @rule(sequence=open_sequences, others=st.lists(open_sequences, max_size=2))
    def release_twice_in_one_call(self, sequence: int, others: list[int]) -> None:
        named = (*others, sequence, sequence)
        self.ledger.refuses(DoubleFree, self.allocator.release, *named)

    @rule(known=st.lists(open_sequences, max_size=2, unique=True), foreign=st.integers(1, 10**6))
    def name_a_foreign_sequence(self, known: list[int], foreign: int) -> None:
        issued = len(self.ledger.histories) + len(self.ledger.closed)  # ids count up from 0
        for unknown in (issued - 1 + foreign, -foreign):
            growth = dict.fromkeys([*known, unknown], 1)
            self.ledger.refuses(UnknownSequence, self.allocator.release, *known, unknown)
            self.ledger.refuses(UnknownSequence, self.allocator.append, growth)
            self.ledger.refuses(UnknownSequence, self.allocator.fork, unknown)

    @rule(
        sequence=open_sequences,
        tokens=st.integers(-(10**9), -1),
        others=st.lists(open_sequences, max_size=2),
    )
    def append_a_negative_number(self, sequence: int, tokens: int, others: list[int]) -> None:
        growth = {**dict.fromkeys(others, 1), sequence: tokens}
        self.ledger.refuses(InvalidRequest, self.allocator.append, growth)

    @rule(sequence=open_sequences, others=st.lists(open_sequences, max_size=2))
    def append_more_than_fits(self, sequence: int, others: list[int]) -> None:
        too_many = (self.allocator.pages + 1) * self.allocator.page_size
        growth = {**dict.fromkeys(others, 1), sequence: too_many}
        self.ledger.refuses(OutOfPages, self.allocator.append, growth)

    def _append(self, growth: dict[int, int]) -> None:
        if self.allocator.pages_needed(growth) <= self.allocator.free:
            self.ledger.append(growth)
        else:
            self.ledger.refuses(OutOfPages, self.allocator.append, growth)

    @invariant()
    def everything_agrees(self) -> None:
        self.ledger.check_valid()


TestAllocatorMachine = AllocatorMachine.TestCase


def walk(ledger: Ledger, steps: int, seed: int) -> None:
    """As the machine, without shrinking and a hundred times faster. Every step is checked."""
    chance = random.Random(seed)
    allocator, histories, closed = ledger.allocator, ledger.histories, ledger.closed
    for _ in range(steps):
        known = list(histories)
        request = chance.random()
        if not known or (request < 0.1 and len(known) < 8):
            ledger.open()
        elif request < 0.17 and len(known) < 12:
            ledger.fork(chance.choice(known))
        elif request < 0.2 and len(known) < 12:
            ledger.share(chance.choice(known), chance.randint(0, 4))
        elif request < 0.72:
            writers = chance.sample(known, chance.randint(1, min(4, len(known))))
            growth = {sequence: chance.randint(0, 9) for sequence in writers}
            if allocator.pages_needed(growth) <= allocator.free:
                ledger.append(growth)
            else:
                ledger.refuses(OutOfPages, allocator.append, growth)
        elif request < 0.9:
            ledger.release(*chance.sample(known, chance.randint(1, min(2, len(known)))))
        elif request < 0.93 and closed:
            again = chance.choice(closed)
            ledger.refuses(DoubleFree, allocator.release, known[0], again)
        elif request < 0.96:
            twice = chance.choice(known)
            ledger.refuses(DoubleFree, allocator.release, twice, twice)
        elif request < 0.98:
            ledger.refuses(InvalidRequest, allocator.append, {known[0]: 1, known[-1]: -1})
        else:
            ledger.refuses(UnknownSequence, allocator.append, {known[0]: 1, -1: 1})
        ledger.check_valid()


@pytest.mark.parametrize(("pages", "page_size"), [(16, 1), (20, 3), (24, 4), (40, 8)])
def test_a_long_random_walk_never_breaks_the_invariant(pages: int, page_size: int) -> None:
    ledger = Ledger(PageAllocator(pages, page_size))
    walk(ledger, DEEP_STEPS // 4, seed=pages)
    ledger.release(*ledger.allocator.sequences)
    assert ledger.allocator.free == pages - 1
    refusals = {"OutOfPages", "DoubleFree", "UnknownSequence", "InvalidRequest"}
    assert refusals <= ledger.met.keys(), "the walk never met a refusal"
    assert ledger.met["copy"] or page_size == 1, "the walk never copied on write"
