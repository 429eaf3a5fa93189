"""A runner's buffers: which row a call reads, writes and clears."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from granite_paged.layers.mamba import EXACT_CHUNK, REPLAYED, Kept
from granite_paged.runner import storage as storage_module
from granite_paged.runner.storage import NULL_ROW, RowSnapshot, Storage, make_storage
from tests.helpers.mamba_layers import mixer_sizes
from tests.helpers.strategies import CPU

ROWS = 4
MIXER = mixer_sizes(heads=2, head_dim=3, state_size=5, groups=1, width=4)
CHANNELS = 2 * 3 + 2 * 5
PARTS = {Kept.NOTHING: 0, Kept.CHUNK: 1, Kept.REPLAY: 2}  # buffers of kept inputs


def make(*layers: int, kept: Kept = Kept.NOTHING) -> Storage:
    pages: Any = mock.Mock(pools={1: "a pool"})
    of_layers = dict.fromkeys(layers, MIXER)
    return make_storage(pages, of_layers, ROWS, torch.bfloat16, CPU, kept=kept)


def numbered(*layers: int, kept: Kept = Kept.NOTHING) -> Storage:
    """Return storage whose row r holds r everywhere, in token, flag and states."""
    storage = make(*layers, kept=kept)
    for tensor in (storage.tokens, storage.nonfinite):
        tensor.copy_(torch.arange(ROWS + 1))
    for states in storage.stacked:
        for row in range(1, ROWS + 1):
            states[:, row - 1] = row
    return storage


def rows_of(storage: Storage) -> list[list[int]]:
    """Return what the rows of each buffer hold, one number per row, the null row first."""
    found = [storage.tokens.tolist(), storage.nonfinite.tolist()]
    for states in storage.stacked:
        by_row = states.transpose(0, 1).reshape(ROWS, -1)
        assert bool((by_row == by_row[:, :1]).all())
        found.append([NULL_ROW, *by_row[:, 0].int().tolist()])
    return found


def test_the_null_row_comes_first() -> None:
    assert NULL_ROW == 0


def test_states_of_all_layers_are_one_buffer_of_each_kind() -> None:
    storage = make(0, 3)
    conv, ssm = storage.stacked
    assert (conv.shape, conv.dtype) == ((2, ROWS, CHANNELS, 4), torch.bfloat16)
    assert (ssm.shape, ssm.dtype) == ((2, ROWS, 2, 3, 5), torch.float32)
    assert (storage.tokens.shape, storage.nonfinite.shape) == ((ROWS + 1,), (ROWS + 1,))
    assert list(storage.states) == [0, 3]
    for place, state in enumerate(storage.states.values()):
        assert (state.rows, state.recent) == (None, None)
        assert state.conv.data_ptr() == conv[place].data_ptr()
        assert state.ssm.data_ptr() == ssm[place].data_ptr()


def test_rows_keep_the_inputs_of_a_chunk_for_exact_mode() -> None:
    storage = make(0, 3, 4, kept=Kept.CHUNK)
    *_, recent = storage.stacked
    assert (recent.shape, recent.dtype) == ((3, ROWS, EXACT_CHUNK, CHANNELS + 2), torch.bfloat16)
    for place, state in enumerate(storage.states.values()):
        assert state.recent is not None
        assert state.recent.data_ptr() == recent[place].data_ptr()
        assert state.times is None


def test_rows_keep_the_inputs_to_replay() -> None:
    storage = make(0, 3, 4, kept=Kept.REPLAY)
    *_, recent, times = storage.stacked
    assert (recent.shape, recent.dtype) == ((3, ROWS, REPLAYED, 2 * 3 + 5), torch.bfloat16)
    assert (times.shape, times.dtype) == ((3, ROWS, REPLAYED, 2, 2), torch.float32)
    for place, state in enumerate(storage.states.values()):
        assert state.recent is not None
        assert state.times is not None
        assert state.recent.data_ptr() == recent[place].data_ptr()
        assert state.times.data_ptr() == times[place].data_ptr()


def test_a_model_without_mamba_layers_has_empty_states() -> None:
    storage = make()
    assert [states.shape for states in storage.stacked] == [(0, ROWS)] * 2
    assert storage.states == {}
    assert storage.save_row(1, to_host=False).nbytes == 0


@pytest.mark.parametrize("kept", Kept)
def test_a_row_is_copied_to_others(kept: Kept) -> None:
    storage = numbered(0, 2, kept=kept)
    storage.copy_row(2, [4, 1])
    assert rows_of(storage) == [[0, 2, 2, 3, 2]] * (4 + PARTS[kept])
    source, index = storage.pages.table.copy_row.call_args.args  # type: ignore[attr-defined]
    assert (source, index.tolist()) == (2, [4, 1])


def test_cleared_rows_hold_zeros() -> None:
    storage = numbered(0, 2)
    storage.clear_rows([1, 3])
    assert rows_of(storage) == [[0, 0, 2, 0, 4]] * 4
    rows, index = storage.pages.table.clear_rows.call_args.args  # type: ignore[attr-defined]
    assert (rows, index.tolist()) == ([1, 3], [1, 3])


@pytest.mark.parametrize("kept", Kept)
@pytest.mark.parametrize("to_host", [False, True])
def test_a_saved_row_can_be_put_into_any_other(to_host: bool, kept: Kept) -> None:
    storage = numbered(0, 2, kept=kept)
    saved = storage.save_row(3, to_host=to_host)
    storage.clear_rows([3])
    storage.load_row(1, saved)
    storage.settle()
    assert rows_of(storage)[2:] == [[0, 3, 2, 0, 4]] * (2 + PARTS[kept])
    assert saved.nbytes == sum(states.nbytes // ROWS for states in storage.stacked)


@pytest.mark.parametrize("kept", Kept)
def test_one_copy_serves_all_rows_that_begin_with_the_same_state(kept: Kept) -> None:
    storage = numbered(0, 2, kept=kept)
    shared, other = (storage.save_row(row, to_host=False) for row in (3, 2))
    for row, state in ((1, shared), (3, other), (4, shared)):
        storage.load_row(row, state)
    with mock.patch.object(Storage, "_copy", autospec=True, side_effect=Storage._copy) as copy:
        storage.settle()
        storage.settle()
    assert [call.args[1] for call in copy.call_args_list] == [[1, 4], [3]]
    assert rows_of(storage)[2:] == [[0, 3, 2, 2, 3]] * (2 + PARTS[kept])
    assert storage.loads == {}


def test_a_model_without_mamba_layers_loads_nothing_into_several_rows() -> None:
    storage = make()
    saved = storage.save_row(1, to_host=False)
    storage.load_row(1, saved)
    storage.load_row(2, saved)
    storage.settle()
    assert storage.loads == {}


def test_a_state_that_was_loaded_is_what_is_copied_saved_and_cleared_after() -> None:
    storage = numbered(0)
    saved = storage.save_row(4, to_host=False)
    storage.load_row(1, saved)
    storage.copy_row(1, [2])
    assert rows_of(storage)[2:] == [[0, 4, 4, 3, 4]] * 2
    storage.load_row(3, saved)
    assert float(storage.save_row(3, to_host=False).ssm.min()) == 4.0
    storage.load_row(1, saved)
    storage.clear_rows([1])
    storage.settle()
    assert rows_of(storage)[2:] == [[0, 0, 4, 4, 4]] * 2


def test_the_last_state_loaded_into_a_row_is_its_own() -> None:
    storage = numbered(0)
    first, last = (storage.save_row(row, to_host=False) for row in (3, 2))
    storage.load_row(1, first)
    storage.load_row(1, last)
    storage.settle()
    assert rows_of(storage)[2:] == [[0, 2, 2, 3, 4]] * 2


def test_only_the_rows_that_are_named_are_loaded() -> None:
    storage = numbered(0)
    saved = storage.save_row(3, to_host=False)
    for row in (1, 2, 4):
        storage.load_row(row, saved)
    storage.load_states([3, 4, 2])
    assert rows_of(storage)[2:] == [[0, 1, 3, 3, 3]] * 2
    assert list(storage.loads) == [1]


def test_a_row_that_becomes_a_copy_begins_with_no_state_of_its_own() -> None:
    storage = numbered(0)
    saved = storage.save_row(3, to_host=False)
    storage.load_row(1, saved)
    storage.copy_row(2, [1])
    storage.settle()
    assert rows_of(storage)[2:] == [[0, 2, 2, 3, 4]] * 2


def test_a_load_that_raised_is_not_tried_again() -> None:
    """Its rows are cleared for other owners, whose steps it does not concern."""
    storage = numbered(0)
    saved = storage.save_row(3, to_host=False)
    for row in (1, 2):
        storage.load_row(row, saved)
    with (
        mock.patch.object(Storage, "_copy", side_effect=torch.OutOfMemoryError),
        pytest.raises(torch.OutOfMemoryError),
    ):
        storage.load_states([1])
    assert list(storage.loads) == [2]
    storage.settle()
    assert rows_of(storage)[2:] == [[0, 1, 3, 3, 4]] * 2


@pytest.mark.parametrize("part", range(4))
def test_a_snapshot_with_one_nan_is_not_finite(part: int) -> None:
    parts = [torch.zeros(2, 3, 4) for _ in range(4)]
    assert RowSnapshot(*parts).all_finite().tolist() == [True]
    assert RowSnapshot(*parts[:2]).all_finite().tolist() == [True]
    parts[part][1, 2, 3] = torch.nan
    assert RowSnapshot(*parts).all_finite().tolist() == [False]


def test_cleared_storage_keeps_no_pools_and_states() -> None:
    storage = make(0)
    storage.clear()
    assert (storage.pages.pools, storage.states, storage.stacked) == ({}, {}, [])


@pytest.mark.parametrize("to_host", [False, True])
def test_a_row_is_saved_to_host_memory_only_where_that_is_asked_for(
    to_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[torch.Tensor] = []

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(storage_module, "host_copy", copied)
    numbered(0).save_row(1, to_host=to_host)
    assert len(copies) == (2 if to_host else 0)
