"""Visits and suites on the CPU: what is timed, in which order, and what a loss does to it."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged.bench import session as session_module
from granite_paged.bench import suites
from granite_paged.bench.calibration import bound_of
from granite_paged.bench.cases import CASES, Shape
from granite_paged.bench.judge import Gated, Seen
from granite_paged.bench.measure import Clock, Prepared
from granite_paged.bench.session import Measured, Session
from granite_paged.bench.suites import sleep_of, worsened
from granite_paged.bench.visits import (
    FEWEST,
    STEPS,
    Subject,
    look_at,
    ready_subjects,
    shapes_for,
    subject_of,
)
from granite_paged.geometry import PagedConfig
from granite_paged.models import LoadedModel
from granite_paged.report.bench_results import CalibratedShape, Calibration
from tests.helpers.tiny_models import tiny_model

CLOCK = Clock(torch.device("cpu"))
GATE, SERVED = Gated("decode", Shape(1, 8)), Gated("serve", Shape(1, 8))


def subject(log: list[str], name: str, seconds: float = 0.0) -> Subject:
    def step() -> None:
        log.append(name)
        time.sleep(seconds)

    return Subject(Prepared(step, lambda: log.append("reset")), Measured(), CLOCK, steps=2)


def test_visits_of_the_modes_take_turns() -> None:
    log: list[str] = []
    both = {mode: subject(log, mode) for mode in ("paged", "default")}
    seen = Seen()
    look_at(GATE, both, seen, 3)
    assert [len(part) for part in (seen.times, seen.paged, seen.default)] == [3, 3, 3]
    one_visit = ["default", "reset"] * 2 + ["paged", "reset"] * 4
    assert log == 3 * one_visit


def test_only_the_record_needs_the_devices_time() -> None:
    log: list[str] = []
    seen = Seen()
    look_at(GATE, {"paged": subject(log, "paged")}, seen, 3, whole=False)
    assert (len(seen.times), len(seen.paged)) == (3, 0)
    assert log.count("paged") == 6


def test_the_engines_whole_time_is_compared() -> None:
    seen = Seen()
    look_at(SERVED, {"paged": subject([], "paged", 1e-3)}, seen, 2, whole=False)
    assert seen.times == seen.paged
    assert min(seen.times) >= 1e-3


def test_a_shape_for_memory_is_not_visited() -> None:
    log: list[str] = []
    look_at(Gated("context", Shape(1, 8), time=False), {"paged": subject(log, "x")}, Seen(), 3)
    assert log == []


def test_a_second_look_replaces_the_first() -> None:
    seen, both = Seen(), {mode: subject([], mode) for mode in ("paged", "default")}
    look_at(GATE, both, seen, 2)
    look_at(GATE, both, seen, 4)
    assert [len(part) for part in (seen.times, seen.paged, seen.default)] == [4, 4, 4]


def test_a_failing_mode_leaves_unequal_visits_and_its_reason() -> None:
    calls: list[str] = []

    def failing() -> Any:
        calls.append("step")
        if len(calls) > 2:
            raise torch.OutOfMemoryError("3 GB")

    bad = Subject(Prepared(failing), Measured(), CLOCK, steps=2)
    seen = Seen()
    look_at(GATE, {"default": bad, "paged": subject([], "paged")}, seen, 3)
    assert (len(seen.default), len(seen.paged)) == (1, 3)
    assert seen.errors == {"default": "OutOfMemoryError: 3 GB"}


def test_a_step_is_reset_after_its_peak_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen here: the next step opened its sequences a second time, and ran out of pages."""
    log: list[str] = []
    session = Session(LoadedModel("tiny", tiny_model(), None), PagedConfig())
    step = Prepared(lambda: log.append("step"), lambda: log.append("reset"))
    monkeypatch.setattr(session, "_prepared", lambda *given: step)
    monkeypatch.setattr(Clock, "peak", lambda clock, step: step() and None)
    session.ready(CASES["batch"], Shape(1, 8), "paged", Measured())
    assert log == ["step", "reset"] * (len(log) // 2)


@pytest.mark.parametrize("own", [False, True], ids=["the current stream", "a stream of its own"])
def test_every_step_counts_one_workspace(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen here: of steps on one stream, only the first one's peak had its 34 MB."""
    weights, workspace, mine = 500, 50, 7
    held = {"weights": weights, "current": workspace}

    def prepare(kind: Any, shape: Shape, mode: str) -> Prepared:
        held[mode] = mine
        if own:
            held["own"] = workspace  # allocated once
        return Prepared(lambda: None, own_workspace=own)

    monkeypatch.setattr(session_module, "level_workspaces", lambda device: workspace)
    monkeypatch.setattr(Clock, "allocated", lambda clock: sum(held.values()))
    monkeypatch.setattr(Clock, "peak", lambda clock, step: sum(held.values()))
    session = Session(LoadedModel("tiny", tiny_model(), None), PagedConfig())
    monkeypatch.setattr(session, "_prepared", prepare)
    for turn in range(2):
        for number in range(3):
            found = Measured()
            step = session.ready(CASES["batch"], Shape(1, 8), f"{turn}.{number}", found)
            assert found.peak_bytes == weights + workspace + mine
            subject = Subject(step, found, session.clock)
            assert subject.peak(session.weights, workspace) == found.peak_bytes
        held = {"weights": weights, "current": workspace}
        session.level_workspaces()


@pytest.mark.parametrize(
    ("longest", "contexts"), [(512, [8, 512]), (513, [8, 512, 512]), (8, [8]), (7, [])]
)
def test_shapes_beyond_the_models_limit_are_left_out(longest: int, contexts: list[int]) -> None:
    config = SimpleNamespace(max_position_embeddings=longest)
    session: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    shapes = (SERVED, Gated("batch", Shape(1, 512)), Gated("decode", Shape(1, 512)))
    assert [gated.shape.context for gated in shapes_for(session, shapes)] == contexts


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 40), (1e-4, 40), (0.02, 7), (0.2, 2)])
def test_a_visit_lasts_150_ms_in_2_to_40_steps(
    seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "seconds", lambda clock, step: step() or seconds)
    looked = subject([], "paged", seconds)
    looked.look()
    assert looked.steps == steps
    assert seconds <= looked.host < 60


