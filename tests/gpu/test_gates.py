"""The gate on a real GPU: a slower or larger paged path fails, noise alone passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.bench import modes
from granite_paged.bench import session as sessions
from granite_paged.bench.cases import CASES, Kind, Shape
from granite_paged.bench.gate import MEMORY, PAIRS, Against, checks_of, judged, refuse_where_blind
from granite_paged.bench.measure import Prepared, Repeats, interleaved, released
from granite_paged.bench.session import Measured, Session
from granite_paged.models import load
from granite_paged.report.bench_results import Result

CASE, SHAPE = CASES["batch"], Shape(4, 512)
"""Case and shape of a step that keeps the device busy, so that its noise is the device's."""

MODES = ("default", "paged")
ROUNDS = Repeats(least=PAIRS, most=PAIRS, patience=math.inf)
FEW_ROUNDS = Repeats(least=12, most=12, patience=math.inf)
SPEED = "time as recorded"
RECORDED = (SPEED, "memory as recorded")
SLEEP_CYCLES = 10_000_000

Change = Callable[[Prepared], None]


@pytest.fixture(scope="module")
def session() -> Session:
    loaded = load(random_weights="granite-4.0-h-1b", device="cuda", dtype="bfloat16")
    made = Session(loaded, PagedConfig())
    refuse_where_blind(made)
    return made


@pytest.fixture(scope="module")
def record(session: Session) -> Result:
    return as_result(session, session.measure(CASE, SHAPE, MODES, ROUNDS))


def as_result(session: Session, measured: dict[str, Measured]) -> Result:
    rows = [session._row(CASE, SHAPE, mode, part) for mode, part in measured.items()]
    assert [row.error for row in rows] == ["", ""]
    return session.result(rows)


def change_paged(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Change every paged step that is prepared from now on."""
    real = modes.make_mode

    class Flawed:
        def __init__(self, mode: Any) -> None:
            self._mode = mode

        def prepare(self, kind: Kind, shape: Shape) -> Prepared:
            prepared: Prepared = self._mode.prepare(kind, shape)
            change(prepared)
            return prepared

    def make(name: str, *args: Any) -> Any:
        mode = real(name, *args)
        return Flawed(mode) if name == "paged" else mode

    monkeypatch.setattr(sessions, "make_mode", make)


def verdicts(session: Session, record: Result) -> dict[str, str]:
    return {check.law: check.verdict for check in judged(session, CASE, SHAPE, Against(record))}


def median_ms(record: Result, mode: str) -> float:
    row = record.find(CASE.name, mode, *SHAPE[:2])
    assert row is not None
    assert row.latency_ms is not None
    return row.latency_ms.median


def sleep_for(session: Session, milliseconds: float) -> Callable[[], None]:
    """Return a step that keeps the device busy for this many milliseconds."""
    times = [session.clock.seconds(lambda: torch.cuda._sleep(SLEEP_CYCLES)) for _ in range(5)]
    cycles = int(SLEEP_CYCLES * milliseconds / 1e3 / min(times))
    return lambda: torch.cuda._sleep(cycles)


def test_a_paged_path_ten_per_cent_slower_fails(
    session: Session, record: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = sleep_for(session, 0.10 * median_ms(record, "paged"))

    def slow(prepared: Prepared) -> None:
        step = prepared.step

        def step_then_sleep() -> None:
            step()
            sleep()

        prepared.step = step_then_sleep

    change_paged(monkeypatch, slow)
    assert verdicts(session, record)[SPEED] == "failed"


def test_three_per_cent_more_memory_fails(
    session: Session, record: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = record.find(CASE.name, "paged", *SHAPE[:2])
    assert row is not None
    assert row.peak_bytes is not None
    more = int(0.03 * row.peak_bytes)

    def large(prepared: Prepared) -> None:
        step = prepared.step

        def step_with_more() -> None:
            held = torch.empty(more, dtype=torch.uint8, device="cuda")
            step()
            del held

        prepared.step = step_with_more

    change_paged(monkeypatch, large)
    assert verdicts(session, record)["memory as recorded"] == "failed"


def test_noise_alone_passes_20_repeats(session: Session, record: Result) -> None:
    parts = {mode: Measured() for mode in MODES}
    found: list[str] = []
    steps: dict[str, Prepared] = {}
    with released(steps, session.clock.device):
        for mode, part in parts.items():
            steps[mode] = session._ready(CASE, SHAPE, mode, part)
        for _ in range(20):
            for mode, samples in interleaved(steps, session.clock, FEW_ROUNDS).items():
                parts[mode].samples = samples
            checks = checks_of(CASE, SHAPE, parts, Against(record), session.floor(CASE, SHAPE))
            found += [check.verdict for check in checks if check.law in RECORDED]
    assert len(found) == 20 * len(RECORDED)
    assert found.count("failed") == 0
    assert found.count("passed") >= 0.9 * len(found), "this machine is too noisy for the test"


def test_peak_memory_repeats_within_its_tolerance(session: Session, record: Result) -> None:
    again = as_result(session, session.measure(CASE, SHAPE, MODES, ROUNDS))
    for mode in MODES:
        first, second = (r.find(CASE.name, mode, *SHAPE[:2]) for r in (record, again))
        assert first is not None
        assert second is not None
        assert first.peak_bytes == pytest.approx(second.peak_bytes, rel=MEMORY - 1), mode


def test_private_memory_of_a_graph_is_counted(session: Session) -> None:
    clock, before = session.clock, session.clock.allocated()
    graph, source = torch.cuda.CUDAGraph(), torch.zeros(2**22, device="cuda")
    with torch.cuda.graph(graph):
        total = (source + 1).sum()
    megabytes = 2**22 * 4
    # the source, and the memory that source + 1 needs
    assert clock.allocated() - before >= 2 * megabytes
    peak = clock.peak(graph.replay)
    assert peak is not None
    assert peak - before >= 2 * megabytes
    assert total.item() == 2**22
