"""Mutation tests: each breaks something on purpose, and a checker must detect it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from granite_paged.errors import DoubleFree
from granite_paged.layers import attention
from granite_paged.paging import masks
from granite_paged.paging.allocator import AppendPlan, PageAllocator
from granite_paged.paging.page_table import UNHELD, PageTable
from granite_paged.paging.pool import KVPool
from tests.helpers.allocator_model import AllocatorMachine, AllocatorModel, random_walk
from tests.helpers.strategies import (
    Open,
    PagedSequences,
    Step,
    assert_no_page_is_listed_twice,
    assert_right,
    assert_same_outputs,
    assert_unlisted_pages_hold_nothing,
    assert_whole_pages_are_allowed,
    make_geometry,
    move_pages,
)

# -- allocators ---------------------------------------------------------------------------------


class AcceptsADoubleFree(PageAllocator):
    """Seen in transformers and vLLM."""

    def release(self, *sequences: int) -> list[int]:
        return super().release(*(s for s in sequences if s in self._sequences))


class FreesTwiceWhatIsNamedTwice(PageAllocator):
    """Seen in torch PagedAttention.erase."""

    def release(self, *sequences: int) -> list[int]:
        freed = super().release(*dict.fromkeys(sequences))
        if len(set(sequences)) < len(sequences):
            self._recycled.extend(freed)
        return freed


class FreesWhatIsShared(PageAllocator):
    """One owner's release takes the page from the others."""

    def _drop(self, page: int, freed: list[int]) -> None:
        self._references[page] = 1
        super()._drop(page, freed)


class ForgetsAReference(PageAllocator):
    def fork(self, parent: int) -> int:
        child = super().fork(parent)
        for page in self.pages_of(child)[:1]:
            self._references[page] -= 1
        return child


class NeverCopies(PageAllocator):
    def _writes_shared_page(self, sequence: Any) -> bool:
        return False


class PlansNoCopy(PageAllocator):
    """The table is right and the tokens are missing."""

    def append(self, growth: Mapping[int, int]) -> AppendPlan:
        plan = super().append(growth)
        return AppendPlan(plan.writes, [])


class LosesPages(PageAllocator):
    def release(self, *sequences: int) -> list[int]:
        freed = super().release(*sequences)
        if len(freed) > 1:
            self._recycled.pop()
        return freed


class HandsOutTheNullPage(PageAllocator):
    def __init__(self, pages: int, page_size: int) -> None:
        super().__init__(pages, page_size)
        self._never_issued = 0


class MutatesBeforeItRefuses(PageAllocator):
    def append(self, growth: Mapping[int, int]) -> AppendPlan:
        whole = AppendPlan([], [])
        for sequence, tokens in growth.items():
            plan = super().append({sequence: tokens})
            whole.writes.extend(plan.writes)
            whole.copies.extend(plan.copies)
        return whole


class AcceptsANegativeGrowth(PageAllocator):
    """Seen in vLLM."""

    def append(self, growth: Mapping[int, int]) -> AppendPlan:
        return super().append({s: max(0, tokens) for s, tokens in growth.items()})


class IgnoresForeignSequences(PageAllocator):
    def append(self, growth: Mapping[int, int]) -> AppendPlan:
        return super().append({s: n for s, n in growth.items() if s in self._sequences})


class ReusesIds(PageAllocator):
    def open(self, pages: Iterable[int] = ()) -> int:
        self._next_sequence = 0
        while self._next_sequence in self._sequences:
            self._next_sequence += 1
        return super().open(pages)


class ForgetsCopiesWhenCounting(PageAllocator):
    def pages_needed(self, growth: Mapping[int, int]) -> int:
        return sum(
            self.pages_for(self.length(s) + tokens) - len(self.pages_of(s))
            for s, tokens in growth.items()
        )


