"""Golden data: a failure says which side moved, and only an update writes files."""

from __future__ import annotations

import contextvars
import math
import shutil
from pathlib import Path

import pytest
import syrupy
import torch
from torch import Tensor

from tests.helpers.golden_extension import (
    AGREE,
    INPUTS_CHANGED,
    VERDICTS,
    Measured,
    Recorded,
    compare,
    contested,
    difference,
    fingerprint,
)
from tests.helpers.tolerance import LOGITS_FLOAT32

pytest_plugins = ["pytester"]

TESTS = Path(__file__).parents[1]
ORIGIN = {"seed": "0", "weights_sha256": "w", "ids_sha256": "i"}
LARGEST_LOGIT = 8.0
BOUND = LOGITS_FLOAT32 * LARGEST_LOGIT


def logits(shift: float = 0.0) -> dict[str, Tensor]:
    """Return values up to LARGEST_LOGIT; one of them is moved by `shift` times the bound."""
    values = torch.linspace(-4, LARGEST_LOGIT, 24, dtype=torch.float64).reshape(2, 3, 4)
    values[1, 0, 2] += shift * BOUND
    return {"last": values.float()}


# -- the verdict --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sdpa", "paged", "verdict"),
    [
        (0, 0, AGREE),
        (0.5, -0.4, AGREE),
        (50, 50, "transformers' SDPA moved (we followed it)"),
        (0, 50, "paged moved, SDPA did not"),
        (50, 0, "transformers' SDPA moved, paged did not"),
        (50, -50, "both moved apart"),
        (0.8, -0.8, "paged and SDPA are apart, each within the bound of the record"),
        (1.5, 0.8, "both drifted together, SDPA past the bound of the record"),
        (0.8, 1.5, "both drifted together, paged past the bound of the record"),
    ],
)
def test_verdict_says_which_side_moved(sdpa: float, paged: float, verdict: str) -> None:
    measured = Measured(logits(sdpa), logits(paged), ORIGIN)

    comparison = compare(measured, Recorded(logits(), ORIGIN, {}))

    assert comparison.verdict == verdict
    assert comparison.agrees == (verdict == AGREE)
    assert comparison.lines()[0] == verdict


def test_each_pattern_of_differences_has_its_own_verdict() -> None:
    assert len(VERDICTS) == len(set(VERDICTS.values())) == 2**3


@pytest.mark.parametrize("shift", [0, 50])
def test_changed_inputs_are_not_reported_as_a_changed_forward(shift: float) -> None:
    measured = Measured(logits(shift), logits(shift), {**ORIGIN, "weights_sha256": "other"})

    comparison = compare(measured, Recorded(logits(), ORIGIN, {}))

    assert comparison.verdict == INPUTS_CHANGED
    assert comparison.lines()[0] == f"{INPUTS_CHANGED} (weights_sha256)"


def test_message_gives_largest_difference_place_and_ratio() -> None:
    moved = difference(logits(50), logits())

    assert moved.ratio == pytest.approx(50, rel=0.01)
    assert f"50 x the bound: {50 * BOUND:.1e} at last[1, 0, 2]" in moved.text


@pytest.mark.parametrize(("shift", "off"), [(0.9, False), (1.1, True)])
def test_bound_is_relative_to_the_largest_logit(shift: float, off: bool) -> None:
    assert difference(logits(shift), logits()).off == off


