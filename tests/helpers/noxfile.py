"""Sessions of noxfile.py as functions, without nox."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]


class CommandFailed(Exception):
    """Takes the place of nox's error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def nox_sessions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run noxfile.py with a stand-in for nox, which the environment of the tests does not have."""

    def decorate(function: Any = None, **settings: Any) -> Any:
        return function or (lambda decorated: decorated)

    stand_in = mock.MagicMock(session=decorate, parametrize=lambda *values: decorate)
    stand_in.command.CommandFailed = CommandFailed
    monkeypatch.setitem(sys.modules, "nox", stand_in)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "noxfile.py"))
