"""Tuning: constants are chosen by worst loss, among those that run, for a model's real calls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GraniteMoeHybridForCausalLM

from granite_paged.bench import kernel, search_space
from granite_paged.bench.measure import Clock
from granite_paged.bench.search_space import (
    SUBJECTS,
    DecodeSteps,
    TuningTarget,
    candidates,
    groups_of,
    product_kinds,
)
from granite_paged.bench.tune import (
    NOISE,
    Group,
    Outcome,
    Trial,
    TunedShape,
    choose,
    losses,
    retuned,
    sweep,
)
from granite_paged.errors import CannotJudge
from granite_paged.geometry import PagedConfig
from granite_paged.layers.triton import tiles
from granite_paged.layers.tuning import TUNED, OneRowConstants, read_tuned
from granite_paged.models import geometry_config
from granite_paged.runner.runner import Runner
from tests.helpers.tiny_models import FLAVOURS, tiny_model

CONFIG = PagedConfig(page_size=16)
HERE = {"device": "a GPU", "torch": "1", "triton": "2"}


def trials(*microseconds: float | None) -> list[Trial]:
    return [Trial({}, time) for time in microseconds]


# -- choosing -----------------------------------------------------------------------------------


def test_a_loss_is_relative_to_the_fastest() -> None:
    assert losses(trials(11, 10, None)) == [pytest.approx(0.1), 0.0, math.inf]


def test_losses_are_infinite_if_nothing_runs() -> None:
    assert losses(trials(None, None)) == [math.inf, math.inf]


def test_the_worst_loss_decides() -> None:
    """The second candidate is far better in one shape, and bad in the other."""
    assert choose([trials(20, 10, 12), trials(10, 14, 11)]) == 2


def test_a_candidate_must_run_in_every_shape() -> None:
    assert choose([trials(20, 10), trials(20, None)]) == 0


@pytest.mark.parametrize(("gain", "chosen"), [(NOISE / 2, 0), (2 * NOISE, 1)])
def test_the_rule_changes_only_for_gains_above_noise(gain: float, chosen: int) -> None:
    assert choose([trials(10 * (1 + gain), 10)]) == chosen


times = st.floats(1, 100)


@given(st.lists(st.lists(times, min_size=4, max_size=4), min_size=1, max_size=4))
def test_the_choice_is_optimal_up_to_noise(shapes: list[list[float]]) -> None:
    lines = [trials(*shape) for shape in shapes]
    worst = [max(losses(line)[i] for line in lines) for i in range(4)]
    assert worst[choose(lines)] <= min(worst) + NOISE


# -- a sweep ------------------------------------------------------------------------------------

RULE = OneRowConstants(gated=False, few_columns=False, COLUMNS=4, warps=4)


def columns_of(constants: Any) -> dict[str, int]:
    return {"COLUMNS": min(4, constants.COLUMNS)}


class Timer:
    """Returns the seconds of a number of columns; numbers that are not listed fail to compile."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.calls: list[int] = []

    def __call__(self, layout: dict[str, int]) -> float:
        self.calls.append(layout["COLUMNS"])
        if layout["COLUMNS"] not in self.seconds:
            raise ValueError("out of shared memory\nat line 3")
        return self.seconds[layout["COLUMNS"]]


def swept(seconds: dict[int, float], columns: tuple[int, ...] = (4, 1, 2)) -> tuple[Outcome, Timer]:
    timer = Timer(seconds)
    shape = TunedShape("a shape", columns_of, lambda: timer)
    group = Group(tuple(replace(RULE, COLUMNS=count) for count in columns), (shape,))
    return sweep(group), timer


def test_a_sweep_times_every_candidate_and_chooses() -> None:
    outcome, timer = swept({1: 3e-6, 2: 1e-6, 4: 2e-6})
    assert timer.calls == [4, 1, 2]
    assert [t.microseconds for t in outcome.trials["a shape"]] == pytest.approx([2, 3, 1])
    assert outcome.candidates[outcome.chosen].COLUMNS == 2
    assert outcome.loss("a shape") == outcome.worst() == pytest.approx(1)
    assert outcome.worst(outcome.chosen) == 0
    assert outcome.best("a shape").layout == {"COLUMNS": 2}


