"""Results as they lie in files: of evaluations, of benchmarks, and of the original study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite_paged.errors import DataError

Json = dict[str, Any]

_STUDY = Path(__file__).with_name("original_study.json")


@dataclass(frozen=True)
class Entry:
    """One task of one evaluation.

    Attributes:
        label: what tells it from the others in a report.
        modes: each mode's `ModeMetrics`, in plain types.
        agreement: each other mode's `Agreement`, in plain types.
    """

    label: str
    task: str
    model: str
    device: str
    dtype: str
    versions: dict[str, str]
    modes: dict[str, Json]
    agreement: dict[str, Json]

    @property
    def where(self) -> str:
        """Machine, model and versions, in one line."""
        names = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device}; {self.model}, {self.dtype}; {names}"


@dataclass(frozen=True)
class BenchRow:
    """One measurement of a benchmark, made on `where`; times in milliseconds of a whole batch."""

    where: str

    case: str
    mode: str
    batch: int
    context: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    peak_bytes: int | None


def entries(evaluations: Sequence[Json]) -> list[Entry]:
    """Of several evaluations, as `Evaluation.to_json` makes them."""
    several_devices = len({run["device"] for run in evaluations}) > 1
    return [
        Entry(
            label=_label(run, name, with_device=several_devices),
            task=name,
            model=run["model"],
            device=run["device"],
            dtype=run["dtype"],
            versions=run["versions"],
            modes=task["modes"],
            agreement=task["agreement"],
        )
        for run in evaluations
        for name, task in run["tasks"].items()
    ]


def read_evaluation(path: str) -> Json:
    """A file that `granite-paged eval --json` wrote. Raises DataError, naming file and field."""
    run = _read_object(path)
    wanted = ("model", "device", "dtype", "batch", "versions", "tasks")
    missing = [name for name in wanted if name not in run]
    if missing:
        raise DataError(
            path, f"field {missing[0]!r} is missing: not a result of granite-paged eval"
        )
    return run


def read_bench(path: str) -> list[BenchRow]:
    """The timed rows of a benchmark's file; those without a time are passed over.

    Raises DataError, naming file, row and field.
    """
    content = _read_object(path)
    rows, device = content.get("rows"), content.get("device")
    if not isinstance(rows, list) or not isinstance(device, str):
        raise DataError(path, "no device and rows: not a result of granite-paged bench")
    read = (_bench_row(path, device, number, row) for number, row in enumerate(rows, start=1))
    return [row for row in read if row is not None]


def original_study() -> Json:
    """The tables that the original study published."""
    return _read_object(str(_STUDY))


def _label(run: Json, task: str, *, with_device: bool) -> str:
    shots = f" {run['tasks'][task]['fewshot']}-shot" if task == "mmlu" else ""
    rows = "one by one" if run["batch"] == 1 else f"batch {run['batch']}"
    device = f", {run['device'].removeprefix('NVIDIA ')}" if with_device else ""
    return f"{task}{shots}, {rows}{device}"


def _bench_row(path: str, device: str, number: int, row: Any) -> BenchRow | None:
    try:
        times = row["latency_ms"]
        if times is None:  # only memory was measured, or nothing could be
            return None
        return BenchRow(
            where=device,
            case=row["case"],
            mode=row["mode"],
            batch=int(row["batch"]),
            context=int(row["context"]),
            median_ms=float(times["median"]),
            p10_ms=float(times.get("p10") or times["median"]),
            p90_ms=float(times.get("p90") or times["median"]),
            peak_bytes=row.get("peak_bytes"),
        )
    except KeyError as error:
        raise DataError(path, f"row {number}: field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise DataError(path, f"row {number}: {error}") from None


def _read_object(path: str) -> Json:
    content = _read(path)
    if not isinstance(content, dict):
        raise DataError(path, "not a JSON object")
    return content


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", None)
        raise DataError(path, f"not JSON: {error}", line=line) from None
