"""Laws of generated block tables, from the allocator to FlexAttention's output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.strategies import (
    DTYPES,
    History,
    PagedSequences,
    Step,
    additions,
    assert_no_page_is_listed_twice,
    assert_query_blocks_show_the_same,
    assert_right,
    assert_same_outputs,
    assert_unlisted_pages_hold_nothing,
    assert_whole_pages_are_allowed,
    geometries,
    histories,
    make_geometry,
    move_pages,
)

KINDS = ("decode", "chunk", "ragged")
POISONS = (torch.nan, torch.inf, 1e30)

SMALL = geometries(page_sizes=(1, 2, 4, 8, 16), head_dims=(16,))
"""Geometries for laws that do not depend on the head size."""


def draw_step(
    data: st.DataObject, history: History, kind: str
) -> tuple[PagedSequences, dict[int, int], Step]:
    """Draw a step of some of the open sequences, in any order."""
    paged = PagedSequences.after(history)
    picked = data.draw(st.permutations(paged.rows), label="batch")
    picked = picked[: data.draw(st.integers(1, len(picked)), label="rows")]
    counts = data.draw(additions(len(picked), kind), label="added")
    added = dict(zip(picked, counts, strict=True))
    padding = data.draw(st.integers(0, 3), label="padding")
    return paged, added, paged.step(added, padding=padding)


# -- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=settings.default.max_examples // 2)
@given(data=st.data())
def test_every_row_attends_as_accurately_as_sdpa(
    kind: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    history = data.draw(histories(geometries((dtype,))))
    paged, added, step = draw_step(data, history, kind)
    assert_right(paged, step, added, step.attend())
    paged.check_valid()


@given(
    geometry=SMALL,
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    padding=st.integers(0, 3),
)
def test_a_left_padded_prefill_is_as_accurate_as_sdpa(geometry, lengths, padding) -> None:
    paged = PagedSequences(geometry)
    added = {paged.open(0): length for length in lengths}
    step = paged.step(added, padding=padding)
    assert_right(paged, step, added, step.attend())


@given(geometry=SMALL, chunks=st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_chunked_prefill_equals_one_prefill(geometry, chunks) -> None:
    paged = PagedSequences(geometry)
    prompt, total = paged.open(0), sum(chunks)
    paged.append({prompt: total})
    whole = paged.look({prompt: total})
    piecewise = [
        whole.replace(positions=positions, query=query).attend()
        for positions, query in zip(
            whole.positions.split(chunks, dim=1), whole.query.split(chunks, dim=2), strict=True
        )
    ]
    assert_same_outputs(torch.cat(piecewise, dim=2), whole.attend())


# -- laws ---------------------------------------------------------------------------------------


@given(data=st.data(), history=histories(SMALL), seed=st.integers(0, 99))
def test_permuting_physical_pages_changes_no_output(data, history, seed) -> None:
    """Seen in torch: if a block of a BlockMask spans pages, the output depends on placement."""
    _, _, step = draw_step(data, history, "ragged")
    assert_same_outputs(move_pages(step, seed).attend(), step.attend())


@given(data=st.data(), history=histories(SMALL), more=st.integers(0, 3))
def test_query_blocks_see_what_each_row_sees(data, history, more) -> None:
    _, _, step = draw_step(data, history, "ragged")
    assert_query_blocks_show_the_same(step, more)


@given(data=st.data(), history=histories(SMALL))
def test_permuting_rows_permutes_the_outputs(data, history) -> None:
    """Seen in torch's PagedAttention and attention-gym: the permuted rows' page tables are combined
    with the inverse map of rows 0, 1, ..."""
    _, _, step = draw_step(data, history, "ragged")
    order = data.draw(st.permutations(range(len(step.query))))
    assert_same_outputs(step.rows(order).attend(), step.attend()[torch.tensor(order)])


@given(data=st.data(), history=histories(SMALL))
def test_a_row_alone_equals_the_row_in_a_batch(data, history) -> None:
    """Seen in torch's PagedAttention and attention-gym: subsets of the rows are wrong."""
    _, _, step = draw_step(data, history, "ragged")
    row = data.draw(st.integers(0, len(step.query) - 1))
    assert_same_outputs(step.rows([row]).attend(), step.attend()[row : row + 1])


