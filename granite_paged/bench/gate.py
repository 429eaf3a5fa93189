"""The gate: fail when `paged` is slower or larger than recorded, or than `default`.

Time is judged by two ratios: paged / default in interleaved pairs, against 1, and paged / floor,
against the ratio recorded for this GPU and model. The floor is the shortest time that the device
could take, at the bandwidth and arithmetic rates that it reaches in the same run. `default` would
be a poor yardstick for the record: much of its time is spent on the host, and hosts differ (a
decode step took 38 to 127 ms on machines with the same GPU); a faster transformers would also
look like a slower `paged`.

The gate must see a slowdown of ten per cent against the record, and must not see noise. The limit
therefore lies half way, at 1.05 times the recorded ratio, and a 99.8 % bootstrap interval decides
whether a measurement is precise enough to compare with it::

    interval above the limit              fail
    interval below the limit              pass
    across it, narrower than 1.10 / 1.05  the estimate decides: such an interval contains
                                          neither 1.00 nor 1.10
    across it, and wider                  unmeasurable: measure again, with twice the pairs; fail
                                          after three tries

Consequences:

- A slowdown of 10 % passes, or an unchanged program fails, only in two cases. Either the estimate
  is off by 5 % although its interval reaches at most 2.4 % to either side (3.1 standard errors):
  an error of 6 standard errors. Or a wider interval lies entirely on the wrong side of the limit:
  in at most 0.1 % of runs. 20 repeats of 5 shapes then all pass in 9 of 10 suites on the noisiest
  machine that can be judged at all, and practically always where steps vary by 5 %.
- The machine may differ from its recorded state by about 3 % in either direction before a verdict
  changes.
- A measurement too noisy to judge is reported as such and does not pass.

These claims hold for pairs that are independent of each other. Noise that lasts over many pairs,
or for a whole run (a clock that changes, a neighbour on the machine), makes the interval too
narrow: unchanged programs then fail, and slower ones pass, more often than is stated here.

The rule that holds without a record, "not slower than default", must see five per cent; its limit
also lies half way. Peak memory repeats to the byte, so it is compared directly, with 1 % for the
allocator's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from granite_paged.bench.cases import CASES, BenchCase, Shape
from granite_paged.bench.measure import Repeats
from granite_paged.bench.modes import config_for, make_runner
from granite_paged.bench.session import Measured, Session, describe
from granite_paged.errors import CannotJudge
from granite_paged.progress import Progress, silent
from granite_paged.report.bench_results import Result, read_result, slug
from granite_paged.report.published import Published

Verdict = Literal["passed", "failed", "unmeasurable"]

SEEN = 1.10
"""A slowdown against the record, as a factor, that must not pass."""

LAW_SEEN = 1.05
"""A slowdown against `default`, as a factor, that must not pass."""

MEMORY = 1.01
"""Limit on peak bytes, as a factor of the recorded ones or of those of `default`."""

PAIRS = 40
"""Interleaved pairs of the first try; each further try has twice as many."""

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
"""Case and shape of each gated measurement. Both kinds of step appear in a shape that is limited by
kernel launches and in one that is limited by the device. A decode step of one sequence is left out:
an eighth of its time is spent on the host."""

GATED_MODES = ("default", "paged")


# -- judging: pure functions of samples ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """Estimate of a ratio, with the ends of its `CONFIDENCE` interval."""

    estimate: float
    low: float
    high: float


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """Return the median of ours / theirs over the pairs, with a percentile bootstrap interval.

    The median, because a stall hits single steps and must not move the estimate. Logarithms, so
    that exchanging the two inverts the interval exactly. The interval is infinite for fewer than
    8 pairs, which cannot give this confidence.
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


