"""Quantiles of a few numbers, and of Student's t distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable


def quantile(numbers: Iterable[float], part: float) -> float:
    """Return a quantile, interpolated linearly between neighbours. Raises ValueError for none.

    Args:
        numbers: in any order.
        part: 0 for the smallest number, 0.5 for the median, 1 for the largest.
    """
    ordered = sorted(numbers)
    if not ordered:
        raise ValueError("no numbers, so no quantile")
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def student_t_quantile(part: float, dof: int) -> float:
    """Return a quantile of Student's t distribution, above its median.

    Args:
        part: from 0.5 on, below 1.
        dof: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _t_within(high, dof) < 2 * part - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, dof) < 2 * part - 1 else (low, middle)
    return high


def _t_within(t: float, dof: int) -> float:
    """Return the probability that a t variable lies within -t and t.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(dof))
    square, odd = math.cos(angle) ** 2, dof % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for order in range(2 + odd, dof + 1, 2):
        total += term
        term *= (order - 1) / order * square
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
