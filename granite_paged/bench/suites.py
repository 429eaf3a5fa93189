"""Suites in a row, of identical and of slowed code: the gate's calibration, and its teeth.

All shapes are prepared once and stay alive, so that a suite is only its measurements.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from granite_paged.bench.calibration import LEAST_DOF, Alarms, bound_of, false_alarms
from granite_paged.bench.cases import CASES
from granite_paged.bench.conditions import read_conditions
from granite_paged.bench.judge import (
    MEMORY_LAW,
    TIME_LAW,
    Against,
    Check,
    Gated,
    Seen,
    checks_of,
    describe,
    scattered,
    suite_time,
)
from granite_paged.bench.measure import Clock, released
from granite_paged.bench.session import Session
from granite_paged.bench.visits import TRIES, VISITS, Subject, look_at, subject_of
from granite_paged.errors import CannotJudge
from granite_paged.progress import Progress, silent
from granite_paged.report.bench_results import CalibratedShape, Calibration

Subjects = dict[Gated, Subject]


@contextmanager
def all_ready(session: Session, shapes: Sequence[Gated]) -> Iterator[Subjects]:
    """Prepare the paged step of every shape, and release all of them at the end."""
    steps: dict[str, Any] = {}
    subjects: Subjects = {}
    session.level_workspaces()
    with released(steps, session.clock.device):
        for gated in shapes:
            subjects[gated] = subject_of(session, gated, "paged")
            steps[describe(gated)] = subjects[gated].prepared
        yield subjects


def measure_suite(session: Session, subjects: Subjects) -> dict[Gated, Seen]:
    """Measure the time of every shape, with the device's rates of its moment.

    Visits that scatter are repeated, twice as many each time, as the gate repeats them.
    """
    suite = {}
    for gated, subject in subjects.items():
        session.measure_rates()
        peaks = {"paged": subject.measured.peak_bytes}
        seen = Seen(peaks=peaks, floor=session.floor(CASES[gated.case], gated.shape))
        for attempt in range(TRIES):
            look_at(gated, {"paged": subject}, seen, VISITS * 2**attempt, whole=False)
            if error := seen.errors.get("paged"):
                raise RuntimeError(f"{describe(gated)}: {error}")
            if not (gated.time and scattered(seen.times, gated.seen, on_device=gated.on_device)):
                break
        suite[gated] = seen
    return suite


# -- calibration --------------------------------------------------------------------------------


def calibrate(
    session: Session,
    suites: int,
    shapes: Sequence[Gated],
    earlier: Calibration | None = None,
    progress: Progress = silent,
    keep: Callable[[Calibration], None] = lambda calibration: None,
) -> Calibration:
    """Run suites of identical code; return them as one more session of `earlier`.

    Args:
        suites: how many; 0 measures memory and the share of busy time only.
        keep: called after each suite with the calibration so far, without `busy`.
    """
    progress("prepare", 0, suites)
    config = session.config

    def calibration(busy: Callable[[Gated], float | None]) -> Calibration:
        found = [
            CalibratedShape(
                *gated.place,
                sessions=[ratios[gated]] if ratios[gated] else [],
                floor_ms=_floor_ms(session, gated),
                peak_bytes=subjects[gated].measured.peak_bytes,
                busy=busy(gated),
                clock_mhz=[min(clocks), max(clocks)] if clocks else None,
            )
            for gated in shapes
        ]
        return joined(Calibration(config.page_size, config.backend, VISITS, found), earlier)

    with all_ready(session, shapes) as subjects:
        ratios: dict[Gated, list[float]] = {gated: [] for gated in shapes}
        clocks: list[int] = []
        for number in range(suites):
            progress("suite", number, suites)
            for gated, seen in measure_suite(session, subjects).items():
                if gated.time and seen.floor:
                    found = suite_time(seen.times, on_device=gated.on_device)
                    ratios[gated].append(found / seen.floor)
            clocks += filter(None, [read_conditions(session.clock.device).clock_mhz])
            keep(calibration(busy=lambda gated: None))
        return calibration(busy=lambda gated: _busy(gated, subjects[gated]))


def _floor_ms(session: Session, gated: Gated) -> float | None:
    floor = session.floor(CASES[gated.case], gated.shape)
    return 1e3 * floor if floor else None


def _busy(gated: Gated, subject: Subject) -> float | None:
    return subject.on_device() / subject.whole() if gated.time and gated.on_device else None


def suites_in(calibration: Calibration | None) -> int:
    """Return the number of suites in a calibration."""
    shapes = calibration.shapes if calibration else []
    return max((sum(map(len, shape.sessions)) for shape in shapes), default=0)


def missing_suites(earlier: Calibration | None, suites: int) -> int:
    """Return how many suites one more session must run, to have `suites` and a bound.

    A session costs a degree of freedom, so a calibration that was interrupted needs more suites.

    Args:
        earlier: what an interrupted calibration kept; None at the start.
        suites: how many suites were asked for, of all sessions together.
    """
    shapes = earlier.shapes if earlier else []
    sessions = max((len(shape.sessions) for shape in shapes), default=0)
    kept = suites_in(earlier)
    if kept >= suites and kept - sessions >= LEAST_DOF:
        return 0
    return max(suites - kept, LEAST_DOF + sessions + 1 - kept)


def joined(calibration: Calibration, earlier: Calibration | None) -> Calibration:
    """Return a calibration that has the sessions of an earlier one too, before its own."""
    if earlier is None:
        return calibration
    return replace(calibration, shapes=[_joined(shape, earlier) for shape in calibration.shapes])


def _joined(shape: CalibratedShape, earlier: Calibration) -> CalibratedShape:
    """Put the sessions of an earlier calibration before these; keep the larger peak."""
    for then in earlier.shapes:
        if then.place == shape.place:
            peaks = [peak for peak in (then.peak_bytes, shape.peak_bytes) if peak]
            clocks = [*(then.clock_mhz or ()), *(shape.clock_mhz or ())]
            return replace(
                shape,
                sessions=[*then.sessions, *shape.sessions],
                peak_bytes=max(peaks, default=None),
                clock_mhz=[min(clocks), max(clocks)] if clocks else None,
            )
    return shape


def alarms_of(calibration: Calibration) -> Alarms:
    """Return how many of the calibration's own suites would have been red."""
    return false_alarms(calibration.shapes)


