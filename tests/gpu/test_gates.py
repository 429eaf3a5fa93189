"""The gate on a real GPU: a slower or larger paged path fails, identical code passes.

`granite-paged gate --calibrate` and `--teeth` do the same for every gated shape, with a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.bench.calibration import bound_of
from granite_paged.bench.cases import Shape
from granite_paged.bench.conditions import read_conditions
from granite_paged.bench.gate import refuse_where_blind
from granite_paged.bench.judge import MEMORY, Against, Gated
from granite_paged.bench.session import Session
from granite_paged.bench.suites import MORE_MEMORY, TeethReport, calibrate, teeth
from granite_paged.bench.visits import Subject, ready_subjects
from granite_paged.models import load
from granite_paged.report.bench_results import Calibration

SHAPES = (Gated("decode", Shape(8, 512)),)
SUITES, TRIES = 10, 5

pytestmark = pytest.mark.whole_gpu


@pytest.fixture(scope="module")
def session() -> Session:
    loaded = load(random_weights="granite-4.0-h-1b", device="cuda", dtype="bfloat16")
    made = Session(loaded, PagedConfig())
    refuse_where_blind(made)
    return made


@pytest.fixture(scope="module")
def calibration(session: Session) -> Calibration:
    return calibrate(session, SUITES, SHAPES)


@pytest.fixture(scope="module")
def report(session: Session, calibration: Calibration) -> TeethReport:
    return teeth(session, Against(calibration, checks=len(SHAPES)), TRIES, SHAPES)


@pytest.fixture
def subject(session: Session) -> Iterator[Subject]:
    with ready_subjects(session, replace(SHAPES[0], default=False)) as (subjects, seen):
        assert not seen.errors
        yield subjects["paged"]


def test_a_calibration_sees_five_per_cent(calibration: Calibration) -> None:
    for shape in calibration.shapes:
        bound = bound_of(shape.sessions, len(SHAPES))
        assert bound is not None
        assert bound.sees < 0.05, (shape, bound)


def test_a_calibration_holds_what_it_depends_on(calibration: Calibration) -> None:
    for shape in calibration.shapes:
        assert shape.busy is not None
        assert 0.5 < shape.busy < 1.05
        assert shape.peak_bytes
        assert shape.clock_mhz is None or 100 < shape.clock_mhz[0] <= shape.clock_mhz[1] < 5000


def test_a_slower_or_larger_step_is_red_every_time(report: TeethReport) -> None:
    assert {bite.law for bite in report.bites} == {"time as recorded", "memory as recorded"}
    assert [bite for bite in report.bites if bite.red != TRIES] == []


def test_identical_code_is_green_every_time(report: TeethReport) -> None:
    assert [bite for bite in report.bites if bite.green != TRIES] == []


def test_peak_memory_repeats_within_its_tolerance(session: Session, subject: Subject) -> None:
    first = subject.measured.peak_bytes
    assert first is not None
    for _ in range(3):
        again = subject.peak(session.weights, session.workspace)
        assert again == pytest.approx(first, rel=min(MEMORY - 1, MORE_MEMORY) / 2)


def test_the_devices_time_is_part_of_the_whole(subject: Subject) -> None:
    whole, device = subject.whole(), subject.on_device()
    assert 0.5 * whole < device < 1.02 * whole


def test_the_clock_is_read(session: Session) -> None:
    found = read_conditions(session.clock.device)
    assert found.clock_mhz is None or 100 < found.clock_mhz < 5000
    assert found.busy is None or 0 <= found.busy <= 1


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