BROKEN_ALLOCATORS = [
    AcceptsADoubleFree,
    FreesTwiceWhatIsNamedTwice,
    FreesWhatIsShared,
    ForgetsAReference,
    NeverCopies,
    PlansNoCopy,
    LosesPages,
    HandsOutTheNullPage,
    MutatesBeforeItRefuses,
    AcceptsANegativeGrowth,
    IgnoresForeignSequences,
    ReusesIds,
    ForgetsCopiesWhenCounting,
]

HUNT = settings(
    max_examples=5000,  # the search depends on which modules are loaded, also derandomized
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # finding a failure is enough here; shrinking it would take seconds
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("broken", BROKEN_ALLOCATORS, ids=lambda kind: kind.__name__)
def test_the_state_machine_detects_a_broken_allocator(broken: type[PageAllocator]) -> None:
    machine = type("Machine", (AllocatorMachine,), {"allocator_type": broken})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=HUNT)


@pytest.mark.parametrize("broken", BROKEN_ALLOCATORS, ids=lambda kind: kind.__name__)
def test_the_random_walk_detects_a_broken_allocator(broken: type[PageAllocator]) -> None:
    with pytest.raises(AssertionError):
        random_walk(AllocatorModel(broken(20, 3)), steps=5000, seed=0)


def test_the_real_allocator_passes_both_searches() -> None:
    """So the failures found above come from the faults, not from the search."""
    run_state_machine_as_test(AllocatorMachine, settings=settings(HUNT, max_examples=20))
    model = AllocatorModel(PageAllocator(20, 3))
    random_walk(model, steps=1000, seed=0)
    assert model.met["copy"] > 0


def test_a_missing_refusal_is_detected() -> None:
    model = AllocatorModel(PageAllocator(4, 4))
    with pytest.raises(AssertionError, match="DoubleFree was not raised"):
        model.refuses(DoubleFree, model.allocator.release)


# -- page tables and pools ----------------------------------------------------------------------


class StaleInverse(PageTable):
    """Seen in torch PagedAttention.erase: chained advanced indexing writes to a copy."""

    def forget(self, pages: Iterable[int]) -> None:
        pass


class WritesOneMap(PageTable):
    def write(self, row: int, logical_page: int, physical_page: int) -> None:
        super().write(row, logical_page, physical_page)
        del self._places[physical_page]


class LosesItsContentsInGrowing(PageTable):
    def fit(self, *, rows: int, width: int, pages: int) -> None:
        before = self.physical.shape
        super().fit(rows=rows, width=width, pages=pages)
        if self.physical.shape != before:
            self.physical = torch.zeros_like(self.physical)


class MovesNoRows(PageTable):
    def select_rows(self, rows: Tensor) -> None:
        self.physical = self.physical[torch.arange(len(rows)) % len(self.physical)]


class CopiesKeysOnly(KVPool):
    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        values = self.values.clone()
        super().copy_pages(sources, targets)
        self.values.copy_(values)


class WrapsSlotsAround(KVPool):
    """Seen in torch PagedAttention.assign."""

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return super().write((slots - self._geometry.page_size) % self.keys.shape[2], keys, values)


class StoresKeysThatAreNotFinite(KVPool):
    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        finite = super().write(slots, keys, values)
        self.keys[0].index_copy_(1, slots, keys.transpose(0, 1).flatten(1, 2))
        return finite


def eventful() -> PagedSequences:
    """Return a pool after forks that diverge, releases and recycled pages."""
    paged = PagedSequences(make_geometry(page_size=4))
    parent = paged.open(10)
    paged.open(7)
    child = paged.fork(parent)
    paged.append({child: 3})
    paged.release(parent)
    paged.happen(Open(13))
    paged.append({child: 9})
    paged.release(paged.open(5))
    return paged


def test_an_unbroken_pool_stays_valid() -> None:
    eventful().check_valid()


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("PageTable", StaleInverse),
        ("PageTable", WritesOneMap),
        ("PageTable", LosesItsContentsInGrowing),
        ("PageTable", MovesNoRows),
        ("KVPool", CopiesKeysOnly),
        ("KVPool", WrapsSlotsAround),
        ("KVPool", StoresKeysThatAreNotFinite),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_page_table_or_pool_is_detected(part: str, broken: type, monkeypatch) -> None:
    monkeypatch.setattr(f"granite_paged.paging.store.{part}", broken)
    with pytest.raises(AssertionError):
        eventful().check_valid()


