"""Run transformers' own tests for this model and for generation, with every model patched.

    nox -s upstream -- CHECKOUT          a checkout of transformers; the session installs it
    python -m tools.upstream CHECKOUT    with the transformers that is installed

`refused.toml` lists the tests that may fail, each for a reason that the documentation gives. Exit
status: 0 only those failed, 1 another test failed or an entry of the list is stale, 2 there is no
usable checkout or no test ran on pages.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PASSED, FAILED, UNUSABLE = 0, 1, 2

ROOT = Path(__file__).resolve().parents[2]
REFUSED = Path(__file__).with_name("refused.toml")
SUITE = "tests/models/granitemoehybrid"
MODULE = f"{SUITE}/test_modeling_granitemoehybrid.py"
NEEDED = (MODULE, "tests/generation/test_utils.py", "src/transformers/__init__.py")
STEPS = "paged_steps"  # the property that the plugin records


class Refusal(NamedTuple):
    """Tests that fail for one documented reason; `tests` are names or shell patterns."""

    kind: str
    reason: str
    error: str
    tests: tuple[str, ...]


class Outcome(NamedTuple):
    """What one test did: its node's last two names, and the messages of its failures."""

    node: str
    failures: tuple[str, ...]
    skipped: bool
    paged_steps: int


def read_refusals(path: Path = REFUSED) -> list[Refusal]:
    """Read the list of tests that may fail."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["refused"]
    return [Refusal(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def table(refusals: Iterable[Refusal]) -> str:
    """Return the list as a Markdown table, for the documentation."""
    lines = ["| refused | reason | tests of transformers |", "| --- | --- | --- |"]
    for refusal in refusals:
        tests = ", ".join(f"`{test}`" for test in refusal.tests)
        lines.append(f"| {refusal.kind} | {refusal.reason} | {tests} |")
    return "\n".join(lines)


def find_checkout(arguments: Sequence[str]) -> Path:
    """Return the checkout that the command line names. Raises ValueError if it is not one."""
    if len(arguments) != 1:
        raise ValueError(f"expected one checkout of transformers, got {len(arguments)} arguments")
    checkout = Path(arguments[0]).expanduser().resolve()
    for name in NEEDED:
        if not (checkout / name).is_file():
            raise ValueError(f"{checkout} is no checkout of transformers: it has no {name}")
    return checkout


def check_version(checkout: Path, installed: str) -> None:
    """Raise ValueError if the checkout is of another version than the installed transformers."""
    text = (checkout / "src/transformers/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    own = found[1] if found else "unknown"
    if own != installed:
        raise ValueError(
            f"the checkout is transformers {own} and {installed} is installed: "
            f"check out v{installed}, or install the checkout"
        )


def read_outcomes(junit: Path) -> dict[str, Outcome]:
    """Read a JUnit report, by test name. One that pytest could not write has no tests."""
    outcomes: dict[str, Outcome] = {}
    if not junit.exists():
        return outcomes
    for case in ElementTree.parse(junit).iter("testcase"):
        name, owner = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
        known = outcomes.get(name, Outcome(f"{owner}::{name}", (), False, 0))
        found = [*case.iter("failure"), *case.iter("error")]
        steps = [int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == STEPS]
        outcomes[name] = Outcome(
            known.node,
            known.failures + tuple(problem.get("message") or "" for problem in found),
            known.skipped or case.find("skipped") is not None,
            max([known.paged_steps, *steps]),
        )
    return outcomes


def run_tests(checkout: Path, nodes: Collection[str] = (), *, patched: bool) -> dict[str, Outcome]:
    """Run the suite, or some of its tests, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        plugin = ("-p", "tools.upstream.plugin") if patched else ()
        options = ("-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "--color=no")
        tests = [f"{MODULE}::{node}" for node in nodes] or [SUITE]
        path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        subprocess.run(
            [sys.executable, "-m", "pytest", *plugin, *options, f"--junitxml={junit}", *tests],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        return read_outcomes(junit)


def unlisted(outcomes: Mapping[str, Outcome], refusals: Sequence[Refusal]) -> list[str]:
    """Return the names of tests that fail and are not on the list."""
    patterns = [test for refusal in refusals for test in refusal.tests]
    failed = (name for name, outcome in outcomes.items() if outcome.failures)
    return [name for name in failed if not any(fnmatchcase(name, p) for p in patterns)]


def stale(outcomes: Mapping[str, Outcome], refusals: Sequence[Refusal]) -> list[str]:
    """Say what is wrong with the list: tests that pass, do not exist or fail for other reasons."""
    problems = []
    for refusal in refusals:
        for pattern in refusal.tests:
            matches = [name for name in outcomes if fnmatchcase(name, pattern)]
            if not matches:
                problems.append(f"{pattern}: is on the list, and there is no such test")
            problems += [
                problem for name in matches if (problem := _problem(name, outcomes[name], refusal))
            ]
    return problems


def _problem(name: str, outcome: Outcome, refusal: Refusal) -> str:
    if not (outcome.failures or outcome.skipped):
        return f"{name}: is on the list, and it passes"
    other = [message for message in outcome.failures if refusal.error not in message]
    return f"{name}: does not fail for {refusal.kind}: {other[0][:200]}" if other else ""


def main(arguments: Sequence[str]) -> int:
    """Run the suite and print what it did. Returns the exit status."""
    try:
        checkout = find_checkout(arguments)
        check_version(checkout, version("transformers"))
    except ValueError as error:
        print(f"upstream: {error}", file=sys.stderr)
        return UNUSABLE
    refusals, outcomes = read_refusals(), run_tests(checkout, patched=True)
    paged = [outcome for outcome in outcomes.values() if outcome.paged_steps]
    if not paged:
        print(f"upstream: no test of {checkout} ran on pages; see its pytest", file=sys.stderr)
        return UNUSABLE
    suspects = unlisted(outcomes, refusals)
    nodes = [outcomes[name].node for name in suspects]
    plain = run_tests(checkout, nodes, patched=False) if nodes else {}
    ours = [name for name in suspects if name in plain and not plain[name].failures]
    theirs = [name for name in suspects if name not in ours]
    problems = [f"{name}: fails on pages only: {outcomes[name].failures[0]}" for name in ours]
    problems += stale(outcomes, refusals)
    failed = sum(bool(outcome.failures) for outcome in outcomes.values())
    print(f"transformers {version('transformers')}: {len(outcomes)} tests, {len(paged)} on pages")
    print(f"skipped by transformers: {sum(outcome.skipped for outcome in outcomes.values())}")
    print(f"refused as documented: {failed - len(suspects)}")
    print(f"fail without pages too: {', '.join(theirs) or 'none'}")
    print(*problems, sep="\n")
    return FAILED if problems else PASSED


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