def test_candidates_that_do_not_compile_are_skipped() -> None:
    outcome, _ = swept({1: 1e-6, 4: 2e-6})
    assert outcome.skipped == 1
    assert outcome.trials["a shape"][2].error == "ValueError: out of shared memory"
    assert outcome.candidates[outcome.chosen].COLUMNS == 1


def test_the_constants_in_use_must_run() -> None:
    with pytest.raises(CannotJudge, match=r"in use for a shape do not run here: ValueErr"):
        swept({1: 1e-6})


def test_candidates_with_equal_layouts_are_timed_once() -> None:
    outcome, timer = swept({1: 1e-6, 4: 2e-6}, columns=(4, 8, 16, 1))
    assert timer.calls == [4, 1]
    assert len(outcome.trials["a shape"]) == 4


def test_a_report_lists_every_trial_as_json() -> None:
    outcome, _ = swept({1: 1e-6, 4: 2e-6})
    data = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
    assert (data["rule"]["COLUMNS"], data["chosen"]["COLUMNS"]) == (4, 1)
    assert [trial["microseconds"] for trial in data["shapes"]["a shape"]] == [2, 1, None]


# -- the file -----------------------------------------------------------------------------------


def test_retuning_changes_only_what_was_tried(tmp_path: Path) -> None:
    outcome, _ = swept({1: 3e-6, 2: 1e-6, 4: 2e-6})
    tuned = retuned(TUNED, [outcome], HERE)
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(tuned.to_json()))
    assert read_tuned(path) == tuned
    assert tuned.for_one_row(gated=False, few_columns=False).COLUMNS == 2
    assert (tuned.device, tuned.microseconds) == ("a GPU", {"a shape": 1.0})
    assert (tuned.decode, tuned.prefill, tuned.few_rows) == (
        TUNED.decode,
        TUNED.prefill,
        TUNED.few_rows,
    )
    assert tuned.one_row[1:] == TUNED.one_row[1:]


@pytest.mark.parametrize(("device", "kept"), [("a GPU", True), ("another", False)])
def test_earlier_times_are_kept_for_the_same_device(device: str, kept: bool) -> None:
    outcome, _ = swept({1: 3e-6, 2: 1e-6, 4: 2e-6})
    earlier = replace(TUNED, **{**HERE, "device": device}, microseconds={"another shape": 5.0})
    assert ("another shape" in retuned(earlier, [outcome], HERE).microseconds) is kept


def test_a_new_batch_is_inserted_in_order() -> None:
    new = replace(TUNED.decode[0], batch=4, warps=8)
    outcome = Outcome((new,), {"decode 4": trials(1.0)}, 0)
    decode = retuned(TUNED, [outcome], HERE).decode
    assert [c.batch for c in decode] == sorted([4, *(c.batch for c in TUNED.decode)])


# -- what is tuned ------------------------------------------------------------------------------


def target(**sizes: Any) -> TuningTarget:
    return TuningTarget(tiny_model(**sizes), CONFIG)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SUBJECTS)
def test_groups_start_with_the_rule_and_have_distinct_candidates(name: str, quick: bool) -> None:
    pytest.importorskip("triton")
    for group in SUBJECTS[name](target(), quick):
        rule = group.candidates[0]
        known = {*TUNED.decode, TUNED.prefill, *TUNED.one_row, *TUNED.few_rows}
        assert rule in known or TUNED.for_batch(rule.batch) in known
        assert len(set(group.candidates)) == len(group.candidates) > 1
        assert group.shapes


def test_quick_candidates_keep_warps_and_stages() -> None:
    rule = TUNED.few_rows[0]
    quick = candidates(rule, search_space.FEW_ROWS_CHOICES, quick=True)
    assert {(c.warps, c.stages) for c in quick} == {(rule.warps, rule.stages)}
    assert len(quick) < len(candidates(rule, search_space.FEW_ROWS_CHOICES, quick=False)) / 2


@pytest.mark.parametrize("rows", [1, 32])
def test_a_step_has_three_kinds_of_products(rows: int) -> None:
    pytest.importorskip("triton")
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM._from_config(geometry_config("granite-4.0-h-1b"))
    assert product_kinds(model, rows, 132) == [(False, False), (False, True), (True, True)]


