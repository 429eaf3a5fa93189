"""Compare digests of bits with those in golden/bits, where device and versions are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from granite_paged.bits import BitsReport, read_reports

RECORDED = Path(__file__).parents[2] / "golden" / "bits"


def compare_with_recorded(report: BitsReport, folder: Path = RECORDED) -> None:
    """Check that bits are those that were recorded in the same place.

    Skips, and says what differs, if this model was not recorded in this place.
    """
    files = sorted(folder.glob("*.json"))
    recorded = [one for file in files for one in read_reports(file) if one.same_model(report)]
    if not recorded:
        pytest.skip(f"no bits of {report.model} in {report.dtype} are recorded")
    nearest = min(recorded, key=lambda one: len(one.moved(report)))
    if moved := nearest.moved(report):
        pytest.skip(f"bits are recorded elsewhere, with {', '.join(moved)}")
    assert not nearest.differences(report), "\n".join(nearest.described(report))
