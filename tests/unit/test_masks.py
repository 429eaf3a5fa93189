"""Masks: which slots a query may see, slot by slot and page by page."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE, BlockMask

from granite_paged.paging.allocator import NULL_PAGE
from granite_paged.paging.masks import (
    PADDING,
    QUERY_BLOCK,
    PageLists,
    Parts,
    QueryBlocks,
    listed_block_mask,
    paged_block_mask,
    query_block_mask_mod,
    split_mask_mod,
)
from granite_paged.paging.page_table import UNHELD
from tests.helpers.strategies import (
    PagedSequences,
    Step,
    allowed_slots,
    assert_query_blocks_show_the_same,
    assert_right,
    make_geometry,
    partial_pages,
    whole_pages,
)

# Pages of 4. Row 0 holds pages 3, 1, 5; row 1 holds page 2; page 4 is free.
PHYSICAL = torch.tensor([[3, 1, 5], [2, NULL_PAGE, NULL_PAGE]], dtype=torch.int32)
LOGICAL = torch.tensor([UNHELD, 1, 0, 0, UNHELD, 2], dtype=torch.int32)


def make(positions: list[list[int]], *, group: int = 1, rows: tuple[int, ...] = (0, 1)):
    return paged_block_mask(
        PHYSICAL[list(rows)],
        LOGICAL,
        torch.tensor(positions, dtype=torch.int32),
        page_size=4,
        group=group,
    )


def seen(mask, row: int = 0, folded_row: int = 0) -> list[int]:
    """Return the slots that a query may see."""
    return allowed_slots(mask)[row, folded_row].nonzero()[:, 0].tolist()


# -- the mask_mod -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "slots"),
    [
        (0, [12]),
        (3, [12, 13, 14, 15]),
        (4, [4, 12, 13, 14, 15]),
        (8, [4, 5, 6, 7, 12, 13, 14, 15, 20]),
        (11, [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]),
    ],
)
def test_a_query_sees_its_own_tokens_up_to_itself(position: int, slots: list[int]) -> None:
    assert seen(make([[position], [0]])) == slots, "the mask's slots, then those it must show"


def test_the_tail_of_a_partly_filled_page_is_never_seen() -> None:
    """Seen in torch: the tail is attended if the KV length is not a multiple of the page size."""
    assert seen(make([[5], [2]]), row=1) == [8, 9, 10]


def test_padding_sees_nothing() -> None:
    mask = make([[PADDING, 0], [PADDING, PADDING]])
    assert seen(mask, row=0, folded_row=0) == []
    assert seen(mask, row=1, folded_row=1) == []


def test_rows_do_not_see_each_others_pages() -> None:
    """Pages 2 and 3 are both logical page 0: the inverse map alone cannot distinguish them."""
    mask = make([[11], [3]])
    assert not set(seen(mask, row=0)) & set(seen(mask, row=1))


@pytest.mark.parametrize("page", [NULL_PAGE, 4])
def test_the_null_page_and_free_pages_are_never_seen(page: int) -> None:
    slots = slice(4 * page, 4 * page + 4)
    assert not allowed_slots(make([[11], [3]]))[:, :, slots].any()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_all_heads_of_a_group_see_the_same(group: int) -> None:
    one = allowed_slots(make([[4, 5], [0, 1]]))
    folded = allowed_slots(make([[4, 5], [0, 1]], group=group))
    assert torch.equal(folded, one.repeat_interleave(group, dim=1))


@pytest.mark.parametrize("rows", [(1, 0), (1,), (0,), (1, 1, 0)], ids=str)
def test_a_mask_uses_the_tables_of_the_selected_rows(rows: tuple[int, ...]) -> None:
    """Seen in torch PagedAttention and attention-gym: tables of the selected rows are combined with
    the inverse map of rows 0, 1, ... (error 2.7)."""
    positions = [[7], [2]]
    whole = allowed_slots(make(positions))
    some = allowed_slots(make([positions[row] for row in rows], rows=rows))
    assert torch.equal(some, whole[list(rows)])


def test_both_rows_see_a_page_shared_by_a_fork() -> None:
    """A shared page has the same logical place in every row, so one inverse map is enough."""
    shared = PHYSICAL.clone()
    shared[1, 0] = 3
    mask = paged_block_mask(
        shared,
        LOGICAL,
        torch.tensor([[3], [1]], dtype=torch.int32),
        page_size=4,
        group=1,
    )
    assert (seen(mask, 0), seen(mask, 1)) == ([12, 13, 14, 15], [12, 13])


@pytest.mark.parametrize("stale", [1, 3, 5])
def test_table_entries_that_contradict_the_inverse_map_are_hidden(stale: int) -> None:
    """Row 1 names a page of row 0 at another logical place than its own."""
    contradicted = PHYSICAL.clone()
    place = (int(LOGICAL[stale]) + 1) % 3
    contradicted[1] = torch.tensor([2, 0, 0])
    contradicted[1, place] = stale
    mask = paged_block_mask(
        contradicted, LOGICAL, torch.tensor([[11], [11]], dtype=torch.int32), page_size=4, group=1
    )
    assert not set(seen(mask, row=1)) & set(range(4 * stale, 4 * stale + 4))


def test_a_longer_row_in_the_pool_is_hidden_from_a_narrower_table() -> None:
    """The pool holds logical page 2 of row 0; the table of row 1 alone has one column."""
    mask = paged_block_mask(
        PHYSICAL[1:, :1], LOGICAL, torch.tensor([[3]], dtype=torch.int32), page_size=4, group=1
    )
    assert seen(mask) == [8, 9, 10, 11]


def test_tokens_that_the_users_mask_hides_are_not_seen() -> None:
    visible = torch.tensor([[False, True, True, True, True, False], [True] * 5 + [False]])
    mask = paged_block_mask(
        PHYSICAL,
        LOGICAL,
        torch.tensor([[4, 5], [1, 2]], dtype=torch.int32),
        page_size=4,
        group=1,
        visible=visible,
    )
    assert seen(mask, 0, 0) == [4, 13, 14, 15]
    assert seen(mask, 0, 1) == [4, 13, 14, 15]
    assert seen(mask, 1, 0) == [8, 9]
    assert seen(mask, 1, 1) == [8, 9, 10]


def test_a_page_with_a_hidden_token_is_never_listed_whole() -> None:
    mask = paged_block_mask(
        PHYSICAL,
        LOGICAL,
        torch.tensor([[11], [3]], dtype=torch.int32),
        page_size=4,
        group=1,
        visible=torch.ones(2, 12, dtype=torch.bool),
    )
    assert named(whole_pages(mask)) == [[]]
    assert named(partial_pages(mask)) == [[1, 3, 5]]


# -- query blocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("past", "added"), [((37, 5, 16), 1), ((0, 70), 60), ((200,), 100), ((3, 60, 0, 17), 43)]
)
def test_query_blocks_show_each_row_what_its_own_mask_shows(
    past: tuple[int, ...], added: int, group: int
) -> None:
    paged = PagedSequences(make_geometry(page_size=16, group=group))
    growth = {paged.open(tokens): added for tokens in past}
    positions = paged.step(growth).positions
    positions[-1, -1:] = PADDING
    assert_query_blocks_show_the_same(paged.step(growth).replace(positions=positions), more=2)


def test_a_longer_row_in_the_pool_is_hidden_from_a_narrower_table_of_query_blocks() -> None:
    positions = torch.full((1, QUERY_BLOCK), 3, dtype=torch.int32)
    blocks = QueryBlocks(torch.tensor([0], dtype=torch.int32), positions)
    mask_mod = query_block_mask_mod(PHYSICAL[:, :1], LOGICAL, blocks, page_size=4)
    block = torch.zeros(1, dtype=torch.int64)
    allowed = mask_mod(block, block, block, torch.arange(4 * len(LOGICAL)))
    assert allowed.nonzero()[:, 0].tolist() == [12, 13, 14, 15]


# -- split rows ---------------------------------------------------------------------------------


def slots_of_parts(position: int, splits: int, *, row: int = 0, width: int = 3) -> list[list[int]]:
    """Return the slots that each part of a row sees, by a table of `width` pages."""
    pages = (position + 4) // 4
    each = -(-pages // splits)
    first = torch.arange(splits, dtype=torch.int32) * each
    parts = Parts(
        rows=torch.full((splits,), row, dtype=torch.int32),
        newest=torch.full((splits,), position, dtype=torch.int32),
        first=first,
        end=(first + each).clamp(max=pages),
    )
    mask_mod = split_mask_mod(PHYSICAL[:, :width], LOGICAL, parts, page_size=4)
    part, slot = torch.arange(splits)[:, None], torch.arange(4 * len(LOGICAL))[None]
    allowed = mask_mod(part, part * 0, part * 0, slot).expand(splits, -1)
    return [slots.nonzero()[:, 0].tolist() for slots in allowed]


def seen_by_parts(position: int, splits: int, **table: int) -> list[list[int]]:
    """Return the pages of which each part sees a slot."""
    slots = slots_of_parts(position, splits, **table)
    return [sorted({slot // 4 for slot in part}) for part in slots]


def test_parts_see_the_slots_up_to_the_newest_token() -> None:
    assert slots_of_parts(9, 2) == [[4, 5, 6, 7, 12, 13, 14, 15], [20, 21]]


@pytest.mark.parametrize(
    ("position", "splits", "parts"),
    [
        (11, 1, [[1, 3, 5]]),
        (11, 2, [[1, 3], [5]]),
        (11, 3, [[3], [1], [5]]),
        (7, 2, [[3], [1]]),
        (8, 2, [[1, 3], [5]]),
        (4, 4, [[3], [1], [], []]),
    ],
)
def test_parts_see_equal_runs_of_pages(position: int, splits: int, parts: list[list[int]]) -> None:
    assert seen_by_parts(position, splits) == parts


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_every_part_of_a_padding_row_sees_nothing(splits: int) -> None:
    assert seen_by_parts(PADDING, splits) == [[]] * splits


def test_a_longer_row_in_the_pool_is_hidden_from_a_narrower_table_of_parts() -> None:
    assert seen_by_parts(7, 2, width=2) == [[3], [1]]


def test_parts_do_not_see_another_rows_pages() -> None:
    assert seen_by_parts(3, 2, row=1) == [[2], []]


def test_a_mask_over_lists_takes_them_as_they_are() -> None:
    lists = PageLists(
        torch.tensor([1, 2]),
        torch.tensor([[3, 0], [4, 5]]),
        torch.tensor([1, 0]),
        torch.tensor([[2, 0], [0, 0]]),
    )
    mask = listed_block_mask(
        lists, lambda b, h, q, kv: kv >= 0, page_size=4, folded_rows=2, slots=24
    )
    assert whole_pages(mask)[:, 0].tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert partial_pages(mask)[:, 0].tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6]
    assert mask.q_indices is None, "lists for the backward pass"
    assert mask.shape == (2, 1, 2, 24)
    assert mask.BLOCK_SIZE == (QUERY_BLOCK, 4)


# -- the lists ----------------------------------------------------------------------------------


def named(pages: torch.Tensor) -> list[list[int]]:
    """Return the pages listed for each query block of row 0."""
    return [block.nonzero()[:, 0].tolist() for block in pages[0]]


@pytest.mark.parametrize(
    ("position", "whole", "partial"),
    [
        (0, [], [3]),
        (2, [], [3]),
        (3, [3], []),
        (4, [3], [1]),
        (7, [1, 3], []),
        (9, [1, 3], [5]),
        (11, [1, 3, 5], []),
    ],
)
def test_decode_lists_filled_pages_whole_and_the_last_partial(position, whole, partial) -> None:
    mask = make([[position], [0]])
    assert named(whole_pages(mask)) == [whole]
    assert named(partial_pages(mask)) == [partial]


def test_prefill_lists_pages_hidden_from_some_rows_as_partial() -> None:
    mask = make([[0, 1, 2, 3, 4, 5], [PADDING] * 5 + [0]])
    assert named(whole_pages(mask)) == [[]]
    assert named(partial_pages(mask)) == [[1, 3]]


def test_a_chunk_lists_earlier_pages_whole() -> None:
    mask = make([[8, 9], [0, 1]])
    assert named(whole_pages(mask)) == [[1, 3]]
    assert named(partial_pages(mask)) == [[5]]


def test_a_block_with_padding_lists_no_whole_pages() -> None:
    """Every row of the block reads a whole page, so padding would attend to it."""
    mask = make([[PADDING, 8], [0, 1]])
    assert named(whole_pages(mask)) == [[]]
    assert named(partial_pages(mask)) == [[1, 3, 5]]


def test_a_padding_row_lists_no_pages() -> None:
    mask = make([[PADDING], [0]])
    assert (named(whole_pages(mask)), named(partial_pages(mask))) == ([[]], [[]])


def test_the_full_list_names_the_rows_pages_and_then_null_pages() -> None:
    """A kernel may read the list beyond its count."""
    mask = make([[5], [0]])
    assert mask.full_kv_indices[:, 0, 0].tolist() == [[3, 1, 5, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    assert mask.kv_indices[0, 0, 0].tolist() == [1, 5, 0, 0, 0, 0]


def long_prefill(
    tokens: int, group: int, past: int = 0
) -> tuple[PagedSequences, dict[int, int], Step]:
    paged = PagedSequences(make_geometry(page_size=16, group=group, kv_heads=1))
    added = {paged.open(past): tokens}
    return paged, added, paged.step(added)


@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("tokens", [QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 300])
def test_each_query_block_lists_its_own_pages(group: int, tokens: int) -> None:
    """Query blocks may split a group: the heads of one token may lie in two blocks."""
    _, _, step = long_prefill(tokens, group, past=33)
    mask = step.mask()
    blocks = -(-tokens * group // QUERY_BLOCK)
    first = 33 + torch.arange(blocks) * QUERY_BLOCK // group  # position of a block's first row
    last = (
        33 + ((torch.arange(blocks) + 1) * QUERY_BLOCK - 1).clamp(max=tokens * group - 1) // group
    )
    assert torch.equal(whole_pages(mask)[0].sum(dim=1), (first + 1) // 16)
    assert torch.equal((whole_pages(mask) + partial_pages(mask))[0].sum(dim=1), last // 16 + 1)


@pytest.mark.parametrize("tokens", [43, 127, 129, 300])
def test_query_counts_off_the_tile_size_are_right(tokens: int) -> None:
    """Seen in torch: wrong output if the query count is not a multiple of the tile."""
    paged, added, step = long_prefill(tokens, group=3)
    assert_right(paged, step, added, step.attend())


def test_a_query_block_is_the_one_that_flex_attention_expects() -> None:
    """Its GPU kernels split a block of the mask into tiles, so another size would not divide."""
    assert QUERY_BLOCK == _DEFAULT_SPARSE_BLOCK_SIZE


@pytest.mark.parametrize("page_size", [1, 2, 16, 128, 256])
def test_a_block_of_the_mask_is_one_page(page_size: int) -> None:
    """Seen in torch: if a block spans pages, the output depends on where pages lie."""
    paged = PagedSequences(make_geometry(page_size=page_size))
    step = paged.step({paged.open(5): 1})
    mask = step.mask()
    assert (QUERY_BLOCK, page_size) == mask.BLOCK_SIZE
    assert mask.shape[-1] == step.keys.shape[2]


def test_to_dense_shows_the_listed_pages() -> None:
    """BlockMask's own conversion of the lists agrees with ours."""
    _, _, step = long_prefill(100, 3, past=33)
    mask = step.mask()
    listed = whole_pages(mask) + partial_pages(mask)
    assert torch.equal(mask.to_dense()[:, 0].bool(), listed.bool())


