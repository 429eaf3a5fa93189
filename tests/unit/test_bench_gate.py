"""The gate's verdicts on synthetic visits: real regressions fail, and noise does not."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.bench import gate, judge, records
from granite_paged.bench.calibration import Bound, bound_of
from granite_paged.bench.cases import Shape
from granite_paged.bench.gate import judged
from granite_paged.bench.judge import (
    ENGINE_SEEN,
    GATED,
    LAW_SEEN,
    LEAST_BYTES,
    LEAST_SECONDS,
    SEEN,
    Against,
    Check,
    Gated,
    Interval,
    Seen,
    checks_of,
    judge_bytes,
    judge_ratio,
    judge_time,
    limit_of,
    scattered,
    suite_time,
    visit_ratio,
)
from granite_paged.bench.suites import teeth
from granite_paged.bench.visits import TRIES, VISITS
from granite_paged.errors import CannotJudge, ResultFileError
from granite_paged.geometry import PagedConfig
from granite_paged.report.bench_results import (
    CalibratedShape,
    Calibration,
    Result,
    read_result,
    record_name,
)
from granite_paged.report.published import Published, PublishedRow

RECORDS = Path(gate.__file__).parents[1] / "records"
GATE = Gated("decode", Shape(1, 512))
DEFAULT, RATIO = 0.075, 0.03  # seconds of a step of default; time of paged relative to it
FLOOR = 0.001  # seconds
GIGABYTE = 10**9

SLOWER = "not slower than default"
LARGER = "not more memory than default"
TIME_RECORD = "time as recorded"
MEMORY_RECORD = "memory as recorded"
ALL = (SLOWER, LARGER, TIME_RECORD, MEMORY_RECORD)


def visits(draw: random.Random, mean: float, noise: float, count: int = VISITS) -> list[float]:
    """Draw the median times of visits."""
    return [mean * math.exp(draw.gauss(0, noise)) for _ in range(count)]


def seen(
    *,
    loss: float = 1.0,
    memory: float = 1.0,
    noise: float = 0.003,
    seed: int = 0,
    count: int = VISITS,
) -> Seen:
    """Return what a suite sees of a paged step that is slower and larger by these factors."""
    draw, usual = random.Random(seed), RATIO * DEFAULT
    return Seen(
        times=visits(draw, loss * usual, noise, count),
        paged=visits(draw, loss * usual, noise, count),
        default=visits(draw, DEFAULT, noise, count),
        peaks={"paged": int(memory * 3 * GIGABYTE), "default": 4 * GIGABYTE},
    )


def calibrated(**changes: Any) -> CalibratedShape:
    draw = random.Random(9)
    ratios = visits(draw, RATIO * DEFAULT / FLOOR, 0.002, 20)
    whole = CalibratedShape(
        *GATE.place, sessions=[ratios], floor_ms=1e3 * FLOOR, peak_bytes=3 * GIGABYTE
    )
    return replace(whole, **changes)


def calibration(*shapes: CalibratedShape) -> Calibration:
    return Calibration(128, "auto", VISITS, list(shapes))


def record(**changes: Any) -> Against:
    return Against(calibration(calibrated(**changes)))


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.law: check.verdict for check in checks}


def red(found: Seen, against: Against, floor: float | None = FLOOR) -> list[str]:
    """Return the laws that did not pass."""
    checks = verdicts(checks_of(GATE, found, against, floor))
    return [law for law, verdict in checks.items() if verdict != "passed"]


# -- at the boundaries --------------------------------------------------------------------------


def test_a_run_like_the_record_passes_every_check() -> None:
    found = verdicts(checks_of(GATE, seen(), record(), FLOOR))
    assert found == dict.fromkeys(ALL, "passed")


@pytest.mark.parametrize("seed", range(20))
def test_five_per_cent_slower_fails_only_against_the_record(seed: int) -> None:
    assert red(seen(loss=1.05, seed=seed), record()) == [TIME_RECORD]
    assert red(seen(seed=seed), record()) == []


@pytest.mark.parametrize(("loss", "verdict"), [(1.04, "failed"), (1.01, "passed")])
def test_four_per_cent_slower_than_default_fails(loss: float, verdict: str) -> None:
    for seed in range(20):
        near = seen(loss=loss / RATIO, noise=0.001, seed=seed)
        assert verdicts(checks_of(GATE, near, Against(), FLOOR))[SLOWER] == verdict


@pytest.mark.parametrize(("memory", "laws"), [(1.015, [MEMORY_RECORD]), (1.009, [])])
def test_one_and_a_half_per_cent_more_memory_fails(memory: float, laws: list[str]) -> None:
    assert red(seen(memory=memory), record()) == laws


def test_memory_of_default_times_1_015_fails() -> None:
    assert red(seen(memory=1.015 * 4 / 3), Against()) == [LARGER]
    assert red(seen(memory=1.009 * 4 / 3), Against()) == []


def test_memory_is_reported_in_gigabytes() -> None:
    found = replace(seen(), peaks={"paged": 10**15, "default": 2 * 10**15})
    (check,) = [c for c in checks_of(GATE, found, Against(), FLOOR) if c.law == LARGER]
    assert (check.found, check.bound) == ("1000000.0000 GB", "1.01 x 2000000.0000 GB")


def test_a_microsecond_is_never_a_loss() -> None:
    bound = bound_of([[1.0] * 10], 9)
    assert bound is not None
    floor = 1e-5
    assert judge_time([floor + 1e-6] * VISITS, floor, bound, SEEN) == "passed"
    assert judge_time([floor + 1.2 * LEAST_SECONDS] * VISITS, floor, bound, SEEN) == "failed"


def test_a_block_of_the_allocator_is_never_a_loss() -> None:
    assert judge_bytes(10**6 + LEAST_BYTES, 10**6) == "passed"
    assert judge_bytes(10**6 + LEAST_BYTES + 1, 10**6) == "failed"
    assert judge_bytes(int(1.015 * GIGABYTE), GIGABYTE) == "failed"


def test_a_study_without_the_shape_judges_nothing() -> None:
    empty = Published("a study", "NVIDIA A100 80GB", ["granite-4.0-h-1b"], [], [])
    assert red(seen(loss=1.04), Against(published=(empty,))) == []
    assert set(verdicts(checks_of(GATE, seen(), Against(published=(empty,)), FLOOR))) == {
        SLOWER,
        LARGER,
    }


@pytest.mark.parametrize(("ours", "theirs"), [(5, 4), (4, 5), (0, 5), (5, 0), (2, 2)])
def test_unequal_or_too_few_visits_are_unmeasurable(ours: int, theirs: int) -> None:
    found = visit_ratio([1.0] * ours, [2.0] * theirs)
    assert (found.low, found.high) == (0.0, math.inf)
    assert judge_ratio(found, base=1.0, seen=LAW_SEEN) == "unmeasurable"
    few = replace(seen(), paged=[1.0] * ours, default=[2.0] * theirs)
    assert SLOWER in red(few, Against())


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan, math.inf])
def test_times_that_no_clock_measures_are_unmeasurable(time: float) -> None:
    good = [1.0] * VISITS
    for pair in ((good, [time, *good[1:]]), ([time, *good[1:]], good)):
        assert judge_ratio(visit_ratio(*pair), base=1.0, seen=LAW_SEEN) == "unmeasurable"
    assert (
        judge_time([time, *good[1:]], FLOOR, Bound(1.0, 0.01, 0.02, 0.01, 0.03), SEEN)
        == "unmeasurable"
    )


def test_a_swapped_comparison_fails() -> None:
    """Found and allowed have their own columns: the sides are not interchangeable."""
    ours, theirs = seen(loss=1.2 / RATIO), seen()
    (check, *_) = checks_of(GATE, replace(theirs, paged=ours.paged), Against(), FLOOR)
    swapped = replace(theirs, paged=theirs.default, default=ours.paged)
    (back, *_) = checks_of(GATE, swapped, Against(), FLOOR)
    assert (check.verdict, back.verdict) == ("failed", "passed")
    assert float(check.found.split()[0]) == pytest.approx(1.2, rel=0.01)
    assert check.bound == "< 1.0250"
    for loss, slower in ((1.0, False), (1.05, True)):
        found = checks_of(GATE, seen(loss=loss), record(), FLOOR)
        (time,) = [check for check in found if check.law == TIME_RECORD]
        assert (float(time.found) > float(time.bound.removeprefix("<= "))) == slower


@pytest.mark.parametrize(
    ("low", "estimate", "high", "verdict"),
    [
        (1.030, 1.035, 1.040, "failed"),
        (1.010, 1.015, 1.020, "passed"),
        (1.015, 1.020, 1.035, "passed"),  # across the limit and narrow: the estimate decides
        (1.015, 1.030, 1.035, "failed"),
        (1.015, 1.020, 1.0397, "passed"),
        (1.015, 1.020, 1.0398, "unmeasurable"),  # wider than 1.05 / 1.025
        (1.02, 1.02, 1.02 * LAW_SEEN / limit_of(LAW_SEEN), "passed"),  # as wide
        (1.025, 1.03, 1.06, "unmeasurable"),  # from the limit, and wide
        (0.9, 1.0, 1.025, "unmeasurable"),  # to the limit, and wide
        (1.02, 1.025, 1.03, "failed"),  # the limit itself
    ],
)
@pytest.mark.parametrize("base", [1.0, 2.0])
def test_an_interval_is_judged_by_its_place_and_width(
    base: float, low: float, estimate: float, high: float, verdict: str
) -> None:
    interval = Interval(base * estimate, base * low, base * high)
    assert judge_ratio(interval, base=base, seen=LAW_SEEN) == verdict


# -- noise --------------------------------------------------------------------------------------


def test_one_disturbed_visit_changes_no_verdict() -> None:
    found = seen(noise=0.001)
    disturbed = replace(found, times=[*found.times[:-1], 1.02 * found.times[-1]])
    assert red(disturbed, record()) == []


def test_a_suites_time_is_the_median_of_its_visits_and_of_the_host_the_shortest() -> None:
    assert suite_time([1.0, 9.0, 2.0]) == 2.0
    assert suite_time([2.0, 9.0, 1.0], on_device=False) == 1.0


def test_the_false_alarms_of_a_suite_are_shared_by_its_time_checks() -> None:
    assert Against().checks == sum(gated.time for gated in GATED) == 9
    draw = random.Random(3)
    sessions = [visits(draw, RATIO * DEFAULT / FLOOR, 0.004, 20)]
    limits = []
    for checks in (1, 9):
        against = replace(record(sessions=sessions), checks=checks)
        found = {check.law: check.bound for check in checks_of(GATE, seen(), against, FLOOR)}
        limits.append(float(found[TIME_RECORD].removeprefix("<= ")))
    assert limits[0] < limits[1]


def test_visits_that_scatter_are_unmeasurable() -> None:
    assert scattered([1.0, 1.05, 0.95, 1.08, 1.0], SEEN)
    assert not scattered([1.0, 1.01, 0.99, 1.01, 1.0], SEEN)
    assert scattered([1.0], SEEN)
    assert not scattered([1.0, 1.0], SEEN)
    assert not scattered([1.0, 1.0], 1.0), "whatever must be seen"
    assert TIME_RECORD in red(seen(noise=0.08), record())


def test_visits_of_the_host_scatter_when_the_two_shortest_are_half_way_apart() -> None:
    limit = judge.limit_of(ENGINE_SEEN)
    for second, verdict in ((limit, False), (math.nextafter(limit, 2), True)):
        assert scattered([9.0, second, 1.0], ENGINE_SEEN, on_device=False) == verdict
    assert scattered([1.0], ENGINE_SEEN, on_device=False)
    assert scattered([0.0, 1.0, 1.0], ENGINE_SEEN, on_device=False)


def test_a_busy_host_makes_no_engine_slower() -> None:
    """Seen on a GPU: of 20 suites of the same code, one was red because its host was busy."""
    bound, busy = Bound(1.0, 0.01, 0.04, 0.01, 0.08), [1.3, 1.0, 1.2, 1.01, 1.4]
    assert judge_time(busy, 1.0, bound, ENGINE_SEEN, on_device=False) == "passed"
    assert judge_time(busy, 1.0, bound, ENGINE_SEEN) == "unmeasurable", "on the device"
    slower = [ENGINE_SEEN * visit for visit in busy]
    assert judge_time(slower, 1.0, bound, ENGINE_SEEN, on_device=False) == "failed"
    engine = replace(GATE, case="serve", seen=ENGINE_SEEN)
    for gated, verdict in ((GATE, "unmeasurable"), (engine, "passed")):
        against = Against(calibration(calibrated(case=gated.case)))
        found = seen()
        scale = found.times[0]
        checks = checks_of(gated, replace(found, times=[scale * v for v in busy]), against, FLOOR)
        assert verdicts(checks)[TIME_RECORD] == verdict


def test_visits_scatter_when_two_standard_errors_reach_half_way() -> None:
    """Four visits at plus and minus s: the median's standard error is 0.7236 s."""
    half_way = math.log(1.025) / 2 / 0.7236
    for factor, verdict in ((0.98, False), (1.02, True)):
        up, down = math.exp(factor * half_way), math.exp(-factor * half_way)
        assert scattered([up, down, up, down], SEEN) == verdict


