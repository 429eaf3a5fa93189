"""Records of GPUs: where they are, and whether one was made under the same contract.

The package brings records along, so that the gate finds them without a clone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from granite_paged.bench.judge import Against, Gated
from granite_paged.bench.session import Session
from granite_paged.bench.visits import VISITS
from granite_paged.errors import CannotJudge
from granite_paged.report.bench_results import (
    Calibration,
    Result,
    model_key,
    read_result,
    record_name,
)
from granite_paged.report.published import Published

DEPENDS_ON = ("torch", "triton")
"""Versions that the time of `paged` depends on: its kernels come from these two."""

MISSING = "missing"
"""Version of a package that is not installed, or that a record does not name."""


def record_path(records: Path, session: Session) -> Path:
    """Return the file that holds the record of the session's GPU, model and dtype."""
    now = session.result([])
    return records / record_name(now.device, now.model, now.dtype)


def against_records(records: Path, session: Session, published: Sequence[Published]) -> Against:
    """Return what a folder records for this GPU, model and dtype.

    Raises:
        ResultFileError: the record cannot be read.
        CannotJudge: it has no calibration, or was made under another contract.
    """
    path = record_path(records, session)
    fitting = tuple(p for p in published if p.applies_to(session.device_name, session.name))
    if not path.exists():
        return Against(None, fitting, f"{path} does not exist")
    record = read_result(path)
    refuse_other_contract(record, session, path)
    if record.calibration is None:
        raise CannotJudge(
            f"{path} has no calibration, so nothing was compared; add one with "
            f"`granite-paged gate --calibrate 20 --records {path.parent}`"
        )
    return Against(record.calibration, fitting)


def record_to_extend(path: Path, session: Session) -> Result:
    """Return the record that a calibration goes into: the file's, or a new one without rows.

    Raises:
        ResultFileError: the file cannot be read.
        CannotJudge: it was made under another contract.
    """
    if not path.exists():
        return session.result([])
    record = read_result(path)
    refuse_other_contract(record, session, path)
    return record


def refuse_other_contract(record: Result, session: Session, path: Path) -> None:
    """Raise CannotJudge if the record is of something else than the session measures."""
    if differing := _differing(record, session):
        raise CannotJudge(
            f"{path} was recorded with {differing}, so nothing was compared; record "
            "again in another folder: `granite-paged gate --calibrate 20 --records DIR`"
        )


def unfinished_path(path: Path) -> Path:
    """Return the file with the suites of an interrupted calibration for the record `path`."""
    return path.with_suffix(".unfinished")


def unfinished(path: Path, session: Session, shapes: Sequence[Gated]) -> Calibration | None:
    """Return what an interrupted calibration left in a file; None if there is no such file.

    Raises:
        ResultFileError: the file cannot be read.
        CannotJudge: its suites are of something else than the session measures.
    """
    if not path.exists():
        return None
    record = read_result(path)
    differing = _differing(record, session)
    left = record.calibration
    if left is None or [shape.place for shape in left.shapes] != [gated.place for gated in shapes]:
        differing = differing or "other shapes"
    if differing:
        raise CannotJudge(
            f"{path} has suites of an interrupted calibration with {differing}; "
            "delete it to calibrate from the start"
        )
    return left


def _differing(record: Result, session: Session) -> str:
    """Return the parts of the contract that differ, or ""."""
    return ", ".join(
        f"{name} {there} (here {here})"
        for name, here, there in _contract(record, session)
        if here != there
    )


def _contract(record: Result, session: Session) -> list[tuple[str, object, object]]:
    """Return (name, value here, value in the record) of all that times depend on."""
    now, then = session.result([]), record.calibration
    parts: list[tuple[str, object, object]] = [
        ("device", now.device, record.device),
        ("model", model_key(now.model), model_key(record.model)),
        ("dtype", now.dtype, record.dtype),
    ]
    parts += [
        (name, now.versions.get(name, MISSING), record.versions.get(name, MISSING))
        for name in DEPENDS_ON
    ]
    if then is not None:
        config = session.config
        parts += [
            ("page size", config.page_size, then.page_size),
            ("backend", config.backend, then.backend),
            ("visits per suite", VISITS, then.visits),
        ]
    return parts


def how_to_record(unused: str, records: Path) -> str:
    """Return advice for a run without a record; `unused` is the reason."""
    return (
        f"paged was compared with default only, not with a record: {unused}. To record this GPU, "
        f"leave it idle and run the same command with --calibrate 20 --records DIR; then pass "
        f"--records DIR. This run looked in {records}."
    )