# -- what a mask costs --------------------------------------------------------------------------


def list_bytes(pages: int, group: int = 1, device: str = "meta") -> int:
    mask = paged_block_mask(
        torch.zeros(4, 32, dtype=torch.int32, device=device),
        torch.zeros(pages, dtype=torch.int32, device=device),
        torch.zeros(4, 1, dtype=torch.int32, device=device),
        page_size=16,
        group=group,
    )
    lists = (
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
    )
    assert mask.q_indices is None, "lists for the backward pass were made"
    return sum(tensor.nbytes for tensor in lists)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_mask_memory_is_independent_of_group_and_pool(group: int) -> None:
    """Seen in vLLM: mask memory grows with group size times pool pages, 8.45 GiB at warm-up."""
    assert list_bytes(10**6, group) == list_bytes(64, 1) == 2 * 4 * 4 * (32 + 1)


def test_cpu_lists_have_one_entry_per_pool_page() -> None:
    """The CPU kernel refuses shorter lists."""
    assert list_bytes(1000, device="cpu") == 2 * 4 * 4 * (1000 + 1)


@pytest.mark.parametrize("visible", [None, torch.ones(2, 12, dtype=torch.bool)])
def test_lists_that_plain_pytorch_reads_are_as_long_as_the_longest_row(
    visible: torch.Tensor | None,
) -> None:
    positions = torch.tensor([[4, 5], [1, 2]], dtype=torch.int32)

    def made(pages: int, *, gathers: bool) -> BlockMask:
        logical = torch.cat([LOGICAL, LOGICAL.new_full((pages,), UNHELD)])
        return paged_block_mask(
            PHYSICAL, logical, positions, page_size=4, group=1, visible=visible, gathers=gathers
        )

    whole, short = made(1000, gathers=False), made(1000, gathers=True)
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(short, name), getattr(whole, name))
    for name in ("kv_indices", "full_kv_indices"):
        listed = getattr(short, name)
        assert listed.shape[-1] == 2
        assert torch.equal(listed, getattr(whole, name)[..., :2])


@pytest.mark.parametrize("position", [PADDING, 0, 3])
def test_the_shortest_list_that_plain_pytorch_reads_has_one_page(position: int) -> None:
    positions = torch.tensor([[position]], dtype=torch.int32)
    mask = paged_block_mask(PHYSICAL[:1], LOGICAL, positions, page_size=4, group=1, gathers=True)
    assert mask.kv_indices.shape[-1] == 1
