"""Every option that names a file or folder to write: one that cannot be written stops the command.

It stops before a model is loaded and before anything is drawn or asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from granite_paged import models
from granite_paged.cli.main import cli, run
from granite_paged.cli.options import RECORDS, ModelChoice
from tests.helpers.command_line import Capture, assert_one_line, commands

USAGE = 2
ROOT = Path(__file__).parents[2]
PERF = str(next(path for path in RECORDS.glob("*.json") if ".published." not in path.name))
RESULT = str(next((ROOT / "golden/results").glob("*.json")))

NEEDED = {  # what a command needs besides the option
    "plot": [PERF],
    "report": [RESULT],
    "profile": ["decode"],
    "generate": ["text"],
}


def writers() -> Iterator[str]:
    """Every command with an option that names what it writes: `eval --json`."""
    for words, command in commands(cli):
        for param in command.params:
            if not isinstance(param, click.Option):
                continue
            named = (param.metavar or "").strip("[]") in ("FILE", "DIR", "PATH")
            if named and re.search(r"\b(write|save|keep|into)\b", param.help or "", re.IGNORECASE):
                yield f"{words} {param.opts[0]}"


WRITERS = sorted(writers())


def test_the_options_that_write_are_found() -> None:
    known = {
        "eval --json",
        "eval --out",
        "eval --output",
        "bench --json",
        "profile --out",
        "bench --out",
    }
    known |= {"plot --out", "plot --page", "report --out", "report --page", "tune --write"}
    assert known <= set(WRITERS)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(ModelChoice, "require_gpu", lambda choice, command: None)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written_is_refused_before_the_work(
    writer: str, tmp_path: Path, capsys: Capture
) -> None:
    """A page is read first, for the place of the tables in it."""
    words, _, option = writer.rpartition(" ")
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "below" / "name"
    extra = ["--out", str(tmp_path / "out")] if writer == "plot --page" else []
    assert run([*words.split(), *NEEDED.get(words, []), *extra, option, str(path)]) == USAGE
    found = "cannot be read" if option == "--page" else f"cannot write {path}"
    assert_one_line(capsys, found)
