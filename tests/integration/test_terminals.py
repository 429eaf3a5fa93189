"""Every command, interrupted or with nowhere to go: full disks, closed pipes, no home or folder.

The commands are those of the click tree, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged import files, verify
from granite_paged.bench import coldstart, gate, search_space, serving, tune
from granite_paged.bench.gate import GateReport
from granite_paged.bench.session import Session
from granite_paged.cli.main import CLOSED_PIPE, INTERRUPTED, OK, USAGE, cli, run
from granite_paged.cli.options import RECORDS, ModelChoice
from granite_paged.engine.engine import Engine
from granite_paged.evaluate import tasks
from granite_paged.evaluate.journal import Journal
from granite_paged.report import eval_report
from tests.helpers.command_line import Capture, commands
from tests.integration.test_unwritable import WRITERS

ROOT = Path(__file__).parents[2]
PERF = next(path for path in RECORDS.glob("*.json") if ".published." not in path.name)
RESULT = next((ROOT / "golden/results").glob("*.json"))
NOWHERE = "/proc/nowhere"  # cannot be made, by root either

ON_CPU = ("--device", "cpu")
ONE_STEP = ("--case", "decode", "--mode", "paged", "--batch", "1", "--context", "16")

SHORT: dict[str, tuple[str, ...]] = {  # the shortest run of each command that prints something
    "verify": (*ON_CPU, "--context", "16", "--no-reference"),
    "generate": ("and", "--max-new-tokens", "1", *ON_CPU),
    "batch": ("IN", "-", "--max-new-tokens", "1", *ON_CPU),
    "bench": (*ON_CPU, "--quick", *ONE_STEP),
    "bench serve": (*ON_CPU, "--requests", "1", "--new-tokens", "1", "1", "--mode", "paged"),
    "coldstart": (*ON_CPU, "--context", "16"),
    "gate": (*ON_CPU, "--records", "OUT"),
    "tune": ON_CPU,
    "profile": ("decode", *ON_CPU, "--context", "16", "--out", "OUT"),
    "plot": (str(PERF), "--markdown", "OUT/page.md"),
    "eval": (*ON_CPU, "--limit", "1", "--mode", "paged"),
    "report": (str(RESULT), "--out", "OUT"),
}
COMMANDS = dict(commands(cli))


def test_every_command_is_listed() -> None:
    assert set(SHORT) == set(COMMANDS)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with an input, and a pretended GPU on which gate and tune have nothing to measure."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "and"}\n')
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tasks, "RECALL_LONGEST", 32)
    monkeypatch.setattr(ModelChoice, "require_gpu", lambda *args: None)
    report = GateReport(True, "cpu", "tiny-recall", "", [])
    monkeypatch.setattr(gate, "gate", lambda *args: report)
    monkeypatch.setattr(search_space, "groups_of", lambda *args, **options: [])
    monkeypatch.setattr(tune, "retuned", lambda tuned, *args: tuned)
    return tmp_path


def line(command: str, folder: Path) -> list[str]:
    """Words of the shortest run, with its files in this folder."""
    files = {"IN": str(folder / "in.jsonl"), "OUT": str(folder / "out")}
    words = (files.get(word, word).replace("OUT/", f"{folder}/out/") for word in SHORT[command])
    return [*command.split(), *words]


@contextmanager
def standard_output(file: int) -> Iterator[None]:
    """Let file descriptor 1 be `file`, and check that the interpreter could exit."""
    sys.stdout.flush()
    kept, before = os.dup(1), sys.stdout
    os.dup2(file, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    try:
        yield
        sys.stdout.flush()  # as at exit, where a failure would be a second complaint
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        sys.stdout = before


@pytest.fixture
def full_disk() -> Iterator[int]:
    file = os.open("/dev/full", os.O_WRONLY)
    yield file
    os.close(file)


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


BROKEN = {
    "full_disk": (USAGE, "cannot write standard output: No space left on device"),
    "closed_pipe": (CLOSED_PIPE, ""),
}


def check_broken(words: list[str], broken: str, request: pytest.FixtureRequest, capfd: Any) -> None:
    status, error = BROKEN[broken]
    file = request.getfixturevalue(broken)
    capfd.readouterr()
    with standard_output(file):
        assert run(words) == status
    said = capfd.readouterr().err.splitlines()
    assert [text for text in said if text] == ([f"granite-paged: error: {error}"] if error else [])


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_with_nowhere_to_go(
    command: str, broken: str, request: pytest.FixtureRequest, capfd: Any
) -> None:
    check_broken([*command.split(), "--help"], broken, request, capfd)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_results_with_nowhere_to_go(
    command: str, broken: str, ready: Path, request: pytest.FixtureRequest, capfd: Any
) -> None:
    check_broken(line(command, ready), broken, request, capfd)


JSON = sorted(writer.rpartition(" ")[0] for writer in WRITERS if writer.endswith(" --json"))


@pytest.mark.parametrize("command", JSON)
def test_a_json_file_is_written_although_the_reader_of_the_tables_is_gone(
    command: str, ready: Path, closed_pipe: int, capfd: Any
) -> None:
    file = ready / "report.json"
    with standard_output(closed_pipe):
        assert run([*line(command, ready), "--json", str(file)]) in (OK, CLOSED_PIPE)
    assert isinstance(json.loads(file.read_text()), dict)


def test_eval_writes_its_report_although_the_reader_of_the_tables_is_gone(
    ready: Path, closed_pipe: int, capfd: Any
) -> None:
    folder = ready / "report"
    with standard_output(closed_pipe):
        assert run([*line("eval", ready), "--out", str(folder)]) == CLOSED_PIPE
    assert (folder / "report.md").exists()


# -- files that cannot be written ---------------------------------------------------------------

MORE = {
    "plot --page": ("--out", "OUT"),
    "tune --out": ("--write",),
    "gate --records": ("--calibrate", "5"),
}
"""What else a run needs so that it writes what the option names."""


@pytest.mark.parametrize("path", ["/dev/full", NOWHERE])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_is_named_in_one_line(
    writer: str, path: str, ready: Path, capfd: Any
) -> None:
    command, _, option = writer.rpartition(" ")
    words = line(command, ready)
    extra = [word.replace("OUT", str(ready / "out")) for word in MORE.get(writer, ())]
    assert run([*words, *extra, option, path]) == USAGE
    said = capfd.readouterr().err.splitlines()
    (error,) = (text for text in said if text)
    assert error.startswith("granite-paged: error: ")
    assert path in error


# -- neither a home nor a folder ----------------------------------------------------------------

RUNS = """
import functools, json, logging, sys
logging.disable(logging.WARNING)  # a command that loads these loads them silently too
from granite_paged.bench import session
from granite_paged.cli.main import run
from granite_paged.evaluate import tasks
logging.disable(logging.NOTSET)
session.measure_rates = functools.cache(session.measure_rates)
tasks.RECALL_LONGEST = 32
for words in json.loads(sys.argv[1]):
    print("status", run(words), file=sys.stderr)
