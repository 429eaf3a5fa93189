"""Checks of what a command prints."""

from __future__ import annotations

import pytest

Capture = pytest.CaptureFixture[str]


def assert_one_line(capsys: Capture, reason: str) -> None:
    """Check that a command printed one line of error, with `reason` in it, and nothing else."""
    shown = capsys.readouterr()
    assert shown.err.startswith("granite-paged: error: ")
    assert reason in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
