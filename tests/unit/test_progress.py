"""Progress of long commands where there is no terminal, as in a log of CI."""

from __future__ import annotations

import time

import pytest

from granite_paged.cli import options


def test_a_line_is_printed_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with options.progress() as report:
        for now in (0.0, 29.9, 30.0, 31.0, 59.9, 60.0):  # the clock reads it
            report("suite", int(now), 100)
    assert capsys.readouterr().err == "suite: 30 of 100\nsuite: 60 of 100\n"
