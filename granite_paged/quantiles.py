"""Quantiles of a few numbers."""

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
