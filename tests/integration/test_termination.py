"""SIGTERM, as a job scheduler sends it, ends a command like Ctrl-C: what is measured is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from granite_paged import models
from granite_paged.cli.main import run
from granite_paged.cli.options import OK, TERMINATED
from granite_paged.report.bench_results import read_result
from tests.helpers.command_line import Capture

TELL_EACH_ROW = """
import sys
from granite_paged.bench import session
from granite_paged.cli.main import main

measured = session.run

def told(*args):
    for row in measured(*args):
        yield row
        print("measured a row", flush=True)  # and it was taken

session.run = told
sys.argv = ["granite-paged", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("interrupts", ["default", "ignored"])
def test_a_terminated_bench_keeps_its_rows(interrupts: str, tmp_path: Path) -> None:
    """A shell starts its background jobs with SIGINT ignored: SIGTERM still ends them."""
    kept = tmp_path / "kept.json"
    options = ["--device", "cpu", "--case", "batch", "--mode", "paged", "--json", str(kept)]
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN if interrupts == "ignored" else signal.SIG_DFL
    )
    try:
        bench = subprocess.Popen(
            [sys.executable, "-c", TELL_EACH_ROW, "bench", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert bench.stdout is not None
    assert bench.stdout.readline() == "measured a row\n"
    bench.terminate()
    errors = bench.communicate(timeout=60)[1]
    assert bench.returncode == TERMINATED == 128 + signal.SIGTERM
    rows = read_result(kept).rows
    assert 1 <= len(rows) < 6, "it ended before its last shape"
    said = f"granite-paged: terminated; {len(rows)} rows kept in {kept}"
    assert said in errors
    assert "Traceback" not in errors


def test_the_handler_that_was_there_is_restored(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*args: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(models, "load", terminated)
    assert run(["verify", "--device", "cpu"]) == TERMINATED
    assert "granite-paged: terminated; " in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_of_the_program_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def mine(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        run(["--version"])
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_runs_in_a_thread() -> None:
    """Only the main thread may install a handler."""
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run(["--version"])))
    thread.start()
    thread.join()
    assert statuses == [OK]