def test_only_a_single_row_uses_the_head() -> None:
    """The head is the one product of this model that has many columns."""
    few_columns = tiles.FEW_COLUMNS
    model = tiny_model("dense")
    widest = max(len(w) for name, w in model.named_parameters() if "proj" in name or "mlp" in name)
    multiprocessors = widest // few_columns + 1
    model.resize_token_embeddings(2 * multiprocessors * few_columns)
    assert product_kinds(model, 1, multiprocessors) == [(False, False), (False, True), (True, True)]
    assert product_kinds(model, 16, multiprocessors) == [(False, True), (True, True)]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_kind_of_model_has_products(flavour: str) -> None:
    pytest.importorskip("triton")
    assert product_kinds(tiny_model(flavour), 16, 1)


def test_earlier_choices_stay_while_later_ones_are_made() -> None:
    pytest.importorskip("triton")
    steps = DecodeSteps(target(), 16)
    first = replace(TUNED.for_few_rows(16, gated=True, few_columns=True), SPLITS=5)
    steps.settle(first)
    steps.settle(replace(TUNED.for_few_rows(16, gated=False, few_columns=True), SPLITS=5))
    assert steps._tuned.for_few_rows(16, gated=True, few_columns=True) == first


def test_a_sweep_reports_its_choice() -> None:
    reported: list[Any] = []
    shape = TunedShape("a shape", columns_of, lambda: Timer({1: 1e-6, 4: 2e-6}))
    sweep(Group((RULE, replace(RULE, COLUMNS=1)), (shape,), settle=reported.append))
    assert reported == [replace(RULE, COLUMNS=1)]


def test_tuning_needs_a_gpu() -> None:
    with pytest.raises(CannotJudge, match="tune needs a CUDA device, and this run has none"):
        groups_of(target())


def test_tuning_needs_working_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TuningTarget, "clock", AGpu())
    with pytest.raises(CannotJudge, match="kernels do not run here: device cpu has no Triton"):
        groups_of(target())


class AGpu:
    gpu = True


# -- timing, as far as a CPU can test it --------------------------------------------------------


def test_calls_of_one_graph_are_timed_together() -> None:
    class Ticks(Clock):
        def seconds(self, step: Any) -> float:
            step()
            return 6.0

    made: list[str] = []
    calls = [lambda name=name: made.append(name) for name in "abc"]
    assert Ticks(torch.device("cpu")).graph_seconds(calls) == 2.0
    assert made[:6] == ["a", "b", "c"] * 2


def test_a_step_is_recaptured_for_each_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(search_space, "STEP_CONTEXT", 20)
    monkeypatch.setattr(search_space, "_STEPS", 2)
    met, decode = [], Runner.decode

    def decoded(runner: Runner, *arguments: Any) -> Any:
        met.append((bool(runner._steps._captured), tiles.tiles(16, 8, 64, False, 1)["SPLITS"]))
        return decode(runner, *arguments)

    monkeypatch.setattr(Runner, "decode", decoded)
    groups = [g for g in SUBJECTS["products"](target(), True) if "step of 16" in g.shapes[0].name]
    (shape,) = groups[0].shapes
    rule = TUNED.for_few_rows(16, gated=False, few_columns=True)
    assert shape.prepare()(shape.layout(replace(rule, SPLITS=1, DEPTH=32))) > 0
    assert met[0] == (False, 1)
    assert shape.prepare()(shape.layout(replace(rule, SPLITS=2, DEPTH=32))) > 0
    assert (False, 2) in met


def test_prefill_attention_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_space, "PREFILL_TOKENS", 24)
    monkeypatch.setattr(search_space, "PREFILL_PASTS", (0, 40))
    (group,) = SUBJECTS["prefill"](target(), False)
    assert [shape.name for shape in group.shapes] == ["prefill 24 of 24", "prefill 24 of 64"]
    for shape in group.shapes:
        assert shape.prepare()(shape.layout(group.candidates[0])) > 0


def test_decode_attention_uses_the_plan_being_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    given = []
    monkeypatch.setattr(search_space, "DECODE_CONTEXTS", {2: (40,)})
    monkeypatch.setattr("granite_paged.layers.attention.multiprocessors", lambda device: 8)
    monkeypatch.setattr(
        kernel, "split_attention", lambda *args, plan, **options: given.append((args[3], plan))
    )
    (group,) = SUBJECTS["decode"](target(), True)
    (shape,) = group.shapes
    layout = shape.layout(group.candidates[0])
    assert shape.prepare()(layout) > 0
    mask, plan = given[0]
    assert plan.splits == layout["splits"] > 1
    assert mask.shape[0] == plan.parts >= 2 * plan.splits
