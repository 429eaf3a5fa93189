"""The memory plan: how many rows and pages fit, and what a runner with them takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from granite_paged.errors import GeometryError, OutOfMemory
from granite_paged.geometry import PagedConfig
from granite_paged.runner import memory_plan
from granite_paged.runner.memory_plan import (
    MemoryPlan,
    RunnerSizes,
    choose_sizes,
    memory_refused,
    plan_memory,
    row_bytes,
    weight_bytes,
)
from tests.helpers.mamba_layers import mixer_sizes
from tests.helpers.memory_errors import MEMORY_ERRORS
from tests.helpers.strategies import make_geometry

GEOMETRY = make_geometry(page_size=16, group=3, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
PAGE = 16 * 2 * 2 * 8 * 2
"""Bytes of a page: 16 tokens, K and V, 2 heads of 8 numbers of 2 bytes."""

MIXER = mixer_sizes(heads=4, head_dim=10, state_size=16, groups=2, width=3)
INNER, CHANNELS = 40, 40 + 2 * 2 * 16
ROW = CHANNELS * 3 * 2 + INNER * 16 * 4
"""Bytes of a row: the convolution's last inputs in bfloat16, and a state in float32."""


class Fake(nn.Module):
    """A model of which the plan reads sizes only."""

    def __init__(self, device: str, **sizes: int) -> None:
        super().__init__()
        self.device, self.dtype = torch.device(device), torch.bfloat16
        usual = {"hidden_size": 20, "shared_intermediate_size": 30, "vocab_size": 97}
        self.config = SimpleNamespace(**{**usual, "max_position_embeddings": 10**9, **sizes})
        self.first = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.register_buffer("second", torch.zeros(3))


