"""Every file of examples/ runs and prints what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FACTS = "red-fox copper-bell and green-wolf iron-boat while"


def run(name: str, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        input=typed,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def lines_of(name: str, *arguments: str, typed: str = "") -> list[str]:
    done = run(name, *arguments, typed=typed)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_paged_generate_recalls() -> None:
    assert lines_of("paged_generate.py") == ["copper-bell"]


def test_generate_answers_and_reports_refusals() -> None:
    *answers, refused = lines_of("generate.py")
    assert answers == ["copper-bell", "iron-boat"]
    assert refused.startswith("refused: ")
    assert "prompt" in refused


def test_stream_prints_an_answer() -> None:
    (answer,) = lines_of("stream.py")
    assert answer.split()[0] == "copper-bell"


def test_scoring_chooses_correctly_and_shares_the_prefix() -> None:
    *choices, shared = lines_of("shared_prefix_scoring.py")
    assert len(choices) == 14
    assert choices[0] == "amber-bear: copper-bell"
    assert choices[-1] == "red-wolf: cotton-chair"
    assert int(shared.split()[0]) > 0


def test_chat_remembers_earlier_turns() -> None:
    typed = f"{FACTS} red-fox\ngreen-wolf\n"
    assert lines_of("chat.py", typed=typed) == ["copper-bell", "iron-boat"]


@pytest.mark.parametrize(("limit", "status"), [("1000", 0), ("0.001", 1)])
def test_the_custom_gate_applies_its_limit(limit: str, status: int) -> None:
    done = run("custom_gate.py", "--limit", limit)
    assert done.returncode == status, done.stderr
    assert "tokens: as SDPA" in done.stdout


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    unused = [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text]
    assert not unused, f"no test runs {unused}"
