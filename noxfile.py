"""Sessions that check the project. `nox -l` lists them; start with `nox -s tests`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typing", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")

GPU_WORKERS = "7"
"""Processes that share a GPU of 80 GB. Most tests take less than 10 GB, one at a time up to 23."""

PYTEST_FOUND_NONE = 5
"""Exit status of pytest where no test matched."""

WORKERS = os.environ.get("PYTEST_WORKERS", "auto")
DEEP_STEPS = "1000000"

PROSE = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "golden/README.md", "docs", "examples"),
    *("granite_paged", "tests", "tools", "noxfile.py"),
)

MEASURED_MODEL = ("--random-weights", "granite-4.0-h-1b", "--dtype", "bfloat16")
REQUIRE_GPU = """
import sys, torch
if not torch.cuda.is_available():
    print("this session needs a CUDA device; nothing was run", file=sys.stderr)
    sys.exit(2)
"""
PRINT_RECORD = """
import torch
from granite_paged.report.bench_results import record_name
print(record_name(torch.cuda.get_device_name(), "granite-4.0-h-1b", "bfloat16"))
"""
RECORDS = Path("granite_paged/records")

UNUSABLE = 2
"""Exit status of our commands and tools where they could not judge: wrong use, or no GPU."""


def install(session: nox.Session, *groups: str, package: str | None = ".") -> None:
    """Install dependency groups of pyproject.toml, and the package as a user would."""
    named = nox.project.dependency_groups(PROJECT, *groups)
    session.install(*named, *([package] if package else []))


def run(session: nox.Session, *command: str) -> None:
    """Run a command or tool of ours. Its exit status 2 is nox's too, which is 1 otherwise."""
    try:
        session.run(*command)
    except nox.command.CommandFailed as failed:
        if failed.reason == f"Returned code {UNUSABLE}":
            sys.exit(UNUSABLE)
        raise


def refuse(message: str) -> NoReturn:
    """End a session that has nothing to judge: one line, and status 2."""
    print(message, file=sys.stderr)
    sys.exit(UNUSABLE)


@nox.session
def lint(session: nox.Session) -> None:
    """Check code with ruff, and text with codespell and the phrases in .prose.txt."""
    install(session, "lint", package=None)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    entries = Path(".prose.txt").read_text(encoding="utf-8").splitlines()
    phrases = "|".join(re.escape(entry.partition("->")[0]) for entry in entries)
    retired = ("--dictionary", ".prose.txt", "--regex", rf"(?<!\w)(?:{phrases})(?!\w)")
    session.run("codespell", *retired, *PROSE)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/. A broken link or an unknown name fails it."""
    install(session, "docs", package=None)
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=quiet)


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package: mypy, strict."""
    install(session, "typing")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs no GPU. Arguments go to pytest: `nox -s tests -- -k fork`."""
    install(session, "tests", "quantised", package=".[ray,eval]")
    arguments = session.posargs or ["--durations=10"]
    session.run("python", "-m", "pytest", "-n", WORKERS, "-m", "not gpu", *arguments)


@nox.session(name="property")
def property_(session: nox.Session) -> None:
    """Run allocator and engine a million steps each, more cases, and a fault at every call."""
    install(session, "tests")
    pytest = ("python", "-m", "pytest", "-n", WORKERS, *session.posargs)
    workers = max(1, int(WORKERS)) if WORKERS.isdecimal() else os.cpu_count() or 1
    # every shard must reach every rule and deep state: it needs as many steps as an ordinary run
    steps = {"GRANITE_PAGED_DEEP_STEPS": DEEP_STEPS, "GRANITE_PAGED_SHARDS": str(min(workers, 16))}
    machines = ("test_allocator_machine.py", "test_engine_machine.py")
    deep = {"HYPOTHESIS_PROFILE": "deep", **steps}
    session.run(*pytest, *(f"tests/property/{machine}" for machine in machines), env=deep)
    wide = {"HYPOTHESIS_PROFILE": "wide", "GRANITE_PAGED_SHARDS": str(min(workers, 4))}
    every_fault = "tests/integration/test_engine_every_fault.py"
    session.run(*pytest, "tests/property", every_fault, env=wide)


@nox.session
def soak(session: nox.Session) -> None:
    """Keep an engine busy for an hour, with faults; memory must be flat. `-- 600`: 10 minutes."""
    install(session, "tests")
    session.run("python", "-m", "tests.helpers.soak", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change the code in small ways that tests must notice: `nox -s mutants -- --sample 60`."""
    install(session, "mutants")
    session.run("python", "-m", "pytest", "-q", "tests/unit/test_mutants.py")
    run(session, "python", "-m", "tools.mutants", *session.posargs)


