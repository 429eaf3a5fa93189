"""The benchmark cases have the documented shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.bench.cases import CASES, Shape, chosen_cases, workload_of
from granite_paged.bench.judge import GATED
from granite_paged.bench.search_space import SUBJECTS
from granite_paged.bench.workload import arrivals
from granite_paged.errors import UnknownName
from granite_paged.names import CASE_NAMES, SUBJECT_NAMES


def shapes(case: str) -> set[tuple[int, int]]:
    return {shape[:2] for shape in CASES[case].choose(gpu=True, quick=False)}


def test_batch_case_is_1_to_32_prompts_of_512_tokens() -> None:
    assert shapes("batch") == {(batch, 512) for batch in (1, 2, 4, 8, 16, 32)}


def test_context_case_is_one_prompt_of_128_to_131072_tokens() -> None:
    contexts = {128, 256, 512, 1024, 2048, 4096, 16384, 32768, 131072}
    assert shapes("context") == {(1, context) for context in contexts}


def test_decode_case_is_every_batch_with_every_context() -> None:
    expected = {(b, c) for b in (1, 8, 32, 128) for c in (512, 1024, 4096, 32768)}
    assert shapes("decode") == expected


def test_kernel_case_has_a_ragged_batch() -> None:
    assert Shape(32, 4096, 64) in CASES["kernel"].shapes
    assert {(1, 4096), (8, 32768), (1, 131072)} <= shapes("kernel")


@given(st.integers(1, 50), st.integers(1, 500), st.integers(0, 500))
def test_ragged_lengths_span_shortest_to_context(batch: int, shortest: int, more: int) -> None:
    lengths = Shape(batch, shortest + more, shortest).lengths()
    assert len(lengths) == batch
    assert lengths == sorted(lengths)
    assert lengths[-1] == shortest + more
    assert batch == 1 or lengths[0] == shortest


@pytest.mark.parametrize("case", CASES)
def test_quick_shapes_are_a_subset_and_small_ones_are_small(case: str) -> None:
    assert set(CASES[case].quick) <= set(CASES[case].shapes)
    if case != "memory":  # counted, not run
        assert all(batch * context <= 1024 for batch, context, _ in CASES[case].small)


def test_given_batches_and_contexts_replace_the_default_ones() -> None:
    decode = CASES["decode"]
    chosen = decode.choose(gpu=True, quick=False, contexts=[100])
    assert chosen == [Shape(batch, 100) for batch in (1, 8, 32, 128)]
    chosen = decode.choose(gpu=False, quick=True, batches=[3], contexts=[5, 7])
    assert chosen == [Shape(3, 5), Shape(3, 7)]


def test_chosen_cases_are_all_or_the_named_ones_in_order() -> None:
    assert [case.name for case in chosen_cases([])] == list(CASES)
    assert [case.name for case in chosen_cases(["kernel", "batch", "kernel"])] == [
        "kernel",
        "batch",
    ]


def test_an_unknown_case_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown case 'speed': use one of batch, context"):
        chosen_cases(["speed"])


def test_the_command_line_knows_every_case_and_subject() -> None:
    assert tuple(CASES) == CASE_NAMES
    assert tuple(SUBJECTS) == SUBJECT_NAMES


def test_every_gated_shape_is_benchmarked() -> None:
    missing = [gated for gated in GATED if gated.shape not in CASES[gated.case].shapes]
    assert missing == []


def test_static_compiles_prefill_only_where_it_is_named() -> None:
    for name in ("batch", "context", "serve"):
        assert CASES[name].able() == ["default", "paged"]
        assert CASES[name].able(["static", "paged"]) == ["static", "paged"]
    assert CASES["decode"].able() == ["default", "static", "paged"]


@pytest.mark.parametrize("shape", [*CASES["serve"].shapes, *CASES["serve"].small, Shape(1, 3)])
def test_a_served_request_has_at_most_the_shapes_tokens(shape: Shape) -> None:
    workload = workload_of(shape)
    assert workload.requests == shape.batch
    assert workload.longest == shape.context
    coming = arrivals(workload, 100, seed=0)
    new = sum(arrival.new_tokens for arrival in coming)
    assert new == pytest.approx(workload.expected_new, rel=0.2)
