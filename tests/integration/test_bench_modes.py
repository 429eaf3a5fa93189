"""Each mode prepares the right step on a live model, and releases its memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from granite_paged.bench import modes
from granite_paged.bench import session as sessions
from granite_paged.bench.cases import CASES, Shape
from granite_paged.bench.conditions import Reading
from granite_paged.bench.kernel import KernelCase, KernelTimes
from granite_paged.bench.measure import Repeats, Samples
from granite_paged.bench.modes import Default, Paged, Static, config_for, prefill_calls, token_ids
from granite_paged.bench.session import (
    BenchPlan,
    Session,
    first_steps,
    make_plan,
    missing_from,
    run,
)
from granite_paged.errors import InvalidArgument, Unsupported
from granite_paged.geometry import PagedConfig
from granite_paged.hf.compat import CACHE, with_cache
from granite_paged.layers.mamba import REPLAYED
from granite_paged.models import LoadedModel
from granite_paged.report.bench_results import updated
from granite_paged.runner.shapes import Shapes
from tests.helpers import recording_runner
from tests.helpers.tiny_models import FLAVOURS, tiny_model

CONFIG = PagedConfig(page_size=16)


@pytest.fixture
def runner() -> Iterator[Any]:
    with recording_runner.installed() as fake:
        yield fake


def seen_by_model(model: Any) -> list[tuple[tuple[int, ...], int]]:
    """Record (shape of input_ids, tokens already cached) of every forward pass from now on."""
    seen: list[tuple[tuple[int, ...], int]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        before = int(kwargs[CACHE].get_seq_length(layer_idx=1))
        seen.append((tuple(args[0].shape), before))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


# -- transformers -------------------------------------------------------------------------------


def test_default_prefills_into_a_new_cache_each_time() -> None:
    model = tiny_model()
    seen = seen_by_model(model)
    prepared = Default(model, 0).prepare("prefill", Shape(2, 40))
    assert prepared.step().shape == (2, 1, model.config.vocab_size)
    prepared.step()
    assert seen == [((2, 40), 0), ((2, 40), 0)]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_default_decodes_at_the_same_context_every_time(flavour: str) -> None:
    model = tiny_model(flavour)
    prepared = Default(model, 0).prepare("decode", Shape(2, 200))
    seen = seen_by_model(model)
    for _ in range(3):
        assert prepared.step().shape == (2,)
        prepared.reset()
    assert seen == [((2, 1), 200)] * 3
    assert prepared.note == "cache: 64 tokens, repeated"


def test_a_short_context_is_run_as_it_is() -> None:
    model = tiny_model()
    prepared = Default(model, 3).prepare("decode", Shape(2, 40))
    cache, ids = DynamicCache(config=model.config), token_ids(model, 2, 40, 3)
    with torch.no_grad():
        model(ids, **with_cache(cache))
        expected = model(ids[:, :1], **with_cache(cache)).logits[:, -1].argmax(-1)
    assert prepared.step().tolist() == expected.tolist()
    assert prepared.note == ""


def test_static_gives_the_tokens_of_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = tiny_model()
    default = Default(model, 0).prepare("decode", Shape(2, 100)).step().tolist()
    prepared = Static(model, 0).prepare("decode", Shape(2, 100))
    seen = seen_by_model(model)
    assert prepared.step().tolist() == default
    prepared.reset()
    prepared.step()
    assert [int(before) for _, before in seen] == [100, 100]
    prepared.release()


def test_static_prefills_an_empty_cache_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = tiny_model()
    default = Default(model, 0).prepare("prefill", Shape(2, 40)).step()[:, -1].argmax(-1)
    prepared = Static(model, 0).prepare("prefill", Shape(2, 40))
    seen = seen_by_model(model)
    for _ in range(2):
        assert prepared.step().tolist() == default.tolist()
        prepared.reset()
    assert [(shape, int(before)) for shape, before in seen] == [((2, 40), 0)] * 2
    prepared.release()


def test_a_released_step_holds_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Any] = []
    real = modes.DynamicCache

    def watched(**options: Any) -> Any:
        cache = real(**options)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(modes, "DynamicCache", watched)
    prepared = Default(tiny_model(), 0).prepare("decode", Shape(1, 20))
    prepared.step()
    prepared.release()
    gc.collect()
    assert [cache() for cache in caches] == [None]


# -- paged --------------------------------------------------------------------------------------


def test_paged_prefills_every_token_of_every_row_once(runner: Any) -> None:
    prepared = Paged(tiny_model(), CONFIG, 0).prepare("prefill", Shape(3, 150))
    prepared.step()
    (made,) = runner.made
    assert made.lengths == [0, 150, 150, 150]
    prepared.reset()
    prepared.step()  # the recording runner refuses chunks that do not start at the end of their row
    assert made.lengths == [0, 150, 150, 150]


def test_paged_decodes_at_the_end_of_every_context(runner: Any) -> None:
    prepared = Paged(tiny_model(), CONFIG, 0).prepare("decode", Shape(3, 150))
    for _ in range(REPLAYED):  # the recording runner refuses a context with an unwritten page
        prepared.step()
    (made,) = runner.made
    steps = [call[1] for call in made.calls if call[0] == "decode"]
    assert steps[:2] == [([1, 2, 3], [150, 151, 152]), ([1, 2, 3], [151, 152, 153])]
    for row in range(3):  # so every row stores its states as often as in an answer
        assert {positions[row] for _, positions in steps} == set(range(150, 150 + REPLAYED))
    assert prepared.note == "cache: 64 tokens, repeated"


def test_the_pool_is_as_large_as_the_shape_needs(runner: Any) -> None:
    Paged(tiny_model(), CONFIG, 0).prepare("decode", Shape(3, 150))
    (made,) = runner.made
    assert made.rows == 3
    assert made.pages == 3 * 10 + 1  # 158 tokens fill ten pages of 16


def test_a_released_runner_is_closed(runner: Any) -> None:
    prepared = Paged(tiny_model(), CONFIG, 0).prepare("prefill", Shape(1, 20))
    prepared.release()
    assert runner.made[0].closed


def test_a_runner_that_refuses_a_shape_is_closed(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "shapes", Shapes(10, 8, captured=False))
    with pytest.raises(Unsupported, match="a chunk of 20 tokens"):
        Paged(tiny_model(), CONFIG, 0).prepare("prefill", Shape(1, 20))
    assert runner.made[0].closed


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_prefill_calls_hold_every_prompt_in_order(lengths: list[int]) -> None:
    with recording_runner.installed() as fake:
        made = fake.for_model(tiny_model(), config_for(CONFIG, Shape(len(lengths), 300)))
        calls = prefill_calls(made, [list(range(length)) for length in lengths])
    tokens: dict[int, list[int]] = {row: [] for row in range(1, len(lengths) + 1)}
    for chunks in calls:
        assert made.shapes.fits([len(chunk.tokens) for chunk in chunks])
        assert len({chunk.row for chunk in chunks}) == len(chunks)
        for row, start, part in chunks:
            assert start == len(tokens[row])
            tokens[row] += part
    assert [len(part) for part in tokens.values()] == lengths
    assert all(part == list(range(len(part))) for part in tokens.values())


# -- kernel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(3, 100), Shape(3, 100, 5)])
def test_paged_and_sdpa_kernels_agree(shape: Shape) -> None:
    case = KernelCase(tiny_model(), CONFIG, shape, 0, torch.device("cpu"))
    torch.testing.assert_close(case.paged(), case.sdpa(), rtol=1e-4, atol=1e-5)
    assert case.padded_by_mask == (shape.shortest is not None)
    if not case.padded_by_mask:
        torch.testing.assert_close(case.paged(), case.grouped_sdpa(), rtol=1e-4, atol=1e-5)
    assert case.kv_bytes == sum(shape.lengths()) * 2 * 2 * 8 * 4  # K and V, 2 heads of 8, float32


@pytest.mark.parametrize(("folded", "grouped"), [(2.0, 3.0), (3.0, 2.0), (2.0, None)])
def test_sdpa_time_is_the_faster_variant(folded: float, grouped: float | None) -> None:
    ways = (Samples([folded]), Samples([grouped] if grouped else []))
    assert KernelTimes(Samples(), *ways, 0).sdpa.seconds == [2.0]


# -- a session ----------------------------------------------------------------------------------

FEW = Repeats(seconds=0, least=2, most=2)


def session(**how: Any) -> Session:
    return Session(LoadedModel("tiny", tiny_model(), None), CONFIG, repeats=FEW, **how)


def rows_of(plan: BenchPlan, on: Session) -> list[Any]:
    return list(run(on, plan))


def test_every_mode_gets_a_complete_row(runner: Any) -> None:
    plan = BenchPlan([(CASES["batch"], Shape(2, 32))], ())
    rows = rows_of(plan, session())
    assert [(row.mode, row.batch, row.context) for row in rows] == [
        ("default", 2, 32),
        ("paged", 2, 32),
    ]
    for row in rows:
        assert row.error == ""
        assert row.latency_ms.n == 2
        assert row.tokens_per_second == pytest.approx(64e3 / row.latency_ms.median)
        assert row.floor_ms > 0
        assert row.peak_bytes is None
    assert [row.mamba for row in rows] == ["reference code", ""]


def test_a_row_holds_clock_and_load(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "read_conditions", lambda device: Reading(1755, 0.9))
    rows = rows_of(BenchPlan([(CASES["batch"], Shape(2, 32))], ()), session())
    assert [(row.clock_mhz, row.busy) for row in rows] == [(1755, 0.9)] * 2


def test_the_serve_case_gives_a_row_of_both_modes() -> None:
    on = session()
    rows = rows_of(BenchPlan([(CASES["serve"], Shape(2, 6))], ()), on)
    assert [(row.mode, row.batch, row.context, row.error) for row in rows] == [
        ("default", 2, 6, ""),
        ("paged", 2, 6, ""),
    ]
    for row in rows:
        assert row.tokens_per_second == pytest.approx(4e3 / row.latency_ms.median)
        assert row.floor_ms > 0


def test_rows_with_mamba_kernels_of_packages_stand_beside_those_without(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BenchPlan([(CASES["batch"], Shape(2, 32))], ("default",))
    on = session()
    without = on.result(rows_of(plan, on))
    monkeypatch.setattr(sessions, "mamba_kernels", lambda: "mamba_ssm 2.3.0")
    known = {**without.versions, "mamba_ssm": "2.3.0"}
    monkeypatch.setattr(sessions, "versions", lambda: known)
    with_kernels = on.result(rows_of(plan, on))
    both = updated(without, with_kernels)
    assert [(row.variant, row.mamba) for row in both.rows] == [
        ("", "reference code"),
        ("mamba_ssm", "mamba_ssm 2.3.0"),
    ]
    assert updated(both, with_kernels).rows == both.rows


def test_only_missing_shapes_are_left_to_measure(runner: Any) -> None:
    on = session()
    shapes = [(CASES["batch"], Shape(n, 16)) for n in (1, 2)] + [(CASES["kernel"], Shape(2, 32, 8))]
    plan = BenchPlan(shapes, ("default", "paged"))
    first = rows_of(BenchPlan(shapes[:1], ("default",)), on)
    assert missing_from(on.result(first), on, plan).shapes == shapes
    first = rows_of(BenchPlan(shapes[:1], ()), on)
    assert missing_from(on.result(first), on, plan).shapes == shapes[1:]
    skipped = rows_of(replace(plan, budget=-1), on)
    assert missing_from(on.result(skipped), on, plan).shapes == shapes
    failed = [replace(row, error="RuntimeError: no kernel") for row in skipped]
    assert missing_from(on.result(failed), on, plan).shapes == []


def test_out_of_memory_is_a_row_with_its_reason(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, chunks: Any) -> Any:
        raise torch.OutOfMemoryError("3 GB asked for")

    monkeypatch.setattr(runner, "prefill", full)
    plan = BenchPlan([(CASES["batch"], Shape(2, 32))], ("default", "paged"))
    default, paged = rows_of(plan, session())
    assert default.error == ""
    assert paged.error == "OutOfMemoryError: 3 GB asked for"
    assert (paged.latency_ms, paged.tokens_per_second) == (None, None)
    assert len(runner.made) == 2, "the failed mode must be tried once more, alone"
    assert all(made.closed for made in runner.made)


def test_a_mode_that_fits_only_alone_is_timed_alone(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = runner.prefill, []

    def full_at_first(self: Any, chunks: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("3 GB asked for")
        return real(self, chunks)

    monkeypatch.setattr(runner, "prefill", full_at_first)
    plan = BenchPlan([(CASES["batch"], Shape(2, 32))], ("default", "paged"))
    paged = rows_of(plan, session())[1]
    assert paged.latency_ms.n == 2
    assert paged.note.startswith("timed alone")


def test_shapes_beyond_the_budget_are_listed(runner: Any) -> None:
    shapes = [(CASES["batch"], Shape(1, 16)), (CASES["kernel"], Shape(2, 32, 8))]
    rows = rows_of(BenchPlan(shapes, ("default", "paged"), budget=-1), session())
    assert [row.key for row in rows] == [
        ("batch", "default", 1, 16, ""),
        ("batch", "paged", 1, 16, ""),
        ("kernel", "paged", 2, 32, "ragged 8-32"),
    ]
    assert {row.error for row in rows} == {"not measured: the budget of -1 s was spent"}


def test_the_kernel_row_has_floor_sdpa_and_paged() -> None:
    (row,) = rows_of(BenchPlan([(CASES["kernel"], Shape(2, 64, 16))], ("paged",)), session())
    assert row.variant == "ragged 16-64"
    assert row.floor_us > 0
    assert row.sdpa_us > 0
    assert row.paged_us == pytest.approx(1e3 * row.latency_ms.median)


def test_memory_rows_count_the_sequences_that_fit(runner: Any) -> None:
    padded, paged = rows_of(
        BenchPlan([(CASES["memory"], Shape(1, 4096, 1))], ("default", "paged")), session()
    )
    assert 0 < padded.batch < paged.batch
    assert max(padded.peak_bytes, paged.peak_bytes) <= 2**30


def test_a_case_without_a_suitable_mode_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="case kernel runs in mode paged only"):
        make_plan(session(), ["kernel"], ["default"])


def test_first_steps_are_one_shape_per_case_and_mode() -> None:
    plan = make_plan(session(), ["decode", "batch", "kernel"], [])
    found = [(case.name, tuple(shape[:2]), mode) for case, shape, mode in first_steps(plan)]
    assert found == [
        ("decode", (1, 64), "default"),
        ("decode", (1, 64), "static"),
        ("decode", (1, 64), "paged"),
        ("batch", (1, 64), "default"),
        ("batch", (1, 64), "paged"),
        ("kernel", (1, 128), "paged"),
    ]
