"""Mamba steps that store a row's state at every eighth token only, and replay inputs in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from granite_paged.layers.mamba import (
    REPLAYED,
    Kept,
    MambaSizes,
    MambaState,
    mamba_forward,
    store_replayed,
)

pytest.importorskip("triton")

from granite_paged.layers.triton import mamba  # needs Triton
from tests.helpers.mamba_layers import mamba_layer
from tests.helpers.tolerance import assert_as_defined

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN = 24
FLOAT32 = 2e-6
BOUND = 10 * FLOAT32
"""Largest error of a kernel's output, relative to the largest value: decays are computed from
differences of float32 sums."""

SHAPES: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups, odd sizes, a limit": {
        "mamba_n_groups": 2,
        "mamba_d_state": 5,
        "mamba_d_conv": 3,
        "time_step_limit": (0.2, 0.6),
    },
}


class Layer:
    """A Mamba layer with two sets of states of the same rows.

    Attributes:
        mine: states of the kernels, with inputs to replay.
        defined: states of the plain forward pass.
    """

    def __init__(self, rows: int = 4, **sizes: Any) -> None:
        torch.manual_seed(2)
        self.mixer = mamba_layer(**sizes)[0].to(DEVICE)
        self.sizes = MambaSizes.of(self.mixer)
        self.mine = self.sizes.empty_state(rows, torch.float32, DEVICE, Kept.REPLAY)
        self.defined = self.sizes.empty_state(rows, torch.float32, DEVICE)

    def feed(self, positions: list[list[int]], rows: list[int], run: Any = None) -> None:
        """Run new tokens in both, and compare outputs. run: instead of the kernels."""
        at = torch.tensor(positions, device=DEVICE)
        hidden = torch.randn(*at.shape, HIDDEN, device=DEVICE)
        which = torch.tensor(rows, device=DEVICE)
        with torch.inference_mode():
            actual = (run or mamba.mamba_forward)(
                self.mixer, hidden, at, self.mine._replace(rows=which)
            )
            there = which >= 0
            state = self.defined._replace(rows=which[there])
            expected = mamba_forward(self.mixer, hidden[there], at[there], state)
        token = at[there] >= 0
        assert_as_defined(actual[there][token], expected[token], BOUND)

    def check_states(self, ends: list[int]) -> None:
        """Compare the states after tokens up to `ends` of all rows."""
        mine = MambaState(*(None if part is None else part.clone() for part in self.mine))
        next_ones = torch.tensor(ends, device=DEVICE)[:, None]
        store_replayed(self.sizes, next_ones, self.mixer.A_log, mine)
        assert_as_defined(mine.ssm, self.defined.ssm, BOUND)
        assert_as_defined(mine.conv, self.defined.conv, FLOAT32)


def steps(starts: list[int], count: int) -> list[list[list[int]]]:
    return [[[start + at] for start in starts] for at in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_that_replay_inputs_equal_steps_that_store_states(shape: str) -> None:
    layer = Layer(**SHAPES[shape])
    layer.feed([list(range(5)), list(range(5))], [2, 0])  # two rows end inside a block
    layer.feed([list(range(16))], [3])  # one at its end; the fourth starts with a step
    for positions in steps([5, 16, 5, 0], REPLAYED + 3):
        layer.feed(positions, [2, 3, 0, 1])
    end = REPLAYED + 3
    layer.check_states([5 + end, end, 5 + end, 16 + end])


@pytest.mark.parametrize("pending", [0, 1, 3, REPLAYED - 1])
@pytest.mark.parametrize("run", [mamba.mamba_forward, mamba_forward], ids=["kernels", "plain"])
def test_a_chunk_starts_from_the_inputs_that_are_left(run: Any, pending: int) -> None:
    layer = Layer()
    layer.feed([list(range(8))], [1])
    for positions in steps([8], pending):
        layer.feed(positions, [1])
    first = 8 + pending
    layer.feed([[first, first + 1, first + 2, -1]], [1], run)
    for positions in steps([first + 3], 6):
        layer.feed(positions, [1])
    layer.check_states([0, first + 9, 0, 0])


def test_a_plain_step_stores_what_kernels_left_to_be_replayed() -> None:
    layer = Layer()
    layer.feed([list(range(3)), list(range(3))], [0, 1])
    for positions in steps([3, 3], 4):
        layer.feed(positions, [0, 1])
    layer.feed([[7]], [1], mamba_forward)
    assert layer.mine.times is not None
    assert not layer.mine.times[1].any()
    for positions in steps([7], 3):  # the other row is as it was
        layer.feed(positions, [0])
    layer.check_states([10, 8, 0, 0])


def test_a_state_is_stored_at_every_eighth_token_only() -> None:
    layer = Layer()
    stored = []
    for positions in steps([0, 3], 2 * REPLAYED):
        before = layer.mine.ssm.clone()
        layer.feed(positions, [0, 1])
        changed = (layer.mine.ssm != before).flatten(1).any(dim=1).tolist()
        stored.append([at[0] for at, row in zip(positions, changed, strict=False) if row])
    assert [at for found in stored for at in found] == [7, 7, 15, 15]


@pytest.mark.parametrize("run", [mamba.mamba_forward, mamba_forward], ids=["kernels", "plain"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_padding_leaves_the_inputs_of_a_row(tokens: int, run: Any) -> None:
    layer = Layer()
    layer.feed([list(range(3)), list(range(3))], [0, 1])
    for positions in steps([3, 3], 2):
        layer.feed(positions, [0, 1])
    before = [part[1].clone() for part in layer.mine.parts]
    layer.feed([list(range(5, 5 + tokens)), [-1] * tokens], [0, 1], run)
    if run is not mamba_forward:  # which has no padding rows without a state
        layer.feed([list(range(5 + tokens, 5 + 2 * tokens)), [-1] * tokens], [0, -1], run)
    for part, held in zip(layer.mine.parts, before, strict=True):
        assert torch.equal(part[1], held)


def test_a_row_can_be_copied_between_two_stored_states() -> None:
    layer = Layer()
    for positions in steps([0], 5):
        layer.feed(positions, [2])
    for part in (*layer.mine.parts, *layer.defined.parts):
        part[0] = part[2]
    for positions in steps([5, 5], 6):
        layer.feed(positions, [0, 2])
    layer.check_states([11, 0, 11, 0])


def test_half_precision_inputs_are_replayed_as_they_were() -> None:
    mixer = mamba_layer()[0].to(DEVICE, torch.float16)
    sizes = MambaSizes.of(mixer)
    rows = torch.tensor([0], device=DEVICE)
    found = []
    for kept in (Kept.REPLAY, Kept.NOTHING):
        torch.manual_seed(4)
        state = sizes.empty_state(1, torch.float16, DEVICE, kept)._replace(rows=rows)
        outputs = []
        with torch.inference_mode():
            for at in range(REPLAYED):  # the last stores the state
                hidden = torch.randn(1, 1, HIDDEN, device=DEVICE).half()
                position = torch.tensor([[at]], device=DEVICE)
                outputs.append(mamba.mamba_forward(mixer, hidden, position, state))
        found.append((torch.cat(outputs).float(), state.ssm))
    (mine, stored), (theirs, expected) = found
    half_ulp = 2.0**-11
    # both round the same sums, which differ by float32's roundings
    assert float((mine - theirs).abs().max()) <= 2 * half_ulp * float(theirs.abs().max())
    # a weight is two numbers of 11 bits: half a unit of the second, for each of seven inputs
    assert_as_defined(stored, expected, 7 * half_ulp**2 + FLOAT32)