@given(data=st.data(), history=histories(SMALL))
def test_rows_may_be_repeated(data, history) -> None:
    """A bucket is filled by repeating a row, or with rows of padding."""
    _, _, step = draw_step(data, history, "decode")
    twice = step.rows([*range(len(step.query)), 0]).attend()
    assert_same_outputs(twice, torch.cat([step.attend(), step.attend()[:1]]))


@given(data=st.data(), history=histories(SMALL))
def test_a_narrower_page_table_gives_the_same_output(data, history) -> None:
    """Entries beyond the longest sequence are spare room, and change no output."""
    paged, _, step = draw_step(data, history, "ragged")
    width = max(1, *(len(paged.allocator.pages_of(sequence)) for sequence in paged.rows))
    narrow = step.replace(physical=step.physical[:, :width])
    assert_same_outputs(narrow.attend(), step.attend())


@given(data=st.data(), history=histories(SMALL))
def test_tokens_of_other_sequences_change_no_output(data, history) -> None:
    paged, added, step = draw_step(data, history, "ragged")
    others = paged.unread_slots(added)
    keys, values = step.keys.clone(), step.values.clone()
    keys[:, :, others], values[:, :, others] = 3.0, -7.0
    assert torch.equal(step.replace(keys=keys, values=values).attend(), step.attend())


@given(data=st.data(), history=histories(SMALL))
def test_later_steps_of_other_sequences_change_no_output(data, history) -> None:
    """Other sequences write, copy on write and recycle pages."""
    paged, added, step = draw_step(data, history, "chunk")
    before = step.attend()
    others = [sequence for sequence in paged.rows if sequence not in added]
    for sequence in others[::2]:
        paged.release(sequence)
    paged.append(dict.fromkeys(others[1::2], 9))
    paged.open(20)
    again = paged.look(added, padding=step.query.shape[2] - max(added.values()))
    assert_same_outputs(again.replace(query=step.query).attend(), before)


# -- poison -------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISONS)
@given(data=st.data(), history=histories(SMALL))
def test_slots_that_a_row_does_not_own_never_reach_its_output(poison, data, history) -> None:
    """These are free pages, others' pages, the null page and tails of partly filled pages. Seen in
    flash-attention and vLLM: a masked weight of 0 times NaN is NaN."""
    paged, added, step = draw_step(data, history, "ragged")
    unread = paged.unread_slots(added)
    keys, values = step.keys.clone(), step.values.clone()
    keys[:, :, unread] = values[:, :, unread] = poison
    assert torch.equal(step.replace(keys=keys, values=values).attend(), step.attend())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_a_nan_reaches_exactly_the_rows_that_attend_to_it(dtype, data) -> None:
    """Hiding NaNs of other rows must not hide a row's own."""
    history = data.draw(histories(geometries((dtype,), page_sizes=(4, 8), head_dims=(16,))))
    paged, added, step = draw_step(data, history, "chunk")
    victim = data.draw(st.sampled_from(list(added)))
    at = data.draw(st.integers(0, paged.allocator.length(victim) - 1))
    slot = paged.slots(victim)[at]
    values = step.values.clone()
    values[0, 0, slot, 0] = torch.nan
    shared = torch.tensor([len(s := paged.slots(q)) > at and s[at] == slot for q in added])
    meets = shared[:, None] & (step.positions >= at)  # [B, S]
    heads = torch.arange(step.geometry.query_heads) < step.geometry.group  # those of KV head 0
    is_nan = step.replace(values=values).attend().isnan().any(dim=3)
    assert torch.equal(is_nan, meets[:, None] & heads[None, :, None])