def test_the_device_sleeps_for_twice_the_hosts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2 GHz, more than any GPU has; a subject that was not looked at does not sleep."""
    cycles: list[int] = []

    def kernel_seconds(clock: Clock, step: Any, flush: Any, sleep: int) -> float:
        cycles.append(sleep)
        return 0.5

    monkeypatch.setattr(Clock, "kernel_seconds", kernel_seconds)
    fresh = subject([], "paged")
    assert fresh.on_device() == 0.5
    fresh.host = 2.0
    fresh.on_device()
    assert cycles == [0, 0, 8 * 10**9, 8 * 10**9]


@pytest.mark.parametrize(("own", "expected"), [(False, 750), (True, 700)])
def test_a_peak_counts_nothing_that_others_hold(own: bool, expected: int) -> None:
    """900 at the peak, of which 200 are neither weights nor held by the step itself."""
    log: list[str] = []
    clock: Any = SimpleNamespace(allocated=lambda: 1000, peak=lambda step: step() or 900)
    prepared = Prepared(lambda: log.append("step"), lambda: log.append("reset"), own_workspace=own)
    measured = Measured(held=300)
    assert Subject(prepared, measured, clock).peak(weights=500, workspace=50) == expected
    assert log == ["step", "reset"]
    clock.peak = lambda step: None
    assert Subject(prepared, measured, clock).peak(500, 50) is None


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """Return a session that prepares steps of 3 modes, and the log of what they do.

    A mode's step fails if `broken` names it, and its preparation if `refused` does.
    """
    log: list[str] = []
    session: Any = SimpleNamespace(
        clock=CLOCK, broken="", refused="", level_workspaces=lambda: None
    )

    def ready(case: Any, shape: Shape, mode: str, measured: Measured) -> Prepared:
        def step() -> None:
            if mode == session.broken:
                raise torch.OutOfMemoryError("3 GB")
            log.append(mode)

        if mode == session.refused:
            raise torch.OutOfMemoryError("5 GB")
        measured.peak_bytes = len(mode)
        return Prepared(step, close=lambda: log.append(f"close {mode}"))

    session.ready = ready
    return session, log


def test_a_subject_whose_time_counts_is_looked_at(prepared: Any) -> None:
    session, log = prepared
    assert subject_of(session, GATE, "paged").steps == STEPS
    assert log == ["paged"] * (1 + FEWEST)
    log.clear()
    assert subject_of(session, replace(GATE, time=False), "paged").steps == FEWEST
    assert log == []


def test_a_subject_that_fails_is_released(prepared: Any) -> None:
    session, log = prepared
    session.broken = "paged"
    with pytest.raises(torch.OutOfMemoryError):
        subject_of(session, GATE, "paged")
    assert log == ["close paged"]


@pytest.mark.parametrize("default", [True, False])
def test_default_is_prepared_where_a_shape_is_compared_with_it(
    prepared: Any, default: bool
) -> None:
    session, log = prepared
    with ready_subjects(session, replace(GATE, default=default)) as (subjects, seen):
        modes = ["paged", "default"] if default else ["paged"]
        assert list(subjects) == modes
        assert seen.peaks == {mode: len(mode) for mode in modes}
        log.clear()
    assert log == [f"close {mode}" for mode in modes]
    assert seen.errors == {}


def test_a_mode_that_cannot_be_prepared_leaves_the_other_and_its_reason(prepared: Any) -> None:
    session, _ = prepared
    session.refused = "default"
    with ready_subjects(session, GATE) as (subjects, seen):
        assert list(subjects) == list(seen.peaks) == ["paged"]
    assert seen.errors == {"default": "OutOfMemoryError: 5 GB"}


def test_a_worsened_step_takes_longer_and_holds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    real = torch.empty

    def empty(size: int, **options: Any) -> Any:
        held.append(size)
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    calls: list[str] = []
    slow = worsened(lambda: calls.append("step"), CLOCK, 0.01, 1000)
    assert CLOCK.seconds(slow) >= 0.01
    assert (calls, held) == (["step"], [1000])
    assert CLOCK.seconds(sleep_of(CLOCK, 0.0)) < 0.01


@pytest.mark.parametrize(
    ("noises", "counts"),
    [([0.0], [5]), ([0.3, 0.0], [5, 10]), ([0.3] * 9, [5, 10, 20])],
    ids=["quiet", "noisy once", "noisy"],
)
@pytest.mark.parametrize("gated", [GATE, SERVED])
def test_a_suite_repeats_visits_that_scatter_as_the_gate_does(
    gated: Gated, noises: list[float], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on a GPU: a slower step counted as missed, which the gate would have measured again."""
    session = Session(LoadedModel("tiny", tiny_model(), None), PagedConfig())
    asked, left = list[int](), list(noises)

    def look(gated: Gated, subjects: Any, seen: Seen, visits: int, *, whole: bool) -> None:
        asked.append(visits)
        noise = left.pop(0)
        seen.times = [(1 + noise) ** number for number in range(visits)]

    monkeypatch.setattr(suites, "look_at", look)
    suite = suites.measure_suite(session, {gated: subject([], "paged")})
    assert asked == counts
    assert len(suite[gated].times) == counts[-1]


