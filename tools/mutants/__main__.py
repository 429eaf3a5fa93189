"""Change the code in small ways, one at a time, and see whether the tests notice.

    nox -s mutants                                       every mutant
    nox -s mutants -- --sample 60                        60 that unit tests judge, always the same
    nox -s mutants -- --module granite_paged/geometry.py

Exit status: 0 every mutant was killed or is listed in `equivalent.toml`; 1 one survived, or, where
every mutant was judged, a score is below `LEAST_OF_MODULE` or `LEAST_OF_ALL`; 2 nothing was judged:
the list no longer matches the code, or the tests fail without a mutant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pytest

from tools.mutants.catalogue import Mutant, mutants, mutate
from tools.mutants.equivalents import Equivalent, read_equivalents, stale
from tools.mutants.forks import Part, Reach, by_file, record_reach, run_tests, warm_up

KILLED, SURVIVED, UNUSABLE = 0, 1, 2

LEAST_OF_MODULE, LEAST_OF_ALL = 0.95, 0.97
"""Least score, as killed of those that are not equivalent: of each module with at least `ENOUGH`
mutants, and of all together."""

ENOUGH = 20

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".mutants.json"

JUDGES = Path(__file__).with_name("judges.toml")
NEED_A_GPU = ("granite_paged/runner/graph.py",)
"""Modules that no test without a GPU runs."""

SURVIVES = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

TEST_TIME = 60.0  # seconds of tests per mutant, the fastest first
FILE_LIMIT = 900.0  # seconds for one test file without a mutant
SAMPLE_TIME = 30.0  # seconds that a test file is taken to need where nothing was recorded


class Verdict(NamedTuple):
    """What became of a mutant. `by` is empty for a survivor."""

    mutant: Mutant
    line: str
    by: str
    seconds: float
    tests: int


def read_judges(root: Path = ROOT) -> dict[str, list[str]]:
    """Return every module that is mutated, with the test files that judge it."""
    entries: dict[str, list[str]] = tomllib.loads(JUDGES.read_text(encoding="utf-8"))
    judges: dict[str, list[str]] = {}
    for path in sorted(entries, key=len):  # a folder, then what is in it
        paths = [root / path] if path.endswith(".py") else sorted((root / path).glob("*.py"))
        for module in (path.relative_to(root).as_posix() for path in paths):
            if module not in NEED_A_GPU:
                judges[module] = [f"tests/{test}.py" for test in entries[path]]
    return judges


# -- what tests reach --------------------------------------------------------------------------


def _digest(root: Path, file: str) -> str:
    """Return a digest of everything that a test file's reach depends on."""
    paths = sorted([*root.glob("granite_paged/**/*.py"), *root.glob("tests/helpers/*.py")])
    digest = hashlib.sha256()
    for path in (*paths, *sorted(root.glob("tests/**/conftest.py")), root / file):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _record(arguments: tuple[Path, str, Sequence[str]]) -> Reach | str:
    root, file, modules = arguments
    reach = record_reach(root, [file], modules, FILE_LIMIT)
    if isinstance(reach, Reach):
        warm_up(reach.modules)
    return reach


def reaches(
    root: Path, files: Sequence[str], modules: Sequence[str], jobs: int, cache: Path | None = None
) -> dict[str, Reach]:
    """Return what every test file reaches, recorded now or earlier for the same code.

    Raises:
        RuntimeError: if a test fails without a mutant.
    """
    known = json.loads(cache.read_text(encoding="utf-8")) if cache and cache.exists() else {}
    digests = {file: _digest(root, file) for file in files}
    missing = [f for f in files if known.get(f, [None])[0] != digests[f]]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        found = pool.map(_record, [(root, file, modules) for file in missing])
        failures = []
        for file, reach in zip(missing, found, strict=True):
            if isinstance(reach, str):
                failures.append(reach)
                continue
            known[file] = [digests[file], *reach]
            if cache:
                cache.write_text(json.dumps(known), encoding="utf-8")
    if failures:
        raise RuntimeError(f"tests fail without a mutant: {failures[0]}")
    return {file: Reach(*known[file][1:]) for file in files}


