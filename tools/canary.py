"""Try this project on other versions of torch and transformers, and say what moved.

    nox -s canary -- torch=2.15.0 transformers=git+https://github.com/huggingface/transformers

`nox` installs the versions; this module runs the tests that need no GPU, in groups, and prints one
report: which tests broke, and, for golden logits, whether transformers' SDPA moved or paged did.
Exit status: 0 nothing moved, 1 something did, 2 the versions cannot be installed or nothing ran.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PASSED, MOVED, UNUSABLE = 0, 1, 2

NIGHTLY = ("--prerelease=allow", "--index-url=https://download.pytorch.org/whl/nightly/cpu")
"""PyTorch's own index of nightly builds for the CPU (https://pytorch.org/get-started)."""

KERNELS = "tests/integration/test_kernels_compile.py"
GROUPS: dict[str, tuple[str, ...]] = {
    "golden logits and tables": ("tests/golden",),
    "kernels compile": (KERNELS,),
    "everything else without a GPU": (
        *("tests/unit", "tests/property", "tests/integration"),
        f"--ignore={KERNELS}",
    ),
}

MOST_LINES = 6  # of one failure's message: golden logits need four


def requirement(argument: str) -> list[str]:
    """Translate `NAME=SPEC` into arguments of `pip install`.

    SPEC is a version, `nightly`, a folder or wheel, or a `git+https://` address.

    Raises:
        ValueError: for another form.
    """
    name, equals, spec = argument.partition("=")
    if not (name and equals and spec) or name.startswith("-"):
        raise ValueError(f"expected NAME=SPEC, such as torch=2.15.0, got {argument!r}")
    if spec == "nightly":
        return [*NIGHTLY, "--upgrade", name]
    if Path(spec).exists():
        return [spec]
    if "://" in spec:
        return [f"{name} @ {spec}"]
    if spec[0].isdigit():
        return [f"{name}=={spec}"]
    raise ValueError(f"{spec!r} is no version, existing path or address, nor `nightly`")


class Failure(NamedTuple):
    """One failed test and the first lines of its message."""

    test: str
    lines: list[str]


@dataclass(frozen=True)
class Outcome:
    """What one group of tests did."""

    group: str
    tests: int
    seconds: float
    failures: list[Failure]


def read_outcome(group: str, junit: Path, seconds: float) -> Outcome:
    """Read a JUnit report. One that pytest could not write has no tests."""
    if not junit.exists():
        return Outcome(group, 0, seconds, [])
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failures = []
    for case in cases:
        for problem in (*case.iter("failure"), *case.iter("error")):
            lines = [line for line in (problem.get("message") or "").splitlines() if line.strip()]
            name = f"{case.get('classname')}::{case.get('name')}".replace(".", "/", 2)
            failures.append(Failure(name, lines[:MOST_LINES]))
    return Outcome(group, len(cases), seconds, failures)


def run_group(group: str, arguments: Sequence[str]) -> Outcome:
    """Run one group with pytest, on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        options = ("-q", "-n", "auto", "-m", "not gpu", f"--junitxml={junit}")
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pytest", *arguments, *options], check=False)
        return read_outcome(group, junit, time.perf_counter() - began)


def report(outcomes: Sequence[Outcome], versions: dict[str, str]) -> str:
    """Return the report as Markdown."""
    lines = [", ".join(f"{name} {number}" for name, number in versions.items()), ""]
    lines += ["| group | tests | failed | seconds |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {o.group} | {o.tests} | {len(o.failures)} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        for failure in outcome.failures:
            lines += ["", f"- `{failure.test}`", *(f"    {line}" for line in failure.lines)]
    return "\n".join(lines)


def status(outcomes: Sequence[Outcome]) -> int:
    """Return the exit status. A group without tests is never green."""
    if not all(outcome.tests for outcome in outcomes):
        return UNUSABLE
    return MOVED if any(outcome.failures for outcome in outcomes) else PASSED


def main() -> int:
    """Run every group and print the report. Returns the exit status."""
    outcomes = [run_group(group, arguments) for group, arguments in GROUPS.items()]
    print(report(outcomes, {name: version(name) for name in ("torch", "transformers")}))
    return status(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
