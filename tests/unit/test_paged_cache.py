"""A `PagedCache` by itself: sizes of its pools, its rows, and what transformers sees of it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.errors import (
    BrokenInvariant,
    CacheReleased,
    GeometryError,
    InvalidRequest,
    NonFinite,
    NotPatched,
    OutOfPages,
    OutOfRows,
    PaddingError,
)
from granite_paged.hf import cache as cache_module
from granite_paged.hf.cache import PagedLayer
from granite_paged.paging.store import PageStore
from tests.helpers.cache_steps import CPU, PAGE, grow, make, mask_of

ATTENTION, MAMBA = 1, 0  # layers


# -- sizes ----------------------------------------------------------------------------------------


def test_a_new_cache_has_the_null_page_and_one_other() -> None:
    own = make()
    assert (own.allocator.pages, own.store.pages) == (2, 2)
    own.check_valid()


def test_a_cache_of_max_tokens_has_all_its_pages_at_once() -> None:
    own = make(max_tokens=42)
    assert own.allocator.pages == own.store.pages == 1 + 11


def test_a_pool_that_is_too_small_grows_by_half_and_at_first_by_what_is_needed() -> None:
    own, sizes = make(), []
    for columns in (5 * PAGE, *[PAGE] * 6):
        grow(own, columns)
        sizes.append(own.allocator.pages)
    assert sizes == [6, 9, 9, 9, 13, 13, 13]
    grow(own, 20 * PAGE)
    assert own.allocator.pages == 1 + 31, "more than half is needed"


def test_a_step_that_fits_into_free_pages_grows_nothing() -> None:
    own = make()
    own.reserve([5 * PAGE])
    for _ in range(5):
        grow(own, PAGE)
    assert own.allocator.pages == own.store.pages == 6
    assert own.allocator.free == 0


def test_a_pool_grows_up_to_its_limit_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 14 * make().geometry.bytes_per_page
    monkeypatch.setattr(cache_module, "available_bytes", lambda device: memory)
    own = make(memory_fraction=0.5)
    for columns in (5 * PAGE, PAGE):
        grow(own, columns)
    assert own.allocator.pages == 7, "half more would be beyond the limit"
    with pytest.raises(OutOfPages, match="memory_fraction") as refused:
        grow(own, PAGE)
    assert (refused.value.needed, refused.value.free) == (1, 0)


def test_a_refusal_counts_what_the_pool_could_still_grow_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = 10 * make().geometry.bytes_per_page
    monkeypatch.setattr(cache_module, "available_bytes", lambda device: memory)
    own = make(memory_fraction=1.0)
    grow(own, PAGE)
    with pytest.raises(OutOfPages) as refused:
        grow(own, 9 * PAGE)
    assert (refused.value.needed, refused.value.free) == (9, 8)
    assert own.allocator.pages == 2, "a refused step leaves the pool as it was"
    grow(own, 8 * PAGE)
    assert own.allocator.pages == 10


def test_a_limit_of_memory_leaves_two_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "available_bytes", lambda device: 1)
    own = make(memory_fraction=0.5)
    grow(own, PAGE)
    with pytest.raises(OutOfPages) as refused:
        grow(own, 1)
    assert (refused.value.needed, refused.value.free) == (1, 0)


@pytest.mark.parametrize("more", [0, -1])
def test_max_tokens_that_do_not_fit_into_memory_are_refused(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 11 * make().geometry.bytes_per_page + more  # ten pages of tokens, and the null page
    monkeypatch.setattr(cache_module, "available_bytes", lambda device: memory)
    if more == 0:
        assert make(max_tokens=40).allocator.pages == 11
    else:
        with pytest.raises(GeometryError, match="max_tokens 40 needs"):
            make(max_tokens=40)


def test_reserve_makes_room_for_every_row_and_for_the_longest() -> None:
    own = make()
    own.reserve([5, 9, 1])
    assert own.allocator.pages == 1 + 2 + 3 + 1
    assert tuple(own.store.table.physical.shape) == (1, 3)
    own.reserve([PAGE])
    assert own.allocator.pages == 7, "a pool never shrinks"


def test_reserving_for_no_row_changes_nothing() -> None:
    own = make()
    own.reserve([])
    assert own.allocator.pages == 2
    assert tuple(own.store.table.physical.shape) == (1, 1)


def test_reserve_stops_at_the_limit() -> None:
    own = make(max_tokens=20)
    own.reserve([1000])
    assert own.allocator.pages == 6


def test_a_device_without_memory_is_reported_as_a_lack_of_pages() -> None:
    own = make()
    grow(own, PAGE)
    full = mock.patch.object(PageStore, "resize", side_effect=torch.OutOfMemoryError)
    with full, pytest.raises(OutOfPages) as refused:
        grow(own, 3 * PAGE)
    assert (refused.value.needed, refused.value.free) == (3, 0)
    own.check_valid()
    grow(own, 3 * PAGE)


def test_compiled_kernels_get_sizes_that_recur() -> None:
    own = make(page_size=16, backend="compiled")
    grow(own, 7 * 16, batch=3)
    # eight sizes of pools per octave; rows and widths are powers of two
    assert own.allocator.pages == own.store.pages == 22
    assert tuple(own.store.table.physical.shape) == (4, 8)
    grow(own, 16, batch=3)
    assert own.allocator.pages == 36, "half more would be 33"
    grow(own, 16, batch=3)
    assert own.allocator.pages == 36
    mask: BlockMask = own.begin_step(3, 5).block_mask
    assert mask.shape[0] == 4
    assert mask.shape[2] == 6 * own.geometry.group, "two sizes of steps per octave"


def test_a_compiled_pool_has_one_of_eight_sizes_per_octave() -> None:
    own = make(page_size=16, backend="compiled")
    own.reserve([72 * 16])
    assert own.allocator.pages == 80


def test_compiled_sizes_stop_at_the_limit() -> None:
    own = make(page_size=16, backend="compiled", max_tokens=18 * 16)
    own.reserve([1000])
    assert own.allocator.pages == 19


def test_eager_steps_get_the_sizes_they_need() -> None:
    own = make()
    grow(own, 7 * PAGE, batch=3)
    assert own.allocator.pages == 22
    assert tuple(own.store.table.physical.shape) == (3, 7)
    mask: BlockMask = own.begin_step(3, 5).block_mask
    assert mask.shape[0] == 3
    assert mask.shape[2] == 5 * own.geometry.group


# -- rows -----------------------------------------------------------------------------------------


def test_a_batch_of_another_size_is_refused() -> None:
    own = make()
    grow(own, 3, batch=2)
    for batch in (1, 3):
        with pytest.raises(InvalidRequest, match=f"holds 2 rows, the batch has {batch}"):
            own.begin_step(batch, 1)
    grow(own, 1, batch=2)


def test_more_rows_than_max_sequences_are_refused() -> None:
    own = make(max_sequences=2)
    with pytest.raises(OutOfRows):
        own.begin_step(3, 1)
    assert not own.is_initialized
    grow(own, 1, batch=2)
    with pytest.raises(OutOfRows):
        own.batch_repeat_interleave(2)
    assert own.batch_size == 2


def test_a_first_step_without_room_leaves_no_rows() -> None:
    own = make(max_tokens=2 * PAGE)
    with pytest.raises(OutOfPages):
        own.begin_step(3, 1)
    assert not own.is_initialized
    grow(own, 1, batch=2)
    with pytest.raises(OutOfPages):
        own.begin_step(2, PAGE)
    assert own.batch_size == 2, "a later step without room keeps them"
    grow(own, 1, batch=2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_is_interrupted_while_it_is_planned_releases_its_rows(
    error: type[BaseException],
) -> None:
    own = make()
    grow(own, 3)
    with mock.patch.object(cache_module, "make_step", side_effect=error), pytest.raises(error):
        own.begin_step(1, 1)
    with pytest.raises(CacheReleased, match="could not be prepared"):
        own.begin_step(1, 1)
    own.check_valid()
    assert own.allocator.held == 0


def test_a_row_of_one_token_has_started() -> None:
    own = make()
    grow(own, 2, batch=2, mask=mask_of(".a", "bc"))
    with pytest.raises(PaddingError, match="right of row 0"):
        own.begin_step(2, 1, mask_of(".a.", "bcd"))


def test_a_row_without_tokens_has_not_started() -> None:
    own = make()
    grow(own, 2, batch=2, mask=mask_of("..", "ab"))
    grow(own, 2, batch=2, mask=mask_of("....", "abcd"))
    step = own.begin_step(2, 2, mask_of(".....e", "abcdef"))
    assert step.columns.mask is None, "nothing is inside a sequence"
    own.end_step()
    assert [own.allocator.length(each) for each in own.sequences] == [1, 6]


@pytest.mark.parametrize("rows", [[0, 2], [-1, 0], [2], []])
def test_rows_that_do_not_exist_cannot_be_selected(rows: list[int]) -> None:
    own = make()
    grow(own, 3, batch=2)
    with pytest.raises(InvalidRequest, match="name some of the 2 rows by 0 to 1"):
        own.reorder_cache(torch.tensor(rows))
    assert own.batch_size == 2


def test_selected_rows_keep_their_sequences_and_copies_are_forks() -> None:
    own = make()
    grow(own, 3, batch=3)
    first, _, third = own.sequences
    own.reorder_cache(torch.tensor([2, 0, 2]))
    assert own.sequences[:2] == (third, first)
    assert len(set(own.sequences)) == 3
    own.check_valid()


def test_the_same_rows_in_the_same_order_are_left_alone() -> None:
    own = make()
    grow(own, 3, batch=2)
    with mock.patch.object(type(own.store.table), "select_rows") as select:
        own.reorder_cache(torch.tensor([0, 1]))
    select.assert_not_called()


def test_rows_are_selected_by_the_bools_that_are_true() -> None:
    own = make()
    grow(own, 3, batch=4)
    before = own.sequences
    own.batch_select_indices(torch.tensor([False, True, False, True]))
    assert own.sequences == (before[1], before[3])


def test_a_sequence_without_a_row_is_found() -> None:
    own = make()
    grow(own, 3)
    own.allocator.open()
    with pytest.raises(BrokenInvariant, match="a sequence without a row"):
        own.check_valid()


# -- a step ---------------------------------------------------------------------------------------


def test_a_step_is_open_from_its_beginning_to_its_end() -> None:
    own = make()
    with pytest.raises(NotPatched):
        _ = own.step
    step = own.begin_step(1, 3)
    assert own.in_step
    assert own.step is step
    assert own.get_seq_length() == 0
    own.end_step()
    assert not own.in_step
    assert own.get_seq_length() == 3
    own.end_step()  # without a step, as after a failed one
    assert own.get_seq_length() == 3


def test_an_interrupted_step_is_noticed_at_the_next_one() -> None:
    own = make()
    own.begin_step(1, 3)
    with pytest.raises(CacheReleased, match=r"interrupted; call reset\(\)"):
        own.begin_step(1, 1)
    own.reset()
    grow(own, 3)


def parts(value: float) -> tuple[Tensor, Tensor]:
    good = torch.ones(1, 2, 3, 8)
    return good, good.masked_fill(torch.arange(8) == 5, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_met_nan_names_its_layer_and_releases_the_cache(value: float) -> None:
    own = make()
    own.begin_step(1, 3)
    own.write(ATTENTION, *parts(1.0))
    own.write(3, *parts(value))
    with pytest.raises(NonFinite) as refused:
        own.end_step()
    assert refused.value.layers == (3,)
    assert own.allocator.held == 0
    with pytest.raises(CacheReleased, match="NaN"):
        own.begin_step(1, 1)


def test_what_came_after_the_layers_is_named_by_its_part() -> None:
    own = make()
    step = own.begin_step(1, 3)
    step.finite.update({ATTENTION: torch.tensor(True), "one": torch.tensor(False)})
    step.finite.update({"two": torch.tensor(False)})
    with pytest.raises(NonFinite, match="one") as refused:
        own.end_step()
    assert refused.value.layers == ()
    assert "two" not in str(refused.value)


def test_layers_are_named_before_later_parts() -> None:
    own = make()
    step = own.begin_step(1, 3)
    step.finite.update({3: torch.tensor(False), "one": torch.tensor(False)})
    with pytest.raises(NonFinite, match="layer 3") as refused:
        own.end_step()
    assert "one" not in str(refused.value).split()


def test_unchecked_steps_note_nothing() -> None:
    own = make(check_finite=False)
    step = own.begin_step(1, 3)
    own.write(ATTENTION, *parts(torch.nan))
    assert step.finite == {}
    own.end_step()


# -- what transformers sees -----------------------------------------------------------------------


def test_transformers_neither_compiles_nor_crops_nor_makes_it_early() -> None:
    own = make()
    assert own.is_compileable is False
    assert own.is_croppable is False
    assert own.is_sliding == [False] * len(own.layers)
    own.early_initialization(1, 2, 8, torch.float32, CPU)  # would raise NotPatched
    with pytest.raises(InvalidRequest, match="cannot be cropped"):
        own.crop(1)


def test_an_attention_layer_shows_what_its_cache_does() -> None:
    own = make()
    layer = own.layers[ATTENTION]
    assert isinstance(layer, PagedLayer)
    assert layer.get_max_length() == -1
    for call in (lambda: layer.get_mask_sizes(1), lambda: layer.lazy_initialization(*parts(1.0))):
        with pytest.raises(NotPatched):
            call()
    grow(own, 3)
    assert layer.get_seq_length() == 3


def test_an_attention_layer_shows_copies_of_what_was_written_by_column() -> None:
    own = make()
    layer = own.layers[ATTENTION]
    assert layer.keys is None
    keys = torch.arange(1.0, 97).view(2, 2, 3, 8)
    mask = mask_of("..a", "bcd")
    own.begin_step(2, 3, mask)
    pool = layer.update(keys, -keys)[0]
    assert pool.shape == (1, 2, own.allocator.pages * PAGE, 8)
    own.end_step()
    shown = keys * mask[:, None, :, None]
    assert torch.equal(layer.keys, shown)
    assert torch.equal(layer.values, -shown)


def test_a_mamba_layer_shows_its_last_inputs_with_the_newest_last() -> None:
    own, width = make(), 4
    assert own.get_conv_state(MAMBA) is None
    grow(own, 7, batch=2, mask=mask_of("..abcde", "fghijkl"))
    ring = torch.empty(2, 3, width)
    for row, tokens in enumerate((5, 7)):
        for place in range(tokens - width, tokens):
            ring[row, :, place % width] = place
    own.layers[MAMBA].conv_states = [ring]
    state = own.get_conv_state(MAMBA)
    assert state is not None
    assert state.tolist() == [[[1, 2, 3, 4]] * 3, [[3, 4, 5, 6]] * 3]
    own.begin_step(2, 1)
    for call in (own.get_conv_state, own.has_previous_state):
        with pytest.raises(NotPatched, match="Mamba layer 0"):
            call(MAMBA)


def test_it_says_how_full_it_is() -> None:
    own = make(max_tokens=40)
    grow(own, 5, batch=2)
    assert repr(own) == "PagedCache(2 sequences, 10 tokens, 4 of 10 pages of 4)"


def test_a_reset_forgets_the_states_of_mamba_layers() -> None:
    own = make()
    grow(own, 3)
    own.layers[MAMBA].conv_states = [torch.ones(1)]
    own.reset()
    assert own.get_conv_state(MAMBA) is None
    assert own.batch_size == -1
