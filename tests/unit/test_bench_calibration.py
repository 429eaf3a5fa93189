"""Bounds from a calibration: identical code passes, and a loss of five per cent does not."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.bench.calibration import (
    ALARMS,
    HOSTS,
    LEAST,
    LEAST_DOF,
    MISSES,
    Alarms,
    Bound,
    bound_of,
    false_alarms,
)
from granite_paged.bench.judge import GATED, SEEN, judge_time, suite_time
from granite_paged.bench.visits import STEPS, VISITS
from granite_paged.quantiles import student_t_quantile
from granite_paged.report.bench_results import CalibratedShape
from tests.helpers.noise import DECODE_8, DECODE_32, PREFILL_8, VISITS_STRAY, Noise

SHAPES = (DECODE_8, DECODE_32, PREFILL_8) * 3
HOSTS_STRAY = 0.003
"""Standard deviation of a shape's time over floor from one session to the next."""


def session(draw: random.Random) -> list[float]:
    """Return how far each shape is off in one session."""
    return [math.exp(draw.gauss(0, HOSTS_STRAY)) for _ in SHAPES]


def suite(draw: random.Random, offsets: Sequence[float], loss: float = 1.0) -> list[list[float]]:
    """Return the visits of each shape in one suite, where the usual time is 1."""
    return [
        [loss * offset * noise.visit(draw, STEPS) for _ in range(VISITS)]
        for noise, offset in zip(SHAPES, offsets, strict=True)
    ]


def calibrated(draw: random.Random, *sizes: int) -> list[Bound]:
    """Return each shape's bound, from one session for each size."""
    suites = []
    for size in sizes:
        offsets = session(draw)
        times = [[suite_time(visits) for visits in suite(draw, offsets)] for _ in range(size)]
        suites.append(times)
    by_shape = [[[one[k] for one in times] for times in suites] for k in range(len(SHAPES))]
    bounds = [bound_of(sessions, len(SHAPES)) for sessions in by_shape]
    assert None not in bounds
    return [bound for bound in bounds if bound]


def verdicts(bounds: Sequence[Bound], measured: Sequence[list[float]]) -> list[str]:
    return [judge_time(v, 1.0, b, SEEN) for v, b in zip(measured, bounds, strict=True)]


def test_nine_shapes_are_compared_in_time() -> None:
    assert len(SHAPES) == sum(gated.time for gated in GATED)


@pytest.mark.parametrize(("noise", "spread"), VISITS_STRAY.items())
def test_the_generated_noise_strays_as_measured(noise: Noise, spread: float) -> None:
    draw = random.Random(0)
    assert stdev(noise.visit(draw) for _ in range(500)) == pytest.approx(spread, rel=0.2)


def test_one_suite_of_100_is_red_on_identical_code_at_most() -> None:
    red = 0
    for seed in range(5):
        draw = random.Random(seed)
        bounds = calibrated(draw, 20, 5)
        red += sum("failed" in verdicts(bounds, suite(draw, session(draw))) for _ in range(20))
    assert red <= 1, red


def test_five_per_cent_slower_passes_in_no_shape_of_50_suites() -> None:
    found: list[str] = []
    for seed in range(5):
        draw = random.Random(seed)
        bounds = calibrated(draw, 20, 5)
        for _ in range(10):
            found += verdicts(bounds, suite(draw, session(draw), 1.05))
    assert found.count("passed") == 0
    assert found.count("failed") >= 0.98 * len(found)


def test_a_calibration_of_25_suites_sees_five_per_cent() -> None:
    for seed in range(5):
        assert max(bound.sees for bound in calibrated(random.Random(seed), 20, 5)) <= SEEN - 1


# -- the derivation -----------------------------------------------------------------------------


def test_a_bound_is_the_t_quantile_of_the_difference_of_means() -> None:
    suites = [2.0 * math.exp(0.01 * x) for x in (-1, 1, -1, 1, -1, 1)]
    bound = bound_of([suites], checks=9)
    assert bound is not None
    spread = 0.01 * math.sqrt(6 / 5) * math.sqrt(1 + 1 / 6)
    assert bound.base == pytest.approx(2.0)
    assert bound.spread == pytest.approx(spread)
    assert bound.noise == pytest.approx(math.expm1(spread * student_t_quantile(1 - 0.01 / 9, 5)))
    seen = (1 + bound.allowed) * 1.01 * math.exp(spread * student_t_quantile(0.99, 5)) - 1
    assert bound.allowed == pytest.approx((1 + bound.noise) * 1.01 - 1)
    assert bound.sees == pytest.approx(seen)


