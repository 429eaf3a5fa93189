"""How far identical code strays: the gate's bound for each shape, from suites that were repeated.

A suite measures each gated shape once and finds one number for it: time over floor. A calibration
is a list of sessions (processes, on one machine or on several) of suites each, all of identical
code. The calibrated value is the mean over sessions of the mean logarithm. The next suite differs
from it for two reasons:

- Suites of one session differ. Over its standard deviation, ``sd * sqrt(1 + 1 / suites)``, that
  difference follows Student's t distribution. `noise` is the quantile at 1 - 0.01 / shapes: at
  most one suite of 100 exceeds it in any of its shapes.
- Sessions differ, as hosts and boards do. There are too few of them for a quantile, so `hosts` is
  an allowance: `HOSTS`, or how far the calibration's own sessions are from their mean, if that is
  more.

The bound is both together, and never below `LEAST`. A slowdown is seen unless noise hides it:
`sees` is the one that at most one suite of 100 misses on a machine that is faster by `hosts`. The
unit is the suite, so no step is taken to be independent of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from granite_paged.quantiles import student_t_quantile
from granite_paged.report.bench_results import CalibratedShape

ALARMS = 0.01
"""Suites of identical code that may be called slower, as a share."""

MISSES = 0.01
"""Suites in which a slowdown of `Bound.sees` may pass, as a share."""

HOSTS = 0.01
"""Relative difference of sessions on hosts and boards of one kind that is always allowed."""

LEAST = 0.02
"""Smallest bound on an excess."""

LEAST_DOF = 4
"""Fewest degrees of freedom (suites less sessions) that a spread can be estimated from."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a shape's time over floor is compared with.

    Attributes:
        base: calibrated time over floor.
        spread: standard deviation of the next suite of the same session, of its logarithm.
        noise: relative excess that identical code reaches in `ALARMS` of all suites.
        hosts: relative difference that is allowed between sessions.
        sees: relative slowdown that passes in `MISSES` of all suites.
    """

    base: float
    spread: float
    noise: float
    hosts: float
    sees: float

    @property
    def allowed(self) -> float:
        """Relative excess over `base` that passes."""
        return max((1 + self.noise) * (1 + self.hosts) - 1, LEAST)


def bound_of(sessions: Sequence[Sequence[float]], checks: int) -> Bound | None:
    """Derive the bound of a shape from time over floor of each suite, session by session.

    Args:
        sessions: time over floor of each suite; all positive.
        checks: number of time checks in a suite, which share the false alarms.

    Returns:
        None where there are too few suites to estimate a spread.
    """
    logs = [[math.log(ratio) for ratio in suites] for suites in sessions if suites]
    count = sum(map(len, logs))
    dof = count - len(logs)
    if dof < LEAST_DOF:
        return None
    means = [fmean(suites) for suites in logs]
    squares = sum((x - m) ** 2 for suites, m in zip(logs, means, strict=True) for x in suites)
    spread = math.sqrt(squares / dof * (1 + 1 / count))
    noise = math.expm1(student_t_quantile(1 - ALARMS / checks, dof) * spread)
    hosts = max(HOSTS, math.expm1(max(abs(mean - fmean(means)) for mean in means)))
    bound = Bound(math.exp(fmean(means)), spread, noise, hosts, 0.0)
    hidden = math.exp(student_t_quantile(1 - MISSES, dof) * spread)
    return replace(bound, sees=(1 + bound.allowed) * (1 + hosts) * hidden - 1)


# -- false alarms -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alarms:
    """How many of the calibration's suites are called slower by the bounds from the others."""

    suites: int
    red: int

    @property
    def at_most(self) -> float:
        """Upper end of the 95 % interval of the rate (Clopper and Pearson, one-sided)."""
        low, high = 0.0, 1.0
        for _ in range(50):
            rate = (low + high) / 2
            low, high = (rate, high) if self._chance(rate) > 0.05 else (low, rate)
        return high

    def _chance(self, rate: float) -> float:
        """Return the probability of `red` suites or fewer at this rate."""
        n = self.suites
        return sum(
            math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(min(self.red, n) + 1)
        )


def false_alarms(shapes: Sequence[CalibratedShape]) -> Alarms:
    """Judge each suite by the bounds that the other suites give; count suites with any shape red.

    A shape that was added to a record later has only the last of the sessions, so the suites of
    earlier ones are not counted. Neither are suites that cannot be left out, because too few
    remain.
    """
    timed = [shape.sessions for shape in shapes if shape.sessions]
    common = min(map(len, timed), default=0)
    places = [
        (session, suite)
        for session in range(-common, 0)
        for suite in range(min(len(sessions[session]) for sessions in timed))
    ]
    verdicts = [_alarm(timed, *place) for place in places]
    return Alarms(len(verdicts) - verdicts.count(None), verdicts.count(True))


def _alarm(timed: Sequence[list[list[float]]], session: int, suite: int) -> bool | None:
    """Whether one suite is red in any shape; None without a bound.

    Args:
        session: counted from the last one, which is -1.
    """
    red = False
    for sessions in timed:
        others = [list(suites) for suites in sessions]
        found = others[session].pop(suite)
        bound = bound_of(others, len(timed))
        if bound is None:
            return None
        red |= found > bound.base * (1 + bound.allowed)
    return red
