"""The gate's verdicts: pure functions of what was measured and what was recorded.

Against the record, a suite's time over floor is compared with the calibrated one. It fails when
it exceeds that by more than the shape's bound, and by more than `LEAST_SECONDS`; the bound, and how
rarely it is wrong, is derived in `granite_paged.bench.calibration`. A shape whose calibration is
too noisy to see what it must see is not green. Neither is one that the record lacks.

Against `default`, visits of the two take turns, and the ratios of neighbouring visits are averaged.
A slowdown of five per cent must be seen, so the limit lies half way, at 1.025::

    99.8 % interval above the limit       fail
    interval below the limit              pass
    across it, narrower than 1.05/1.025   the estimate decides: such an interval contains neither
                                          1.00 nor 1.05
    across it, and wider                  unmeasurable: measure again, with twice the visits; fail
                                          after three tries

A suite is unmeasurable as well if its own visits scatter too much (`scattered`). Peak memory hardly
varies, so it is compared directly, with 1 % for the allocator's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Literal

from granite_paged.bench.calibration import Bound, bound_of
from granite_paged.bench.cases import CASES, Shape
from granite_paged.quantiles import student_t_quantile
from granite_paged.report.bench_results import CalibratedShape, Calibration
from granite_paged.report.published import Published

Verdict = Literal["passed", "failed", "unmeasurable"]

SEEN = 1.05
"""A slowdown against the record, as a factor, that must not pass."""

ENGINE_SEEN = 1.10
"""The same for the engine, much of whose time is the host's."""

LAW_SEEN = 1.05
"""A slowdown against `default`, as a factor, that must not pass."""

MEMORY = 1.01
"""Limit on peak bytes, as a factor of the recorded ones or of those of `default`."""

LEAST_SECONDS = 5e-6
"""Excess of a step's time that always passes."""

LEAST_BYTES = 2**21
"""Excess of peak memory that always passes: a block of the allocator."""

CONFIDENCE = 0.998
"""Confidence level of a ratio's interval. Identical code lies beyond its upper end in 0.1 % of
suites, so with eight to ten ratios at most a share of `ALARMS` of all suites calls it slower."""

NOT_COMPARED = "not compared"
TIME_LAW, MEMORY_LAW = "time as recorded", "memory as recorded"
SPEED_LAW, SPACE_LAW = "not slower than default", "not more memory than default"


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated shape.

    Attributes:
        case, shape: what runs.
        time: whether time is compared, or peak memory only.
        default: whether `default` runs beside it.
        seen: the slowdown against the record that must not pass.
    """

    case: str
    shape: Shape
    time: bool = True
    default: bool = True
    seen: float = SEEN

    @property
    def place(self) -> tuple[str, int, int]:
        """Return case, batch and context, which identify it in a calibration."""
        return (self.case, *self.shape[:2])

    @property
    def on_device(self) -> bool:
        """Whether the device's time is compared; the engine's is the host's as well."""
        return CASES[self.case].kind != "serve"


GATED: tuple[Gated, ...] = (
    Gated("batch", Shape(8, 512)),
    Gated("batch", Shape(32, 512)),
    Gated("context", Shape(1, 512)),
    Gated("context", Shape(1, 4096)),
    Gated("context", Shape(1, 131072), time=False, default=False),
    Gated("decode", Shape(1, 512)),
    Gated("decode", Shape(8, 512)),
    Gated("decode", Shape(32, 512)),
    Gated("decode", Shape(128, 512)),
    Gated("serve", Shape(64, 96), default=False, seen=ENGINE_SEEN),
)
"""Prefill and decode in shapes that are limited by launches and by the device, the peak of a long
prompt, and the engine on a short workload."""