@pytest.mark.parametrize(
    ("actual", "named"),
    [
        ({"first": torch.ones(2)}, "got first float32[2], expected last float32[2]"),
        ({"last": torch.ones(3)}, "got last float32[3], expected last float32[2]"),
        ({"last": torch.ones(2, 1)}, "got last float32[2, 1], expected last float32[2]"),
        ({"last": torch.ones(2).double()}, "got last float64[2], expected last float32[2]"),
        ({"last": torch.ones(2), "more": torch.ones(1)}, "got more float32[1], expected nothing"),
    ],
)
def test_names_shapes_and_dtypes_must_be_equal(actual: dict[str, Tensor], named: str) -> None:
    compared = difference(actual, {"last": torch.ones(2)})

    assert compared.off
    assert compared.text == named


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_non_finite_logits_never_agree(bad: float, both: bool) -> None:
    broken, sound = {"last": torch.tensor([1.0, bad])}, {"last": torch.tensor([1.0, 2.0])}

    assert difference(broken, broken if both else sound).off
    assert difference(sound, broken).off


@pytest.mark.parametrize(
    "expected", [{}, {"last": torch.ones(0)}, {"last": torch.ones(2, dtype=torch.bfloat16)}]
)
def test_logits_without_a_bound_never_agree(expected: dict[str, Tensor]) -> None:
    assert difference(expected, expected).off


@pytest.mark.parametrize(("value", "off"), [(0.0, False), (1e-30, True)])
def test_zero_logits_agree_only_with_zeros(value: float, off: bool) -> None:
    assert difference({"last": torch.full((2,), value)}, {"last": torch.zeros(2)}).off == off


@pytest.mark.parametrize(
    "other",
    [
        fingerprint({"w": torch.tensor([1.0, 2.5])}, size=1),
        fingerprint({"v": torch.tensor([1.0, 2.0])}, size=1),
        fingerprint({"w": torch.tensor([[1.0, 2.0]])}, size=1),
        fingerprint({"w": torch.tensor([1.0, 2.0]).view(torch.int32)}, size=1),
        fingerprint({"w": torch.tensor([1.0, 2.0])}, size=2),
    ],
    ids=["value", "name", "shape", "dtype", "setting"],
)
def test_fingerprint_changes_with_every_property(other: str) -> None:
    assert fingerprint({"w": torch.tensor([1.0, 2.0])}, size=1) != other


def test_fingerprint_does_not_depend_on_order_or_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)

    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a.T.contiguous().T})


def test_names_that_differ_only_in_case_are_contested() -> None:
    claimed = {Path("golden/Test_a.txt"): ["x"], Path("golden/test_a.txt"): ["y"], Path("b"): ["z"]}

    assert contested(claimed) == [["x", "y"]]


# -- a suite with golden data -------------------------------------------------------------------

CASES = """
import os

import pytest
import torch
from tests.helpers.golden_extension import Measured


def logits(side):
    values = torch.linspace(-4, 8, 24).reshape(2, 3, 4)
    values[1, 0, 2] += float(os.environ.get(side, 0))
    return {"last": values}


@pytest.mark.parametrize("case", ["plain", "sla/sh and blank"])
def test_logits(case, golden_logits):
    assert "BROKEN" not in os.environ, "before anything is compared"
    measured = Measured(logits("SDPA"), logits("PAGED"), {"seed": os.environ.get("SEED", "0")})
    assert golden_logits == measured


def test_table(golden_table):
    assert golden_table == os.environ.get("TABLE", "page 1: sequence 0") + "\\n"
"""
FILES = {
    "golden/logits/test_logits-plain.safetensors",
    "golden/logits/test_logits-sla-sh-and-blank.safetensors",
    "golden/tables/test_table.txt",
}