@pytest.fixture
def mixers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Return the Mamba layers that every model has: two, which a test may change."""
    held: dict[int, Any] = {0: MIXER, 2: MIXER}
    monkeypatch.setattr(memory_plan, "mixers", lambda model: held)
    monkeypatch.setattr(memory_plan, "triton_refusal", lambda model, backend: "no kernels here")
    return held


def choose(free: int, device: str = "cuda", longest: int = 10**9, **options: Any) -> RunnerSizes:
    config = PagedConfig(**{"page_size": 16, "memory_fraction": 0.5, **options})
    return choose_sizes(Fake(device, max_position_embeddings=longest), config, GEOMETRY, free)


# -- sizes --------------------------------------------------------------------------------------


def test_rows_take_at_most_half_the_budget_and_pages_the_rest(mixers: Any) -> None:
    free = 2 * 20 * 2 * ROW  # a budget of 20 rows
    assert choose(free) == RunnerSizes(10, 10 * 2 * ROW // PAGE, (10 * 2 * ROW // PAGE - 1) * 16)


def test_there_are_no_more_rows_than_256_unless_asked_for(mixers: Any) -> None:
    assert choose(4 * 1000 * 2 * ROW).rows == 256
    assert choose(4 * 1000 * 2 * ROW, max_sequences=700).rows == 700
    mixers.clear()
    assert choose(100 * PAGE).rows == 256, "attention-only rows take nothing"


def test_there_is_at_least_one_row(mixers: Any) -> None:
    assert choose(2 * 2 * ROW + 5 * PAGE).rows == 1


def test_a_pool_on_the_host_has_8192_tokens(mixers: Any) -> None:
    assert choose(10**9, "cpu") == RunnerSizes(256, 1 + 512, 8192)
    assert choose(10**9, "cpu", max_tokens=100).pages == choose(10**9, max_tokens=100).pages == 8
    tokens = make_geometry(page_size=1, group=1, kv_heads=1, head_dim=8, dtype=torch.bfloat16)
    sizes = choose_sizes(Fake("cpu"), PagedConfig(page_size=1), tokens, 10**9)
    assert (sizes.pages, sizes.longest) == (1 + 8192, 8192)


def test_a_pool_has_no_more_elements_than_32_bits_address(mixers: Any) -> None:
    assert choose(10**14).pages == (2**31 - 1) // (2 * 8 * 16)
    smallest = make_geometry(page_size=1, group=1, kv_heads=1, head_dim=1, dtype=torch.bfloat16)
    config = PagedConfig(page_size=1)
    assert choose_sizes(Fake("cuda"), config, smallest, 10**14).pages == 2**31 - 1


def test_a_sequence_is_no_longer_than_the_model_allows(mixers: Any) -> None:
    assert choose(10**9, max_tokens=160).longest == 160
    assert choose(10**9, longest=99, max_tokens=160).longest == 99
    assert choose(10**9, longest=1, max_tokens=160).longest == 1
    with pytest.raises(GeometryError, match="must be positive, got 0"):
        choose(10**9, longest=0)


def test_what_is_asked_for_may_take_all_free_memory_and_no_more(mixers: Any) -> None:
    needed = 3 * 2 * ROW + 8 * PAGE
    options = {"max_sequences": 3, "max_tokens": 100}
    assert choose(needed, **options) == RunnerSizes(3, 8, 112)
    with pytest.raises(OutOfMemory, match="3 rows and 8 pages of 16 tokens need") as refusal:
        choose(needed - 1, **options)
    assert refusal.value.free == needed - 1


def test_a_runner_needs_a_page_besides_the_null_page(mixers: Any) -> None:
    mixers.clear()
    assert choose(4 * PAGE, max_sequences=1).pages == 2
    assert choose(2 * PAGE, max_sequences=1, max_tokens=16).pages == 2
    with pytest.raises(OutOfMemory, match="1 rows and 2 pages"):
        choose(4 * PAGE - 2, max_sequences=1)


def test_a_refusal_says_how_much_is_needed(mixers: Any) -> None:
    with pytest.raises(OutOfMemory, match=f"need {1e6 * 2 * ROW / 1e9 + 2 * PAGE / 1e9:.2f} GB"):
        choose(10**6, max_sequences=10**6)
    mixers.clear()
    wide = make_geometry(page_size=16, group=1, kv_heads=2, head_dim=10**6, dtype=torch.bfloat16)
    with pytest.raises(OutOfMemory, match=r"2 pages of 16 tokens need 0\.26 GB"):
        choose_sizes(Fake("cuda"), PagedConfig(page_size=16), wide, 10**8)


# -- the plan -----------------------------------------------------------------------------------


def test_a_shared_parameter_counts_once() -> None:
    model = Fake("cpu")
    model.again = model.first
    assert weight_bytes(model) == 5 * 2 + 3 * 4


def test_a_row_holds_the_states_of_all_layers(mixers: Any) -> None:
    assert row_bytes(Fake("cpu"), PagedConfig()) == 2 * ROW


def test_a_row_keeps_inputs_to_replay_where_triton_kernels_run(
    mixers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row_bytes(Fake("cuda"), PagedConfig()) == 2 * ROW
    monkeypatch.setattr(memory_plan, "triton_refusal", lambda model, backend: "")
    inputs = 8 * ((INNER + 2 * 16) * 2 + 2 * 4 * 4)  # x and B in bfloat16, dt and sums in float32
    assert row_bytes(Fake("cuda"), PagedConfig()) == 2 * (ROW + inputs)
    assert row_bytes(Fake("cpu"), PagedConfig()) == 2 * ROW


def test_a_row_keeps_its_recent_inputs_in_exact_mode_on_a_gpu(mixers: Any) -> None:
    exact = PagedConfig(exact=True)
    assert row_bytes(Fake("cpu"), exact) == 2 * ROW
    recent = 64 * (CHANNELS + 4) * 2  # 64 tokens' x, B, C and dt
    assert row_bytes(Fake("cuda"), exact) == 2 * (ROW + recent)
    assert plan("cuda", exact=True).row_bytes == 5 * 2 * (ROW + recent)


def plan(device: str, rows: int = 5, **options: Any) -> MemoryPlan:
    config = PagedConfig(page_size=16, chunk_tokens=64, **options)
    return plan_memory(Fake(device), config, GEOMETRY, RunnerSizes(rows, 30, 70))


def test_a_plan_counts_rows_pages_tables_and_logits(mixers: Any) -> None:
    found = plan("cpu")
    assert found.weight_bytes == 22
    assert found.row_bytes == 5 * 2 * ROW
    tables = 4 * (6 * 5 + 30)  # 5 rows and the null row, 5 pages each; then the inverse map
    assert found.page_bytes == 30 * PAGE + tables
    assert found.logit_bytes == 256 * 97 * 2
    assert plan("cpu", rows=300).logit_bytes == 512 * 97 * 2, "rows are rounded up to 2^n"
    assert (found.graph_bytes, found.prefix_bytes) == (0, 0)
    states = found.weight_bytes + found.row_bytes + found.page_bytes
    assert found.total_bytes == states + found.workspace_bytes + found.logit_bytes


def test_a_gpu_has_two_workspaces_and_the_scratch_of_the_kernels(mixers: Any) -> None:
    scratch = 4 * (memory_plan.SCRATCH_NUMBERS + memory_plan.SCRATCH_TILES)
    assert plan("cuda").graph_bytes == 2 * 32 * 1024**2 + scratch


RESIDUAL = 3 * 20 * 2
"""Bytes per token of the hidden states around any layer."""


def test_the_widest_layer_decides_the_workspace(mixers: Any) -> None:
    """Numbers per token: of the feed-forward, 3 x 30 and the hidden 20; of attention, 5 x 48 of the
    query, 2 x 16 of the key, and the hidden 20."""
    mixers.clear()
    assert plan("cpu").workspace_bytes == 64 * (2 * (5 * 48 + 2 * 16 + 20) + RESIDUAL)
    config = PagedConfig(page_size=16, chunk_tokens=64)
    wide = Fake("cpu", shared_intermediate_size=300)
    found = plan_memory(wide, config, GEOMETRY, RunnerSizes(5, 30, 70))
    assert found.workspace_bytes == 64 * (2 * (3 * 300 + 20) + RESIDUAL)


@pytest.mark.parametrize("chunk_size", [128, 256, 1024])
def test_a_mamba_layers_workspace_holds_its_scan(mixers: Any, chunk_size: int) -> None:
    """Per token: projected (gate, convolved, time steps), convolved, gated and mixed, hidden; two
    decays of a head in float32; similarities with the chunk's tokens in float32; and for each chunk
    a state in float32 and one in bfloat16."""
    mixer = SimpleNamespace(**{**vars(MIXER), "chunk_size": chunk_size, "head_dim": 300})
    mixers[2] = mixer
    inner, channels = 1200, 1200 + 64
    numbers = (inner + channels + 4) + channels + 2 * inner + 20
    chunk = min(chunk_size, 256)
    states = (4 + 2) * inner * 16
    similar = 4 * 2 * chunk  # in each of two groups
    per_token = 2 * numbers + 2 * 4 * 4 + similar + states // chunk
    assert plan("cpu").workspace_bytes == 64 * (per_token + RESIDUAL)
    exact = 2 * numbers + 2 * 4 * 4 + states // 64  # no similarities, and a state per 64 tokens
    assert plan("cuda", exact=True).workspace_bytes == 64 * (exact + RESIDUAL)


@pytest.mark.parametrize("source", MEMORY_ERRORS)
def test_a_refusal_of_the_device_names_what_did_not_fit(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 123)
    with (
        pytest.raises(OutOfMemory, match="a step did not fit") as refusal,
        memory_refused(torch.device("cpu"), "a step"),
    ):
        raise MEMORY_ERRORS[source]
    assert refusal.value.free == 123
