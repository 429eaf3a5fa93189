"""The tool that changes the code, its list of equivalent mutants, and how it judges a mutant.

What needs cosmic-ray runs in `nox -s mutants`, which has it, and is skipped elsewhere.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tools import canary
from tools.mutants.equivalents import Equivalent, read_equivalents, stale
from tools.mutants.forks import Run, in_child

ROOT = Path(__file__).resolve().parents[2]

MODULE = '''
"""A module."""
LIMIT: int = 3

class Counter:
    def add(self, n: int | None, *, most: int = 5) -> int | None:
        """Add 1."""
        if n < most and n > 2:
            raise ValueError(f"{n + 1} is too few")
        if limit := n:
            values = {**{"a": limit}}
        return sum(
            value
            - 7
            for value, _ in zip(values.values(), "a", strict=True)
        )
'''


def write_module(root: Path) -> str:
    (root / "module.py").write_text(MODULE, encoding="utf-8")
    return "module.py"


def test_the_list_of_equivalent_mutants_matches_the_code() -> None:
    assert stale(ROOT, read_equivalents()) == []


def test_every_equivalent_mutant_has_a_reason_and_is_listed_once() -> None:
    entries = read_equivalents()
    assert all(e.reason.endswith(".") and e.line != e.mutant for e in entries)
    assert len({e[:4] for e in entries}) == len(entries)


@pytest.mark.parametrize(
    ("module", "function", "line", "problem"),
    [
        ("module.py", "Counter.add", "- 7", None),
        ("module.py", "", "LIMIT: int = 3", None),
        ("module.py", "Counter.add", "- 8", "module.py:Counter.add: is listed, and has no line"),
        ("module.py", "Counter.gone", "- 7", "module.py:Counter.gone: is listed, and has no line"),
        ("gone.py", "", "LIMIT: int = 3", "gone.py:module: is listed, and has no line"),
    ],
    ids=["function", "module", "another line", "another function", "another module"],
)
def test_an_entry_that_no_longer_matches_is_found(
    tmp_path: Path, module: str, function: str, line: str, problem: str | None
) -> None:
    write_module(tmp_path)
    found = stale(tmp_path, [Equivalent(module, function, line, "x", "No reason.")])
    assert [text.partition(" `")[0] for text in found] == ([problem] if problem else [])


def test_every_module_is_judged_by_tests_that_exist() -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.__main__ import read_judges  # noqa: PLC0415
    from tools.mutants.forks import TIMED  # noqa: PLC0415

    judges = read_judges()
    files = {file for tests in judges.values() for file in tests}
    assert all((ROOT / path).is_file() for path in {*judges, *files})
    for node in TIMED:
        file, _, test = node.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), node


def test_mutants_are_named_by_function_statement_and_line(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.catalogue import mutants, mutate  # noqa: PLC0415

    found = mutants(tmp_path, write_module(tmp_path))
    places = {(m.function, m.lines, m.imported, mutate(tmp_path, m)[1]) for m in found}
    assert places == {
        ("", (3, 3), True, "LIMIT: int = 4"),
        ("", (3, 3), True, "LIMIT: int = 2"),
        ("Counter.add", (6, 6), True, MODULE.split("\n")[5].strip().replace("5", "6")),
        ("Counter.add", (6, 6), True, MODULE.split("\n")[5].strip().replace("5", "4")),
        *(
            ("Counter.add", (8, 8), False, line)
            for line in (
                "if n < most or n > 2:",
                "if not n < most and n > 2:",
                *(f"if n {sign} most and n > 2:" for sign in ("<=", ">=")),
                *(f"if n < most and n {sign} 2:" for sign in (">=", "<=")),
                *(f"if n < most and n > {number}:" for number in (1, 3)),
            )
        ),
        *(("Counter.add", (12, 16), False, line) for line in ("+ 7", "- 8", "- 6")),
    }


def test_the_sample_does_not_depend_on_code_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.catalogue import mutants  # noqa: PLC0415

    module = write_module(tmp_path)
    before = sorted(mutant.rank(1) for mutant in mutants(tmp_path, module))
    (tmp_path / module).write_text(MODULE.replace('"""A module."""', "import ast\n"))
    assert sorted(mutant.rank(1) for mutant in mutants(tmp_path, module)) == before
    assert len(set(before)) == len(before)
    assert sorted(mutant.rank(2) for mutant in mutants(tmp_path, module)) != before


def test_a_killed_mutant_names_the_file_and_a_survivor_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.__main__ import judge, parts_for, reaches, split, survivor  # noqa: PLC0415
    from tools.mutants.catalogue import mutants  # noqa: PLC0415

    (tmp_path / "mutated_here.py").write_text(
        "def double(n: int) -> int:\n    if n > 99:\n        return 2\n    return n * max(2, 0)\n\n"
        "def shared() -> int:\n    return 50\n"
    )
    (tmp_path / "test_double.py").write_text(
        "import functools\nfrom mutated_here import double, shared\n\n"
        "once = functools.cache(shared)\n\ndef test_double():\n    assert double(3) == 6\n\n"
        "def test_two():\n    assert double(1) == 2\n\ndef test_first():\n    once()\n\n"
        "def test_later():\n    assert once() == 50\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    monkeypatch.chdir(tmp_path)
    reached = reaches(tmp_path, ["test_double.py"], ["mutated_here.py"], 1)
    found = mutants(tmp_path, "mutated_here.py")
    same = Equivalent(
        *("mutated_here.py", "double", "return n * max(2, 0)", "return n * max(2, -1)"),
        reason="Both are 2.",
    )
    rest, equivalent, unused = split(tmp_path, found, [same, same._replace(mutant="x")])
    assert (len(rest), equivalent["mutated_here.py"]) == (len(found) - 1, 1)
    assert [entry.mutant for entry in unused] == ["x"]
    tasks = [(tmp_path, m, parts_for(m, reached, 9)) for m in rest]
    verdicts = {verdict.line: verdict for verdict in map(judge, tasks)}
    killed = {line for line, verdict in verdicts.items() if verdict.by}
    assert {"return n + max(2, 0)", "return n * max(3, 0)", "if not n > 99:"} <= killed
    assert "return 51" in killed, "test_first runs the line, test_later sees what it returned"
    unreached = verdicts["return 3"]
    assert "no recorded test reaches it" in survivor(unreached)
    assert verdicts["if n > 100:"].tests == 2
    assert "2 tests reach it" in survivor(verdicts["if n > 100:"])


def test_every_test_may_see_what_runs_at_import() -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.__main__ import tests_for  # noqa: PLC0415
    from tools.mutants.catalogue import Mutant  # noqa: PLC0415
    from tools.mutants.forks import Reach  # noqa: PLC0415

    seconds = {"slow": 3.0, "quick": 1.0, "default": 0.5}
    lines = {"slow": {"m.py": [5]}, "quick": {"m.py": [7]}, "default": {}}
    reached = [Reach(seconds, lines, [])]
    within = Mutant("m.py", "", 0, 5, (5, 5), "f", False, "", 1)
    assert list(tests_for(within, reached, 9.0)) == ["slow"]
    default = within._replace(imported=True)
    assert list(tests_for(default, reached, 9.0)) == ["default", "quick", "slow"]
    assert list(tests_for(default, reached, 2.0)) == ["default", "quick"]


def test_a_child_ends_by_its_status_its_time_or_an_error() -> None:
    assert in_child(lambda: os.write(1, b"said\n") and 3, 9.0) == Run(3, "said\n")
    assert in_child(lambda: time.sleep(9) or 0, 0.1).status is None

    def crash() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_child(crash, 9.0).status == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_child(lambda: 1 // 0, 9.0)


@pytest.mark.parametrize(
    ("scores", "whole", "expected"),
    [
        ([(100, 100)], False, True),
        ([(100, 99)], False, False),
        ([(100, 97)], True, True),
        ([(100, 96)], True, False),
        ([(100, 100), (20, 19), (20, 20)], True, True),
        ([(200, 200), (20, 18)], True, False),
        ([(200, 200), (19, 14)], True, True),
    ],
    ids=str,
)
def test_the_scores_of_all_mutants_pass_from_a_threshold_on(
    scores: list[tuple[int, int]], whole: bool, expected: bool
) -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.__main__ import Verdict, passed  # noqa: PLC0415
    from tools.mutants.catalogue import Mutant  # noqa: PLC0415

    verdicts = [
        Verdict(
            Mutant(str(n), "", 0, 1, (1, 1), "", False, "", 1), "", "x" if i < killed else "", 0, 0
        )
        for n, (total, killed) in enumerate(scores)
        for i in range(total)
    ]
    assert passed(verdicts, whole=whole) == expected


def test_an_unusable_run_has_the_status_of_the_other_tools() -> None:
    pytest.importorskip("cosmic_ray")
    from tools.mutants.__main__ import UNUSABLE  # noqa: PLC0415

    assert canary.UNUSABLE == UNUSABLE