class Suite:
    """A small project with this project's fixtures and rules for golden data."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._pytester, self._monkeypatch = pytester.path, pytester, monkeypatch
        for variable in ("ADDOPTS", "XDIST_WORKER", "XDIST_WORKER_COUNT", "XDIST_TESTRUNUID"):
            monkeypatch.delenv(f"PYTEST_{variable}", raising=False)
        pytester.makeini(
            f"[pytest]\npythonpath = {TESTS.parent}\ntestpaths = suite\n"
            "addopts = --import-mode=importlib"
        )
        suite = pytester.mkdir("suite")
        for name in ("conftest.py", "test_golden_files.py"):
            shutil.copy(TESTS / "golden" / name, suite)
        (suite / "test_cases.py").write_text(CASES)

    def run(self, *arguments: str, **environment: object) -> pytest.RunResult:
        """Run pytest in this process, and restore syrupy's globals afterwards."""
        with self._monkeypatch.context() as patch:
            patch.setattr(syrupy, "_syrupy", syrupy._syrupy)
            for name, value in environment.items():
                patch.setenv(name, str(value))
            run = self._pytester.runpytest_inprocess
            return contextvars.copy_context().run(run, "-p", "no:cacheprovider", *arguments)

    def update(self, **environment: object) -> pytest.RunResult:
        return self.run("--snapshot-update", **environment)

    def spread(self) -> pytest.RunResult:
        """Run the suite in a worker of pytest-xdist."""
        return self.run("-n", "1")

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Return the bytes and the modification time of every golden file."""
        golden = [path for path in (self.root / "golden").rglob("*") if path.is_file()]
        return {
            path.relative_to(self.root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in golden
        }


@pytest.fixture
def empty(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(pytester, monkeypatch)


@pytest.fixture(scope="module")
def written() -> dict[str, bytes]:
    """Golden files of the suite, once a test has them."""
    return {}


@pytest.fixture
def suite(empty: Suite, written: dict[str, bytes]) -> Suite:
    """A suite whose tests all have their golden files."""
    if written:
        for name, content in written.items():
            (empty.root / name).parent.mkdir(parents=True, exist_ok=True)
            (empty.root / name).write_bytes(content)
    else:
        assert empty.update().ret == 0
        written.update({name: content for name, (content, _) in empty.files().items()})
    return empty


def test_missing_golden_file_fails_and_is_not_written(empty: Suite) -> None:
    result = empty.run()

    result.assert_outcomes(failed=3, passed=3)
    result.stdout.fnmatch_lines(["*'test_logits-plain' does not exist*", "*--snapshot-update*"])
    assert not empty.files()


def test_update_writes_one_file_per_test(empty: Suite) -> None:
    empty.update().assert_outcomes(passed=6)

    assert empty.files().keys() == FILES
    assert empty.files()["golden/tables/test_table.txt"][0] == b"page 1: sequence 0\n"


def test_updates_with_the_same_logits_write_the_same_bytes(suite: Suite) -> None:
    before = suite.files()
    shutil.rmtree(suite.root / "golden")

    suite.update()

    assert {name: content for name, (content, _) in suite.files().items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_update_leaves_files_that_still_agree(suite: Suite) -> None:
    before = suite.files()

    suite.update(SDPA=BOUND / 4, PAGED=BOUND / 4)

    assert suite.files() == before


@pytest.mark.parametrize("moved", [{}, {"PAGED": 1}, {"SDPA": 1, "PAGED": 1}, {"TABLE": "other"}])
def test_run_without_update_writes_nothing(suite: Suite, moved: dict[str, object]) -> None:
    before = suite.files()

    result = suite.run(**moved)

    assert (result.ret == 0) == (not moved)
    assert suite.files() == before


@pytest.mark.parametrize(
    ("moved", "verdict"),
    [
        ({"SDPA": 0.5, "PAGED": 0.5}, "transformers' SDPA moved (we followed it)"),
        ({"PAGED": 0.5}, "paged moved, SDPA did not"),
        ({"SDPA": 0.5}, "transformers' SDPA moved, paged did not"),
        ({"SDPA": 0.5, "PAGED": -0.5}, "both moved apart"),
        ({"SEED": 1}, f"{INPUTS_CHANGED} (seed)"),
    ],
)
def test_failure_says_which_side_moved(
    suite: Suite, moved: dict[str, object], verdict: str
) -> None:
    result = suite.run(**moved)

    result.assert_outcomes(failed=2, passed=4)
    assert f"E         {verdict}" in result.outlines
    assert "truncated" not in result.stdout.str(), "pytest truncated the message"


def test_changed_table_shows_the_changed_line(suite: Suite) -> None:
    result = suite.run(TABLE="page 1: sequence 7")

    result.assert_outcomes(failed=1, passed=5)
    result.stdout.fnmatch_lines(["*- page 1: sequence 0", "*+ page 1: sequence 7"])


def test_update_records_the_new_values(suite: Suite) -> None:
    suite.update(SDPA=0.5, PAGED=0.5, TABLE="other").assert_outcomes(passed=6)

    suite.run(SDPA=0.5, PAGED=0.5, TABLE="other").assert_outcomes(passed=6)


def test_update_is_refused_where_paged_differs_from_sdpa(suite: Suite) -> None:
    before = suite.files()

    result = suite.update(SDPA=0.5)

    result.assert_outcomes(failed=2, passed=4)
    result.stdout.fnmatch_lines(["*not recorded, paged and SDPA are apart*"])
    assert suite.files() == before


def test_update_keeps_the_file_of_a_failed_test(suite: Suite) -> None:
    before = suite.files()

    suite.update(BROKEN=1).assert_outcomes(failed=2, passed=4)

    assert suite.files() == before


# -- orphans ------------------------------------------------------------------------------------


def leave_behind(suite: Suite, name: str) -> None:
    (suite.root / "golden" / name).write_text("of a test that was renamed")


@pytest.mark.parametrize("name", ["logits/test_gone.safetensors", "tables/test_gone.txt"])
@pytest.mark.parametrize(
    "selection", [(), ("suite",), ("-k", "files or belongs"), ("--deselect", "suite/test_cases.py")]
)
def test_orphan_fails_whatever_tests_are_selected(
    suite: Suite, name: str, selection: tuple[str, ...]
) -> None:
    leave_behind(suite, name)

    result = suite.run(*selection)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*no test claims golden/{name}*"])


@pytest.mark.parametrize(
    "part", ["suite/test_golden_files.py", "suite/test_golden_files.py::test_every_golden_file_*"]
)
def test_files_of_uncollected_tests_are_not_orphans(suite: Suite, part: str) -> None:
    name = "test_every_golden_file_belongs_to_a_test"

    result = suite.run(part.replace("test_every_golden_file_*", name), "-k", name)

    assert result.parseoutcomes()["skipped"] == 1


def test_orphans_are_reported_under_xdist(suite: Suite) -> None:
    leave_behind(suite, "tables/test_gone.txt")
    before = suite.files()

    result = suite.spread()

    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*no test claims golden/tables/test_gone.txt*"])
    assert suite.files() == before


def with_test(suite: Suite, code: str) -> Suite:
    (suite.root / "suite" / "test_more.py").write_text(code)
    return suite


def test_comparing_nothing_fails(suite: Suite) -> None:
    result = with_test(suite, "def test_idle(golden_table): pass").run("-k", "idle")

    result.assert_outcomes(failed=1, deselected=6)
    result.stdout.fnmatch_lines(["*nothing was compared with golden_table*"])


def test_comparing_twice_fails(suite: Suite) -> None:
    twice = "def test_twice(golden_table):\n    assert golden_table == 'a'\n"
    code = f"{twice}    assert golden_table == 'b'\n"

    result = with_test(suite, code).run("-k", "twice", "--snapshot-update")

    result.assert_outcomes(failed=1, deselected=6)
    result.stdout.fnmatch_lines(["*compare with its golden file only once*"])


def test_two_tests_with_one_file_fail(suite: Suite) -> None:
    same = "def test_table(golden_table):\n    assert golden_table == 'page 1: sequence 0\\n'\n"

    result = with_test(suite, same).run()

    result.assert_outcomes(failed=1, passed=6)
    result.stdout.fnmatch_lines(["*FAILED*test_no_two_tests_share_a_golden_file*"])