def test_the_interval_is_students_with_one_degree_of_freedom_less_than_visits() -> None:
    found = visit_ratio([math.exp(-0.01), 1.0, math.exp(0.01)], [1.0] * 3)
    reach = 22.327 * 0.01 / math.sqrt(3)  # 0.999 quantile of Student's t with 2 degrees of freedom
    assert math.log(found.high) == pytest.approx(reach, rel=1e-3)
    assert math.log(found.low) == pytest.approx(-reach, rel=1e-3)


def test_a_calibration_that_cannot_see_the_loss_is_not_green() -> None:
    draw = random.Random(1)
    noisy = record(sessions=[visits(draw, RATIO * DEFAULT / FLOOR, 0.02, 20)])
    checks = checks_of(GATE, seen(), noisy, FLOOR)
    (check,) = [check for check in checks if check.verdict != "passed"]
    assert (check.law, check.found) == (TIME_RECORD, "not compared")
    assert "hides slowdowns below" in check.bound


def test_a_calibration_that_just_sees_the_loss_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "bound_of", lambda *given: Bound(RATIO * 75, 0.01, 0.0, 0.0, 0.25))
    for loss, compared in ((1.25, True), (1.125, False)):
        checks = checks_of(replace(GATE, seen=loss), seen(), record(), FLOOR)
        (time,) = [check for check in checks if check.law == TIME_RECORD]
        assert (time.found != "not compared") == compared


