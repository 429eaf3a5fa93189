"""Our Mamba-2 layer against that of transformers, and padding that changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from granite_paged.layers.mamba import (
    EXACT_CHUNK,
    REPLAYED,
    Kept,
    MambaRows,
    MambaSizes,
    MambaState,
    mamba_forward,
    mixers,
    norm_groups,
)
from tests.helpers.mamba_layers import mamba_layer
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tolerance import largest_error

FLOAT32 = 2e-6
"""Bound of `largest_error`: about 17 roundings of 2**-23."""


class Ours:
    """The layer under test; its state continues from call to call."""

    def __init__(self, mixer: Any, batch: int) -> None:
        self.mixer = mixer
        sizes = MambaSizes.of(mixer)
        self.state = sizes.empty_state(batch, torch.float32, torch.device("cpu"))
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        tokens = torch.ones(hidden.shape[:2], dtype=torch.bool) if tokens is None else tokens
        at = self.lengths[:, None] + tokens.cumsum(1) - 1
        self.lengths = self.lengths + tokens.sum(1)
        with torch.inference_mode():
            return mamba_forward(self.mixer, hidden, at.where(tokens, -1), self.state)


class Theirs:
    """The layer of transformers, with its own cache."""

    def __init__(self, mixer: Any, config: Any) -> None:
        self.mixer, self.cache = mixer, DynamicCache(config=config)

    def __call__(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.mixer(hidden, self.cache)

    @property
    def ssm(self) -> Tensor:
        return self.cache.layers[0].recurrent_states[0]


@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
    head_dim=st.sampled_from([1, 4, 12]),
    state_size=st.sampled_from([1, 5, 16]),
    conv_width=st.integers(2, 5),
    chunk_size=st.sampled_from([1, 3, 8, 16]),
    limit=st.sampled_from([(0.0, float("inf")), (0.1, 0.7)]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_mamba_agrees_with_transformers_from_any_state(
    batch: int,
    heads: tuple[int, int],
    head_dim: int,
    state_size: int,
    conv_width: int,
    chunk_size: int,
    limit: tuple[float, float],
    lengths: list[int],
    seed: int,
) -> None:
    mixer, config = mamba_layer(
        seed,
        hidden_size=heads[0] * head_dim,
        mamba_expand=1,
        num_attention_heads=1,
        mamba_n_heads=heads[0],
        mamba_n_groups=heads[1],
        mamba_d_head=head_dim,
        mamba_d_state=state_size,
        mamba_d_conv=conv_width,
        mamba_chunk_size=chunk_size,
        time_step_limit=limit,
    )
    ours, theirs = Ours(mixer, batch), Theirs(mixer, config)
    draw = torch.Generator().manual_seed(seed)
    for tokens in lengths:
        hidden = torch.randn(batch, tokens, heads[0] * head_dim, generator=draw)
        assert largest_error(ours(hidden), theirs(hidden)) <= FLOAT32
        assert largest_error(ours.state.ssm, theirs.ssm) <= FLOAT32


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [(5, 1, 0), (23, 9, 3)])
def test_padding_changes_neither_states_nor_outputs(side: str, tokens: tuple[int, ...]) -> None:
    mixer, _ = mamba_layer()
    width = max(tokens) + 2
    batch = Ours(mixer, len(tokens))
    alone = [Ours(mixer, 1) for _ in tokens]
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):  # the second and third calls continue from the first
        columns = torch.arange(width)[None]
        counts = torch.tensor(tokens)[:, None]
        is_token = columns >= width - counts if side == "left" else columns < counts
        hidden = torch.randn(len(tokens), width, 24, generator=draw)
        out = batch(hidden, is_token)
        for row, one in enumerate(alone):
            if tokens[row]:
                expected = one(hidden[row][is_token[row]][None])
                assert largest_error(out[row][is_token[row]][None], expected) <= FLOAT32
            torch.testing.assert_close(batch.state.ssm[row], one.state.ssm[0])
            torch.testing.assert_close(batch.state.conv[row], one.state.conv[0])


def test_a_batch_updates_only_the_rows_it_names() -> None:
    mixer, _ = mamba_layer()
    whole = MambaSizes.of(mixer).empty_state(5, torch.float32, torch.device("cpu"))
    before = MambaState(whole.conv.normal_().clone(), whole.ssm.normal_().clone(), None)
    rows = torch.tensor([3, 1])
    hidden = torch.randn(2, 7, 24)
    positions = torch.arange(4, 11).expand(2, -1)
    named = MambaState(before.conv[rows].clone(), before.ssm[rows].clone(), None)
    with torch.inference_mode():
        expected = mamba_forward(mixer, hidden, positions, named)
        actual = mamba_forward(mixer, hidden, positions, MambaState(whole.conv, whole.ssm, rows))
    assert torch.equal(actual, expected)
    assert torch.equal(whole.ssm[rows], named.ssm)
    assert torch.equal(whole.conv[rows], named.conv)
    assert torch.equal(whole.ssm[[0, 2, 4]], before.ssm[[0, 2, 4]])
    assert torch.equal(whole.conv[[0, 2, 4]], before.conv[[0, 2, 4]])


# -- rows of a cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [Kept.NOTHING, Kept.CHUNK])
def test_rows_of_a_cache_have_states_from_the_first_step_to_a_reset(kept: Kept) -> None:
    sizes, rows = MambaSizes.of(mamba_layer()[0]), MambaRows()
    unset = copy.deepcopy(vars(rows))
    rows.select_rows(torch.tensor([0]))
    assert rows.nbytes == 0
    state = rows.state(sizes, 3, torch.zeros(1), kept)
    assert not any(part.any() for part in state.parts)
    assert rows.nbytes == state.nbytes == 3 * sizes.state_bytes(torch.float32, kept)
    assert rows.has_previous_state[0] is True
    for part in state.parts:
        part.copy_(torch.arange(3.0).view(-1, *[1] * (part.ndim - 1)).expand_as(part))
    rows.select_rows(torch.tensor([2, 0, 2, 1]))
    again = rows.state(sizes, 4, torch.zeros(1), kept)
    assert len(again.parts) == len(state.parts)
    for part in again.parts:
        assert part.flatten(1).unique(dim=1)[:, 0].tolist() == [2, 0, 2, 1]
    rows.reset()
    assert {name: vars(rows)[name] for name in unset} == unset
    assert rows.nbytes == 0
    assert MambaRows.is_compileable is False, "the step is not in a compiled graph"


def test_a_model_has_a_mixer_for_each_mamba_layer() -> None:
    model = tiny_model()
    found = mixers(model)
    assert list(found) == [0, 2]
    assert all(found[layer] is model.model.layers[layer].mamba for layer in found)


def test_a_norm_without_groups_has_one() -> None:
    mixer, _ = mamba_layer()
    mixer.norm = torch.nn.LayerNorm(48)
    assert norm_groups(mixer) == 1
    mixer.norm.group_size = 12
    assert norm_groups(mixer) == 4


def test_kept_inputs_fill_blocks_of_kernels() -> None:
    """Triton's blocks are powers of two."""
    for count in (EXACT_CHUNK, REPLAYED):
        assert count.bit_count() == 1


def test_sizes_of_states_follow_from_those_of_the_layer() -> None:
    sizes = MambaSizes(3, 5, 7, 2, 4, 8, (0.0, 1.0))
    assert (sizes.inner, sizes.channels, sizes.ssm_elements) == (15, 15 + 28, 105)
    shapes = {kept: [tuple(part.shape) for part in empty(sizes, kept).parts] for kept in Kept}
    states = [(2, 43, 4), (2, 3, 5, 7)]
    assert shapes == {
        Kept.NOTHING: states,
        Kept.REPLAY: [*states, (2, REPLAYED, 15 + 14), (2, REPLAYED, 2, 3)],
        Kept.CHUNK: [*states, (2, EXACT_CHUNK, 43 + 3)],
    }
    for kept in Kept:
        assert 2 * sizes.state_bytes(torch.float16, kept) == empty(sizes, kept).nbytes


def empty(sizes: MambaSizes, kept: Kept) -> MambaState:
    return sizes.empty_state(2, torch.float16, torch.device("cpu"), kept)