def test_an_error_names_the_page_of_a_stale_inverse_map() -> None:
    paged = eventful()
    free = next(
        page for page, place in enumerate(paged.store.table.logical) if page and place == UNHELD
    )
    paged.store.table.logical[free] = 0
    with pytest.raises(AssertionError, match=f"page {free}: the inverse map says 0"):
        paged.store.table.check_valid(paged.allocator, paged.rows)


# -- mask_mods ----------------------------------------------------------------------------------

complete = masks.paged_mask_mod


def changed(**changes: Callable[[Any], Any]) -> Callable[..., masks.MaskMod]:
    """Return the complete mask_mod, built from changed arguments."""

    def make(*tensors: Tensor, **given: Any) -> masks.MaskMod:
        given |= dict(zip(("physical", "logical", "positions"), tensors, strict=True))
        return complete(**{k: changes[k](v) if k in changes else v for k, v in given.items()})

    return make


def without_ownership(
    physical: Tensor,
    logical: Tensor,
    positions: Tensor,
    *,
    page_size: int,
    group: int,
    visible: Tensor | None = None,
) -> masks.MaskMod:
    def mask_mod(row: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        logical_page = logical[slot // page_size]
        position = logical_page * page_size + slot % page_size
        return (logical_page >= 0) & (position <= positions[row, folded_row // group])

    return mask_mod


def without_inverse_map(
    physical: Tensor,
    logical: Tensor,
    positions: Tensor,
    *,
    page_size: int,
    group: int,
    visible: Tensor | None = None,
) -> masks.MaskMod:
    """Take slots for positions, which is right only while pages lie in order."""

    def mask_mod(row: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        return slot <= positions[row, folded_row // group]

    return mask_mod


BROKEN_MASK_MODS = {
    "without the inverse map": without_inverse_map,
    "without the causal bound": changed(positions=lambda p: p.where(p < 0, p.amax())),
    "without a length": changed(positions=lambda p: p.where(p < 0, 10**6)),
    "with one position too many": changed(positions=lambda p: p.where(p < 0, p + 1)),
    "with one position too few": changed(positions=lambda p: p - 1),
    "with padding that attends": changed(positions=lambda p: p.clamp(min=0)),
    "with twice the page size": changed(page_size=lambda size: 2 * size),
    "with half the page size": changed(
        page_size=lambda size: size // 2, logical=lambda pages: torch.cat([pages, pages])
    ),
    "with another group": changed(group=lambda group: group + 1),
    "with the rows of another batch": changed(physical=lambda table: table.roll(1, 0)),
    "with the first row for all": changed(physical=lambda table: table[:1].expand_as(table)),
    "with a stale inverse map": changed(logical=lambda pages: pages.roll(1)),
}


def ragged_step() -> tuple[PagedSequences, dict[int, int], Step]:
    """Return three rows of different lengths and new tokens, one a fork, with padding."""
    paged = PagedSequences(make_geometry(page_size=4))
    first, second = paged.open(13), paged.open(6)
    paged.open(11)
    added = {second: 3, first: 5, paged.fork(first): 1}
    return paged, added, paged.step(added)


def test_the_complete_mask_mod_is_right() -> None:
    paged, added, step = ragged_step()
    assert_right(paged, step, added, step.attend())


@pytest.mark.parametrize("name", BROKEN_MASK_MODS)
def test_the_oracle_detects_a_broken_mask_mod(name: str, monkeypatch) -> None:
    paged, added, step = ragged_step()
    monkeypatch.setattr(masks, "paged_mask_mod", BROKEN_MASK_MODS[name])
    with pytest.raises(AssertionError):
        assert_right(paged, step, added, step.attend())


def test_a_mask_mod_without_the_ownership_test_is_detected(monkeypatch) -> None:
    """Attention reads listed pages only, so this fault is seen where lists and mask_mod differ."""
    _, _, step = ragged_step()
    monkeypatch.setattr(masks, "paged_mask_mod", without_ownership)
    with pytest.raises(AssertionError, match="a page that no list names"):
        assert_unlisted_pages_hold_nothing(step)


def test_moving_pages_detects_slots_read_as_positions(monkeypatch) -> None:
    _, _, step = ragged_step()
    monkeypatch.setattr(masks, "paged_mask_mod", without_inverse_map)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_same_outputs(move_pages(step, seed=1).attend(), step.attend())


# -- block lists --------------------------------------------------------------------------------


def one_whole_page_more(whole: Tensor, touched: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(whole + 1, touched), touched


def last_page_missing(whole: Tensor, touched: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(whole, touched - 1), touched - 1


@pytest.mark.parametrize(
    ("break_counts", "check"),
    [
        (one_whole_page_more, assert_whole_pages_are_allowed),
        (last_page_missing, assert_unlisted_pages_hold_nothing),
    ],
)
def test_broken_page_counts_are_detected(break_counts, check, monkeypatch) -> None:
    _, _, step = ragged_step()
    check(step)
    right = masks._pages_seen
    monkeypatch.setattr(masks, "_pages_seen", lambda *a, **k: break_counts(*right(*a, **k)))
    with pytest.raises(AssertionError):
        check(step)


def test_pages_listed_whole_and_partial_are_detected(monkeypatch) -> None:
    """Pages listed both as whole and as partial would count twice."""
    paged = PagedSequences(make_geometry(page_size=4))
    step = paged.step({paged.open(13): 1})
    assert_no_page_is_listed_twice(step)
    right = masks._from_logical_page
    monkeypatch.setattr(
        masks, "_from_logical_page", lambda table, start, width: right(table, 0 * start, width)
    )
    with pytest.raises(AssertionError, match="listed twice"):
        assert_no_page_is_listed_twice(step)


# -- attention ----------------------------------------------------------------------------------


def wrong_scale(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, keys, values, mask, scale: call(query, keys, values, mask, 1.01 * scale)


def half_precision(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Round a float64 output to float32."""
    return lambda *arguments: call(*arguments).float().double()


def heads_swapped(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: call(*arguments).flip(1)


def rows_shifted(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: call(*arguments).roll(1, 2)


def keys_for_values(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, keys, values, mask, scale: call(query, keys, keys, mask, scale)


@pytest.mark.parametrize(
    "broken", [wrong_scale, half_precision, heads_swapped, rows_shifted, keys_for_values]
)
def test_the_oracle_detects_broken_attention(broken, monkeypatch) -> None:
    paged, added, step = ragged_step()
    monkeypatch.setattr(attention, "gathered_attention", broken(attention.gathered_attention))
    with pytest.raises(AssertionError):
        assert_right(paged, step, added, step.attend())


def test_a_foreign_nan_in_the_output_is_detected(monkeypatch) -> None:
    """SDPA spreads a NaN in the unused tail of a page to every token, unless it is replaced."""
    paged, added, step = ragged_step()
    values = step.values.clone()
    values[:, :, paged.unread_slots(added)] = torch.nan
    poisoned = step.replace(values=values)
    assert torch.equal(poisoned.attend(), step.attend())
    monkeypatch.setattr(Tensor, "isfinite", lambda numbers: torch.ones_like(numbers).bool())
    assert not torch.equal(poisoned.attend(), step.attend())


def test_check_valid_works_with_assertions_disabled() -> None:
    code = (
        "from granite_paged.paging.allocator import PageAllocator\n"
        "allocator = PageAllocator(9, 4)\n"
        "allocator.append({allocator.open(): 9})\n"
        "allocator._references[1] = 5\n"
        "allocator.check_valid()\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], check=False, capture_output=True, text=True
    )
    assert "BrokenInvariant: reference counts differ from the tables" in done.stderr