def test_an_excess_of_exactly_the_bound_passes() -> None:
    bound = Bound(base=1.0, spread=0.01, noise=1.0, hosts=0.0, sees=0.03)
    assert judge_time([2.0] * VISITS, 1.0, bound, SEEN) == "passed"
    assert judge_time([math.nextafter(2.0, 3)] * VISITS, 1.0, bound, SEEN) == "failed"


def test_a_mode_without_a_peak_is_not_compared_in_memory() -> None:
    for peaks in ({"default": GIGABYTE}, {"paged": GIGABYTE}):
        found = replace(seen(), peaks=peaks)
        assert LARGER not in verdicts(checks_of(GATE, found, Against(), FLOOR))


def test_an_excess_of_a_block_of_the_allocator_passes() -> None:
    assert LEAST_BYTES == 2 << 20, "bytes of a block of PyTorch's allocator"


def test_the_records_were_made_with_as_many_visits_as_the_gate_makes() -> None:
    made = [read_result(path).calibration for path in RECORDS.glob("*.json")]
    assert {calibration.visits for calibration in made if calibration} == {VISITS}


@pytest.mark.parametrize("host", [0.4, 1.0, 3.0])
def test_the_speed_of_the_host_changes_no_verdict(host: float) -> None:
    for loss, laws in ((1.0, []), (1.05, [TIME_RECORD])):
        found = seen(loss=loss)
        slow = replace(found, default=[host * time for time in found.default])
        assert red(slow, record()) == laws


