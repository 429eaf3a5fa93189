"""Results of a benchmark as one JSON object, written and read back.

::

    {"device", "model", "dtype", "versions", "seed", "rates", "rows": [
        {"case", "mode", "batch", "context",
         "latency_ms": {"median", "p10", "p90", "n"} | null,
         "tokens_per_second" | null, "peak_bytes" | null,
         "variant"?, "floor_ms"?, "floor_us"?, "sdpa_us"?, "paged_us"?, "note"?, "error"?}]}

A row that could not be measured is present, with its `error`. What is read is checked field by
field, so that tables and figures need no checks.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from granite_paged.errors import InvalidArgument, ResultFileError, writing
from granite_paged.typed_json import read_json

Key = tuple[str, str, int, int, str]
"""Case, mode, batch, context and variant, which identify a row of a result."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one step over `n` repeats: median, 10th and 90th percentile."""

    median: float
    p10: float | None = None
    p90: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One case in one mode.

    Attributes:
        case, mode, batch, context: what ran; context in tokens per sequence.
        latency_ms: time of one step; None where only memory was measured.
        tokens_per_second: input tokens of the whole batch per second of step time.
        peak_bytes: peak device memory, weights included, as `Clock.peak` counts it; None on the
            CPU.
        variant: distinguishes rows of one shape ("ragged 64-4096", "first token, empty cache").
        floor_ms: least time that the device could take for the step; see `bench/roofline.py`.
        floor_us, sdpa_us, paged_us: microseconds of one layer's attention, in the `kernel` case.
        note: how the number was obtained, where that is unusual.
        error: why the row has no number.
    """

    case: str
    mode: str
    batch: int
    context: int
    latency_ms: Latency | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    variant: str = ""
    floor_ms: float | None = None
    floor_us: float | None = None
    sdpa_us: float | None = None
    paged_us: float | None = None
    note: str = ""
    error: str = ""

    @property
    def key(self) -> Key:
        """Return what identifies this row in its result."""
        return (self.case, self.mode, self.batch, self.context, self.variant)


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured peak rates of the device: copies and matrix products."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, slots=True)
class Result:
    """Everything one run of the benchmark measured."""

    device: str
    versions: dict[str, str]
    seed: int
    rows: list[Row]
    model: str = ""
    dtype: str = ""
    rates: Rates | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain types only; optional fields are left out where they are not set."""
        return typing.cast("dict[str, Any]", _plain(self))

    def find(self, case: str, mode: str, batch: int, context: int, variant: str = "") -> Row | None:
        """Return the row with that key, or None if it was not measured."""
        wanted = (case, mode, batch, context, variant)
        return next((row for row in self.rows if row.key == wanted and not row.error), None)

    def measured(self, case: str, mode: str | None = None) -> list[Row]:
        """Return the rows of a case without an error, sorted by batch and context."""
        rows = [row for row in self.rows if row.case == case and mode in (None, row.mode)]
        return sorted((r for r in rows if not r.error), key=lambda row: (row.batch, row.context))


def updated(old: Result, new: Result) -> Result:
    """Return `old` with its rows replaced where `new` measured them again, and new rows appended.

    Raises:
        InvalidArgument: if device, model, dtype, versions or seed differ.
    """
    for name in ("device", "model", "dtype", "versions", "seed"):
        if getattr(old, name) != getattr(new, name):
            raise InvalidArgument(
                f"cannot merge results of different {name}: "
                f"{getattr(old, name)} and {getattr(new, name)}; write to another file"
            )
    rows: list[Row] = []
    for row in old.rows:
        rows += [found for found in new.rows if _replaces(found, row)] or [row]
    return replace(new, rows=list(dict.fromkeys([*rows, *new.rows])))


def _replaces(new: Row, old: Row) -> bool:
    """Whether `new` measures what `old` did.

    In the `memory` case the batch is the measurement. An error stands for all variants of a shape.
    """
    if (new.case, new.mode, new.context) != (old.case, old.mode, old.context):
        return False
    same_batch = new.batch == old.batch or new.case == "memory"
    return same_batch and (new.variant == old.variant or bool(old.error))


def slug(device: str) -> str:
    """Return a device's name as a file name: `NVIDIA H200` becomes `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read_result(path: str | Path) -> Result:
    """Read and check one file. Raises ResultFileError, which names the file and the field."""
    result: Result = read_json(Result, path, ResultFileError)
    _check_unique(result.rows, str(path))
    return result


def writable_folder(folder: Path) -> Path:
    """Make a folder if it is missing, and return it. Raises CannotWrite."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_unique(rows: Sequence[Row], path: str) -> None:
    seen: dict[Key, int] = {}
    for place, row in enumerate(rows):
        first = seen.setdefault(row.key, place)
        if first != place:
            raise ResultFileError(path, f"rows[{place}]", f"repeats rows[{first}]")


# -- to plain types -----------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if _kept(f, value)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


_ALWAYS = ("latency_ms", "tokens_per_second", "peak_bytes", "model", "dtype")


def _kept(place: Any, value: Any) -> bool:
    """Whether a field goes into the file: always, or because it is set."""
    return place.name in _ALWAYS or getattr(value, place.name) not in (None, "")
