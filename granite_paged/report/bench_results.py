"""Results of a benchmark as one JSON object, written and read back.

::

    {"device", "model", "dtype", "versions", "seed", "rates", "rows": [
        {"case", "mode", "batch", "context",
         "latency_ms": {"median", "p10", "p90", "n"} | null,
         "tokens_per_second" | null, "peak_bytes" | null,
         "variant"?, "floor_ms"?, "floor_us"?, "sdpa_us"?, "paged_us"?, "note"?, "error"?,
         "mamba"?, "clock_mhz"?, "busy"?}],
     "calibration"?: {"page_size", "backend", "visits", "shapes": [
        {"case", "batch", "context", "sessions", "floor_ms"?, "peak_bytes"?, "busy"?,
         "clock_mhz"?}]}}

A row that could not be measured is present, with its `error`. What is read is checked field by
field, names of cases and modes too, so that tables and figures need no checks.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from granite_paged.errors import InvalidArgument, ResultFileError, writing
from granite_paged.names import CASE_NAMES, MAMBA_PACKAGES, MODES
from granite_paged.typed_json import Share, read_json

Key = tuple[str, str, int, int, str]
"""Case, mode, batch, context and variant, which identify a row of a result."""


WITH_MAMBA_SSM = "mamba_ssm"
"""Variant of rows for which transformers' modes had Mamba kernels of other packages."""


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
        mamba: what transformers' modes ran Mamba layers with: its reference code, or the versions
            of mamba_ssm and causal_conv1d.
        clock_mhz: clock of the multiprocessors, read right after the row was measured.
        busy: share of time in which the GPU ran kernels, as the driver reports it at that moment.
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
    mamba: str = ""
    clock_mhz: int | None = None
    busy: Share | None = None

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
class CalibratedShape:
    """What suites of identical code found of `paged` in one shape.

    Attributes:
        case, batch, context: as in `Row`.
        sessions: time over floor of each suite, session by session; empty where only memory counts.
        floor_ms: shortest possible time of a step.
        peak_bytes: most of all suites.
        busy: time on the device over time of the whole step, from an idle device to its end.
        clock_mhz: lowest and highest clock of the multiprocessors that was read after a suite.
    """

    case: str
    batch: int
    context: int
    sessions: list[list[float]]
    floor_ms: float | None = None
    peak_bytes: int | None = None
    busy: float | None = None
    clock_mhz: list[int] | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        """Return case, batch and context."""
        return (self.case, self.batch, self.context)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the gate compares with, and the settings that it depends on.

    Attributes:
        page_size, backend: of `PagedConfig`.
        visits: visits of each shape in a suite.
    """

    page_size: int
    backend: str
    visits: int
    shapes: list[CalibratedShape]


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
    calibration: Calibration | None = None

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

    Versions of `MAMBA_PACKAGES` may differ: each row says what it was measured with.

    Raises:
        InvalidArgument: if device, model, dtype, other versions or seed differ.
    """
    for name in ("device", "model", "dtype", "versions", "seed"):
        before, after = (_comparable(getattr(result, name)) for result in (old, new))
        if before != after:
            raise InvalidArgument(
                f"cannot merge results of different {name}: {before} and {after}; "
                "write to another file"
            )
    rows: list[Row] = []
    for row in old.rows:
        rows += [found for found in new.rows if _replaces(found, row)] or [row]
    merged = list(dict.fromkeys([*rows, *new.rows]))
    calibration = new.calibration or old.calibration
    return replace(new, rows=merged, versions=old.versions, calibration=calibration)


def _comparable(value: Any) -> Any:
    """Return versions without `MAMBA_PACKAGES`, and anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {name: number for name, number in value.items() if name not in MAMBA_PACKAGES}


def _replaces(new: Row, old: Row) -> bool:
    """Whether `new` measures what `old` did.

    In the `memory` case the batch is the measurement. An error stands for all variants of a shape,
    except for those of transformers' modes, which say what ran the Mamba layers.
    """
    if (new.case, new.mode, new.context) != (old.case, old.mode, old.context):
        return False
    same_batch = new.batch == old.batch or new.case == "memory"
    return same_batch and (new.variant == old.variant or bool(old.error and not old.mamba))


def slug(device: str) -> str:
    """Return a device's name as a file name: `NVIDIA H200` becomes `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def model_key(model: str) -> str:
    """Return a model's name as a part of a file name: neither weights nor folder count.

    `granite-4.0-h-1b (random weights, seed 0)` and `ibm-granite/granite-4.0-h-1b` both become
    `granite-4.0-h-1b`: the time of a step depends on neither.
    """
    name = model.partition(" (")[0].rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9.-]+", "-", name).strip("-.") or "unnamed"


def record_name(device: str, model: str, dtype: str) -> str:
    """Return the name of the file that holds a record, which GPU, model and dtype identify."""
    return f"{slug(device)}.{model_key(model)}.{slug(dtype)}.json"


def read_result(path: str | Path) -> Result:
    """Read and check one file. Raises ResultFileError, which names the file and the field."""
    result: Result = read_json(Result, path, ResultFileError)
    _check_names(result.rows, str(path))
    _check_unique(result.rows, str(path))
    return result


def writable_folder(folder: Path) -> Path:
    """Make a folder if it is missing, and return it. Raises CannotWrite."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_names(rows: Sequence[Row], path: str) -> None:
    for place, row in enumerate(rows):
        for field, name, known in (("case", row.case, CASE_NAMES), ("mode", row.mode, MODES)):
            if name not in known:
                problem = f"must be one of {', '.join(known)}, got {name!r:.40}"
                raise ResultFileError(path, f"rows[{place}].{field}", problem)


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
