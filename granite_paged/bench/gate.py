"""The gate: has paged become slower or larger than it was, or than `default` is?

Time is judged by ratios: paged / default of interleaved pairs against 1, and paged / floor against
what was recorded for this GPU and model. The floor is the least that the device could take, at the
rates it shows in the same run. `default` would not do there: much of its time is the host's, whose
processor and clock differ from machine to machine (a decode step took 38 to 127 ms on one kind of
GPU), and a faster transformers is no fault of paged.

Of the record ten per cent must be seen and noise must not be, so the limit lies half way, at 1.05
times the recorded ratio, and a 99.8 % bootstrap interval says whether a measurement is good enough
to be held against it::

    interval above the limit              red
    interval below the limit              green
    across it, narrower than 1.10 / 1.05  what the estimate says: such an interval reaches neither
                                          1.00 nor 1.10, so one of the two is ruled out
    across it, and wider                  unmeasurable: measured again, with twice the pairs; red
                                          after three tries

It follows

- that +10 % is green, and no change red, only if the estimate is off by 5 % where its interval is
  at most 2.4 % to either side (3.1 standard errors): by 6 standard errors; or, where the interval
  is wider, if all of it lies on the wrong side of the limit, in 0.1 % of runs at most. 20 repeats
  of 5 shapes are then all quiet in 9 suites of 10 on the noisiest machine that can be judged at
  all, and practically always on one whose steps vary by 5 %;
- that the machine may be off its recorded day by about 3 % either way before either turns;
- that what is too wide to tell is reported as such, and is not green.

Against the law that holds anywhere, paged not slower than default, five per cent must be seen, and
the limit lies half way again. Peak memory repeats to the byte, so it is compared as it is, with 1 %
for the allocator's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from granite_paged.bench.cases import CASES, Case, Shape
from granite_paged.bench.measure import Repeats
from granite_paged.bench.modes import config_for, make_runner
from granite_paged.bench.session import Measured, Session, describe
from granite_paged.errors import CannotJudge
from granite_paged.progress import Progress, silent
from granite_paged.report.bench_results import Result, read_result, slug
from granite_paged.report.published import Published

Verdict = Literal["passed", "failed", "unmeasurable"]

SEEN = 1.10
"""A ratio this much above the recorded one must not pass."""

LAW_SEEN = 1.05
"""Nor must paged that takes this much longer than default."""

MEMORY = 1.01
"""Peak bytes may be this much above the recorded ones, or above default's."""

PAIRS = 40
"""Of the first try; every further one has twice as many."""

TRIES = 3
CONFIDENCE = 0.998
RESAMPLES = 5000

GATED: tuple[tuple[str, Shape], ...] = (
    ("batch", Shape(8, 512)),
    ("context", Shape(1, 512)),
    ("context", Shape(1, 4096)),
    ("decode", Shape(8, 512)),
    ("decode", Shape(32, 512)),
)
"""Both kinds of step, each bound by launches in one shape and by the device in another. A decode
step of one row is left out: an eighth of its time is the host's."""

GATED_MODES = ("default", "paged")


# -- judging: pure functions of samples ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a ratio lies: its estimate, and the ends of a `CONFIDENCE` interval."""

    estimate: float
    low: float
    high: float


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """Median of ours / theirs, pair by pair, with a percentile bootstrap interval.

    The median of pairs, since a stall hits one step and must not move the answer; logarithms, so
    that exchanging the two turns the interval upside down and nothing else. At least 8 pairs: an
    interval of fewer cannot hold so much, and is infinite.
    """
    logs = torch.tensor(
        [math.log(a / b) for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64
    )
    if len(logs) < 8:
        return Interval(float(logs.median().exp()) if len(logs) else math.nan, 0.0, math.inf)
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(logs), (RESAMPLES, len(logs)), generator=draw)
    medians = logs[picks].quantile(0.5, dim=1)
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = medians.quantile(tails).exp().tolist()
    return Interval(float(logs.quantile(0.5).exp()), low, high)


def limit_of(seen: float) -> float:
    """Half way between no change and what must be seen."""
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


def judge_bytes(ours: int, bound: int) -> Verdict:
    """Peak memory against what is allowed before the allowance."""
    return "passed" if ours <= MEMORY * bound else "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison and its verdict; `found` and `bound` are for people."""

    what: str
    law: str
    found: str
    bound: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Against:
    """What a run is held against, besides the laws that hold anywhere."""

    record: Result | None = None
    published: tuple[Published, ...] = ()


def checks_of(
    case: Case,
    shape: Shape,
    measured: dict[str, Measured],
    against: Against,
    floor: float | None = None,
) -> list[Check]:
    """Every check of one shape. floor: seconds that a step takes at least; None where not known."""
    what, ours, default = describe(case, shape), measured["paged"], measured["default"]
    if ours.samples.error:
        return [Check(what, "paged runs", ours.samples.error, "no error", "failed")]
    checks = _ceilings(case, shape, ours, against.published)
    if default.samples.error:
        return [*checks, _beside_a_failure(what, default.samples.error)]
    ratio = paired_ratio(ours.samples.seconds, default.samples.seconds)
    checks += [
        _time(what, "not slower than default", ratio, 1.0, LAW_SEEN),
        *_memory(what, "not more memory than default", ours.peak_bytes, default.peak_bytes),
    ]
    return checks + _against_record(case, shape, ours, against.record, floor)


