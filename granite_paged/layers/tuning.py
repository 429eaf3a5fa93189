"""Constants that the rules of kernel options go by, as `granite-paged tune` last wrote them.

::

    {"device", "torch", "triton",        where the constants come from
     "decode":   [{"batch", "parts_per_multiprocessor", "block", "warps", "stages"}],
     "prefill":  {"BLOCK_M", "BLOCK_N", "warps", "stages"},
     "one_row":  [{"gated", "few_columns", "COLUMNS", "warps"}],
     "few_rows": [{"rows", "gated", "few_columns",
                   "COLUMNS", "DEPTH", "SPLITS", "warps", "stages"}],
     "microseconds"?: {shape: of one call, or one step, with these constants}}

The rules: `DecodePlan.choose` and `kernel_options` for attention, `triton.linear.tiles` for products.
The file travels with the package and is checked once, when this is imported.
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
"""Rows that one program of a product takes; Triton's matrix product needs 16."""


@dataclass(frozen=True, slots=True)
class DecodeConstants:
    """Decode attention, from a batch of this size on.

    parts_per_multiprocessor: programs that the pages of a batch are shared out over. block: tokens
    of a kernel's block, at most.
    """

    batch: int
    parts_per_multiprocessor: float
    block: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class PrefillConstants:
    """Prefill attention: folded query rows and tokens of a kernel's block, at most."""

    BLOCK_M: int
    BLOCK_N: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class OneRowConstants:
    """A product of one row: whole columns a program, at most."""

    gated: bool
    few_columns: bool
    COLUMNS: int
    warps: int


@dataclass(frozen=True, slots=True)
class FewRowsConstants:
    """A product of at most so many rows. SPLITS: parts of the depth, at most."""

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
    """All constants, and where they come from.

    decode is ascending in batch, from 1 on; one_row and few_rows have one entry for each case.
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
        """As the file has it; without times where there are none."""
        data = asdict(self)
        if not self.microseconds:
            del data["microseconds"]
        return data

    def having(self, constants: Constants) -> Tuned:
        """A copy with these in place of those of the same case, or beside them."""
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
        """Those of the nearest measured batch at or below."""
        return [c for c in self.decode if c.batch <= max(1, batch)][-1]

    def for_one_row(self, *, gated: bool, few_columns: bool) -> OneRowConstants:
        """Those of a product of one row."""
        case = (gated, few_columns)
        return next(c for c in self.one_row if (c.gated, c.few_columns) == case)

    def for_few_rows(self, rows: int, *, gated: bool, few_columns: bool) -> FewRowsConstants:
        """Those of the least tile that holds so many rows, or of the largest."""
        tile = next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
        case = (tile, gated, few_columns)
        return next(c for c in self.few_rows if (c.rows, c.gated, c.few_columns) == case)


def _merged(old: Sequence[Any], new: Any, *names: str) -> list[Any]:
    """Old entries in their order, the one of `new`'s case replaced; else `new` behind them."""
    by_case = {tuple(getattr(entry, name) for name in names): entry for entry in (*old, new)}
    return list(by_case.values())


def read_tuned(path: str | Path) -> Tuned:
    """Read and check a file. Raises TunedFileError, which names the file and the field."""
    tuned: Tuned = read_json(Tuned, path, TunedFileError)
    _check_cases(tuned, str(path))
    for place, constants in _places(tuned):
        _check_numbers(constants, str(path), place)
    return tuned


def _check_cases(tuned: Tuned, path: str) -> None:
    """Every case that a rule may ask for is there, once."""
    batches = [c.batch for c in tuned.decode]
    if batches[:1] != [1] or batches != sorted(set(batches)):
        raise TunedFileError(path, "decode", f"must ascend from batch 1 on, {batches} given")
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
            raise TunedFileError(path, name, f"must have each of {len(cases)} cases once")


def _places(tuned: Tuned) -> list[tuple[str, Any]]:
    """Each entry with its name in the file."""
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
"""What must be one, and the least that the kernels take."""


def _check_numbers(constants: Any, path: str, place: str) -> None:
    powers = _POWERS_OF_TWO[type(constants)]
    for f in fields(constants):
        value, name, least = getattr(constants, f.name), f"{place}.{f.name}", powers.get(f.name)
        if least is not None and (value < least or value & (value - 1)):
            problem = f"must be a power of two of at least {least}, {value} given"
            raise TunedFileError(path, name, problem)
        if type(value) is not bool and value <= 0:
            raise TunedFileError(path, name, f"must be above 0, {value} given")


TUNED = read_tuned(PATH)
