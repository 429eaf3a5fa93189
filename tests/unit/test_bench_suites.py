"""Visits and suites on the CPU: what is timed, in which order, and what a loss does to it."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged.bench import suites
from granite_paged.bench.cases import CASES, Shape
from granite_paged.bench.judge import Gated, Seen
from granite_paged.bench.measure import Clock, Prepared
from granite_paged.bench.session import Measured, Session
from granite_paged.bench.suites import sleep_of, worsened
from granite_paged.bench.visits import Subject, look_at, shapes_for
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


@pytest.mark.parametrize(
    ("longest", "contexts"), [(512, [8, 512]), (513, [8, 512, 512]), (8, [8]), (7, [])]
)
def test_shapes_beyond_the_models_limit_are_left_out(longest: int, contexts: list[int]) -> None:
    config = SimpleNamespace(max_position_embeddings=longest)
    session: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    shapes = (SERVED, Gated("batch", Shape(1, 512)), Gated("decode", Shape(1, 512)))
    assert [gated.shape.context for gated in shapes_for(session, shapes)] == contexts


@pytest.mark.parametrize(("seconds", "steps"), [(1e-4, 40), (0.02, 7), (0.2, 2)])
def test_a_visit_lasts_150_ms_in_2_to_40_steps(
    seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "seconds", lambda clock, step: step() or seconds)
    looked = subject([], "paged", seconds)
    looked.look()
    assert looked.steps == steps
    assert looked.host >= seconds


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
