"""The canary: what it installs, and how it reports failed tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from granite_paged.bits import BitsReport, write_report
from tools.canary import (
    NIGHTLY,
    Failure,
    Outcome,
    described_bits,
    read_outcome,
    report,
    requirement,
    status,
)

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.golden.test_golden_logits" name="test_prefill[hybrid]">
<failure message="transformers' SDPA moved (we followed it)&#10;OFF SDPA-recorded">trace</failure>
</testcase>
<testcase classname="tests.golden.test_golden_logits" name="test_prefill[dense]" />
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("torch=2.15.0", ["torch==2.15.0"]),
        ("torch=nightly", [*NIGHTLY, "--upgrade", "torch"]),
        ("transformers=git+https://host/x@main", ["transformers @ git+https://host/x@main"]),
        ("transformers=.", ["."]),
    ],
)
def test_a_specification_becomes_arguments_of_pip(argument: str, expected: list[str]) -> None:
    assert requirement(argument) == expected


@pytest.mark.parametrize("argument", ["torch", "=2.15.0", "torch=", "torch=soon", "--upgrade=1"])
def test_a_malformed_specification_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=r"expected NAME=SPEC|is no version"):
        requirement(argument)


def test_a_failure_is_reported_with_its_verdict(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    outcome = read_outcome("golden", junit, seconds=3)
    assert (outcome.tests, len(outcome.failures)) == (2, 1)
    text = report([outcome], {"torch": "2.15.0"})
    assert "| golden | 2 | 1 | 3 |" in text
    assert "tests/golden/test_golden_logits::test_prefill[hybrid]" in text
    assert "    transformers' SDPA moved (we followed it)\n    OFF SDPA-recorded" in text


@pytest.mark.parametrize(
    ("tests", "failures", "expected"), [(3, 0, 0), (3, 1, 1), (0, 0, 2)], ids=str
)
def test_the_status_passes_only_if_tests_ran(tests: int, failures: int, expected: int) -> None:
    assert status([Outcome("a", tests, 1.0, [Failure("t", [])] * failures)]) == expected


def test_a_group_without_a_report_never_passes(tmp_path: Path) -> None:
    assert status([read_outcome("golden", tmp_path / "missing.xml", 1.0)]) == 2


def test_the_report_names_the_release_and_the_first_layer_of_other_bits(tmp_path: Path) -> None:
    digests = {"0 mamba": "a", "1 attention": "b", "logits": "c"}
    before = BitsReport("tiny", "f00", "float32", {"torch": "2.14.1"}, {"short": digests})
    older = replace(before, place={"torch": "2.9.1", "transformers": "5.17.0"})
    moved = {"short": {**digests, "1 attention": "x", "logits": "y"}}
    (tmp_path / "recorded").mkdir()
    for one in (older, before):
        write_report(tmp_path / "recorded" / "cpu.json", one)
    now = replace(before, place={"torch": "2.15.0"}, requests=moved)
    write_report(tmp_path / "now.json", now)
    lines = described_bits(tmp_path / "now.json", tmp_path / "recorded")
    assert lines[1:] == [
        "other places: torch 2.14.1 and 2.15.0",
        "short: differs first in layer 1 attention",
    ]
    assert report([Outcome("a", 1, 1.0, [])], {}, lines).endswith("\n".join(["", *lines]))
    write_report(tmp_path / "other.json", replace(now, dtype="float64"))
    assert "none are recorded" in described_bits(tmp_path / "other.json", tmp_path / "recorded")[0]