def tests_for(mutant: Mutant, reached: Iterable[Reach], budget: float) -> dict[str, float]:
    """Return the tests that reach a mutant, with their seconds: the fastest, within `budget`.

    Every test may see what runs at import: a constant, or the default of a dataclass, whose
    `__init__` has no lines.
    """
    first, last = mutant.lines
    found = {}
    for reach in reached:
        for node, modules in reach.lines.items():
            lines = modules.get(mutant.module, ())
            if mutant.imported or any(first <= line <= last for line in lines):
                found[node] = reach.seconds[node]
    chosen: dict[str, float] = {}
    total = 0.0
    for node in sorted(found, key=lambda node: found[node]):
        total += found[node]
        if total > budget and chosen:
            break
        chosen[node] = found[node]
    return chosen


# -- mutants -------------------------------------------------------------------------------------


def parts_for(mutant: Mutant, reached: Mapping[str, Reach], budget: float) -> list[Part]:
    """Return the tests that reach a mutant, then the whole files.

    What a fixture of a module does, or a function that is cached, is recorded for the first test
    only, so a mutant that seems to survive is shown to every test of its files.
    """
    likely = by_file(tests_for(mutant, reached.values(), budget))
    return likely + [Part(file, [], sum(reach.seconds.values())) for file, reach in reached.items()]


def judge(task: tuple[Path, Mutant, list[Part]]) -> Verdict:
    """Run tests against one mutant until one fails."""
    root, mutant, parts = task
    began = time.perf_counter()
    source, line = mutate(root, mutant)
    compile(source, mutant.module, "exec")  # one that is no Python would count as killed
    by, ran = "", 0
    for part in parts:
        ran += len(part.nodes)
        if run_tests(root, mutant.module, source, part).status not in SURVIVES:
            by = part.file
            break
    return Verdict(mutant, line, by, time.perf_counter() - began, ran)


def _fails(task: tuple[Path, str, Part]) -> str:
    """Return pytest's output if tests fail where a module is replaced by its own text."""
    root, module, part = task
    source = (root / module).read_text(encoding="utf-8")
    run = run_tests(root, module, source, part)
    return "" if run.status == 0 else f"{part.file}: exit {run.status}\n{run.output[-2000:]}"


def split(
    root: Path, found: Sequence[Mutant], equivalents: Sequence[Equivalent]
) -> tuple[list[Mutant], Counter[str], list[Equivalent]]:
    """Return the mutants to judge, how many of each module are not, and entries without one."""
    listed = {(e.module, e.function, e.line, e.mutant): e for e in equivalents}
    lines = {(e.module, e.function, e.line) for e in equivalents}
    rest, used = [], set()
    equivalent: Counter[str] = Counter()
    for mutant in found:
        place = (mutant.module, mutant.function, mutant.source)
        key = (*place, mutate(root, mutant)[1]) if place in lines else None
        if key in listed:
            used.add(key)
            equivalent[mutant.module] += 1
        else:
            rest.append(mutant)
    modules = {mutant.module for mutant in found}
    unused = [e for key, e in listed.items() if key not in used and e.module in modules]
    return rest, equivalent, unused


def table(verdicts: Sequence[Verdict], equivalent: Mapping[str, int]) -> str:
    """Return the score of each module as a Markdown table."""
    total = Counter(verdict.mutant.module for verdict in verdicts)
    killed = Counter(verdict.mutant.module for verdict in verdicts if verdict.by)
    lines = ["| module | mutants | killed | equivalent | score |", "| --- |" + " ---: |" * 4]
    rows = [(m, total[m], killed[m], equivalent.get(m, 0)) for m in sorted(total)]
    rows.append(("all", total.total(), killed.total(), sum(equivalent.values())))
    lines += [f"| {m} | {n} | {k} | {e} | {k / n:.1%} |" for m, n, k, e in rows]
    return "\n".join(lines)


def passed(verdicts: Sequence[Verdict], *, whole: bool) -> bool:
    """Whether no mutant survived; of all mutants, whether the scores are high enough."""
    if not whole:
        return all(verdict.by for verdict in verdicts)
    modules: dict[str, list[bool]] = {}
    for verdict in verdicts:
        modules.setdefault(verdict.mutant.module, []).append(bool(verdict.by))
    large = [killed for killed in modules.values() if len(killed) >= ENOUGH]
    return fmean(bool(verdict.by) for verdict in verdicts) >= LEAST_OF_ALL and all(
        fmean(killed) >= LEAST_OF_MODULE for killed in large
    )


