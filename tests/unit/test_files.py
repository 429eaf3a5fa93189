"""Result files are strict JSON, and a failed write leaves the old file as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from granite_paged.errors import CannotWrite
from granite_paged.files import write_file, write_json


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "result.json").write_text("old")
    return tmp_path / "result.json"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    call: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, call) if call == "fsync" else (Path, call)), full)
    with pytest.raises(CannotWrite, match="No space left on device"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_rewritten_file_keeps_its_permissions(path: Path) -> None:
    path.chmod(0o640)
    write_file(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_to_a_file_stays_a_link(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    write_file(link, b"new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_a_device_is_written_directly() -> None:
    write_file(os.devnull, "new")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_before_the_file_is_touched(number: float, path: Path) -> None:
    with pytest.raises(CannotWrite, match="not JSON compliant"):
        write_json(path, {"seconds": number})
    assert path.read_text() == "old"