@nox.session
def snapshots(session: nox.Session) -> None:
    """Rewrite golden data and show what changed. Logits must agree with SDPA to be written."""
    install(session, "tests")
    session.run("python", "-m", "pytest", "tests/golden", "--snapshot-update", *session.posargs)
    session.run("git", "--no-pager", "diff", "--stat", "--", "golden", external=True)
    session.run("git", "--no-pager", "diff", "--", "golden/tables", external=True)
    session.run("git", "status", "--short", "--", "golden", external=True)


@nox.session
def verify(session: nox.Session) -> None:
    """Compare paged with SDPA: `nox -s verify -- --random-weights granite-4.0-h-350m`."""
    session.install(".")
    run(session, "granite-paged", "verify", *session.posargs)


@nox.session
def eval_parity(session: nox.Session) -> None:
    """Compare all of MMLU and TruthfulQA with lm-eval's own scores. Needs the data."""
    data = Path(os.environ.get("GRANITE_PAGED_DATA", "../shared/data")).resolve()
    if not (data / "mmlu_test.jsonl").exists():
        refuse(f"eval_parity: no data in {data}; set GRANITE_PAGED_DATA to its folder")
    session.install(*nox.project.dependency_groups(PROJECT, "parity"), ".[eval,wandb,tensorboard]")
    names = ("test_lm_eval", "test_lm_eval_model", "test_lm_eval_ranks", "test_report")
    extras = (f"tests/integration/{name}.py" for name in names)
    asked = {"GRANITE_PAGED_DATA": str(data), "GRANITE_PAGED_PARITY": "all"}
    session.run("python", "-m", "pytest", "--durations=5", *extras, *session.posargs, env=asked)