def judge_bytes(ours: int, bound: int) -> Verdict:
    """Compare peak memory with the bound, including the tolerance `MEMORY`."""
    return "passed" if ours <= MEMORY * bound else "failed"


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
        record: of this device, model, dtype and versions; None without one.
        published: figures that apply to this device and model.
        unused: why there is no record, or why it is not used.
        refused: a failed check for each way in which the record's environment differs.
    """

    record: Result | None = None
    published: tuple[Published, ...] = ()
    unused: str = ""
    refused: tuple[Check, ...] = ()


def checks_of(
    case: BenchCase,
    shape: Shape,
    measured: dict[str, Measured],
    against: Against,
    floor: float | None = None,
) -> list[Check]:
    """Return every check of one shape, from what was measured of `paged` and `default`.

    `floor` is the shortest possible time of a step in seconds; None if unknown.
    """
    what, ours, default = describe(case, shape), measured["paged"], measured["default"]
    if ours.samples.error:
        return [Check(what, "paged runs", ours.samples.error, "no error", "failed")]
    checks = _ceilings(case, shape, ours, against.published)
    if default.samples.error:
        checks.append(_default_failed(what, default.samples.error))
    else:
        ratio = paired_ratio(ours.samples.seconds, default.samples.seconds)
        checks.append(_time(what, "not slower than default", ratio, 1.0, LAW_SEEN))
        law = "not more memory than default"
        checks += _memory(what, law, ours.peak_bytes, default.peak_bytes)
    if against.record:
        checks += _against_record(case, shape, ours, against.record, floor)
    return checks


def _default_failed(what: str, error: str) -> Check:
    """Pass where only `default` ran out of memory; another failure of it leaves the check open."""
    verdict: Verdict = "passed" if "OutOfMemory" in error else "unmeasurable"
    return Check(what, "not slower than default", f"default: {error}", "-", verdict)


def _against_record(
    case: BenchCase, shape: Shape, ours: Measured, record: Result, floor: float | None
) -> list[Check]:
    """Compare time and memory; whatever the record lacks for that is a failed check."""
    what, seconds, time_law = describe(case, shape), ours.samples.seconds, "time as recorded"
    wanted = (case.name, "paged", shape.batch, shape.context, "")
    then = next((row for row in record.rows if row.key == wanted), None)
    if then is None or then.error:
        lack = then.error if then else "no such row"
        return [_lacking(what, law, lack) for law in (time_law, "memory as recorded")]
    was = then.latency_ms.median if then.latency_ms else None
    if was and then.floor_ms and floor:
        ratio = paired_ratio(seconds, [floor] * len(seconds))
        checks = [_time(what, time_law, ratio, was / then.floor_ms, SEEN)]
    else:
        checks = [_lacking(what, time_law, "no floor" if was else "no time")]
    if not then.peak_bytes:
        return [*checks, _lacking(what, "memory as recorded", "no peak memory")]
    return checks + _memory(what, "memory as recorded", ours.peak_bytes, then.peak_bytes)


_NOT_COMPARED = "not compared"


def _lacking(what: str, law: str, lack: str) -> Check:
    return Check(what, law, _NOT_COMPARED, f"record: {lack}", "failed")


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
    case: BenchCase, shape: Shape, ours: Measured, published: Sequence[Published]
) -> list[Check]:
    """Check the published figures, which are absolute: any median above them fails."""
    points = [study.find(case.name, "paged", *shape[:2]) for study in published]
    checks = []
    for point in (point for point in points if point):
        what, law = describe(case, shape), "below the published figure"
        found = ours.samples.latency().median / shape.batch
        verdict: Verdict = "passed" if found <= point.ms_per_query else "failed"
        bound = f"<= {point.ms_per_query:g} ms"
        checks.append(Check(what, law, f"{found:.2f} ms per query", bound, verdict))
        checks += _memory(what, law, ours.peak_bytes, int(point.peak_gb * 1e9))
    return checks


# -- running ------------------------------------------------------------------------------------


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
    shapes: Sequence[tuple[str, Shape]] = GATED,
    progress: Progress = silent,
) -> GateReport:
    """Measure and judge these shapes.

    Raises:
        CannotJudge: there is no CUDA device, or the runner fell back to a slower path.
    """
    refuse_where_blind(session)
    checks = list(against.refused)
    for done, (name, shape) in enumerate(shapes):
        progress(describe(CASES[name], shape), done, len(shapes))
        checks += judged(session, CASES[name], shape, against)
    incomplete = any(check.found == _NOT_COMPARED for check in checks)
    compared = "incomplete record" if incomplete else "recorded"
    return GateReport(
        passed=all(check.verdict == "passed" for check in checks),
        device=session.device_name,
        model=session.name,
        record="laws only" if against.record is None else compared,
        checks=checks,
    )


def judged(session: Session, case: BenchCase, shape: Shape, against: Against) -> list[Check]:
    """Return the checks of one shape; measure again while noise alone keeps it undecided.

    A failed check is final: another try could only measure it away.
    """
    checks: list[Check] = []
    for attempt in range(TRIES):
        pairs = PAIRS * 2**attempt
        repeats = Repeats(least=pairs, most=pairs, patience=math.inf)
        measured = session.measure(case, shape, GATED_MODES, repeats)
        checks = checks_of(case, shape, measured, against, session.floor(case, shape))
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


def against_records(records: Path, session: Session, published: Sequence[Published]) -> Against:
    """Return what a folder records for this GPU, model and dtype. Raises ResultFileError."""
    path, now = record_path(records, session.device_name), session.result([])
    fitting = tuple(p for p in published if p.applies_to(session.device_name, session.name))
    if not path.exists():
        return Against(None, fitting, f"{path} does not exist")
    record = read_result(path)
    if (record.model, record.dtype) != (now.model, now.dtype):
        which = f"({record.model or 'unnamed'}, {record.dtype or 'unnamed'})"
        return Against(None, fitting, f"{path} is for another model or dtype {which}")
    if refused := _differences(now, record):
        return Against(None, fitting, f"{path} is of another device or other versions", refused)
    return Against(record, fitting)


DEPENDS_ON = ("torch", "triton")
"""Versions that the time of `paged` depends on: its kernels come from these two."""


def _differences(now: Result, record: Result) -> tuple[Check, ...]:
    """Return a failed check for the device and for each named version that differs."""
    pairs = {"device": (now.device, record.device)}
    for name in DEPENDS_ON:
        if name in record.versions:
            pairs[name] = (now.versions.get(name, "not installed"), record.versions[name])
    return tuple(
        Check("record", f"{name} as recorded", here, there, "failed")
        for name, (here, there) in pairs.items()
        if here != there
    )


def record_path(records: Path, device: str) -> Path:
    """Return the file that holds the record of a GPU."""
    return records / f"{slug(device)}.json"


def how_to_record(unused: str) -> str:
    """Return advice for a run without a record; `unused` is the reason."""
    return (
        f"paged was compared with default only, not with a record: {unused}. "
        "In a clone of the repository, record this GPU with `nox -s perf_record`, "
        "read the difference and commit it."
    )