def test_a_device_is_compared_with_its_own_floor() -> None:
    assert red(seen(loss=1.2), record(), 1.2 * FLOOR) == []


# -- properties ---------------------------------------------------------------------------------

seconds = st.floats(1e-6, 1e2)
samples = st.lists(st.tuples(seconds, seconds), min_size=3, max_size=30).map(
    lambda both: tuple(map(list, zip(*both, strict=True)))
)


@given(samples)
def test_the_estimate_lies_in_its_interval(times: tuple[list[float], list[float]]) -> None:
    found = visit_ratio(*times)
    assert found.low <= found.estimate * (1 + 1e-9)
    assert found.estimate <= found.high * (1 + 1e-9)


@given(samples)
def test_swapping_the_sides_inverts_the_interval(times: tuple[list[float], list[float]]) -> None:
    there, back = visit_ratio(*times), visit_ratio(*reversed(times))
    assert there.estimate * back.estimate == pytest.approx(1)
    if there.low > 1e-300 and there.high < 1e300:
        assert there.low * back.high == pytest.approx(1)


@given(samples, st.floats(1.01, 10), st.floats(0.1, 10))
def test_slower_times_never_improve_a_verdict(
    times: tuple[list[float], list[float]], factor: float, limit: float
) -> None:
    ours, theirs = times
    worst = {"passed": 0, "unmeasurable": 1, "failed": 2}
    before, after = (
        worst[judge_ratio(visit_ratio(o, theirs), base=limit, seen=SEEN)]
        for o in (ours, [factor * t for t in ours])
    )
    assert after >= before


