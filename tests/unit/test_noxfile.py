"""Exit statuses of nox sessions: 2 where nothing could be judged, as the tools have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.noxfile import CommandFailed, nox_sessions
from tools import canary
from tools.upstream import __main__ as upstream

RUNS = {  # a session, and what of its commands fails
    "mutants": "tools.mutants",
    "canary": "tools.canary",
    "verify": "verify",
    "gpu_tests": "-c",
    "perf_record": "--calibrate",
    "tune": "tune",
}


def session_that_fails(word: str, status: int) -> Any:
    """Return a session whose command with this word ends with this status."""

    def run(*command: str, **options: Any) -> str:
        if word in command:
            raise CommandFailed(f"Returned code {status}")
        return "record.json"

    return mock.Mock(posargs=[], run=run)


@pytest.mark.parametrize("name", RUNS)
def test_status_2_of_a_tool_is_that_of_nox(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        nox_sessions(monkeypatch)[name](session_that_fails(RUNS[name], 2))
    assert ended.value.code == 2


@pytest.mark.parametrize("name", RUNS)
def test_another_failure_stays_one_of_nox(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandFailed):
        nox_sessions(monkeypatch)[name](session_that_fails(RUNS[name], 1))


@pytest.mark.parametrize("posargs", [[], ["torch=2.15.0"]])
def test_a_canary_that_cannot_be_installed_ends_with_status_2(
    posargs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(*arguments: str, **options: Any) -> None:
        if not posargs or "torch==2.15.0" in arguments:
            raise CommandFailed("no network")

    with pytest.raises(SystemExit) as ended:
        nox_sessions(monkeypatch)["canary"](mock.Mock(posargs=posargs, install=install))
    assert ended.value.code == 2
    assert "canary: cannot install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "missing"), [("eval_parity", "no data in"), ("report", "no results")]
)
def test_a_session_without_its_data_says_so_in_a_line(
    name: str,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sessions = nox_sessions(monkeypatch)
    monkeypatch.setenv("GRANITE_PAGED_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        sessions[name](mock.Mock(posargs=[]))
    assert ended.value.code == 2
    assert missing in capsys.readouterr().err


def test_nox_and_the_tools_mean_the_same_status(monkeypatch: pytest.MonkeyPatch) -> None:
    status = nox_sessions(monkeypatch)["UNUSABLE"]
    assert {canary.UNUSABLE, upstream.UNUSABLE} == {status}
