"""Step times with the noise that was measured on an H100: steps in a row resemble each other."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Noise:
    """Noise of a step's logarithm.

    Attributes:
        drift: standard deviation of the part that lasts.
        memory: autocorrelation of that part from one step to the next.
        jitter: standard deviation of each step's own part.
        stalls: share of steps that take half as long again.
    """

    drift: float
    memory: float
    jitter: float
    stalls: float = 0.01

    def steps(self, draw: random.Random, count: int) -> list[float]:
        """Return the times of `count` steps in a row; the usual time is 1."""
        state, fresh = draw.gauss(0, self.drift), math.sqrt(1 - self.memory**2) * self.drift
        times = []
        for _ in range(count):
            state = self.memory * state + draw.gauss(0, fresh)
            stall = 1.5 if draw.random() < self.stalls else 1.0
            times.append(stall * math.exp(state + draw.gauss(0, self.jitter)))
        return times

    def visit(self, draw: random.Random, count: int = 40) -> float:
        """Return the median time of one visit."""
        return median(self.steps(draw, count))


DECODE_8 = Noise(drift=0.008, memory=0.97, jitter=0.004)
DECODE_32 = Noise(drift=0.0018, memory=0.8, jitter=0.003, stalls=0.02)
PREFILL_8 = Noise(drift=0.006, memory=0.75, jitter=0.009, stalls=0.02)
"""Profiles of three shapes, like decode of 8 and 32 sequences and prefill of 8."""

VISITS_STRAY = {DECODE_8: 0.0069, DECODE_32: 0.0011, PREFILL_8: 0.0033}
"""Standard deviation that was measured of the medians of visits of 40 steps."""