def _beside_a_failure(what: str, error: str) -> Check:
    """Running where default has no memory left is no loss; any other failure leaves it open."""
    verdict: Verdict = "passed" if "OutOfMemory" in error else "unmeasurable"
    return Check(what, "not slower than default", f"default: {error}", "-", verdict)


def _against_record(
    case: Case, shape: Shape, ours: Measured, record: Result | None, floor: float | None
) -> list[Check]:
    then = record.find(case.name, "paged", *shape[:2]) if record else None
    if not then:
        return []
    what, seconds = describe(case, shape), ours.samples.seconds
    checks = _memory(what, "memory as recorded", ours.peak_bytes, then.peak_bytes)
    if then.latency_ms and then.floor_ms and floor:
        now, was = paired_ratio(seconds, [floor] * len(seconds)), then.latency_ms.median
        base = was / then.floor_ms
        checks.append(_time(what, "time as recorded", now, base, SEEN))
    return checks


def _time(what: str, law: str, ratio: Interval, base: float, seen: float) -> Check:
    found = f"{ratio.estimate:.4f} ({ratio.low:.4f} to {ratio.high:.4f})"
    verdict = judge_ratio(ratio, base=base, seen=seen)
    return Check(what, law, found, f"< {base * limit_of(seen):.4f}", verdict)


def _memory(what: str, law: str, ours: int | None, bound: int | None) -> list[Check]:
    if ours is None or bound is None:
        return []
    verdict = judge_bytes(ours, bound)
    return [Check(what, law, f"{ours / 1e9:.4f} GB", f"{MEMORY:g} x {bound / 1e9:.4f} GB", verdict)]


def _ceilings(
    case: Case, shape: Shape, ours: Measured, published: Sequence[Published]
) -> list[Check]:
    """Published figures are absolute: a median above them fails, however narrowly."""
    points = [study.find(case.name, "paged", *shape[:2]) for study in published]
    checks = []
    for point in (point for point in points if point):
        what, law = describe(case, shape), "below the published figure"
        found = ours.samples.latency().median / shape.batch
        verdict: Verdict = "passed" if found <= point.ms_per_query else "failed"
        bound = f"<= {point.ms_per_query:g} ms"
        checks.append(Check(what, law, f"{found:.2f} ms a query", bound, verdict))
        checks += _memory(what, law, ours.peak_bytes, int(point.peak_gb * 1e9))
    return checks


# -- running ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GateReport:
    """Everything `granite-paged gate` has to say."""

    passed: bool
    device: str
    model: str
    record: str
    checks: list[Check]

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


def gate(
    session: Session,
    against: Against,
    shapes: Sequence[tuple[str, Shape]] = GATED,
    progress: Progress = silent,
) -> GateReport:
    """Measure and judge these shapes.

    Raises:
        CannotJudge: without a CUDA device, or where the runner has fallen back to a slower path.
    """
    refuse_where_blind(session)
    checks: list[Check] = []
    for done, (name, shape) in enumerate(shapes):
        progress(describe(CASES[name], shape), done, len(shapes))
        checks += judged(session, CASES[name], shape, against)
    return GateReport(
        passed=all(check.verdict == "passed" for check in checks),
        device=session.device_name,
        model=session.name,
        record="laws only" if against.record is None else "recorded",
        checks=checks,
    )


def judged(session: Session, case: Case, shape: Shape, against: Against) -> list[Check]:
    """Checks of one shape, measured again while noise leaves any of them open."""
    checks: list[Check] = []
    for attempt in range(TRIES):
        pairs = PAIRS * 2**attempt
        repeats = Repeats(least=pairs, most=pairs, patience=math.inf)
        measured = session.measure(case, shape, GATED_MODES, repeats)
        checks = checks_of(case, shape, measured, against, session.floor(case, shape))
        if not any(check.verdict == "unmeasurable" for check in checks):
            break
    return checks


def no_gpu(command: str) -> CannotJudge:
    """What a command says where there is no GPU, or where another device was chosen."""
    return CannotJudge(
        f"{command} needs a CUDA device, and this run has none: nothing was measured"
    )


def refuse_where_blind(session: Session) -> None:
    """Raise CannotJudge where what runs is not the fast path."""
    if not session.clock.gpu:
        raise no_gpu("gate")
    runner = make_runner(session.model, config_for(session.config, Shape(1, 1)))
    slow = runner.fallback
    runner.close()
    if slow:
        raise CannotJudge(f"paged has fallen back to a slower path here, not judged: {slow}")


def against_records(records: Path, session: Session, published: Sequence[Published]) -> Against:
    """What was recorded in a folder for this GPU, model and dtype. Raises ResultFileError."""
    path = record_path(records, session.device_name)
    record = read_result(path) if path.exists() else None
    if record is not None and not _same_model(record, session):
        record = None
    fitting = [p for p in published if p.applies_to(session.device_name, session.name)]
    return Against(record, tuple(fitting))


def record_path(records: Path, device: str) -> Path:
    """Where the record of a GPU is kept."""
    return records / f"{slug(device)}.json"


def how_to_record(records: Path, session: Session) -> str:
    """What to do where nothing is recorded for this GPU and model."""
    path = record_path(records, session.device_name)
    state = f"{path} is of another model or dtype" if path.exists() else f"there is no {path}"
    return (
        f"only the laws that hold anywhere were applied: {state}. "
        "Record this GPU with `nox -s perf_record`, read the difference, and commit it."
    )


def _same_model(record: Result, session: Session) -> bool:
    now = session.result([])
    return (record.model, record.dtype) == (now.model, now.dtype)
