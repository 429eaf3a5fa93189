"""The roofline floor counts unavoidable work: checked against sizes worked out by hand."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridForCausalLM

from granite_paged.bench import session
from granite_paged.bench.capacity import padded_capacity, paged_capacity
from granite_paged.bench.roofline import ModelSizes, Work, measure_rates
from granite_paged.bench.workload import Workload
from granite_paged.geometry import CacheGeometry
from granite_paged.models import geometry_config
from granite_paged.report.bench_results import Rates
from tests.helpers.tiny_models import FLAVOURS, tiny_model


def sizes_of(name: str) -> ModelSizes:
    with torch.device("meta"):
        return ModelSizes.of(
            GraniteMoeHybridForCausalLM._from_config(geometry_config(name), dtype=torch.bfloat16)
        )


@pytest.fixture(scope="module")
def one_b() -> ModelSizes:
    return sizes_of("granite-4.0-h-1b")


def test_granite_1b_has_its_published_sizes(one_b: ModelSizes) -> None:
    assert one_b.shared + one_b.head == 1_461_538_368
    assert one_b.experts == 0
    assert one_b.kv_bytes == 4 * 2 * 4 * 128 * 2
    assert one_b.state_size == 36 * 48 * 64 * 128
    conv = (2 * 1536 + 2 * 128) * 4
    assert one_b.state_bytes == 4 * one_b.state_size + 36 * conv * 2


def moved(sizes: ModelSizes) -> float:
    """Return what eight steps of one sequence move of states and inputs, divided by eight."""
    inputs = 7 + sum(range(8))  # stored by seven, and read by those that follow
    return (8 + 1) / 8 * sizes.state_bytes + inputs / 8 * sizes.kept_bytes / 8


def test_decode_bytes_are_weights_context_states_and_inputs(one_b: ModelSizes) -> None:
    weights = 2 * 1_461_538_368
    assert one_b.kept_bytes == 36 * 8 * ((3072 + 128) * 2 + 2 * 48 * 4)
    for batch, context in ((1, 512), (32, 4096)):
        cache = batch * (8192 * context + moved(one_b))
        assert one_b.decode(batch, context).bytes == pytest.approx(weights + cache)


def test_a_served_token_moves_what_a_decode_step_moves(one_b: ModelSizes) -> None:
    few, many = (
        one_b.serve(Workload(requests=4, prompt_tokens=(9, 9), new_tokens=(least, 100))).bytes
        for least in (50, 60)
    )
    assert many - few == pytest.approx(4 * 5 * (one_b.kv_bytes + moved(one_b)))


def test_a_prefill_of_2048_tokens_takes_5_5_teraflop(one_b: ModelSizes) -> None:
    work = one_b.prefill(1, 2048)
    assert 5.2e12 < work.flops < 5.7e12
    assert work.seconds(Rates(4.3e12, 780e12)) == work.flops / 780e12


def test_a_small_decode_step_is_bound_by_memory(one_b: ModelSizes) -> None:
    work = one_b.decode(1, 512)
    assert work.seconds(Rates(4.3e12, 780e12)) == work.bytes / 4.3e12


def test_attention_grows_with_the_square_of_the_context(one_b: ModelSizes) -> None:
    def beyond_twice_the_work(context: int) -> float:
        return one_b.prefill(1, 2 * context).flops - 2 * one_b.prefill(1, context).flops

    assert beyond_twice_the_work(8192) / beyond_twice_the_work(4096) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_parameters_are_counted_once(flavour: str) -> None:
    model = tiny_model(flavour)
    sizes = ModelSizes.of(model)
    assert sizes.shared + sizes.experts + sizes.head == sum(p.numel() for p in model.parameters())


def test_an_untied_embedding_is_not_read_as_weights() -> None:
    tied, apart = (ModelSizes.of(tiny_model(tie_word_embeddings=tie)) for tie in (True, False))
    assert (tied.shared, tied.head) == (apart.shared, apart.head)


@pytest.mark.parametrize(("tokens", "share"), [(1, 1 / 2), (2, 3 / 4), (9, 1 - 1 / 2**9)])
def test_experts_are_read_as_often_as_uniform_routing_chooses_them(
    tokens: int, share: float
) -> None:
    """Tokens may choose the same experts: two tokens of two experts each read fewer than four."""
    sizes = ModelSizes.of(tiny_model("experts"))
    assert sizes.experts_per_token * 2 == sizes.expert_count
    weights = sizes.itemsize * (sizes.shared + sizes.head + share * sizes.experts)
    assert sizes.decode(tokens, 0).bytes == pytest.approx(weights + tokens * moved(sizes))
    cache = tokens * sizes.kv_bytes + sizes.state_bytes
    assert sizes.prefill(1, tokens).bytes == pytest.approx(weights + cache)


def test_a_dense_model_has_no_states() -> None:
    sizes = ModelSizes.of(tiny_model("dense"))
    assert (sizes.state_bytes, sizes.state_size) == (0, 0)


def test_the_floor_is_the_maximum_of_memory_and_compute_time() -> None:
    assert Work(bytes=10, flops=1).seconds(Rates(2, 2)) == 5
    assert Work(bytes=1, flops=10).seconds(Rates(2, 2)) == 5


def test_rates_are_measured_on_the_given_device() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.bytes_per_second < 1e13
    assert 1e8 < rates.flops_per_second < 1e14


# -- capacity -----------------------------------------------------------------------------------


def capacity(sizes: ModelSizes, budget: int, **how: Any) -> Any:
    config = geometry_config("granite-4.0-h-1b")
    geometry = CacheGeometry.from_config(config, page_size=128, dtype=torch.bfloat16)
    return paged_capacity(geometry, sizes, budget, longest=4096, seed=0, **how)


def test_pages_hold_more_ragged_sequences_than_padding(one_b: ModelSizes) -> None:
    budget = 70 * 10**9
    paged, padded = capacity(one_b, budget), padded_capacity(one_b, budget, longest=4096)
    # a sequence has 56.6 MB of states and 33.6 MB of K and V; paging halves the latter
    assert 1.15 < paged.sequences / padded.sequences < 1.3
    assert max(paged.bytes, padded.bytes) <= budget


def test_capacity_leaves_less_than_one_sequence_unused(one_b: ModelSizes) -> None:
    budget = 10**10
    longest = 4096 * one_b.kv_bytes + one_b.state_bytes
    assert budget - longest < capacity(one_b, budget).bytes <= budget
    assert budget - longest < padded_capacity(one_b, budget, longest=4096).bytes <= budget


def test_a_budget_below_one_sequence_holds_none(one_b: ModelSizes) -> None:
    assert capacity(one_b, 10**6).sequences == 0
    assert padded_capacity(one_b, 10**6, longest=4096).sequences == 0


def test_rates_are_medians_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: twenty rounds at first, then four new ones each time."""
    found = iter(float(n) for n in range(1, 1000))
    monkeypatch.setattr(session, "measure_rates", lambda *args: Rates(next(found), next(found)))
    watched: Any = session.Session.__new__(session.Session)
    watched.clock = SimpleNamespace(device=None)
    watched.model = SimpleNamespace(dtype=None)
    watched._rounds = deque(maxlen=session.ROUNDS)
    watched.measure_rates()
    assert watched.rates == Rates(20.0, 21.0)  # of 1, 3, ... 39 and of 2, 4, ... 40
    watched.measure_rates()
    assert watched.rates == Rates(28.0, 29.0)
    assert len(watched._rounds) == 20