@given(st.integers(1, 2**40), st.integers(1, 2**40), st.integers(0, 2**40))
def test_more_memory_never_improves_a_verdict(bound: int, ours: int, more: int) -> None:
    if judge_bytes(ours, bound) == "failed":
        assert judge_bytes(ours + more, bound) == "failed"


@given(st.floats(0.5, 2), st.floats(1, 1.5), st.floats(0, 1))
def test_passed_excludes_the_loss_and_failed_excludes_no_change(
    low: float, width: float, place: float
) -> None:
    interval = Interval(low * width**place, low, low * width)
    verdict = judge_ratio(interval, base=1, seen=SEEN)
    assert verdict != "passed" or interval.high < SEEN
    assert verdict != "failed" or interval.low > 1


def test_the_interval_has_its_nominal_coverage() -> None:
    draw = random.Random(6)
    inside = 0
    for _ in range(500):
        found = visit_ratio(visits(draw, RATIO, 0.05), visits(draw, 1.0, 0.05))
        inside += found.low <= RATIO <= found.high
    assert inside >= 0.99 * 500, inside


# -- what the record lacks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("against", "laws", "lack"),
    [
        (record(batch=99), [TIME_RECORD, MEMORY_RECORD], "its calibration has no such shape"),
        (record(sessions=[]), [TIME_RECORD], "too few suites were calibrated"),
        (record(sessions=[[2.25] * 3]), [TIME_RECORD], "too few suites were calibrated"),
        (record(sessions=[[2.25] * 9 + [0.0]]), [TIME_RECORD], "no floor"),
        (record(floor_ms=None), [TIME_RECORD], "no floor"),
        (record(floor_ms=0.0), [TIME_RECORD], "no floor"),
        (record(peak_bytes=None), [MEMORY_RECORD], "no peak memory"),
    ],
)
def test_what_the_record_lacks_fails_by_name(against: Against, laws: list[str], lack: str) -> None:
    checks = [c for c in checks_of(GATE, seen(), against, FLOOR) if c.verdict != "passed"]
    assert [check.law for check in checks] == laws
    assert {(check.found, check.verdict) for check in checks} == {("not compared", "failed")}
    assert {check.bound for check in checks} == {f"record: {lack}"}


@pytest.mark.parametrize("floor", [None, 0.0])
def test_without_a_floor_of_this_device_the_time_check_fails(floor: float | None) -> None:
    assert red(seen(), record(), floor) == [TIME_RECORD]


def test_a_shape_without_visits_is_not_green() -> None:
    assert TIME_RECORD in red(replace(seen(), times=[]), record())


def test_a_shape_for_memory_needs_no_time() -> None:
    peak = replace(GATE, time=False, default=False)
    found = Seen(peaks={"paged": 3 * GIGABYTE})
    checks = checks_of(peak, found, record(sessions=[]), FLOOR)
    assert verdicts(checks) == {MEMORY_RECORD: "passed"}


def test_the_record_is_compared_also_where_default_ran_out_of_memory() -> None:
    found = replace(seen(loss=2), errors={"default": "OutOfMemoryError: 3 GB"})
    checks = verdicts(checks_of(GATE, found, record(), FLOOR))
    assert checks == {SLOWER: "passed", TIME_RECORD: "failed", MEMORY_RECORD: "passed"}


def test_without_a_record_only_the_laws_are_applied() -> None:
    found = verdicts(checks_of(GATE, seen(loss=5, memory=1.2), Against(), FLOOR))
    assert found == {SLOWER: "passed", LARGER: "passed"}


