"""Results of a benchmark as one JSON object, written and read back.

::

    {"device", "model", "dtype", "versions", "seed", "rates", "rows": [
        {"case", "mode", "batch", "context",
         "latency_ms": {"median", "p10", "p90", "n"} | null,
         "tokens_per_second" | null, "peak_bytes" | null,
         "variant"?, "floor_ms"?, "floor_us"?, "sdpa_us"?, "paged_us"?, "note"?, "error"?}]}

A row that could not be measured is there all the same, with its `error`. What is read is checked
field by field, so that whoever uses a `Result` need not.
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
"""Case, mode, batch, context and variant: what tells one row from another."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one step over `n` repeats: median, and the tenth and ninetieth percentile.

    Published figures give the median alone.
    """

    median: float
    p10: float | None = None
    p90: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One case in one mode.

    Attributes:
        case, mode, batch, context: what ran; context in tokens a sequence.
        latency_ms: of one step; None where only memory was measured, or nothing.
        tokens_per_second: all tokens of the batch that one step takes in.
        peak_bytes: most device memory at once, the weights included, as `Clock.peak` counts it;
            None on the CPU.
        variant: what tells rows of one shape apart ("ragged 64-4096", "first token, empty cache").
        floor_ms: least time the device could take for the step; see `floor.py`.
        floor_us, sdpa_us, paged_us: of the `kernel` case.
        note: how the number came about, where that is not the usual way.
        error: why there is no number.
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
        """What tells this row from the others of its result."""
        return (self.case, self.mode, self.batch, self.context, self.variant)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device was measured to do: bytes copied and operations multiplied a second."""

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
        """Plain types only; the fields of the format are always there, the optional ones if set."""
        return typing.cast("dict[str, Any]", _plain(self))

    def find(self, case: str, mode: str, batch: int, context: int, variant: str = "") -> Row | None:
        """The row with that key, if it was measured."""
        wanted = (case, mode, batch, context, variant)
        return next((row for row in self.rows if row.key == wanted and not row.error), None)

    def measured(self, case: str, mode: str | None = None) -> list[Row]:
        """Rows of a case, and of a mode, that have no error, by batch and context."""
        rows = [row for row in self.rows if row.case == case and mode in (None, row.mode)]
        return sorted((r for r in rows if not r.error), key=lambda row: (row.batch, row.context))


def updated(old: Result, new: Result) -> Result:
    """`old` with the rows of `new` in the places of those that it measured again, or at the end.

    Raises:
        InvalidArgument: if they are not of one device, model, dtype, seed and set of versions.
    """
    for name in ("device", "model", "dtype", "versions", "seed"):
        if getattr(old, name) != getattr(new, name):
            raise InvalidArgument(
                f"results of different {name} make no one record: "
                f"{getattr(old, name)} and {getattr(new, name)}; write to another file"
            )
    rows: list[Row] = []
    for row in old.rows:
        rows += [found for found in new.rows if _replaces(found, row)] or [row]
    return replace(new, rows=list(dict.fromkeys([*rows, *new.rows])))


def _replaces(new: Row, old: Row) -> bool:
    """Whether both answer the same question. How many sequences fit is an answer, and a failure
    answers for every variant of its shape.
    """
    if (new.case, new.mode, new.context) != (old.case, old.mode, old.context):
        return False
    same_batch = new.batch == old.batch or new.case == "memory"
    return same_batch and (new.variant == old.variant or bool(old.error))


def slug(device: str) -> str:
    """A device's name as the name of a file: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read_result(path: str | Path) -> Result:
    """Read and check one file. Raises ResultFileError, which names the file and the field."""
    result: Result = read_as(Result, path)
    _check_unique(result.rows, str(path))
    return result


def writable_folder(folder: Path) -> Path:
    """The folder, made if it was missing. Raises CannotWrite."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_as(kind: Any, path: str | Path) -> Any:
    """A JSON file as a dataclass, every field checked. Raises ResultFileError."""
    return read_json(kind, path, ResultFileError)


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
    """Optional fields that say nothing stay out of the file."""
    return place.name in _ALWAYS or getattr(value, place.name) not in (None, "")
