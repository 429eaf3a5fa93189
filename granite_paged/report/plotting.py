"""What all figures need: matplotlib, from the extra `plot`, and how numbers are written."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from granite_paged.errors import MissingExtra


def check_matplotlib() -> None:
    """Raises MissingExtra without it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", extra="plot")


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files. Raises MissingExtra without matplotlib."""
    check_matplotlib()
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def short_count(number: float) -> str:
    """Tokens or rows at an axis: 512, 4k."""
    whole = int(number)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)
