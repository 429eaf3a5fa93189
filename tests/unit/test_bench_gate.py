"""The gate's verdicts on synthetic samples: real regressions fail, and noise does not."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.bench import gate
from granite_paged.bench.cases import CASES, Shape
from granite_paged.bench.gate import (
    MEMORY,
    PAIRS,
    SEEN,
    TRIES,
    Against,
    Check,
    Interval,
    checks_of,
    judge_bytes,
    judge_ratio,
    judged,
    limit_of,
    paired_ratio,
)
from granite_paged.bench.measure import Samples
from granite_paged.bench.session import Measured
from granite_paged.errors import CannotJudge
from granite_paged.report.bench_results import Latency, Result, Row
from granite_paged.report.published import Published, PublishedRow

CASE, SHAPE = CASES["decode"], Shape(1, 512)
DEFAULT, RATIO = 0.075, 0.03  # seconds of a step of default; time of paged relative to it
FLOOR = 0.001  # seconds
GIGABYTE = 10**9


def pairs(
    draw: random.Random, *, factor: float = 1.0, noise: float = 0.02, count: int = PAIRS
) -> tuple[list[float], list[float]]:
    """Draw times of paged and default, each with its own noise and an occasional stall."""

    def time(mean: float) -> float:
        stall = 3.0 if draw.random() < 0.03 else 1.0
        return mean * math.exp(draw.gauss(0, noise)) * stall

    return (
        [time(factor * RATIO * DEFAULT) for _ in range(count)],
        [time(DEFAULT) for _ in range(count)],
    )


def against_record(draw: random.Random, **how: Any) -> str:
    ratio = paired_ratio(*pairs(draw, **how))
    return judge_ratio(ratio, base=RATIO, seen=SEEN)


# -- mutation tests -----------------------------------------------------------------------------


def test_ten_per_cent_slower_fails_every_one_of_100_runs() -> None:
    draw = random.Random(0)
    verdicts = {against_record(draw, factor=1.10) for _ in range(100)}
    assert verdicts == {"failed"}


def test_noise_alone_passes_every_one_of_100_runs() -> None:
    draw = random.Random(1)
    verdicts = {against_record(draw) for _ in range(100)}
    assert verdicts == {"passed"}


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_ten_per_cent_slower_hardly_ever_passes_under_noise(noise: float) -> None:
    draw = random.Random(2)
    passed = sum(against_record(draw, factor=1.10, noise=noise) == "passed" for _ in range(100))
    assert passed <= 1, f"{passed} passed of 100"


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_noise_alone_hardly_ever_fails(noise: float) -> None:
    draw = random.Random(3)
    failed = sum(against_record(draw, noise=noise) == "failed" for _ in range(100))
    assert failed <= 1, f"{failed} failed of 100"


def test_wide_noise_is_unmeasurable() -> None:
    draw = random.Random(4)
    verdicts = [against_record(draw, noise=0.5) for _ in range(50)]
    assert verdicts.count("unmeasurable") >= 48, verdicts


def test_a_drift_of_three_per_cent_reverses_no_verdict() -> None:
    draw = random.Random(5)
    for drift in (0.97, 1.03):
        same = [against_record(draw, factor=drift) for _ in range(50)]
        slower = [against_record(draw, factor=1.10 * drift) for _ in range(50)]
        assert "failed" not in same, drift
        assert "passed" not in slower, drift
        assert min(same.count("passed"), slower.count("failed")) >= 35, (same, slower)


def test_memory_may_grow_half_a_per_cent_but_not_three() -> None:
    assert judge_bytes(int(1.03 * GIGABYTE), GIGABYTE) == "failed"
    assert judge_bytes(int(1.005 * GIGABYTE), GIGABYTE) == "passed"


# -- properties ---------------------------------------------------------------------------------

seconds = st.floats(1e-6, 1e2)
samples = st.lists(st.tuples(seconds, seconds), min_size=8, max_size=30).map(
    lambda both: tuple(map(list, zip(*both, strict=True)))
)


@given(samples)
def test_the_estimate_lies_in_its_interval(times: tuple[list[float], list[float]]) -> None:
    found = paired_ratio(*times)
    assert found.low <= found.estimate * (1 + 1e-9)
    assert found.estimate <= found.high * (1 + 1e-9)


@given(samples, st.floats(0.01, 100))
def test_scaling_our_times_scales_the_interval(
    times: tuple[list[float], list[float]], factor: float
) -> None:
    ours, theirs = times
    found, scaled = paired_ratio(ours, theirs), paired_ratio([factor * t for t in ours], theirs)
    assert scaled.low == pytest.approx(factor * found.low)
    assert scaled.high == pytest.approx(factor * found.high)


@given(samples)
def test_swapping_the_sides_inverts_the_estimate(times: tuple[list[float], list[float]]) -> None:
    ours, theirs = times
    there, back = paired_ratio(ours, theirs), paired_ratio(theirs, ours)
    assert there.estimate * back.estimate == pytest.approx(1)


@given(samples, st.floats(1.01, 10), st.floats(0.1, 10))
def test_slower_times_never_improve_a_verdict(
    times: tuple[list[float], list[float]], factor: float, limit: float
) -> None:
    ours, theirs = times
    worst = {"passed": 0, "unmeasurable": 1, "failed": 2}
    before, after = (
        worst[judge_ratio(paired_ratio(o, theirs), base=limit, seen=SEEN)]
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


def test_too_few_pairs_are_unmeasurable() -> None:
    found = paired_ratio([1.0] * 7, [2.0] * 7)
    assert (found.estimate, found.low, found.high) == (0.5, 0.0, math.inf)
    assert judge_ratio(found, base=0.5, seen=SEEN) == "unmeasurable"


def test_the_interval_has_its_nominal_coverage() -> None:
    draw = random.Random(6)
    inside = 0
    for _ in range(300):
        found = paired_ratio(*pairs(draw, noise=0.05))
        inside += found.low <= RATIO <= found.high
    assert inside >= 0.99 * 300, inside


def test_one_stall_does_not_move_the_estimate() -> None:
    ours, theirs = [1.0] * 20, [1.0] * 20
    ours[7] = 50.0
    assert paired_ratio(ours, theirs) == Interval(1.0, 1.0, 1.0)


# -- checks of a shape --------------------------------------------------------------------------


def measured(
    *,
    factor: float = 1.0,
    memory: float = 1.0,
    noise: float = 0.01,
    seed: int = 0,
    pair_count: int = PAIRS,
) -> dict[str, Measured]:
    ours, theirs = pairs(random.Random(seed), factor=factor, noise=noise, count=pair_count)
    return {
        "paged": Measured(Samples(ours), int(memory * 3 * GIGABYTE)),
        "default": Measured(Samples(theirs), 4 * GIGABYTE),
    }


def record(**changes: Any) -> Result:
    def row(mode: str, ms: float, peak: int) -> Row:
        return Row(CASE.name, mode, *SHAPE[:2], latency_ms=Latency(ms), peak_bytes=peak)

    rows = [
        row("default", 1e3 * DEFAULT, 4 * GIGABYTE),
        replace(row("paged", 1e3 * RATIO * DEFAULT, 3 * GIGABYTE), floor_ms=1e3 * FLOOR),
    ]
    return Result(device="NVIDIA H200", versions={}, seed=0, rows=rows, **changes)


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.law: check.verdict for check in checks}


SLOWER = "not slower than default"
LARGER = "not more memory than default"
TIME_RECORD = "time as recorded"
MEMORY_RECORD = "memory as recorded"


def test_a_run_like_the_record_passes_every_check() -> None:
    found = verdicts(checks_of(CASE, SHAPE, measured(), Against(record()), FLOOR))
    assert found == dict.fromkeys((SLOWER, LARGER, TIME_RECORD, MEMORY_RECORD), "passed")


def test_ten_per_cent_slower_fails_only_against_the_record() -> None:
    found = verdicts(checks_of(CASE, SHAPE, measured(factor=1.10), Against(record()), FLOOR))
    assert [law for law, verdict in found.items() if verdict != "passed"] == [TIME_RECORD]


@pytest.mark.parametrize("host", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "passed"), (1.10, "failed")])
def test_the_speed_of_the_host_changes_no_verdict(host: float, factor: float, verdict: str) -> None:
    """It changes the time of default, which is bound by kernel launches, and not that of paged."""
    parts = measured(factor=factor)
    slowed = [host * seconds for seconds in parts["default"].samples.seconds]
    parts["default"] = replace(parts["default"], samples=Samples(slowed))
    found = verdicts(checks_of(CASE, SHAPE, parts, Against(record()), FLOOR))
    assert found == {
        **dict.fromkeys([SLOWER, LARGER, MEMORY_RECORD], "passed"),
        TIME_RECORD: verdict,
    }


def test_a_device_is_compared_with_its_own_floor() -> None:
    slower = measured(factor=1.2)
    found = verdicts(checks_of(CASE, SHAPE, slower, Against(record()), 1.2 * FLOOR))
    assert found[TIME_RECORD] == "passed"


def test_without_a_floor_of_this_device_the_time_check_fails() -> None:
    found = verdicts(checks_of(CASE, SHAPE, measured(), Against(record())))
    assert found == {
        **dict.fromkeys([SLOWER, LARGER, MEMORY_RECORD], "passed"),
        TIME_RECORD: "failed",
    }


def changed_record(**changes: Any) -> Result:
    whole = record()
    return replace(whole, rows=[replace(row, **changes) for row in whole.rows])


@pytest.mark.parametrize(
    ("lacking", "unjudged", "found"),
    [
        (changed_record(batch=99), [TIME_RECORD, MEMORY_RECORD], "no such row"),
        (changed_record(error="RuntimeError: x"), [TIME_RECORD, MEMORY_RECORD], "RuntimeError: x"),
        (changed_record(latency_ms=None), [TIME_RECORD], "no time"),
        (changed_record(latency_ms=Latency(0.0)), [TIME_RECORD], "no time"),
        (changed_record(floor_ms=None), [TIME_RECORD], "no floor"),
        (changed_record(floor_ms=0.0), [TIME_RECORD], "no floor"),
        (changed_record(peak_bytes=None), [MEMORY_RECORD], "no peak memory"),
    ],
)
def test_what_the_record_lacks_fails_by_name(
    lacking: Result, unjudged: list[str], found: str
) -> None:
    checks = checks_of(CASE, SHAPE, measured(), Against(lacking), FLOOR)
    failed = [check for check in checks if check.verdict != "passed"]
    assert [check.law for check in failed] == unjudged
    assert {(check.found, check.verdict) for check in failed} == {("not compared", "failed")}
    assert {check.bound for check in failed} == {f"record: {found}"}


def test_the_record_is_compared_also_where_default_ran_out_of_memory() -> None:
    parts = {**measured(factor=2), "default": Measured(Samples(error="OutOfMemoryError: 3 GB"))}
    found = verdicts(checks_of(CASE, SHAPE, parts, Against(record()), FLOOR))
    assert found == {SLOWER: "passed", TIME_RECORD: "failed", MEMORY_RECORD: "passed"}


def test_three_per_cent_more_memory_fails_only_against_the_record() -> None:
    found = verdicts(checks_of(CASE, SHAPE, measured(memory=1.03), Against(record()), FLOOR))
    assert [law for law, verdict in found.items() if verdict != "passed"] == [MEMORY_RECORD]


def test_without_a_record_only_the_laws_are_applied() -> None:
    found = verdicts(checks_of(CASE, SHAPE, measured(factor=5, memory=1.2), Against()))
    assert found == {SLOWER: "passed", LARGER: "passed"}


def test_slower_and_larger_than_default_fails_without_a_record() -> None:
    found = verdicts(checks_of(CASE, SHAPE, measured(factor=40, memory=1.5), Against()))
    assert found == {SLOWER: "failed", LARGER: "failed"}


def test_a_paged_failure_fails_the_gate() -> None:
    broken = {**measured(), "paged": Measured(Samples(error="RuntimeError: no kernel"))}
    (check,) = checks_of(CASE, SHAPE, broken, Against(record()))
    assert (check.verdict, check.found) == ("failed", "RuntimeError: no kernel")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [("OutOfMemoryError: 3 GB", "passed"), ("RuntimeError: no kernel", "unmeasurable")],
)
def test_only_out_of_memory_of_default_counts_as_passed(error: str, verdict: str) -> None:
    alone = {**measured(), "default": Measured(Samples(error=error))}
    (check,) = checks_of(CASE, SHAPE, alone, Against())
    assert check.verdict == verdict
    assert error in check.found


def published(ms: float, gigabytes: float) -> Published:
    row = PublishedRow(CASE.name, "paged", *SHAPE[:2], ms_per_query=ms, peak_gb=gigabytes)
    return Published("a study", "NVIDIA A100 80GB", ["granite-4.0-h-1b"], [row], [])


@pytest.mark.parametrize(
    ("ms", "gigabytes", "expected"),
    [(3, 3.1, ["passed", "passed"]), (2, 3.1, ["failed", "passed"]), (3, 2, ["passed", "failed"])],
)
def test_a_published_figure_is_an_absolute_ceiling(
    ms: float, gigabytes: float, expected: list[str]
) -> None:
    checks = checks_of(CASE, SHAPE, measured(), Against(None, (published(ms, gigabytes),)))
    assert [c.verdict for c in checks if c.law == "below the published figure"] == expected


# -- repeating ----------------------------------------------------------------------------------


class FakeSession:
    """Returns measurements with the given noise levels, one after the other."""

    def __init__(self, *noises: float) -> None:
        self.noises = list(noises)
        self.pairs: list[int] = []

    def measure(self, case: Any, shape: Any, modes: Any, repeats: Any) -> dict[str, Measured]:
        self.pairs.append(repeats.least)
        assert repeats.least == repeats.most
        return measured(noise=self.noises.pop(0), seed=7, pair_count=repeats.least)

    def floor(self, case: Any, shape: Any) -> float:
        return FLOOR


def test_noisy_times_are_measured_again_with_twice_the_pairs() -> None:
    session: Any = FakeSession(0.8, 0.8, 0.01)
    checks = judged(session, CASE, SHAPE, Against(record()))
    assert session.pairs == [PAIRS, 2 * PAIRS, 4 * PAIRS]
    assert {check.verdict for check in checks} == {"passed"}


def test_persistent_noise_is_unmeasurable_after_three_tries() -> None:
    session: Any = FakeSession(*[1.5] * 9)
    checks = judged(session, CASE, SHAPE, Against(record()))
    assert len(session.pairs) == TRIES == 3
    assert verdicts(checks)[TIME_RECORD] == "unmeasurable"


def test_a_clear_verdict_is_not_measured_again() -> None:
    session: Any = FakeSession(0.01)
    judged(session, CASE, SHAPE, Against(record()))
    assert session.pairs == [PAIRS]


def test_a_failed_check_is_not_measured_away() -> None:
    """In the first try memory fails while noise leaves the time open; the second would pass."""

    class Shrinking(FakeSession):
        def measure(self, *args: Any) -> dict[str, Measured]:
            parts = super().measure(*args)
            if len(self.pairs) == 1:
                parts["paged"].peak_bytes = 5 * GIGABYTE
            return parts

    session: Any = Shrinking(0.8, 0.01, 0.01)
    found = verdicts(judged(session, CASE, SHAPE, Against(record())))
    assert found[MEMORY_RECORD] == found[LARGER] == "failed"
    assert found[TIME_RECORD] == "unmeasurable"


# -- the record of a folder ---------------------------------------------------------------------


class Here(FakeSession):
    """A session on an H200, as `gate` uses it."""

    name, device_name = "granite-4.0-h-1b", "NVIDIA H200"

    def result(self, rows: Any) -> Result:
        now = {"torch": "2.14", "triton": "3.6", "python": "3.12"}
        return Result(self.device_name, now, 0, rows, model=self.name, dtype="bfloat16")


def report_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[gate.GateReport, Against]:
    """Run the gate on one shape, with the record of `Here` after these changes."""
    session: Any = Here(0.01)
    recorded = replace(session.result(record().rows), **changes)
    (folder / "nvidia-h200.json").write_text(json.dumps(recorded.to_json()))
    monkeypatch.setattr(gate, "refuse_where_blind", lambda session: None)
    against = gate.against_records(folder, session, ())
    return gate.gate(session, against, [(CASE.name, SHAPE)]), against


@pytest.mark.parametrize("versions", [{"torch": "2.14", "python": "3.11"}, {}])
def test_a_record_of_this_device_model_and_kernels_is_compared(
    versions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = report_with(tmp_path, monkeypatch, versions=versions)
    assert (report.passed, report.record) == (True, "recorded")
    assert TIME_RECORD in verdicts(report.checks)


@pytest.mark.parametrize(
    ("changes", "law", "here", "there"),
    [
        ({"device": "NVIDIA A100"}, "device as recorded", "NVIDIA H200", "NVIDIA A100"),
        ({"versions": {"torch": "2.9"}}, "torch as recorded", "2.14", "2.9"),
        ({"versions": {"triton": "3.5"}}, "triton as recorded", "3.6", "3.5"),
    ],
)
def test_a_record_of_another_environment_is_refused_by_name(
    changes: dict[str, Any],
    law: str,
    here: str,
    there: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, against = report_with(tmp_path, monkeypatch, **changes)
    (refused,) = [check for check in report.checks if check.verdict != "passed"]
    assert (refused.law, refused.found, refused.bound) == (law, here, there)
    assert (report.passed, report.record) == (False, "laws only")
    assert not {TIME_RECORD, MEMORY_RECORD} & set(verdicts(report.checks))
    assert "another device or other versions" in against.unused


@pytest.mark.parametrize("changes", [{"model": "granite-4.0-h-tiny"}, {"dtype": "float32"}])
def test_a_record_of_another_model_is_not_used_and_said_so(
    changes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, against = report_with(tmp_path, monkeypatch, **changes)
    assert (report.passed, report.record) == (True, "laws only")
    assert "another model or dtype" in against.unused
    (value,) = changes.values()
    assert value in against.unused


def test_a_gate_with_an_incomplete_record_is_not_called_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = report_with(tmp_path, monkeypatch, rows=[])
    assert (report.passed, report.record) == (False, "incomplete record")


def test_the_bounds_follow_their_derivation() -> None:
    astride = SEEN / limit_of(SEEN)  # the widest interval that the estimate may decide
    assert limit_of(SEEN) / astride > 1
    assert limit_of(SEEN) * astride <= SEEN * (1 + 1e-12)
    assert 1.0 < MEMORY < 1.03


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

    runner, session = Slow(), Blind()
    monkeypatch.setattr(gate, "make_runner", lambda model, config: runner)
    monkeypatch.setattr(gate, "config_for", lambda config, shape: config)
    with pytest.raises(CannotJudge, match="no Triton"):
        gate.refuse_where_blind(session)  # type: ignore[arg-type]
    assert runner.closed


def test_a_cpu_is_not_judged() -> None:
    session: Any = Blind()
    session.clock = type("clock", (), {"gpu": False})
    with pytest.raises(CannotJudge, match="CUDA device"):
        gate.gate(session, Against())
