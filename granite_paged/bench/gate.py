"""The gate: fail when `paged` is slower or larger than recorded, or than `default`.

Time against the record is paged / floor. The floor is the shortest time that the device could take,
at the bandwidth and arithmetic rates that it reaches in the same run. Of a step, only the device's
time is compared: the host's part differs between hosts of the same GPU. The engine's part on the
host is what the `serve` shape is gated for, so its whole time is compared, and a larger slowdown
must be seen. `default` would be a poor yardstick for the record: much of its time is the host's
too, and a faster transformers would look like a slower `paged`.

`granite_paged.bench.judge` decides, with bounds from `granite_paged.bench.calibration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from granite_paged.bench.cases import CASES, Shape
from granite_paged.bench.judge import (
    NOT_COMPARED,
    Against,
    Check,
    Gated,
    checks_of,
    describe,
)
from granite_paged.bench.modes import config_for, make_runner
from granite_paged.bench.session import Session
from granite_paged.bench.visits import TRIES, VISITS, look_at, ready_subjects
from granite_paged.errors import CannotJudge
from granite_paged.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class GateReport:
    """Report of `granite-paged gate`."""

    passed: bool
    device: str
    model: str
    record: str
    checks: list[Check]

    def to_json(self) -> dict[str, Any]:
        """Return plain types only."""
        return asdict(self)


def gate(
    session: Session,
    against: Against,
    shapes: Sequence[Gated],
    progress: Progress = silent,
) -> GateReport:
    """Measure and judge these shapes.

    Raises:
        CannotJudge: there is no CUDA device, the runner fell back to a slower path, or no shape
            has anything to be compared with.
    """
    refuse_where_blind(session)
    checks = []
    for done, gated in enumerate(shapes):
        progress(describe(gated), done, len(shapes))
        checks += judged(session, gated, against)
    if not checks:
        reason = against.unused or "the model allows none of them"
        raise CannotJudge(
            f"no gated shape of {session.name} has anything to be compared with, so "
            f"nothing was judged: {reason}"
        )
    incomplete = any(check.found == NOT_COMPARED for check in checks)
    compared = "incomplete record" if incomplete else "recorded"
    return GateReport(
        passed=all(check.verdict == "passed" for check in checks),
        device=session.device_name,
        model=session.name,
        record="laws only" if against.calibration is None else compared,
        checks=checks,
    )


def judged(session: Session, gated: Gated, against: Against) -> list[Check]:
    """Return the checks of one shape; measure again while noise alone keeps it undecided.

    A failed check is final: another try could only measure it away.
    """
    with ready_subjects(session, gated) as (subjects, seen):
        session.measure_rates()  # now, on a device as warm as in a calibration
        floor = session.floor(CASES[gated.case], gated.shape)
        for attempt in range(TRIES):
            look_at(gated, subjects, seen, VISITS * 2**attempt)
            checks = checks_of(gated, seen, against, floor)
            verdicts = {check.verdict for check in checks}
            if "failed" in verdicts or "unmeasurable" not in verdicts:
                break
    return checks


def no_gpu(command: str) -> CannotJudge:
    """Return the refusal of a command that needs a GPU and runs without one."""
    return CannotJudge(
        f"{command} needs a CUDA device, and this run has none: nothing was measured"
    )


def refuse_where_blind(session: Session) -> None:
    """Raise CannotJudge unless the fast path runs here."""
    if not session.clock.gpu:
        raise no_gpu("gate")
    runner = make_runner(session.model, config_for(session.config, Shape(1, 1)))
    slow = runner.fallback
    runner.close()
    if slow:
        raise CannotJudge(f"paged runs on a slower path here, so it was not judged: {slow}")
