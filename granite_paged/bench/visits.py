"""Visits: short blocks of steps of one mode, the unit that the gate judges.

Steps in a row resemble each other, so a visit's median is one observation, and its steps are not.
Visits of the modes take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from granite_paged.bench.cases import CASES
from granite_paged.bench.judge import Gated, Seen
from granite_paged.bench.measure import (
    FAILURES,
    Clock,
    Prepared,
    reason,
    released,
)
from granite_paged.bench.session import Measured, Session

VISITS = 5
"""Visits of each mode in a suite; each further try has twice as many."""

TRIES = 3
"""Tries to measure a shape that noise leaves undecided."""

STEPS, FEWEST = 40, 2
"""Most and fewest steps of a visit."""

VISIT_SECONDS = 0.15
"""Time after which a visit ends, once it has the fewest steps."""

_CYCLES_PER_SECOND = 2e9
"""More than a GPU's clock: a sleep of this many cycles lasts at least a second."""


@dataclass(slots=True)
class Subject:
    """A prepared step that is visited.

    Attributes:
        prepared: the step, warm.
        measured: its peak, and the bytes that it holds.
        clock: of its device.
        steps: steps of a visit.
        host: seconds until the host has queued a step.
    """

    prepared: Prepared
    measured: Measured
    clock: Clock
    steps: int = FEWEST
    host: float = 0.0

    def look(self) -> None:
        """Time a few steps, to choose the length of a visit and how long the host needs."""
        begin = time.perf_counter()
        self.prepared.step()
        self.host = time.perf_counter() - begin
        self.clock.wait()
        self.prepared.reset()
        usual = self._visit(self.clock.seconds)
        self.steps = max(FEWEST, min(STEPS, int(VISIT_SECONDS / max(usual, 1e-9))))

    def whole(self) -> float:
        """Return the median time of a visit's steps, from an idle device to their end."""
        return self._visit(self.clock.seconds)

    def on_device(self) -> float:
        """Return the same without the host's part, which the device sleeps through."""
        cycles = int(2 * self.host * _CYCLES_PER_SECOND)
        return self._visit(lambda step: self.clock.kernel_seconds(step, None, cycles))

    def peak(self, weights: int, workspace: int) -> int | None:
        """Return the peak of a step now, without what other steps hold."""
        others = self.clock.allocated() - self.measured.held - weights
        if not self.prepared.own_workspace:
            others -= workspace
        found = self.clock.peak(self.prepared.step)
        self.prepared.reset()
        return None if found is None else found - others

    def _visit(self, seconds: Callable[[Callable[[], Any]], float]) -> float:
        times = []
        for _ in range(self.steps):
            times.append(seconds(self.prepared.step))
            self.prepared.reset()
        return median(times)


def shapes_for(session: Session, shapes: Sequence[Gated]) -> list[Gated]:
    """Return the shapes whose sequences are not longer than the model allows."""
    longest = session.model.config.max_position_embeddings
    return [
        gated
        for gated in shapes
        if gated.shape.context + (CASES[gated.case].kind == "decode") <= longest
    ]


def subject_of(session: Session, gated: Gated, mode: str) -> Subject:
    """Prepare a step of a gated shape, warm. Raises one of `measure.FAILURES`."""
    measured = Measured()
    prepared = session.ready(CASES[gated.case], gated.shape, mode, measured)
    subject = Subject(prepared, measured, session.clock)
    try:
        if gated.time:
            subject.look()
    except BaseException:
        prepared.release()
        raise
    return subject


def look_at(
    gated: Gated, subjects: Mapping[str, Subject], seen: Seen, visits: int, *, whole: bool = True
) -> None:
    """Visit each mode in turn, `visits` times; put the times into `seen`, or a mode's failure.

    Whole steps of `paged` are left out where only the record needs its time.
    """
    seen.times, seen.paged, seen.default = [], [], []
    if not gated.time:
        return
    steps = {mode: subjects[mode] for mode in ("default", "paged") if mode in subjects}
    for _ in range(visits):
        for mode, subject in steps.items():
            if mode not in seen.errors:
                _visit(gated, mode, subject, seen, whole=whole)


def _visit(gated: Gated, mode: str, subject: Subject, seen: Seen, *, whole: bool) -> None:
    try:
        if mode == "default":
            seen.default.append(subject.whole())
            return
        if whole or not gated.on_device:
            seen.paged.append(subject.whole())
        seen.times.append(subject.on_device() if gated.on_device else seen.paged[-1])
    except FAILURES as error:
        seen.errors[mode] = reason(error)


def visited(session: Session, gated: Gated, visits: int) -> Seen:
    """Prepare `paged` and `default`, visit them in turn, and return what was seen."""
    with ready_subjects(session, gated) as (subjects, seen):
        look_at(gated, subjects, seen, visits)
        return seen


@contextmanager
def ready_subjects(session: Session, gated: Gated) -> Iterator[tuple[dict[str, Subject], Seen]]:
    """Yield the modes that run a gated shape, and their peaks and failures; then release them."""
    seen, subjects, device = Seen(), dict[str, Subject](), session.clock.device
    steps: dict[str, Prepared] = {}
    session.level_workspaces()
    with released(steps, device):
        for mode in ("paged", "default") if gated.default else ("paged",):
            try:
                subjects[mode] = subject_of(session, gated, mode)
            except FAILURES as error:
                seen.errors[mode] = reason(error)
            else:
                steps[mode] = subjects[mode].prepared
                seen.peaks[mode] = subjects[mode].measured.peak_bytes
        yield subjects, seen