def test_a_paged_failure_fails_the_gate() -> None:
    broken = replace(seen(), errors={"paged": "RuntimeError: no kernel"})
    (check,) = checks_of(GATE, broken, record(), FLOOR)
    assert (check.verdict, check.found) == ("failed", "RuntimeError: no kernel")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [("OutOfMemoryError: 3 GB", "passed"), ("RuntimeError: no kernel", "unmeasurable")],
)
def test_only_out_of_memory_of_default_counts_as_passed(error: str, verdict: str) -> None:
    (check,) = checks_of(GATE, replace(seen(), errors={"default": error}), Against(), FLOOR)
    assert check.verdict == verdict
    assert error in check.found


def published(ms: float, gigabytes: float) -> Published:
    row = PublishedRow(GATE.case, "paged", *GATE.shape[:2], ms_per_query=ms, peak_gb=gigabytes)
    return Published("a study", "NVIDIA A100 80GB", ["granite-4.0-h-1b"], [row], [])


@pytest.mark.parametrize(
    ("ms", "gigabytes", "expected"),
    [(3, 3.1, ["passed", "passed"]), (2, 3.1, ["failed", "passed"]), (3, 2, ["passed", "failed"])],
)
def test_a_published_figure_is_an_absolute_ceiling(
    ms: float, gigabytes: float, expected: list[str]
) -> None:
    checks = checks_of(GATE, seen(), Against(None, (published(ms, gigabytes),)), FLOOR)
    assert [c.verdict for c in checks if c.law == "below the published figure"] == expected


def test_a_published_figure_counts_a_query_of_the_batch() -> None:
    eight = Gated("batch", Shape(8, 512), default=False)
    row = PublishedRow("batch", "paged", 8, 512, ms_per_query=2.0, peak_gb=1.0)
    study = Published("a study", "NVIDIA A100 80GB", ["granite-4.0-h-1b"], [row], [])
    for seconds, peak, expected in (
        (0.016, 1_010_000_000, ["passed", "passed"]),
        (0.01601, 1_010_000_001, ["failed", "failed"]),
    ):
        found = Seen(paged=[seconds, seconds, 9.0], peaks={"paged": peak})
        checks = checks_of(eight, found, Against(None, (study,)), None)
        assert [check.verdict for check in checks] == expected
        assert [check.bound for check in checks] == ["<= 2 ms", "1.01 x 1.0000 GB"]
        assert [check.found.split()[0] for check in checks] == [f"{125 * seconds:.2f}", "1.0100"]


def test_gated_shapes_are_those_that_are_promised() -> None:
    assert {(*gated.place, gated.time, gated.default, gated.seen) for gated in GATED} == {
        *(("batch", batch, 512, True, True, 1.05) for batch in (8, 32)),
        *(("context", 1, context, True, True, 1.05) for context in (512, 4096)),
        ("context", 1, 131072, False, False, 1.05),  # the peak of a prompt of 128 Ki tokens
        *(("decode", batch, 512, True, True, 1.05) for batch in (1, 8, 32, 128)),
        ("serve", 64, 96, True, False, 1.10),
    }
    assert [gated.case for gated in GATED if not gated.on_device] == ["serve"]


# -- repeating ----------------------------------------------------------------------------------


class FakeSession:
    """Returns visits with the given noise levels, one try after the other."""

    name, device_name = "granite-4.0-h-1b", "NVIDIA H200"
    config = PagedConfig()

    class clock:  # noqa: N801
        device, gpu = None, True

    def __init__(self, *noises: float) -> None:
        self.noises = list(noises)
        self.visits: list[int] = []

    def measure_rates(self) -> None:
        pass

    def floor(self, case: Any, shape: Any) -> float:
        return FLOOR

    def result(self, rows: Any) -> Result:
        now = {"torch": "2.14", "triton": "3.6", "python": "3.12"}
        return Result(self.device_name, now, 0, rows, model=self.name, dtype="bfloat16")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    """Replace all that measures: the session's noises become the visits."""
    fake = FakeSession()
    peaks: dict[str, int | None] = {"paged": 3 * GIGABYTE, "default": 4 * GIGABYTE}

    @contextlib.contextmanager
    def ready_subjects(session: Any, gated: Gated) -> Iterator[tuple[dict[str, Any], Seen]]:
        yield {}, Seen(peaks=peaks)

    def look_at(gated: Gated, subjects: Any, found: Seen, count: int) -> None:
        fake.visits.append(count)
        drawn = seen(noise=fake.noises.pop(0), seed=7, count=count)
        found.times, found.paged, found.default = drawn.times, drawn.paged, drawn.default

    monkeypatch.setattr(gate, "refuse_where_blind", lambda session: None)
    monkeypatch.setattr(gate, "ready_subjects", ready_subjects)
    monkeypatch.setattr(gate, "look_at", look_at)
    return fake


