"""The prefix cache: what prompts share, and how long it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from granite_paged.engine.prefix_cache import Hit, Node, PrefixCache, PrefixStats
from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import PageAllocator

BLOCK, PAGE = 4, 2


class State(NamedTuple):
    nbytes: int = 10


class CacheDriver:
    """A prefix cache, driven by sequences that compute prompts for it."""

    def __init__(self, *, stateful: bool = True, budget: int = 100, pages: int = 40) -> None:
        self.allocator = PageAllocator(pages, PAGE)
        self.cache = PrefixCache(self.allocator, BLOCK, stateful=stateful, budget=budget)

    def compute(
        self, tokens: Sequence[int], *, state: State | None = None, hold: bool = False
    ) -> int:
        """Compute a prompt and cache its blocks; then close the sequence unless `hold`."""
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
    """Return a prompt of blocks, each of one repeated number, and a last token."""
    return [block for block in blocks for _ in range(BLOCK)] + [99]


def test_the_longest_cached_prefix_is_found() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2, 3))
    assert driver.find(prompt(1, 2, 7)).tokens == 2 * BLOCK
    assert driver.find(prompt(1, 2, 3)).tokens == 3 * BLOCK
    assert driver.find(prompt(2, 2, 3)).tokens == 0


def test_a_hit_never_covers_the_last_token() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2))
    assert driver.find(prompt(1, 2)[:-1]).tokens == BLOCK


def test_a_hit_compares_tokens_and_not_hashes() -> None:
    one, other = [-1] * BLOCK, [-2] * BLOCK
    assert hash(tuple(one)) == hash(tuple(other)), "Python gives -1 and -2 the same hash"
    driver = CacheDriver(stateful=False)
    driver.compute([*one, 5])
    assert driver.find([*other, 5]).tokens == 0


def test_a_hybrid_model_needs_pages_and_a_state_for_a_hit() -> None:
    driver = CacheDriver()
    driver.compute(prompt(1, 2, 3))
    assert driver.find(prompt(1, 2, 3)) == Hit()
    driver.compute(prompt(1, 2)[:-1], state=State())
    hit = driver.find(prompt(1, 2, 3))
    assert (hit.tokens, len(hit.pages), hit.state) == (2 * BLOCK, 2 * BLOCK // PAGE, State())


def test_a_checkpoint_is_set_where_waiting_prompts_diverge() -> None:
    driver = CacheDriver()
    first = driver.cache.announce(prompt(1, 2, 3, 4))
    driver.cache.announce(prompt(1, 2, 5))
    assert driver.checkpoints(first) == [2 * BLOCK]
    driver.cache.announce(prompt(1, 7))
    assert driver.checkpoints(first) == [BLOCK, 2 * BLOCK]


def test_make_room_evicts_states_before_a_copy() -> None:
    """Without it the device would hold an evicted state and the new one at the same time."""
    driver = CacheDriver(budget=20)
    for block in (1, 2):
        driver.compute(prompt(block)[:-1], state=State())
    assert driver.cache.make_room(10)
    assert driver.cache.state_bytes == 10
    assert driver.find(prompt(1)).tokens == 0
    assert driver.find(prompt(2)).tokens == BLOCK
    assert not driver.cache.make_room(21)
    assert driver.cache.state_bytes == 10, "no state may be evicted for one that cannot be cached"


def test_a_single_prompt_has_no_checkpoint() -> None:
    driver = CacheDriver()
    assert driver.checkpoints(driver.cache.announce(prompt(1, 2, 3))) == []


def test_equal_prompts_have_a_checkpoint_at_the_last_block() -> None:
    driver = CacheDriver()
    path = driver.cache.announce(prompt(1, 2, 3))
    driver.cache.announce(prompt(1, 2, 3))
    assert driver.checkpoints(path) == [3 * BLOCK]


def test_a_checkpoint_is_set_where_a_prompt_leaves_the_cache() -> None:
    driver = CacheDriver()
    driver.compute(prompt(1, 2, 3))
    assert driver.checkpoints(driver.cache.announce(prompt(1, 2, 8, 9))) == [2 * BLOCK]


def test_a_prompt_waits_for_the_state_of_a_running_one() -> None:
    driver = CacheDriver()
    running, waiting = (
        driver.cache.announce(prompt(1, 2, 3)),
        driver.cache.announce(prompt(1, 2, 4)),
    )
    checkpoints = driver.cache.checkpoints(running, Hit())
    assert not driver.cache.worth_waiting(waiting, Hit())
    driver.cache.promise(list(checkpoints.values()))
    assert driver.cache.worth_waiting(waiting, Hit())
    driver.cache.unpromise(list(checkpoints.values()))
    assert not driver.cache.worth_waiting(waiting, Hit())


def test_the_least_recently_used_state_is_evicted_first() -> None:
    driver = CacheDriver(budget=25)
    driver.compute(prompt(1), state=State())
    driver.compute(prompt(2), state=State())
    driver.find(prompt(1))
    driver.compute(prompt(3), state=State())
    assert [driver.find(prompt(n)).tokens for n in (1, 2, 3)] == [BLOCK, 0, BLOCK]
    assert driver.cache.state_bytes == 20
    assert driver.cache.stats.evicted_states == 1


def test_a_state_larger_than_the_budget_is_not_cached() -> None:
    driver = CacheDriver(budget=5)
    driver.compute(prompt(1), state=State())
    assert driver.cache.state_bytes == 0


def test_eviction_takes_the_least_recently_used_leaves_first() -> None:
    driver = CacheDriver(stateful=False, pages=13)
    driver.compute(prompt(1, 2)[:-1])
    driver.compute(prompt(3, 4)[:-1])
    driver.find(prompt(1, 2))
    assert driver.allocator.free == 12 - 8
    assert len(driver.cache.evict(6)) == 2
    assert driver.find(prompt(3, 4)).tokens == BLOCK
    assert driver.find(prompt(1, 2)).tokens == 2 * BLOCK


def test_pages_in_use_are_not_evicted() -> None:
    driver = CacheDriver(stateful=False, pages=13)
    driver.compute(prompt(1, 2)[:-1], hold=True)
    driver.cache.evict(12)
    assert driver.allocator.free < 12
    assert driver.find(prompt(1, 2)).tokens == 2 * BLOCK


def test_cached_pages_are_held_until_the_cache_is_cleared() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2))
    assert driver.allocator.held == driver.cache.pages == 4
    driver.cache.clear()
    assert driver.allocator.held == driver.cache.pages == 0


def test_a_budget_of_0_turns_the_cache_off() -> None:
    driver = CacheDriver(budget=0)
    driver.compute(prompt(1, 2), state=State())
    assert driver.cache.announce(prompt(1, 2)) == []
    assert driver.allocator.held == 0


def test_a_withdrawn_prompt_leaves_no_node() -> None:
    driver = CacheDriver()
    path = driver.cache.announce(prompt(1, 2, 3))
    driver.cache.withdraw(path)
    assert not driver.cache._root.children


def test_hits_misses_and_tokens_are_counted() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2))
    driver.find(prompt(1, 2))
    driver.find(prompt(4))
    stats = driver.cache.stats
    assert (stats.hits, stats.misses) == (1, 1)
    assert stats.hit_rate == pytest.approx(2 * BLOCK / (3 * BLOCK + 2))


def test_check_valid_detects_an_uncounted_state() -> None:
    driver = CacheDriver()
    driver.compute(prompt(1), state=State())
    driver.cache.state_bytes += 1
    with pytest.raises(BrokenInvariant, match="bytes of states"):
        driver.cache.check_valid()


# -- corners ------------------------------------------------------------------------------------


def test_nothing_is_counted_at_first() -> None:
    stats = CacheDriver().cache.stats
    assert stats == PrefixStats(hits=0, misses=0, tokens_hit=0, tokens_asked=0, evicted_states=0)
    assert stats.hit_rate == 0


def test_a_prompt_shorter_than_a_block_finds_nothing() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1))
    assert driver.find([1]) == Hit()


def test_a_hit_of_one_token_is_a_hit() -> None:
    allocator = PageAllocator(9, 1)
    cache = PrefixCache(allocator, 1, stateful=False, budget=1)
    sequence = allocator.open()
    allocator.append({sequence: 1})
    cache.keep([5], allocator.pages_of(sequence))
    path = cache.announce([5, 6])
    cache.used(path, cache.find(path), 2)
    assert (cache.stats.hits, cache.stats.misses, cache.stats.tokens_hit) == (1, 0, 1)


def test_a_namespace_is_part_of_the_first_block() -> None:
    cache = CacheDriver().cache
    first, second = (1,) * BLOCK, (2,) * BLOCK
    assert [node.tokens for node in cache.announce(prompt(1, 2))] == [first, second]
    assert [node.tokens for node in cache.announce(prompt(1, 2), "a")] == [("a", *first), second]


def test_a_prompt_hits_its_own_namespace_only() -> None:
    driver = CacheDriver(stateful=False)
    sequence = driver.allocator.open()
    driver.allocator.append({sequence: 2 * BLOCK})
    pages = driver.allocator.pages_of(sequence)
    driver.cache.keep(prompt(1, 2)[:-1], pages, namespace="a")
    found = [driver.cache.find(driver.cache.announce(prompt(1, 2), name)) for name in ("", "a")]
    assert [hit.tokens for hit in found] == [0, 2 * BLOCK]


def test_a_state_at_the_hit_itself_is_not_worth_waiting_for() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2))
    path = driver.cache.announce(prompt(1, 2, 3))
    driver.cache.promise(path[1:2])
    assert not driver.cache.worth_waiting(path, Hit(2 * BLOCK))
    assert driver.cache.worth_waiting(path, Hit(BLOCK))


def test_a_prompt_keeps_no_state_at_the_hit_that_it_starts_from() -> None:
    driver = CacheDriver()
    path = driver.cache.announce(prompt(1, 2, 3, 4))
    driver.cache.announce(prompt(1, 2, 5))
    assert driver.checkpoints(path, Hit(2 * BLOCK)) == []


def test_a_state_as_large_as_the_budget_is_cached() -> None:
    driver = CacheDriver(budget=10)
    driver.compute(prompt(1), state=State())
    assert driver.cache.state_bytes == 10


def test_the_smallest_budget_turns_the_cache_on() -> None:
    driver = CacheDriver(budget=1, stateful=False)
    driver.compute(prompt(1))
    assert driver.find(prompt(1)).tokens == BLOCK


def test_a_state_that_is_computed_twice_counts_once() -> None:
    driver = CacheDriver()
    driver.compute(prompt(1), state=State())
    driver.compute(prompt(1), state=State(11))
    assert driver.cache.state_bytes == 10


def test_nothing_is_evicted_while_enough_pages_are_free() -> None:
    driver = CacheDriver(stateful=False, pages=13)
    driver.compute(prompt(1, 2)[:-1])
    assert driver.cache.evict(driver.allocator.free) == []
    assert driver.cache.pages == 4


def test_a_promised_state_keeps_the_path_to_it() -> None:
    cache = CacheDriver().cache
    path = cache.announce(prompt(1, 2, 3))
    cache.promise(path[1:2])
    cache.withdraw(path)
    cache.check_valid()
    assert cache.worth_waiting(cache.announce(prompt(1, 2, 4)), Hit())


def test_a_path_lasts_as_long_as_one_prompt_waits() -> None:
    cache = CacheDriver().cache
    first, second = cache.announce(prompt(1, 2)), cache.announce(prompt(1, 2))
    cache.withdraw(first)
    assert cache.announce(prompt(1, 2)) == second


def test_a_removed_node_does_not_remove_its_successor() -> None:
    cache = CacheDriver().cache
    gone = cache.announce(prompt(1))
    cache.withdraw(gone)
    (node,) = cache.announce(prompt(1))
    cache.promise(gone)
    cache.unpromise(gone)
    assert cache.announce(prompt(1)) == [node]


@pytest.mark.parametrize("name", ["interest", "pending_states"])
def test_check_valid_detects_a_count_below_zero(name: str) -> None:
    cache = CacheDriver().cache
    (node,) = cache.announce(prompt(1))
    node.interest = node.pending_states = 1
    setattr(node, name, -1)
    with pytest.raises(BrokenInvariant, match="a count below zero"):
        cache.check_valid()


def test_check_valid_detects_a_block_without_the_one_before_it() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2))
    first, _ = driver.cache.announce(prompt(1, 2, 3))[:2]
    assert first.sequence is not None
    first.sequence = None
    del driver.cache._with_pages[first]
    with pytest.raises(BrokenInvariant, match="a block without the one before it"):
        driver.cache.check_valid()


def test_check_valid_detects_a_node_that_nothing_needs() -> None:
    cache = CacheDriver().cache
    (node,) = cache.announce(prompt(1))
    node.interest = 0
    with pytest.raises(BrokenInvariant, match="a node that is not needed"):
        cache.check_valid()


@pytest.mark.parametrize(("budget", "nbytes"), [(0, 1), (10, 11)])
def test_check_valid_detects_states_over_the_budget(budget: int, nbytes: int) -> None:
    driver = CacheDriver(budget=100)
    driver.compute(prompt(1), state=State(nbytes))
    driver.cache.budget = nbytes
    driver.cache.check_valid()
    driver.cache.budget = budget
    with pytest.raises(BrokenInvariant, match="states over budget"):
        driver.cache.check_valid()


def test_a_cache_whose_budget_is_below_zero_is_valid_and_off() -> None:
    driver = CacheDriver(budget=-2)
    driver.compute(prompt(1), state=State(0))
    assert driver.cache.announce(prompt(1)) == []


def test_a_block_that_a_prompt_waits_for_is_kept() -> None:
    driver = CacheDriver(stateful=False)
    path = driver.cache.announce(prompt(1, 2))
    driver.compute(prompt(1))
    assert driver.cache.find(path).tokens == BLOCK
    assert driver.cache.sequences == [path[0].sequence]


def test_a_block_is_not_evicted_before_those_after_it() -> None:
    driver = CacheDriver(stateful=False)
    driver.compute(prompt(1, 2)[:-1])
    _, second = driver.cache.announce(prompt(1, 2))
    assert second.sequence is not None
    held = driver.allocator.open(driver.allocator.pages_of(second.sequence))
    assert driver.cache.evict(99) == []
    driver.cache.check_valid()
    driver.allocator.release(held)
    assert len(driver.cache.evict(99)) == 4
