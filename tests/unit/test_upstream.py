"""The list of transformers' tests that may fail on pages, and how a run is judged by it."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.noxfile import nox_sessions
from tools.upstream.__main__ import (
    NEEDED,
    ROOT,
    UNUSABLE,
    Outcome,
    Refusal,
    check_version,
    main,
    read_outcomes,
    read_refusals,
    stale,
    table,
    unlisted,
)

PADDING = Refusal("padding", "States decay.", "PaddingError", ("test_pad_*",))

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.models.ModelTest" name="test_pad_1">
<properties><property name="paged_steps" value="3" /></properties>
<failure message="PaddingError: row 1">trace</failure></testcase>
<testcase classname="tests.models.ModelTest" name="test_pad_1">
<failure message="other" /></testcase>
<testcase classname="tests.models.ModelTest" name="test_gpu"><skipped message="no GPU" /></testcase>
</testsuite></testsuites>"""


def outcome(*failures: str, skipped: bool = False) -> Outcome:
    """Return what a test did that failed with these messages."""
    return Outcome("ModelTest::test", failures, skipped, 1)


def test_the_guide_shows_the_list() -> None:
    guide = (ROOT / "docs/guides/transformers.md").read_text(encoding="utf-8")
    listed = table(read_refusals())
    if listed not in guide:
        pytest.fail(
            "tools/upstream/refused.toml changed and docs/guides/transformers.md did not. If the "
            f"list is right, its table there is:\n{listed}",
            pytrace=False,
        )


def test_every_entry_has_a_reason_and_names_tests_once() -> None:
    refusals = read_refusals()
    assert all(r.kind and r.reason.endswith(".") and r.error and r.tests for r in refusals)
    tests = [test for refusal in refusals for test in refusal.tests]
    assert len(tests) == len(set(tests))


def test_subtests_of_one_test_are_one_outcome(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    failures = ("PaddingError: row 1", "other")
    assert read_outcomes(junit) == {
        "test_pad_1": Outcome("ModelTest::test_pad_1", failures, skipped=False, paged_steps=3),
        "test_gpu": Outcome("ModelTest::test_gpu", (), skipped=True, paged_steps=0),
    }


def test_a_run_without_a_report_has_no_tests(tmp_path: Path) -> None:
    assert read_outcomes(tmp_path / "missing.xml") == {}


def test_a_failure_that_is_not_listed_is_found() -> None:
    outcomes = {"test_pad_1": outcome("PaddingError"), "test_b": outcome("x"), "test_c": outcome()}
    assert unlisted(outcomes, [PADDING]) == ["test_b"]


@pytest.mark.parametrize(
    ("outcomes", "problem"),
    [
        ({"test_pad_1": outcome("PaddingError: row 1")}, None),
        ({"test_pad_1": outcome(skipped=True)}, None),
        ({"test_pad_1": outcome()}, "test_pad_1: is on the list, and it passes"),
        ({"test_other": outcome()}, "test_pad_*: is on the list, and there is no such test"),
        (
            {"test_pad_1": outcome("PaddingError: row 1", "KeyError: 3")},
            "test_pad_1: does not fail for padding: KeyError: 3",
        ),
    ],
    ids=["fails as listed", "skipped", "passes", "does not exist", "fails otherwise"],
)
def test_a_stale_entry_is_found(outcomes: dict[str, Outcome], problem: str | None) -> None:
    assert stale(outcomes, [PADDING]) == ([problem] if problem else [])


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["no/such/folder"], ["."]], ids=str)
def test_a_path_that_is_no_checkout_is_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == UNUSABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("upstream: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["no/such/folder"]], ids=str)
def test_the_session_refuses_wrong_use_before_it_installs(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = mock.Mock(posargs=arguments)
    with pytest.raises(SystemExit) as ended:
        nox_sessions(monkeypatch)["upstream"](session)
    assert ended.value.code == UNUSABLE
    assert session.mock_calls == []
    assert re.fullmatch("upstream: .*\n", capsys.readouterr().err)


def test_a_checkout_of_another_version_is_refused(tmp_path: Path) -> None:
    version_file = tmp_path / NEEDED[-1]
    version_file.parent.mkdir(parents=True)
    version_file.write_text('__version__ = "5.16.0.dev0"\n')
    with pytest.raises(ValueError, match=r"is transformers 5\.16\.0\.dev0 and 5\.24\.0 is inst"):
        check_version(tmp_path, "5.24.0")
    check_version(tmp_path, "5.16.0.dev0")
