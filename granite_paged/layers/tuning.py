"""Measured constants for kernel options, as `granite-paged tune --write` last wrote them.

::

    {"device", "torch", "triton",        where the constants were measured
     "decode":   [{"batch", "parts_per_multiprocessor", "block", "warps", "stages"}],
     "prefill":  {"BLOCK_M", "BLOCK_N", "warps", "stages"},
     "one_row":  [{"gated", "few_columns", "COLUMNS", "warps"}],
     "few_rows": [{"rows", "gated", "few_columns",
                   "COLUMNS", "DEPTH", "SPLITS", "warps", "stages"}],
     "microseconds"?: {shape: time of one call, or of one decode step, with these constants}}

`DecodePlan.choose` and `kernel_options` turn them into options of the attention kernels,
`triton.tiles` into options of the products. The file is part of the package, and is checked once,
when this module is imported.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from granite_paged.errors import TunedFileError
from granite_paged.typed_json import read_json

PATH = Path(__file__).with_name("tuned.json")

ROW_TILES = (16, 32, 64)
"""Rows per program of a product; Triton's matrix product needs at least 16."""


@dataclass(frozen=True, slots=True)
class DecodeConstants:
    """Constants for decode attention, for batches of at least this size.

    Attributes:
        batch: the smallest batch that they apply to.
        parts_per_multiprocessor: programs per multiprocessor that a batch's pages are divided over.
        block: tokens per block of the kernel; a page's tokens, if those are fewer.
        warps, stages: warps per program and stages of its load pipeline.
    """

    batch: int
    parts_per_multiprocessor: float
    block: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class PrefillConstants:
    """Constants for prefill attention.

    Attributes:
        BLOCK_M: folded query rows per block of the kernel.
        BLOCK_N: tokens per block; a page's tokens, if those are fewer.
        warps, stages: warps per program and stages of its load pipeline.
    """

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class OneRowConstants:
    """Constants for a product with one row.

    Attributes:
        gated: whether the product is gated.
        few_columns: whether it has too few columns to fill the device.
        COLUMNS: columns per program, at most; each is read as a whole.
        warps: warps per program.
    """

    gated: bool
    few_columns: bool
    COLUMNS: int
    warps: int


@dataclass(frozen=True, slots=True)
class FewRowsConstants:
    """Constants for a product with several rows.

    Attributes:
        rows: rows per program, one of `ROW_TILES`.
        gated, few_columns: as in `OneRowConstants`.
        COLUMNS, DEPTH: columns and depth of a block.
        SPLITS: parts that the depth is divided into, at most.
        warps, stages: warps per program and stages of its load pipeline.
    """

    rows: int
    gated: bool
    few_columns: bool
    COLUMNS: int
    DEPTH: int
    SPLITS: int
    warps: int
    stages: int


Constants = DecodeConstants | PrefillConstants | OneRowConstants | FewRowsConstants


@dataclass(frozen=True, slots=True)
class Tuned:
    """All constants, and the device and versions they were measured with.

    `decode` ascends in batch, starting at 1; `one_row` and `few_rows` have one entry per case.
    """

    device: str
    torch: str
    triton: str
    decode: list[DecodeConstants]
    prefill: PrefillConstants
    one_row: list[OneRowConstants]
    few_rows: list[FewRowsConstants]
    microseconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        data = asdict(self)
        if not self.microseconds:
            del data["microseconds"]
        return data

    def having(self, constants: Constants) -> Tuned:
        """Return a copy in which `constants` replace those of the same case, or are added."""
        if isinstance(constants, PrefillConstants):
            return replace(self, prefill=constants)
        if isinstance(constants, DecodeConstants):
            decode = _merged(self.decode, constants, "batch")
            return replace(self, decode=sorted(decode, key=lambda c: c.batch))
        if isinstance(constants, OneRowConstants):
            return replace(self, one_row=_merged(self.one_row, constants, "gated", "few_columns"))
        few_rows = _merged(self.few_rows, constants, "rows", "gated", "few_columns")
        return replace(self, few_rows=few_rows)

    def for_batch(self, batch: int) -> DecodeConstants:
        """Return the constants of the largest measured batch that is not above `batch`."""
        return [c for c in self.decode if c.batch <= max(1, batch)][-1]

    def for_one_row(self, *, gated: bool, few_columns: bool) -> OneRowConstants:
        """Return the constants for a product with one row."""
        case = (gated, few_columns)
        return next(c for c in self.one_row if (c.gated, c.few_columns) == case)

    def for_few_rows(self, rows: int, *, gated: bool, few_columns: bool) -> FewRowsConstants:
        """Return the constants of the smallest tile that holds `rows` rows, else of the largest."""
        tile = next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
        case = (tile, gated, few_columns)
        return next(c for c in self.few_rows if (c.rows, c.gated, c.few_columns) == case)