def test_noisy_visits_are_measured_again_with_twice_as_many(session: Any) -> None:
    session.noises = [0.3, 0.3, 0.003]
    checks = judged(session, GATE, record())
    assert session.visits == [VISITS, 2 * VISITS, 4 * VISITS]
    assert {check.verdict for check in checks} == {"passed"}


def test_persistent_noise_is_unmeasurable_after_three_tries(session: Any) -> None:
    session.noises = [0.5] * 9
    checks = judged(session, GATE, record())
    assert len(session.visits) == TRIES == 3
    assert verdicts(checks)[TIME_RECORD] == "unmeasurable"


def test_a_clear_verdict_is_not_measured_again(session: Any) -> None:
    session.noises = [0.003]
    judged(session, GATE, record())
    assert session.visits == [VISITS]


def test_a_failed_check_is_not_measured_away(session: Any) -> None:
    """In the first try memory fails while noise leaves the time open; the second would pass."""
    session.noises = [0.3, 0.003, 0.003]
    found = verdicts(judged(session, GATE, record(peak_bytes=2 * GIGABYTE)))
    assert found[MEMORY_RECORD] == "failed"
    assert found[TIME_RECORD] == "unmeasurable"


# -- the record of a folder ---------------------------------------------------------------------


def written(folder: Path, session: Any, **changes: Any) -> Path:
    """Write the record of this session's GPU, model and dtype after these changes."""
    usual = replace(session.result([]), calibration=calibration(calibrated()))
    path = folder / record_name(usual.device, usual.model, usual.dtype)
    path.write_text(json.dumps(replace(usual, **changes).to_json()))
    return path


def report_with(folder: Path, session: Any, **changes: Any) -> gate.GateReport:
    written(folder, session, **changes)
    session.noises = [0.003]
    return gate.gate(session, records.against_records(folder, session, ()), [GATE])


def test_a_record_of_this_device_model_and_kernels_is_compared(
    tmp_path: Path, session: Any
) -> None:
    versions = {"torch": "2.14", "triton": "3.6", "python": "3.11"}
    report = report_with(tmp_path, session, versions=versions)
    assert (report.passed, report.record) == (True, "recorded")
    assert TIME_RECORD in verdicts(report.checks)


SHIPPED = [path for path in RECORDS.glob("*.json") if ".published." not in path.name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_record_has_the_gates_contract(path: Path) -> None:
    """No machine without its GPU compares with it, so a wrong one would refuse users only."""
    found, ours = read_result(path), PagedConfig()
    assert record_name(found.device, found.model, found.dtype) == path.name
    assert set(records.DEPENDS_ON) <= set(found.versions)
    if found.calibration is None:
        return
    made = (found.calibration.page_size, found.calibration.backend, found.calibration.visits)
    if made != (ours.page_size, ours.backend, VISITS):
        pytest.fail(
            f"{path} was recorded with (page size, backend, visits) {made}, and the gate measures "
            f"with {(ours.page_size, ours.backend, VISITS)}. If those are intended, record again "
            "with `nox -s perf_record`; a record is never edited by hand",
            pytrace=False,
        )


@pytest.mark.parametrize(
    "model", ["granite-4.0-h-1b (random weights, seed 3)", "ibm/granite-4.0-h-1b"]
)
def test_a_record_of_the_same_model_with_other_weights_is_compared(
    model: str, tmp_path: Path, session: Any
) -> None:
    assert report_with(tmp_path, session, model=model).record == "recorded"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"device": "NVIDIA A100"}, "device NVIDIA A100 (here NVIDIA H200)"),
        ({"model": "granite-4.0-h-tiny"}, "model granite-4.0-h-tiny (here granite-4.0-h-1b)"),
        ({"dtype": "float32"}, "dtype float32 (here bfloat16)"),
        ({"versions": {"torch": "2.9"}}, "torch 2.9 (here 2.14)"),
        ({"versions": {"triton": "3.5"}}, "triton 3.5 (here 3.6)"),
        ({"versions": {"torch": "2.14"}}, "triton missing (here 3.6)"),
        ({"versions": {}}, "torch missing (here 2.14), triton missing (here 3.6)"),
        ({"calibration": Calibration(64, "auto", VISITS, [])}, "page size 64 (here 128)"),
        ({"calibration": Calibration(128, "eager", VISITS, [])}, "backend eager (here auto)"),
        ({"calibration": Calibration(128, "auto", 99, [])}, "visits per suite 99"),
    ],
)
def test_a_record_of_another_contract_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path, session: Any
) -> None:
    with pytest.raises(CannotJudge) as refused:
        report_with(tmp_path, session, **changes)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_record_without_a_calibration_is_refused(tmp_path: Path, session: Any) -> None:
    with pytest.raises(CannotJudge, match=r"no calibration.*--calibrate 20"):
        report_with(tmp_path, session, calibration=None)