def test_a_suite_looks_once_at_a_shape_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(LoadedModel("tiny", tiny_model(), None), PagedConfig())
    asked: list[int] = []
    monkeypatch.setattr(suites, "look_at", lambda *given, whole: asked.append(given[3]))
    suites.measure_suite(session, {replace(GATE, time=False): subject([], "paged")})
    assert asked == [5]


@pytest.mark.parametrize("gated", [GATE, SERVED])
def test_teeth_add_the_loss_that_the_gate_must_see(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[tuple[float, int]] = []
    session: Any = SimpleNamespace(clock=CLOCK)
    slow = subject([], "paged")
    slow.measured.peak_bytes = 2000
    for name in ("whole", "on_device"):
        monkeypatch.setattr(Subject, name, lambda self: 2.0)
    monkeypatch.setattr(
        suites, "worsened", lambda step, clock, seconds, more: lost.append((seconds, more))
    )
    suites._worsened(session, gated, slow)
    assert lost == [(pytest.approx(2.0 * (gated.seen - 1)), 30)]
    lost.clear()
    suites._worsened(session, replace(gated, time=False), slow)
    assert lost == [(0.0, 30)]


def test_another_session_keeps_the_larger_peak_and_all_clocks() -> None:
    first = CalibratedShape("decode", 1, 8, [[1.0]], peak_bytes=9, clock_mhz=[1500, 1700])
    second = CalibratedShape("decode", 1, 8, [[2.0]], peak_bytes=7, clock_mhz=[1600, 1980])
    other = replace(first, batch=2)
    joined = suites._joined(second, Calibration(16, "auto", 5, [other, first]))
    assert joined == replace(second, sessions=[[1.0], [2.0]], peak_bytes=9, clock_mhz=[1500, 1980])
    assert suites._joined(second, Calibration(16, "auto", 5, [other])) == second


@pytest.mark.parametrize(
    ("sessions", "wanted", "missing"),
    [
        ([], 5, 5),
        ([2], 5, 4),
        ([1], 5, 5),
        ([5], 5, 0),
        ([2, 2, 1], 5, 3),
        ([3, 3], 20, 14),
        ([10, 9], 20, 1),
        ([20], 5, 0),
    ],
)
def test_a_resumed_calibration_runs_the_suites_that_a_bound_needs(
    sessions: list[int], wanted: int, missing: int
) -> None:
    """Each session costs a degree of freedom: two and three suites would leave only three."""
    shape = CalibratedShape("decode", 1, 8, [[1.0] * suites for suites in sessions])
    earlier = Calibration(16, "auto", 5, [shape])
    assert suites.missing_suites(earlier, wanted) == missing
    counts = [*sessions, missing] if missing else sessions
    assert bound_of([[1.0] * suites for suites in counts], 1) is not None


def test_a_calibration_that_was_not_begun_lacks_every_suite() -> None:
    assert suites.missing_suites(None, 5) == 5
