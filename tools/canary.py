"""Try this project on other versions of torch and transformers, and say what moved.

    nox -s canary -- torch=2.15.0 transformers=git+https://github.com/huggingface/transformers

`nox` installs the versions; this module runs the tests that need no GPU, in groups, and prints one
report: which tests broke, and, for golden logits, whether transformers' SDPA moved or paged did. It
also says whether the bits of exact mode are the recorded ones, and which layer differs first.
Exit status: 0 nothing moved, 1 something did, 2 the versions cannot be installed or nothing ran.
"""

from __future__ import annotations

import os
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

BITS = Path(__file__).parents[1] / "golden" / "bits"
"""Recorded digests of bits."""

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


def moved_bits(recorded: Path = BITS) -> list[str]:
    """Return lines that compare this environment's bits in exact mode with the nearest recorded.

    They may differ on another device or with another version, so they do not count as a failure.
    """
    command = ("-m", "granite_paged", "verify", "--device", "cpu", "--bits-out")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bits.json")
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as it was recorded
        subprocess.run([sys.executable, *command, str(path)], check=False, env=one_thread)
        if not path.exists():
            return ["bits of exact mode: they could not be computed"]
        return described_bits(path, recorded)


def described_bits(path: Path, recorded: Path) -> list[str]:
    """Return lines that compare a file of digests with the nearest of a folder of recorded ones."""
    from granite_paged.bits import read_reports  # noqa: PLC0415  # the versions may not work

    (now,) = read_reports(path)
    every = [one for file in sorted(recorded.glob("*.json")) for one in read_reports(file)]
    known = [one for one in every if one.same_model(now)]
    if not known:
        return [f"bits of exact mode: none are recorded for {now.model} in {now.dtype}"]
    nearest = min(known, key=lambda one: len(one.moved(now)))
    return ["bits of exact mode, recorded and now:", *nearest.described(now)]


def report(outcomes: Sequence[Outcome], versions: dict[str, str], bits: Sequence[str] = ()) -> str:
    """Return the report as Markdown. bits: lines about the bits of exact mode."""
    lines = [", ".join(f"{name} {number}" for name, number in versions.items()), ""]
    lines += ["| group | tests | failed | seconds |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {o.group} | {o.tests} | {len(o.failures)} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        for failure in outcome.failures:
            lines += ["", f"- `{failure.test}`", *(f"    {line}" for line in failure.lines)]
    lines += ["", *bits] if bits else []
    return "\n".join(lines)


def status(outcomes: Sequence[Outcome]) -> int:
    """Return the exit status. A group without tests is never green."""
    if not all(outcome.tests for outcome in outcomes):
        return UNUSABLE
    return MOVED if any(outcome.failures for outcome in outcomes) else PASSED


def main() -> int:
    """Run every group and print the report. Returns the exit status."""
    outcomes = [run_group(group, arguments) for group, arguments in GROUPS.items()]
    versions = {name: version(name) for name in ("torch", "transformers")}
    print(report(outcomes, versions, moved_bits()))
    return status(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
