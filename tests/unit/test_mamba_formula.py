"""The parts of a Mamba layer against their definitions, one token at a time in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from granite_paged.layers import mamba
from granite_paged.layers.mamba import (
    REPLAYED,
    Kept,
    MambaSizes,
    MambaState,
    ScanWeights,
    causal_conv,
    chunk_scan,
    recurrent_step,
    store_replayed,
)
from tests.helpers.mamba_layers import mamba_layer

HEADS, HEAD_DIM, STATE, GROUPS, WIDTH = 6, 3, 5, 2, 4
LIMIT = (0.2, 0.9)
SIZES = MambaSizes(HEADS, HEAD_DIM, STATE, GROUPS, WIDTH, 4, LIMIT)
CPU = torch.device("cpu")
ROWS = torch.tensor([5, 1, 3, 0])

PADDED = {
    "left": [[-1, -1, 9, 10, 11, 12, 13], [-1, -1, -1, -1, -1, -1, 3]],
    "right": [[7, 8, 9, -1, -1, -1, -1], [1, -1, -1, -1, -1, -1, -1]],
    "none": [[4, 5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5, 6]],
    "rows without tokens": [[-1] * 7, [2, 3, -1, -1, -1, -1, -1]],
    "first tokens": [[-1, -1, 0, 1, 2, 3, 4], [0, 1, -1, -1, -1, -1, -1]],
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def weights() -> ScanWeights:
    return ScanWeights(randn(HEADS, seed=1), randn(HEADS, seed=2), randn(HEADS, seed=3))


def states(rows: Tensor | None, kept: Kept = Kept.NOTHING, count: int = 6) -> MambaState:
    """Return states full of numbers, as an earlier owner of the rows leaves them."""
    state = SIZES.empty_state(count, torch.float32, CPU, kept)._replace(rows=rows)
    for seed, part in enumerate(state.parts):
        part.copy_(randn(*part.shape, seed=10 + seed))
    return state


def copy_of(state: MambaState) -> MambaState:
    return MambaState(*(None if part is None else part.clone() for part in state))


def row_of(state: MambaState, place: int) -> int:
    return place if state.rows is None else int(state.rows[place])


def others(state: MambaState, part: Tensor) -> Tensor:
    """Return the rows of a part that the batch does not name."""
    kept = torch.ones(len(part), dtype=torch.bool)
    kept[state.rows] = False
    return part[kept]


# -- convolution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("named", [False, True])
def test_a_convolution_reads_the_last_inputs_of_its_sequence(padding: str, named: bool) -> None:
    positions = torch.tensor(PADDED[padding])
    batch, columns = positions.shape
    state = states(ROWS[:batch] if named else None, count=6 if named else batch)
    before, channels = copy_of(state), SIZES.channels
    inputs, taps, bias = randn(batch, columns, channels), randn(channels, WIDTH), randn(channels)
    found = causal_conv(inputs, positions, taps, bias, state)
    for place in range(batch):
        at = row_of(state, place)
        ring = before.conv[at].double().clone()
        for column, position in enumerate(positions[place].tolist()):
            if position < 0:
                continue
            ring[:, position % WIDTH] = inputs[place, column].double()
            expected = bias.double().clone()
            for back in range(min(WIDTH, position + 1)):
                expected += taps[:, WIDTH - 1 - back].double() * ring[:, (position - back) % WIDTH]
            torch.testing.assert_close(
                found[place, column].double(), expected, atol=1e-5, rtol=1e-5
            )
        kept = [
            p for p in range(WIDTH) if positions[place].max() >= WIDTH - 1 or p in positions[place]
        ]
        if int(positions[place].max()) < 0:
            kept = list(range(WIDTH))
        assert torch.equal(state.conv[at, :, kept].double(), ring[:, kept])
    if named:
        assert torch.equal(others(state, state.conv), others(before, before.conv))


# -- the recurrence -------------------------------------------------------------------------------


def defined(
    convolved: Tensor, dt: Tensor, positions: Tensor, state: MambaState, *, alone: bool
) -> tuple[Tensor, Tensor]:
    """Return outputs [B, S, inner] and states of the batch's rows, token by token in float64.

    alone: whether the only token of each row is computed by the recurrence.
    """
    own, (batch, columns) = weights(), positions.shape
    out = torch.zeros(batch, columns, HEADS, HEAD_DIM, dtype=torch.float64)
    ends = []
    for place in range(batch):
        ssm = state.ssm[row_of(state, place)].double()
        for column, position in enumerate(positions[place].tolist()):
            if position < 0:
                continue
            numbers = convolved[place, column].double()
            x = numbers[: SIZES.inner].view(HEADS, HEAD_DIM)
            b, c = numbers[SIZES.inner :].view(2, GROUPS, STATE).repeat_interleave(3, dim=1)
            step = softplus(dt[place, column].double() + own.dt_bias.double())
            if not alone or position == 0:
                step = step.clamp(*LIMIT)
            decay = torch.exp(-step * own.a_log.double().exp())
            ssm = ssm * decay[:, None, None] + (step[:, None] * x)[..., None] * b[:, None]
            out[place, column] = (ssm * c[:, None]).sum(-1) + own.skip.double()[:, None] * x
        ends.append(ssm)
    return out.flatten(2), torch.stack(ends)


def check(
    positions: list[list[int]], *, named: bool, alone: bool, sizes: MambaSizes = SIZES
) -> None:
    at = torch.tensor(positions)
    state = states(ROWS[: len(at)] if named else None, count=6 if named else len(at))
    before = copy_of(state)
    convolved, dt = randn(*at.shape, SIZES.channels), 2 * randn(*at.shape, HEADS, seed=5)
    form = recurrent_step if alone else chunk_scan
    found = form(sizes, convolved, dt, weights(), at, state)
    expected, ends = defined(convolved, dt, at, before, alone=alone)
    token = at >= 0
    assert found.shape == (*at.shape, SIZES.inner)
    torch.testing.assert_close(found[token].double(), expected[token], atol=2e-5, rtol=2e-5)
    own = state.ssm if state.rows is None else state.ssm[state.rows]
    torch.testing.assert_close(own.double(), ends, atol=2e-5, rtol=2e-5)
    if named:
        assert torch.equal(others(state, state.ssm), others(before, before.ssm))


@pytest.mark.parametrize("named", [False, True])
def test_a_single_token_advances_the_state_of_its_row(named: bool) -> None:
    """The limit of dt applies to a sequence's first token only, and padding advances nothing."""
    check([[4], [0], [-1], [1]], named=named, alone=True)


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_chunks_advance_the_state_as_single_tokens_do(
    padding: str, named: bool, chunk: int
) -> None:
    """Whatever the size of the chunks, the last of which may be padded."""
    sizes = SIZES._replace(chunk_size=chunk)
    check(PADDED[padding], named=named, alone=False, sizes=sizes)


