"""How numbers are written in tables and figures."""

from __future__ import annotations


def significant(number: float | None) -> str:
    """Return at least three significant digits; a dash for None."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def gigabytes(count: int | None, digits: int = 2) -> str:
    """Return bytes as GB (10^9 bytes); a dash for None and 0."""
    return f"{count / 1e9:.{digits}f}" if count else "-"


def ratio(numerator: float | None, denominator: float | None) -> str:
    """Return a quotient; a dash where a part is missing or 0."""
    return f"{numerator / denominator:.2f}" if numerator and denominator else "-"


def short_count(number: float) -> str:
    """Return a count at an axis: 512, 4k (multiples of 1,024)."""
    whole = int(number)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)
