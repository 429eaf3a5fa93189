"""Every file of examples/ runs and prints what it should."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import Capture

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FACTS = "red-fox copper-bell and green-wolf iron-boat while"


class Example:
    """An example that runs in this process, since a new one would load torch for each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, name: str, *arguments: str, typed: str = "") -> tuple[int, str]:
        """Return the exit status and the standard output."""
        path = str(EXAMPLES / name)
        self._monkeypatch.setattr(sys, "argv", [path, *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        return status, self._capsys.readouterr().out

    def lines(self, name: str, *arguments: str, typed: str = "") -> list[str]:
        status, printed = self.run(name, *arguments, typed=typed)
        assert status == 0, f"examples/{name} ended with status {status}, after printing {printed}"
        return printed.splitlines()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Example:
    return Example(monkeypatch, capsys)


def test_paged_generate_recalls(example: Example) -> None:
    assert example.lines("paged_generate.py") == ["copper-bell"]


def test_generate_answers_and_reports_refusals(example: Example) -> None:
    *answers, refused = example.lines("generate.py")
    assert answers == ["copper-bell", "iron-boat"]
    assert refused.startswith("refused: ")
    assert "prompt" in refused


def test_stream_prints_an_answer(example: Example) -> None:
    (answer,) = example.lines("stream.py")
    assert answer.split()[0] == "copper-bell"


def test_scoring_chooses_correctly_and_shares_the_prefix(example: Example) -> None:
    *choices, shared = example.lines("shared_prefix_scoring.py")
    assert len(choices) == 14
    assert choices[0] == "amber-bear: copper-bell"
    assert choices[-1] == "red-wolf: cotton-chair"
    assert int(shared.split()[0]) > 0


def test_chat_remembers_earlier_turns(example: Example) -> None:
    typed = f"{FACTS} red-fox\ngreen-wolf\n"
    assert example.lines("chat.py", typed=typed) == ["copper-bell", "iron-boat"]


@pytest.mark.parametrize(("limit", "status"), [("1000", 0), ("0.001", 1)])
def test_the_custom_gate_applies_its_limit(example: Example, limit: str, status: int) -> None:
    left, printed = example.run("custom_gate.py", "--limit", limit)
    assert left == status, printed
    assert "tokens: as SDPA" in printed


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    unused = [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text]
    assert not unused, f"no test runs {unused}"