def bounds_of(calibration: Calibration) -> list[tuple[CalibratedShape, Any]]:
    """Return each timed shape with its bound, or None where too few suites were run."""
    timed = [shape for shape in calibration.shapes if shape.sessions]
    return [(shape, bound_of(shape.sessions, len(timed))) for shape in timed]


# -- teeth --------------------------------------------------------------------------------------

MORE_MEMORY = 0.015
"""Peak memory, as a share, that the gate's teeth add."""

_SLEEP_CYCLES = 10_000_000


@dataclass(frozen=True, slots=True)
class Bite:
    """How one check judged identical code, and code with the loss that it must see.

    Attributes:
        what, law: shape and check.
        loss: relative slowdown, or memory added.
        tries: of each kind.
        green: tries of identical code that passed.
        red: tries with the loss that failed.
    """

    what: str
    law: str
    loss: float
    tries: int
    green: int
    red: int


@dataclass(frozen=True, slots=True)
class TeethReport:
    """Report of `granite-paged gate --teeth`."""

    device: str
    model: str
    bites: list[Bite]

    @property
    def passed(self) -> bool:
        """Whether every loss was red and all identical code green, in every try."""
        return all(bite.red == bite.green == bite.tries for bite in self.bites)

    def to_json(self) -> dict[str, Any]:
        """Return plain types only."""
        return {"passed": self.passed, **asdict(self)}


def teeth(
    session: Session,
    against: Against,
    tries: int,
    shapes: Sequence[Gated],
    progress: Progress = silent,
) -> TeethReport:
    """Judge suites of identical code, and suites with a slower and larger step, by the record.

    The step is followed by a sleep of the device for `Gated.seen` of its time, and holds
    `MORE_MEMORY` of its peak more. Peaks of shapes without a time check are measured once.

    Raises:
        CannotJudge: there is no shape.
    """
    if not shapes:
        raise CannotJudge(f"{session.name} allows none of the gated shapes: nothing was judged")
    progress("prepare", 0, tries)
    judged: dict[tuple[Gated, str, bool], list[str]] = {}
    with all_ready(session, shapes) as subjects:
        steps = {
            False: {gated: subject.prepared.step for gated, subject in subjects.items()},
            True: {gated: _worsened(session, gated, each) for gated, each in subjects.items()},
        }
        for number, worse in itertools.product(range(tries), (False, True)):
            progress("suite", number, tries)
            for gated, step in steps[worse].items():
                subjects[gated].prepared.step = step
            for gated, check in _try(session, subjects, against, first=number == 0):
                judged.setdefault((gated, check.law, worse), []).append(check.verdict)
    bites = [
        Bite(
            describe(gated),
            law,
            MORE_MEMORY if law == MEMORY_LAW else gated.seen - 1,
            len(verdicts),
            verdicts.count("passed"),
            judged[gated, law, True].count("failed"),
        )
        for (gated, law, worse), verdicts in judged.items()
        if not worse
    ]
    return TeethReport(session.device_name, session.name, bites)


def _try(
    session: Session, subjects: Subjects, against: Against, *, first: bool
) -> Iterator[tuple[Gated, Check]]:
    """Measure one suite, and judge its time and memory by the record."""
    for gated, seen in measure_suite(session, subjects).items():
        if gated.time or first:
            seen.peaks["paged"] = subjects[gated].peak(session.weights, session.workspace)
            alone = replace(gated, default=False)
            for check in checks_of(alone, seen, against, seen.floor):
                if check.law in (TIME_LAW, MEMORY_LAW):
                    yield gated, check


def _worsened(session: Session, gated: Gated, subject: Subject) -> Callable[[], None]:
    """Return the subject's step with the loss that the gate must see."""
    usual = subject.on_device() if gated.on_device else subject.whole()
    loss = (gated.seen - 1) * usual if gated.time else 0.0
    more = int(MORE_MEMORY * (subject.measured.peak_bytes or 0))
    return worsened(subject.prepared.step, session.clock, loss, more)


def worsened(
    step: Callable[[], Any], clock: Clock, seconds: float, more: int
) -> Callable[[], None]:
    """Return the step with `more` bytes held, and a sleep of the device after it."""
    sleep = sleep_of(clock, seconds)

    def step_and_sleep() -> None:
        held = torch.empty(more, dtype=torch.uint8, device=clock.device)
        step()
        sleep()
        del held

    return step_and_sleep


def sleep_of(clock: Clock, seconds: float) -> Callable[[], None]:
    """Return a step that keeps the device busy for this long; on the CPU, the host."""
    if not clock.gpu:
        return lambda: time.sleep(seconds)
    spin: Any = torch.cuda._sleep
    fastest = min(clock.seconds(lambda: spin(_SLEEP_CYCLES)) for _ in range(5))
    cycles = int(_SLEEP_CYCLES * seconds / fastest)
    return lambda: spin(cycles)