def test_an_unreadable_record_is_refused(tmp_path: Path, session: Any) -> None:
    written(tmp_path, session).write_text("{")
    with pytest.raises(ResultFileError, match="is not JSON"):
        records.against_records(tmp_path, session, ())


@pytest.mark.parametrize("part", ["nvidia-h200", "granite-4.0-h-1b", "bfloat16"])
def test_a_record_of_something_else_is_not_found(part: str, tmp_path: Path, session: Any) -> None:
    path = written(tmp_path, session)
    here = path.name
    assert part in here
    path.rename(path.with_name(here.replace(part, "other")))
    against = records.against_records(tmp_path, session, ())
    assert against.calibration is None
    assert here in against.unused


def test_a_gate_with_an_incomplete_record_is_not_called_recorded(
    tmp_path: Path, session: Any
) -> None:
    report = report_with(tmp_path, session, calibration=calibration())
    assert (report.passed, report.record) == (False, "incomplete record")


@pytest.mark.parametrize("shapes", [[], [Gated("serve", Shape(64, 96), default=False)]])
def test_a_run_without_any_check_is_refused(shapes: list[Gated], session: Any) -> None:
    """Seen with a model whose longest context is shorter than every shape but the engine's."""
    session.noises = [0.003]
    with pytest.raises(CannotJudge, match=r"nothing was judged: perf/x\.json does not exist$"):
        gate.gate(session, Against(unused="perf/x.json does not exist"), shapes)


def test_a_model_that_allows_no_gated_shape_is_refused(session: Any) -> None:
    with pytest.raises(CannotJudge, match="the model allows none of them"):
        gate.gate(session, record(), [])
    with pytest.raises(CannotJudge, match="allows none of the gated shapes"):
        teeth(session, record(), 2, [])


def test_records_of_the_package_are_named_after_what_they_hold() -> None:
    folder = Path(gate.__file__).parents[1] / "records"
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        held = read_result(path)
        assert path.name == record_name(held.device, held.model, held.dtype)


# -- refusing -----------------------------------------------------------------------------------


class Blind:
    """The part of a session that `refuse_where_blind` reads."""

    class clock:  # noqa: N801
        gpu = True

    model, config = None, None


def test_a_runner_without_kernels_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        fallback = "no Triton: plain PyTorch"
        closed = False

        def close(self) -> None:
            self.closed = True

    runner, blind = Slow(), Blind()
    monkeypatch.setattr(gate, "make_runner", lambda model, config: runner)
    shapes: list[Shape] = []
    monkeypatch.setattr(gate, "config_for", lambda config, shape: shapes.append(shape))
    with pytest.raises(CannotJudge, match="no Triton"):
        gate.refuse_where_blind(blind)  # type: ignore[arg-type]
    assert shapes == [Shape(1, 1)], "the smallest runner"
    assert runner.closed


def test_a_cpu_is_not_judged() -> None:
    blind: Any = Blind()
    blind.clock = type("clock", (), {"gpu": False})
    with pytest.raises(CannotJudge, match="CUDA device"):
        gate.gate(blind, Against(), GATED)