@nox.session
def notebook(session: nox.Session) -> None:
    """Run the notebook about `granite-paged profile`; a cell that raises fails the session."""
    session.install(".[plot]", "nbclient", "ipykernel")
    session.run("jupyter", "execute", "examples/profile.ipynb", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Draw golden/figures/evaluation and write the tables of docs/evaluation.md."""
    session.install(".[plot]")
    results = session.posargs or sorted(map(str, Path("golden/results").glob("*.json")))
    if not results:
        refuse("report: no results; `granite-paged eval --json golden/results/NAME.json`")
    files = RECORDS.glob("*.json")
    records = sorted(str(path) for path in files if ".published." not in path.name)
    curves = [part for record in records for part in ("--bench", record)]
    pages = ("--out", "golden/figures/evaluation", "--page", "docs/evaluation.md")
    session.run("granite-paged", "report", *results, *curves, *pages)


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """Run the GPU tests, then those that need a whole GPU, then the gate. Needs a GPU."""
    install(session, "tests")
    run(session, "python", "-c", REQUIRE_GPU)
    pytest = ("python", "-m", "pytest", "tests/gpu", "--durations=10", *session.posargs)
    passing = [0, PYTEST_FOUND_NONE] if session.posargs else [0]  # one part may have no such test
    # a process compiles one kernel at a time: threads of its own would only take the others' cores
    one_thread = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    parallel = (*pytest, "-n", GPU_WORKERS, "-m", "not whole_gpu")
    session.run(*parallel, success_codes=passing, env=one_thread)
    session.run(*pytest, "-m", "whole_gpu", success_codes=passing)
    run(session, "granite-paged", "gate", *MEASURED_MODEL)


@nox.session
def perf_record(session: nox.Session) -> None:
    """Record this GPU, calibrate its gate, draw figures. Arguments go to bench. Needs a GPU."""
    install(session, "tests")
    run(session, "python", "-c", REQUIRE_GPU)
    name = session.run("python", "-c", PRINT_RECORD, silent=True).strip()
    record, tables = str(RECORDS / name), f"golden/perf/{name.removesuffix('.json')}.md"
    session.run("granite-paged", "bench", *MEASURED_MODEL, "--json", record, *session.posargs)
    calibrate = ("--calibrate", "20", "--records", str(RECORDS))
    run(session, "granite-paged", "gate", *MEASURED_MODEL, *calibrate)
    page = ("--page", "docs/benchmarks.md")
    figures = ("--out", "golden/figures", "--markdown", tables, *page)
    session.run("granite-paged", "plot", record, *figures)
    changed = ("golden", "docs", str(RECORDS))
    session.run("git", "status", "--short", "--", *changed, external=True)


@nox.session
def engine_record(session: nox.Session) -> None:
    """Measure the engine and exact mode on this GPU, for the documentation. Needs a GPU."""
    install(session, "tests")
    run(session, "python", "-c", REQUIRE_GPU)
    run(session, "python", "-m", "tools.engine_figures", *session.posargs)
    run(session, "python", "-m", "tools.exact_cost", "--out", "golden/engine")
    session.run("git", "--no-pager", "diff", "--", "golden/engine", external=True)


@nox.session
def tune(session: nox.Session) -> None:
    """Choose the constants of kernel options again. Arguments go to tune. Needs a GPU."""
    session.install(".")
    run(session, "python", "-c", REQUIRE_GPU)
    constants = "granite_paged/layers/tuned.json"
    run(session, "granite-paged", "tune", *MEASURED_MODEL, "--write", constants, *session.posargs)
    session.run("git", "--no-pager", "diff", "--", constants, external=True)


@nox.session
@nox.parametrize("resolution", ["lowest-direct", "highest"])
def matrix(session: nox.Session, resolution: str) -> None:
    """Run the tests at one end of the version ranges in pyproject.toml."""
    groups = nox.project.dependency_groups(PROJECT, "tests")
    session.run_install("uv", "pip", "install", f"--resolution={resolution}", ".", *groups)
    session.run("uv", "pip", "list", silent=False)
    session.run("python", "-m", "pytest", "-n", WORKERS, "-m", "not gpu", *session.posargs)


@nox.session
def canary(session: nox.Session) -> None:
    """Try other versions: `nox -s canary -- torch=2.15.0 transformers=PATH`. Says what moved.

    A version is a number, `nightly`, a folder, a wheel or a git+https address. Exit status 2 means
    that the versions cannot be installed, or that no test ran.
    """
    from tools.canary import requirement  # noqa: PLC0415

    installing = "the tests"
    try:
        install(session, "tests")
        for installing in session.posargs:
            session.install(*requirement(installing))
    except (ValueError, nox.command.CommandFailed) as error:
        refuse(f"canary: cannot install {installing}: {error}")
    run(session, "python", "-m", "tools.canary")


@nox.session
def upstream(session: nox.Session) -> None:
    """Run transformers' own tests with every model patched: `nox -s upstream -- CHECKOUT`."""
    from tools.upstream.__main__ import find_checkout  # noqa: PLC0415

    try:
        checkout = find_checkout(session.posargs)
    except ValueError as error:
        print(f"upstream: {error}", file=sys.stderr)
        sys.exit(UNUSABLE)
    install(session, "upstream")
    session.install(str(checkout))
    run(session, "python", "-m", "tools.upstream", str(checkout))


if __name__ == "__main__":
    sys.exit("run this file with nox: `nox -l` lists the sessions")