@dataclass(slots=True)
class Seen:
    """What one suite measured of a shape. Times are seconds of a step, the median of each visit.

    Attributes:
        times: of `paged`, compared with the record.
        paged, default: of whole steps, compared with each other.
        peaks, errors: by mode.
        floor: shortest possible time of a step, by the rates of that moment; None if unknown.
    """

    times: list[float] = field(default_factory=list)
    paged: list[float] = field(default_factory=list)
    default: list[float] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    floor: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison and its verdict; `found` and `bound` are text for the report."""

    what: str
    law: str
    found: str
    bound: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Against:
    """What a run is compared with, besides `default`.

    Attributes:
        calibration: of this device, model, dtype and versions; None without a record.
        published: figures that apply to this device and model.
        unused: why there is no record.
        checks: time checks in a suite.
    """

    calibration: Calibration | None = None
    published: tuple[Published, ...] = ()
    unused: str = ""
    checks: int = sum(gated.time for gated in GATED)

    def find(self, gated: Gated) -> CalibratedShape | None:
        """Return what is calibrated of this shape."""
        shapes = self.calibration.shapes if self.calibration else []
        return next((shape for shape in shapes if shape.place == gated.place), None)


# -- ratios -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """Estimate of a ratio, with the ends of its `CONFIDENCE` interval."""

    estimate: float
    low: float
    high: float


def visit_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the geometric mean of ours / theirs over visits, with Student's t interval.

    Logarithms, so that exchanging the two inverts the interval. The interval is infinite for
    fewer than 3 visits, where the two have unequal numbers of them, and where one took no time.
    """
    if len(ours) != len(theirs) or len(ours) < 3 or not _timed([*ours, *theirs]):
        return Interval(math.nan, 0.0, math.inf)
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    middle, error = fmean(logs), stdev(logs) / math.sqrt(len(logs))
    reach = student_t_quantile((1 + CONFIDENCE) / 2, len(logs) - 1) * error
    return Interval(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def limit_of(seen: float) -> float:
    """Return the limit: half way between no change and the slowdown that must not pass."""
    return (1 + seen) / 2


def judge_ratio(interval: Interval, *, base: float, seen: float) -> Verdict:
    """Is the ratio `base`, or `seen` times that? See the module's docstring."""
    limit = base * limit_of(seen)
    if interval.low > limit:
        return "failed"
    if interval.high < limit:
        return "passed"
    if interval.high > interval.low * seen / limit_of(seen):
        return "unmeasurable"
    return "passed" if interval.estimate < limit else "failed"


def _timed(visits: Sequence[float]) -> bool:
    """Whether a clock can have measured these times."""
    return all(0 < time < math.inf for time in visits)


def suite_time(visits: Sequence[float], *, on_device: bool = True) -> float:
    """Return a suite's time.

    Of the device: the median of its visits, which one disturbed visit does not move. Of the host:
    the shortest, because whatever else a host does can only add to the time of a visit.
    """
    return median(visits) if on_device else min(visits)


def scattered(visits: Sequence[float], seen: float, *, on_device: bool = True) -> bool:
    """Whether these visits are too far apart to tell a slowdown of `seen`.

    Of the device: two standard errors of their median reach half way to `seen`. Of the host: the
    two shortest differ by that much. True as well for fewer than 2 visits, and where one took no
    time.
    """
    if len(visits) < 2 or not _timed(visits):
        return True
    if not on_device:
        shortest, second, *_ = sorted(visits)
        return second > shortest * limit_of(seen)
    error = math.sqrt(math.pi / 2 / len(visits)) * stdev(map(math.log, visits))
    return 2 * error > math.log(limit_of(seen))


def judge_time(
    visits: Sequence[float], floor: float, bound: Bound, seen: float, *, on_device: bool = True
) -> Verdict:
    """Compare the time of a suite's visits, in seconds, with the calibrated bound."""
    if scattered(visits, seen, on_device=on_device):
        return "unmeasurable"
    excess = suite_time(visits, on_device=on_device) - bound.base * floor
    return "failed" if excess > max(bound.allowed * bound.base * floor, LEAST_SECONDS) else "passed"


def judge_bytes(ours: int, bound: int) -> Verdict:
    """Compare peak memory with the bound: `MEMORY` times, or `LEAST_BYTES` more, may pass."""
    return "passed" if ours <= max(MEMORY * bound, bound + LEAST_BYTES) else "failed"


# -- checks -------------------------------------------------------------------------------------


def checks_of(gated: Gated, seen: Seen, against: Against, floor: float | None) -> list[Check]:
    """Return every check of one shape. `floor` is its shortest possible time in seconds."""
    what = describe(gated)
    if "paged" in seen.errors:
        return [Check(what, "paged runs", seen.errors["paged"], "no error", "failed")]
    checks = _ceilings(gated, seen, against.published)
    if gated.default:
        checks += _against_default(what, seen)
    if against.calibration:
        checks += _against_record(gated, seen, against, floor)
    return checks


def describe(gated: Gated) -> str:
    """Return a short description of a shape."""
    return f"{gated.case} {gated.shape.batch} x {gated.shape.context}"


def _against_default(what: str, seen: Seen) -> list[Check]:
    """Compare with `default`; where only `default` runs out of memory, paged passes."""
    if error := seen.errors.get("default"):
        verdict: Verdict = "passed" if "OutOfMemory" in error else "unmeasurable"
        return [Check(what, SPEED_LAW, f"default: {error}", "-", verdict)]
    ratio = visit_ratio(seen.paged, seen.default)
    found = f"{ratio.estimate:.4f} ({ratio.low:.4f} to {ratio.high:.4f})"
    verdict = judge_ratio(ratio, base=1.0, seen=LAW_SEEN)
    check = Check(what, SPEED_LAW, found, f"< {limit_of(LAW_SEEN):.4f}", verdict)
    return [check, *_memory(what, SPACE_LAW, seen, seen.peaks.get("default"))]


def _against_record(gated: Gated, seen: Seen, against: Against, floor: float | None) -> list[Check]:
    """Compare time and memory; whatever the record lacks for that is a failed check."""
    what, then = describe(gated), against.find(gated)
    laws = (*([TIME_LAW] if gated.time else []), MEMORY_LAW)
    if then is None:
        return [_lacking(what, law, "its calibration has no such shape") for law in laws]
    checks = [_time(gated, seen, then, against.checks, floor)] if gated.time else []
    if not then.peak_bytes:
        return [*checks, _lacking(what, MEMORY_LAW, "no peak memory")]
    return checks + _memory(what, MEMORY_LAW, seen, then.peak_bytes)


def _time(
    gated: Gated, seen: Seen, then: CalibratedShape, checks: int, floor: float | None
) -> Check:
    what = describe(gated)
    ratios = [ratio for suites in then.sessions for ratio in suites]
    if not (floor and then.floor_ms and all(ratios)):
        return _lacking(what, TIME_LAW, "no floor")
    bound = bound_of(then.sessions, checks)
    if bound is None:
        return _lacking(what, TIME_LAW, "too few suites were calibrated")
    if bound.sees > gated.seen - 1:
        lack = f"its noise hides slowdowns below {bound.sees:.1%}"
        return _lacking(what, TIME_LAW, lack)
    if not seen.times:
        return Check(what, TIME_LAW, "no visits", "-", "unmeasurable")
    found = f"{suite_time(seen.times, on_device=gated.on_device) / floor:.4f}"
    limit = f"<= {bound.base * (1 + bound.allowed):.4f}"
    verdict = judge_time(seen.times, floor, bound, gated.seen, on_device=gated.on_device)
    return Check(what, TIME_LAW, found, limit, verdict)


def _lacking(what: str, law: str, lack: str) -> Check:
    return Check(what, law, NOT_COMPARED, f"record: {lack}", "failed")


def _memory(what: str, law: str, seen: Seen, bound: int | None) -> list[Check]:
    ours = seen.peaks.get("paged")
    if ours is None or bound is None:
        return []
    verdict = judge_bytes(ours, bound)
    return [Check(what, law, f"{ours / 1e9:.4f} GB", f"{MEMORY:g} x {bound / 1e9:.4f} GB", verdict)]


def _ceilings(gated: Gated, seen: Seen, published: Sequence[Published]) -> list[Check]:
    """Check the published figures, which are absolute: any median above them fails."""
    points = [study.find(gated.case, "paged", *gated.shape[:2]) for study in published]
    checks = []
    for point in (point for point in points if point and seen.paged):
        what, law = describe(gated), "below the published figure"
        found = 1e3 * median(seen.paged) / gated.shape.batch
        verdict: Verdict = "passed" if found <= point.ms_per_query else "failed"
        bound = f"<= {point.ms_per_query:g} ms"
        checks.append(Check(what, law, f"{found:.2f} ms per query", bound, verdict))
        checks += _memory(what, law, seen, int(point.peak_gb * 1e9))
    return checks
