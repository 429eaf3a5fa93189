"""What prompts share, and for how long it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from granite_paged.engine.prefix_cache import Hit, Node, PrefixCache
from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import PageAllocator

BLOCK, PAGE = 4, 2


class State(NamedTuple):
    nbytes: int = 10


class Desk:
    """A cache, and sequences that compute prompts for it."""

    def __init__(self, *, stateful: bool = True, budget: int = 100, pages: int = 40) -> None:
        self.allocator = PageAllocator(pages, PAGE)
        self.forgotten: list[int] = []
        self.cache = PrefixCache(
            self.allocator, BLOCK, stateful=stateful, budget=budget, forget=self.forgotten.extend
        )

    def compute(
        self, tokens: Sequence[int], *, state: State | None = None, hold: bool = False
    ) -> int:
        """Store a prompt, keep its blocks; the sequence is closed unless it is to be held."""
        sequence = self.allocator.open()
        self.allocator.append({sequence: len(tokens)})
        self.cache.keep(tokens, self.allocator.pages_of(sequence), state)
        if not hold:
            self.allocator.release(sequence)
        self.cache.check_valid()
        self.allocator.check_valid()
        return sequence

    def find(self, tokens: Sequence[int]) -> Hit:
        path = self.cache.announce(tokens)
        hit = self.cache.find(path)
        self.cache.used(path, hit, len(tokens))
        self.cache.withdraw(path)
        self.cache.check_valid()
        return hit

    def checkpoints(self, path: Sequence[Node], hit: Hit | None = None) -> list[int]:
        return list(self.cache.checkpoints(path, hit or Hit()))


def prompt(*blocks: int) -> list[int]:
    """Blocks of one number each, and a token that must be computed."""
    return [block for block in blocks for _ in range(BLOCK)] + [99]


def test_the_longest_kept_beginning_is_found() -> None:
    desk = Desk(stateful=False)
    desk.compute(prompt(1, 2, 3))
    assert desk.find(prompt(1, 2, 7)).tokens == 2 * BLOCK
    assert desk.find(prompt(1, 2, 3)).tokens == 3 * BLOCK
    assert desk.find(prompt(2, 2, 3)).tokens == 0


def test_the_last_token_is_always_left_to_compute() -> None:
    desk = Desk(stateful=False)
    desk.compute(prompt(1, 2))
    assert desk.find(prompt(1, 2)[:-1]).tokens == BLOCK


def test_a_hit_compares_tokens_and_not_hashes() -> None:
    one, other = [-1] * BLOCK, [-2] * BLOCK
    assert hash(tuple(one)) == hash(tuple(other)), "Python gives -1 and -2 one hash"
    desk = Desk(stateful=False)
    desk.compute([*one, 5])
    assert desk.find([*other, 5]).tokens == 0


def test_pages_without_a_state_are_no_start_for_a_model_with_mamba_layers() -> None:
    desk = Desk()
    desk.compute(prompt(1, 2, 3))
    assert desk.find(prompt(1, 2, 3)) == Hit()
    desk.compute(prompt(1, 2)[:-1], state=State())
    hit = desk.find(prompt(1, 2, 3))
    assert (hit.tokens, len(hit.pages), hit.state) == (2 * BLOCK, 2 * BLOCK // PAGE, State())


def test_a_state_is_cut_where_waiting_prompts_part() -> None:
    desk = Desk()
    first = desk.cache.announce(prompt(1, 2, 3, 4))
    desk.cache.announce(prompt(1, 2, 5))
    assert desk.checkpoints(first) == [2 * BLOCK]
    desk.cache.announce(prompt(1, 7))
    assert desk.checkpoints(first) == [BLOCK, 2 * BLOCK]


def test_room_for_a_state_is_made_before_it_is_there() -> None:
    """Whoever copies a state asks first, or the device holds the old and the new at once."""
    desk = Desk(budget=20)
    for block in (1, 2):
        desk.compute(prompt(block)[:-1], state=State())
    assert desk.cache.make_room(10)
    assert desk.cache.state_bytes == 10
    assert desk.find(prompt(1)).tokens == 0
    assert desk.find(prompt(2)).tokens == BLOCK
    assert not desk.cache.make_room(21)
    assert desk.cache.state_bytes == 10, "nothing is dropped for what cannot be kept"


def test_a_prompt_alone_cuts_nowhere() -> None:
    desk = Desk()
    assert desk.checkpoints(desk.cache.announce(prompt(1, 2, 3))) == []


def test_equal_prompts_cut_at_their_last_block() -> None:
    desk = Desk()
    path = desk.cache.announce(prompt(1, 2, 3))
    desk.cache.announce(prompt(1, 2, 3))
    assert desk.checkpoints(path) == [3 * BLOCK]


def test_a_state_is_cut_where_a_prompt_parts_from_the_past() -> None:
    desk = Desk()
    desk.compute(prompt(1, 2, 3))
    assert desk.checkpoints(desk.cache.announce(prompt(1, 2, 8, 9))) == [2 * BLOCK]


def test_a_prompt_waits_for_what_a_running_one_will_leave() -> None:
    desk = Desk()
    running, waiting = desk.cache.announce(prompt(1, 2, 3)), desk.cache.announce(prompt(1, 2, 4))
    checkpoints = desk.cache.checkpoints(running, Hit())
    assert not desk.cache.worth_waiting(waiting, Hit())
    desk.cache.promise(list(checkpoints.values()))
    assert desk.cache.worth_waiting(waiting, Hit())
    desk.cache.unpromise(list(checkpoints.values()))
    assert not desk.cache.worth_waiting(waiting, Hit())


def test_states_keep_to_their_budget_and_the_least_recently_used_goes_first() -> None:
    desk = Desk(budget=25)
    desk.compute(prompt(1), state=State())
    desk.compute(prompt(2), state=State())
    desk.find(prompt(1))
    desk.compute(prompt(3), state=State())
    assert [desk.find(prompt(n)).tokens for n in (1, 2, 3)] == [BLOCK, 0, BLOCK]
    assert desk.cache.state_bytes == 20
    assert desk.cache.stats.evicted_states == 1


def test_a_state_larger_than_the_budget_is_not_kept() -> None:
    desk = Desk(budget=5)
    desk.compute(prompt(1), state=State())
    assert desk.cache.state_bytes == 0


def test_eviction_takes_the_least_recently_used_leaves_first() -> None:
    desk = Desk(stateful=False, pages=13)
    desk.compute(prompt(1, 2)[:-1])
    desk.compute(prompt(3, 4)[:-1])
    desk.find(prompt(1, 2))
    assert desk.allocator.free == 12 - 8
    assert desk.cache.evict(6)
    assert desk.find(prompt(3, 4)).tokens == BLOCK
    assert desk.find(prompt(1, 2)).tokens == 2 * BLOCK
    assert len(desk.forgotten) == 2


def test_pages_in_use_are_spared() -> None:
    desk = Desk(stateful=False, pages=13)
    desk.compute(prompt(1, 2)[:-1], hold=True)
    assert not desk.cache.evict(12)
    assert desk.find(prompt(1, 2)).tokens == 2 * BLOCK


def test_pages_outlive_who_computed_them_and_go_with_the_cache() -> None:
    desk = Desk(stateful=False)
    desk.compute(prompt(1, 2))
    assert desk.allocator.held == desk.cache.pages == 4
    desk.cache.clear()
    assert desk.allocator.held == desk.cache.pages == 0


def test_a_budget_of_nothing_turns_the_cache_off() -> None:
    desk = Desk(budget=0)
    desk.compute(prompt(1, 2), state=State())
    assert desk.cache.announce(prompt(1, 2)) == []
    assert desk.allocator.held == 0


def test_a_prompt_that_waits_no_more_leaves_no_node() -> None:
    desk = Desk()
    path = desk.cache.announce(prompt(1, 2, 3))
    desk.cache.withdraw(path)
    assert not desk.cache._root.children


def test_hits_misses_and_tokens_are_counted() -> None:
    desk = Desk(stateful=False)
    desk.compute(prompt(1, 2))
    desk.find(prompt(1, 2))
    desk.find(prompt(4))
    stats = desk.cache.stats
    assert (stats.hits, stats.misses) == (1, 1)
    assert stats.hit_rate == pytest.approx(2 * BLOCK / (3 * BLOCK + 2))


def test_check_valid_sees_a_state_that_is_not_counted() -> None:
    desk = Desk()
    desk.compute(prompt(1), state=State())
    desk.cache.state_bytes += 1
    with pytest.raises(BrokenInvariant, match="bytes of states"):
        desk.cache.check_valid()