# -- lists --------------------------------------------------------------------------------------


@given(data=st.data(), history=histories(SMALL), kind=st.sampled_from(KINDS))
def test_the_mask_mod_allows_no_slot_of_an_unlisted_page(data, history, kind) -> None:
    """Attention never reads such a page, so the token would be lost."""
    _, _, step = draw_step(data, history, kind)
    assert_unlisted_pages_hold_nothing(step)


@given(data=st.data(), history=histories(SMALL), kind=st.sampled_from(KINDS))
def test_the_mask_mod_allows_every_slot_of_a_whole_page(data, history, kind) -> None:
    """A compiled kernel applies no mask_mod to them."""
    _, _, step = draw_step(data, history, kind)
    assert_whole_pages_are_allowed(step)


@given(data=st.data(), history=histories(SMALL), kind=st.sampled_from(KINDS))
def test_no_page_is_listed_twice(data, history, kind) -> None:
    """It would count twice in the softmax."""
    _, _, step = draw_step(data, history, kind)
    assert_no_page_is_listed_twice(step)


@given(data=st.data(), history=histories(SMALL), kind=st.sampled_from(KINDS))
def test_block_lists_name_only_existing_pages(data, history, kind) -> None:
    """This holds even beyond their counts. Seen in intel-xpu-backend-for-triton: the -1 of an
    unreserved entry gets into kv_indices, and a kernel dereferences it."""
    _, _, step = draw_step(data, history, kind)
    mask = step.mask()
    named = torch.cat([mask.kv_indices.flatten(), mask.full_kv_indices.flatten()])
    assert named.min() >= 0
    assert named.max() < len(step.logical)


# -- forks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["parent", "child", "both"])
@given(data=st.data(), length=st.integers(1, 30), tokens=st.integers(1, 12))
def test_each_branch_of_a_fork_reads_its_own_tokens(writer, data, length, tokens) -> None:
    paged = PagedSequences(data.draw(SMALL))
    parent = paged.open(length)
    child = paged.fork(parent)
    branches = {"parent": [parent], "child": [child], "both": [parent, child]}[writer]
    paged.append(dict.fromkeys(branches, tokens))
    paged.check_valid()
    added = {parent: 1, child: 1}
    step = paged.step(added)
    assert_right(paged, step, added, step.attend())


@given(data=st.data(), forks=st.integers(2, 5), length=st.integers(1, 20))
def test_many_forks_may_diverge_in_one_step(data, forks, length) -> None:
    paged = PagedSequences(data.draw(SMALL))
    parent = paged.open(length)
    family = [parent, *(paged.fork(parent) for _ in range(forks))]
    added = {sequence: 1 + number % 3 for number, sequence in enumerate(family)}
    step = paged.step(added)
    paged.check_valid()
    assert_right(paged, step, added, step.attend())


@given(history=histories(SMALL, max_size=14))
def test_pool_table_and_allocator_agree_after_any_history(history) -> None:
    """Seen in torch's PagedAttention.erase: the inverse map outlives its owner, and two sequences
    appear to own one page."""
    paged = PagedSequences(history.geometry, seed=history.seed)
    for event in history.events:
        paged.happen(event)
        paged.check_valid()


def test_stale_entries_of_a_row_are_never_read() -> None:
    """Entries of a released row stay in the table, while their pages go to other sequences."""
    paged = PagedSequences(make_geometry(page_size=4), scattered=0)
    paged.open(20)
    long = paged.open(20)
    paged.release(long)  # row 1 still names its five pages
    # `short` takes row 1, and `heir` those pages, at the same places
    short, heir = paged.open(3), paged.open(20)
    assert set(paged.store.table.physical[1].tolist()) & set(paged.allocator.pages_of(heir))
    added = {short: 1, heir: 1}
    step = paged.step(added)
    assert_right(paged, step, added, step.attend())