def survivor(verdict: Verdict) -> str:
    """Describe a survivor: place, operator, and the line before and after."""
    mutant = verdict.mutant
    tests = f"{verdict.tests} tests reach it" if verdict.tests else "no recorded test reaches it"
    return (
        f"SURVIVED {mutant.module}:{mutant.line} {mutant.operator} ({mutant.function}; {tests})\n"
        f"  - {mutant.source}\n  + {verdict.line}"
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--module", action="append", default=[], help="only this module; repeat")
    parser.add_argument(
        "--sample", type=int, help="how many mutants, of modules that unit tests judge"
    )
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget", type=float, default=TEST_TIME, help="seconds per mutant")
    parser.add_argument("--json", type=Path, help="write every verdict to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge mutants and print the survivors. Returns the exit status."""
    options = _arguments(arguments)
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.chdir(ROOT)
    judges = read_judges()
    modules = options.module or list(judges)
    if unknown := [module for module in modules if module not in judges]:
        print(f"mutants: {unknown[0]} is none of the modules that are mutated", file=sys.stderr)
        return UNUSABLE
    equivalents = read_equivalents()
    found = [m for module in modules for m in mutants(ROOT, module)]
    rest, equivalent, unused = split(ROOT, found, equivalents)
    problems = stale(ROOT, equivalents)
    problems += [f"{e.module}: is listed, and no mutant reads `{e.mutant}`" for e in unused]
    if problems or not rest:
        print(f"mutants: {problems[0] if problems else 'there is no mutant'}", file=sys.stderr)
        return UNUSABLE
    if options.sample:  # in minutes: from modules that need no model to judge them
        rest = [m for m in rest if not any("/integration/" in file for file in judges[m.module])]
        rest = sorted(rest, key=lambda mutant: mutant.rank(options.seed))[: options.sample]

    import torch  # noqa: PLC0415  # it reads the environment that is set above

    torch.set_num_threads(1)
    files = sorted({file for mutant in rest for file in judges[mutant.module]})
    try:
        collected = record_reach(ROOT, files, (), FILE_LIMIT, "--collect-only")
        if isinstance(collected, str):
            raise RuntimeError(f"tests cannot be collected: {collected}")
        warm_up(collected.modules)
        if options.sample:
            parts = {m: [Part(file, [], SAMPLE_TIME) for file in judges[m.module]] for m in rest}
        else:
            reached = reaches(ROOT, files, list(judges), options.jobs, CACHE)
            warm_up(sorted({name for reach in reached.values() for name in reach.modules}))
            parts = {}
            for mutant in rest:
                judging = {file: reached[file] for file in judges[mutant.module]}
                parts[mutant] = parts_for(mutant, judging, options.budget)
        verdicts = run(parts, options.jobs)
    except RuntimeError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return UNUSABLE
    print(table(verdicts, equivalent))
    if options.json:
        rows = [{**v.mutant._asdict(), **v._asdict(), "mutant": v.line} for v in verdicts]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    whole = not (options.sample or options.module)
    return KILLED if passed(verdicts, whole=whole) else SURVIVED


def run(parts: Mapping[Mutant, list[Part]], jobs: int) -> list[Verdict]:
    """Judge every mutant and print the survivors.

    Raises:
        RuntimeError: if tests that killed one fail without a mutant.
    """
    verdicts = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for verdict in pool.map(judge, [(ROOT, *task) for task in parts.items()]):
            verdicts.append(verdict)
            if not verdict.by:
                print(survivor(verdict), flush=True)
        killers = {
            v.by: (ROOT, v.mutant.module, part)
            for v in verdicts
            for part in parts[v.mutant]
            if part.file == v.by
        }
        for failure in pool.map(_fails, killers.values()):
            if failure:
                raise RuntimeError(f"tests fail without a mutant: {failure}")
    return verdicts


if __name__ == "__main__":
    raise SystemExit(main())
