"""Measuring: modes are interleaved, repeated often enough, and fail independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.bench.measure import (
    Clock,
    Prepared,
    Repeats,
    Samples,
    interleaved,
    reason,
    released,
)
from granite_paged.quantiles import quantile
from tests.helpers.memory_errors import MEMORY_ERRORS


class Ticks(Clock):
    """Counts calls instead of time."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0

    def seconds(self, step: Callable[[], Any]) -> float:
        step()
        self.now += 1
        return float(self.now)


def three_rounds(**steps: Callable[[], Any]) -> dict[str, Samples]:
    prepared = {name: Prepared(step) for name, step in steps.items()}
    return interleaved(prepared, Ticks(), Repeats(least=3, most=3))


def nothing() -> None:
    pass


def test_modes_alternate_and_swap_the_first_place() -> None:
    taken: list[str] = []
    three_rounds(a=lambda: taken.append("a"), b=lambda: taken.append("b"))
    assert "".join(taken) == "abbaab"


def test_times_of_one_round_are_paired() -> None:
    samples = three_rounds(a=nothing, b=nothing)
    assert samples["a"].seconds == [1, 4, 5]
    assert samples["b"].seconds == [2, 3, 6]


@pytest.mark.parametrize("source", MEMORY_ERRORS)
def test_a_gpu_without_memory_has_one_name_and_the_host_keeps_its_own(source: str) -> None:
    """A `default` that runs out of a GPU's memory passes the gate; of the host's, it does not."""
    names = {"cpu": "RuntimeError", "python": "MemoryError"}
    assert reason(MEMORY_ERRORS[source]).split(":")[0] == names.get(source, "OutOfMemoryError")
    assert reason(RuntimeError("no kernel")) == "RuntimeError: no kernel"


def test_a_failing_mode_does_not_stop_the_others() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("tried to allocate 3 GB\nand more")

    samples = three_rounds(a=nothing, b=fail)
    assert samples["b"].error == "OutOfMemoryError: tried to allocate 3 GB"
    assert len(samples["a"].seconds) == 3
    assert len(calls) == 2


def test_a_programming_error_is_not_a_result() -> None:
    def mistake() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        three_rounds(a=mistake)


def test_reset_runs_before_every_repeat() -> None:
    events: list[str] = []
    prepared = Prepared(lambda: events.append("step"), lambda: events.append("reset"))
    interleaved({"a": prepared}, Ticks(), Repeats(least=2, most=2))
    assert events == ["reset", "step"] * 2


# -- how often ----------------------------------------------------------------------------------

counts, times = st.integers(0, 300), st.floats(0, 1000)


@given(counts, times)
def test_ten_repeats_are_made_within_the_time_limit(done: int, elapsed: float) -> None:
    repeats = Repeats()
    if done < 10 and elapsed < repeats.patience:
        assert not repeats.enough(done, elapsed)
    if done < 3:
        assert not repeats.enough(done, math.inf)


@given(counts, times, counts, times)
def test_more_repeats_or_time_are_still_enough(
    done: int, elapsed: float, more: int, longer: float
) -> None:
    repeats = Repeats(patience=2)
    if repeats.enough(done, elapsed) and done >= repeats.least:
        assert repeats.enough(done + more, elapsed + longer)


@pytest.mark.parametrize(
    ("done", "elapsed", "enough"), [(10, 2.9, False), (10, 3.1, True), (200, 0.1, True)]
)
def test_quick_steps_repeat_up_to_a_time_or_count(done: int, elapsed: float, enough: bool) -> None:
    assert Repeats().enough(done, elapsed) is enough


# -- numbers ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantile_equals_torch_quantile(numbers: list[float], part: float) -> None:
    expected = torch.tensor(numbers, dtype=torch.float64).quantile(part).item()
    assert quantile(numbers, part) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_quantile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no numbers"):
        quantile([], 0.5)


def test_latency_is_in_milliseconds() -> None:
    latency = Samples([0.003, 0.001, 0.002]).latency()
    assert (latency.median, latency.n) == (2.0, 3)
    assert latency.p10 == pytest.approx(1.2)
    assert latency.p90 == pytest.approx(2.8)


def test_the_cpu_clock_measures_the_step() -> None:
    clock = Clock(torch.device("cpu"))
    matrix = torch.ones(400, 400)
    few, many = (
        clock.seconds(lambda count=count: [matrix @ matrix for _ in range(count)])
        for count in (1, 200)
    )
    assert 0 < few < many


def test_a_cpu_has_no_peak_memory() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.peak(nothing) is None
    assert clock.allocated() == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [(RuntimeError("a\nb"), "RuntimeError: a"), (MemoryError(), "MemoryError: no message")],
)
def test_a_reason_is_one_line(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_steps_are_released_after_an_interrupt() -> None:
    closed: list[str] = []
    steps = {name: Prepared(nothing, close=lambda n=name: closed.append(n)) for name in "ab"}
    with pytest.raises(KeyboardInterrupt), released(steps, torch.device("cpu")):
        raise KeyboardInterrupt
    assert closed == ["a", "b"]
