"""Block sizes, splits, stages and warps of the products in `linear.py`.

Weights are read once, so the goal is to keep enough bytes in flight. With one row, a program reads
whole columns in one load. With more rows, a program takes a block of columns; where such blocks are
too few to fill the device, the depth is split as well. The measured sizes are in `tuning`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from granite_paged.geometry import bucket
from granite_paged.layers.tuning import TUNED, FewRowsConstants, OneRowConstants, Tuned

FEW_COLUMNS = 32
"""Columns per multiprocessor below which one block of columns each would leave some idle."""

ONE_LOAD = 16384
"""Most weights that a program with one row holds in registers at once."""

_CONSTANTS = ContextVar("_CONSTANTS", default=TUNED)


@contextlib.contextmanager
def using(tuned: Tuned) -> Iterator[None]:
    """Let products use these constants instead of the packaged ones, within the context."""
    before = _CONSTANTS.set(tuned)
    try:
        yield
    finally:
        _CONSTANTS.reset(before)


def tiles(rows: int, columns: int, depth: int, gated: bool, multiprocessors: int) -> dict[str, int]:
    """Return the kernel options for a product [rows, depth] x [columns, depth]^T."""
    few_columns = has_few_columns(columns, multiprocessors)
    tuned = _CONSTANTS.get()
    if rows == 1:
        return one_row_tiles(tuned.for_one_row(gated=gated, few_columns=few_columns), depth)
    return few_rows_tiles(tuned.for_few_rows(rows, gated=gated, few_columns=few_columns), depth)


def has_few_columns(columns: int, multiprocessors: int) -> bool:
    """Return whether a product has too few columns to fill the device."""
    return columns < FEW_COLUMNS * multiprocessors


def one_row_tiles(constants: OneRowConstants, depth: int) -> dict[str, int]:
    """Return the kernel options that these constants give a product with one row."""
    whole = bucket(depth)
    together = max(1, min(constants.COLUMNS, ONE_LOAD // whole))
    return {"COLUMNS": together, "DEPTH": whole, "num_warps": constants.warps}


def few_rows_tiles(constants: FewRowsConstants, depth: int) -> dict[str, int]:
    """Return the kernel options that these constants give a product with several rows."""
    return {
        "ROWS": constants.rows,
        "COLUMNS": constants.COLUMNS,
        "DEPTH": constants.DEPTH,
        "SPLITS": min(constants.SPLITS, -(-depth // constants.DEPTH)),
        "num_warps": constants.warps,
        "num_stages": constants.stages,
    }