def test_a_step_of_one_token_takes_the_recurrence_and_a_longer_one_the_scan() -> None:
    mixer, _ = mamba_layer()
    state = MambaSizes.of(mixer).empty_state(2, torch.float32, CPU)
    taken: list[Any] = []
    for name in ("recurrent_step", "chunk_scan"):
        right = getattr(mamba, name)

        def form(*args: Any, name: str = name, right: Any = right) -> Tensor:
            taken.append(name)
            out: Tensor = right(*args)
            return out

        mock.patch.object(mamba, name, form).start()
    try:
        with torch.inference_mode():
            for columns in (1, 2, 3):
                positions = torch.arange(columns).expand(2, -1)
                mamba.mamba_forward(mixer, torch.zeros(2, columns, 24), positions, state)
    finally:
        mock.patch.stopall()
    assert taken == ["recurrent_step", "chunk_scan", "chunk_scan"]


def test_a_cpu_sums_the_taps_of_a_convolution_itself() -> None:
    """conv1d takes up to three times as long there, and its bits depend on a channel's place."""
    state, inputs = states(None, count=2), randn(2, 3, SIZES.channels)
    positions = torch.arange(3).repeat(2, 1)
    with mock.patch.object(mamba, "conv1d") as conv1d:
        causal_conv(inputs, positions, randn(SIZES.channels, WIDTH), None, state)
    conv1d.assert_not_called()


# -- inputs to replay -----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_replayed_inputs_below_the_next_position_advance_the_state(named: bool) -> None:
    nexts = [13, 8, 3, 0] if named else [7, 16, 1, -1]
    state = states(ROWS if named else None, Kept.REPLAY, 6 if named else 4)
    assert state.recent is not None
    assert state.times is not None
    state.times.abs_()
    before, a_log = copy_of(state), randn(HEADS, seed=2)
    assert before.recent is not None
    assert before.times is not None
    positions = torch.tensor(nexts)[:, None].repeat(1, 2)
    store_replayed(SIZES, positions, a_log, state)
    for place, position in enumerate(nexts):
        at = row_of(state, place)
        ssm = before.ssm[at].double()
        for slot in range(max(position, 0) % REPLAYED):
            numbers, step = before.recent[at, slot].double(), before.times[at, slot, 0].double()
            x = numbers[: SIZES.inner].view(HEADS, HEAD_DIM)
            b = numbers[SIZES.inner :].view(GROUPS, STATE).repeat_interleave(3, dim=0)
            decay = torch.exp(-step * a_log.double().exp())
            ssm = ssm * decay[:, None, None] + (step[:, None] * x)[..., None] * b[:, None]
        torch.testing.assert_close(state.ssm[at].double(), ssm, atol=2e-5, rtol=2e-5)
        if position < 0:
            assert torch.equal(state.times[at], before.times[at]), "padding changes nothing"
        else:
            assert not state.times[at].any(), "nothing is left"
    if named:
        for name in ("ssm", "times", "recent", "conv"):
            assert torch.equal(
                others(state, getattr(state, name)), others(state, getattr(before, name))
            )