@pytest.mark.parametrize(("apart", "hosts"), [(1.0, HOSTS), (1.015, HOSTS), (1.06, 0.0296)])
def test_sessions_that_differ_by_more_widen_the_bound(apart: float, hosts: float) -> None:
    bound = bound_of([[1.0, 1.001] * 5, [apart, 1.001 * apart]], 9)
    assert bound is not None
    assert bound.hosts == pytest.approx(hosts, abs=1e-4)
    assert bound.base == pytest.approx(math.sqrt(apart), rel=1e-3)  # sessions weigh the same


def test_a_quiet_calibration_still_allows_two_per_cent() -> None:
    bound = bound_of([[1.0] * 10], 9)
    assert bound is not None
    assert (bound.noise, bound.allowed) == (0.0, LEAST)


@pytest.mark.parametrize("sessions", [[], [[]], [[1.0] * LEAST_DOF], [[1.0] * 3, [1.0] * 2]])
def test_too_few_suites_give_no_bound(sessions: list[list[float]]) -> None:
    assert bound_of(sessions, 9) is None


def test_the_rates_are_as_stated() -> None:
    assert (ALARMS, MISSES, HOSTS, LEAST) == (0.01, 0.01, 0.01, 0.02)


ratios = st.lists(st.floats(0.5, 2), min_size=6, max_size=12)


@given(ratios, st.floats(0.1, 10))
def test_a_slower_device_scales_the_base_only(suites: list[float], factor: float) -> None:
    bound, scaled = bound_of([suites], 9), bound_of([[factor * x for x in suites]], 9)
    assert bound is not None
    assert scaled is not None
    assert scaled.base == pytest.approx(factor * bound.base)
    assert scaled.noise == pytest.approx(bound.noise, abs=1e-6)


@given(ratios)
def test_more_checks_never_narrow_a_bound(suites: list[float]) -> None:
    few, many = bound_of([suites], 1), bound_of([suites], 20)
    assert few is not None
    assert many is not None
    assert few.noise <= many.noise


@pytest.mark.parametrize(
    ("part", "dof", "value"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.99, 4, 3.747),
        (0.999, 5, 5.893),
        (0.9995, 24, 3.745),
        (0.999, 120, 3.160),
    ],
)
def test_quantiles_of_student_agree_with_tables(part: float, dof: int, value: float) -> None:
    assert student_t_quantile(part, dof) == pytest.approx(value, abs=6e-4)


# -- false alarms -------------------------------------------------------------------------------


def shape(*sessions: list[float]) -> CalibratedShape:
    return CalibratedShape("decode", 8, 512, [*sessions])


def test_suites_are_judged_by_the_others() -> None:
    quiet = [1.0, 1.001, 0.999, 1.0, 1.001, 0.999, 1.0]
    assert false_alarms([shape(quiet), shape(quiet)]) == Alarms(7, 0)
    one_slow = [*quiet[:-1], 1.2]
    assert false_alarms([shape(quiet), shape(one_slow)]) == Alarms(7, 1)
    assert false_alarms([shape(one_slow), shape(quiet)]) == Alarms(7, 1)


def test_a_suite_at_its_bound_is_no_alarm() -> None:
    assert false_alarms([shape([1.0] * 6 + [1 + LEAST])]) == Alarms(7, 0)
    assert false_alarms([shape([1.0] * 6 + [1.001 + LEAST])]) == Alarms(7, 1)


def test_a_shape_that_was_added_later_limits_the_count_to_its_own_session() -> None:
    """Its sessions are the last ones of the others: they are compared with the same suites."""
    quiet = [1.0, 1.001, 0.999, 1.0, 1.001, 0.999, 1.0]
    slow = [1.2, *quiet[1:]]
    assert false_alarms([shape(quiet, quiet), shape(quiet)]) == Alarms(7, 0)
    assert false_alarms([shape(quiet), shape(slow, quiet)]) == Alarms(7, 0)
    assert false_alarms([shape(quiet, quiet), shape(slow)]) == Alarms(7, 1)
    assert false_alarms([shape(quiet, quiet), shape(quiet[:6])]) == Alarms(6, 0)


def test_suites_without_a_bound_are_not_counted() -> None:
    assert false_alarms([shape([1.0] * 5)]) == Alarms(0, 0)
    assert false_alarms([]) == Alarms(0, 0)


@pytest.mark.parametrize(
    ("suites", "red", "rate"), [(25, 0, 0.113), (100, 0, 0.0295), (25, 1, 0.176), (5, 5, 1.0)]
)
def test_the_rate_has_its_upper_confidence_limit(suites: int, red: int, rate: float) -> None:
    assert Alarms(suites, red).at_most == pytest.approx(rate, abs=1e-3)