"""


def test_no_command_needs_a_home_or_a_folder_to_work_in(ready: Path) -> None:
    """Only gate and tune say anything, and that is that they need a GPU."""
    caches = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HF_HOME")
    env = {name: value for name, value in os.environ.items() if name not in caches}
    runs = [line(command, ready) for command in sorted(SHORT)]
    runs += [[*command.split(), "--help"] for command in SHORT]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(runs)],
        check=False,
        capture_output=True,
        text=True,
        cwd="/proc",
        env={**env, "HOME": NOWHERE, "PYTHONPATH": str(ROOT)},
    )
    said = [text for text in done.stderr.splitlines() if text and "tokens/s" not in text]
    refused = [text for text in said if "needs a CUDA device" in text]
    assert len(refused) == (0 if torch.cuda.is_available() else 2)
    without_gpu = {*map(tuple, (line("gate", ready), line("tune", ready)))}
    statuses = [f"status {USAGE if tuple(words) in without_gpu else OK}" for words in runs]
    assert [text for text in said if text not in refused] == ["1 lines", *statuses]


# -- interrupts ---------------------------------------------------------------------------------

NOT_KEPT = "nothing new was kept; run the same command again"
FILES_KEPT = "finished files are kept; run the same command to write all"

MIDDLE: dict[str, tuple[Any, str, str]] = {  # what is interrupted, and what the command says
    "verify": (verify, "verify", NOT_KEPT),
    "generate": (Engine, "step", NOT_KEPT),
    "batch": (Engine, "step", "0 lines written"),
    "bench": (Session, "rows", "rows were not kept: name a file with --json to keep them"),
    "bench serve": (serving, "compare", NOT_KEPT),
    "coldstart": (coldstart, "in_this_process", NOT_KEPT),
    "gate": (gate, "gate", NOT_KEPT),
    "tune": (tune, "sweep_all", NOT_KEPT),
    "profile": (Session, "profile", NOT_KEPT),
    "plot": (files, "write_file", FILES_KEPT),
    "eval": (Journal, "append", "answers were not kept: name a file with --output to keep them"),
    "report": (eval_report, "write_report", FILES_KEPT),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_says_what_was_kept(
    command: str, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """`eval`, `batch` and `bench` with a file to keep answers in have tests of their own."""

    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    where, name, kept = MIDDLE[command]
    monkeypatch.setattr(where, name, interrupt)
    assert run(line(command, ready)) == INTERRUPTED
    said = [text for text in capsys.readouterr().err.splitlines() if text]
    assert said == [f"granite-paged: interrupted; {kept}"]