def _merged(old: Sequence[Any], new: Any, *names: str) -> list[Any]:
    """Replace the entry that equals `new` in these fields; append `new` if there is none."""
    by_case = {tuple(getattr(entry, name) for name in names): entry for entry in (*old, new)}
    return list(by_case.values())


def read_tuned(path: str | Path) -> Tuned:
    """Read and check a file of constants.

    Raises:
        TunedFileError: with the file, the field and the problem.
    """
    tuned: Tuned = read_json(Tuned, path, TunedFileError)
    _check_cases(tuned, str(path))
    for place, constants in _places(tuned):
        _check_numbers(constants, str(path), place)
    return tuned


def _check_cases(tuned: Tuned, path: str) -> None:
    """Check that the file has each case that may be looked up, once."""
    batches = [c.batch for c in tuned.decode]
    if batches[:1] != [1] or batches != sorted(set(batches)):
        raise TunedFileError(path, "decode", f"must ascend from batch 1 on, got {batches}")
    flags = (False, True)
    expected: dict[str, list[Any]] = {
        "one_row": list(itertools.product(flags, flags)),
        "few_rows": list(itertools.product(ROW_TILES, flags, flags)),
    }
    there: dict[str, list[Any]] = {
        "one_row": [(c.gated, c.few_columns) for c in tuned.one_row],
        "few_rows": [(c.rows, c.gated, c.few_columns) for c in tuned.few_rows],
    }
    for name, cases in expected.items():
        if sorted(there[name]) != sorted(cases):
            raise TunedFileError(path, name, f"must have each of the {len(cases)} cases once")


def _places(tuned: Tuned) -> list[tuple[str, Any]]:
    """Return each entry with its name in the file."""
    lists: dict[str, Sequence[Any]] = {
        name: getattr(tuned, name) for name in ("decode", "one_row", "few_rows")
    }
    entries = [(f"{name}[{i}]", c) for name, all_ in lists.items() for i, c in enumerate(all_)]
    return [("prefill", tuned.prefill), *entries]


_POWERS_OF_TWO: dict[type, dict[str, int]] = {
    DecodeConstants: {"block": 16, "warps": 1},
    PrefillConstants: {"BLOCK_M": 16, "BLOCK_N": 16, "warps": 1},
    OneRowConstants: {"COLUMNS": 1, "warps": 1},
    FewRowsConstants: {"COLUMNS": 16, "DEPTH": 64, "warps": 1},
}
"""Fields that must be powers of two, with the smallest value that the kernels accept."""


def _check_numbers(constants: Any, path: str, place: str) -> None:
    powers = _POWERS_OF_TWO[type(constants)]
    for f in fields(constants):
        value, name, least = getattr(constants, f.name), f"{place}.{f.name}", powers.get(f.name)
        if least is not None and (value < least or value & (value - 1)):
            problem = f"must be a power of two of at least {least}, got {value}"
            raise TunedFileError(path, name, problem)
        if type(value) is not bool and value <= 0:
            raise TunedFileError(path, name, f"must be above 0, got {value}")


TUNED = read_tuned(PATH)
