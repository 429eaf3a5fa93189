"""What the documents say is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from granite_paged.report.bench_results import read_result
from granite_paged.report.bench_tables import page_part
from granite_paged.report.eval_report import result_tables
from granite_paged.report.eval_results import read_bench, read_evaluation
from granite_paged.report.markdown import put_between

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_ci_calls_exactly_the_readmes_test_command() -> None:
    (command,) = [block.strip() for block in blocks("sh") if "nox -s tests" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_nox_session_of_the_readme_exists() -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    session = r"^@nox\.session[^\n]*\n(?:[@ )][^\n]*\n)*def (\w+?)_?\("
    sessions = re.findall(session, noxfile, re.MULTILINE)
    assert len(sessions) == noxfile.count("@nox.session")
    named = {name for names in re.findall(r"nox -s ([a-z_ ]+)", README) for name in names.split()}
    assert named <= set(sessions)
    assert set(sessions) <= named, "a session that the README does not mention"


@pytest.mark.parametrize(
    ("number", "printed"), [(0, ["copper-bell"]), (1, ["copper-bell", "iron-boat", "True"])]
)
def test_a_python_example_runs_and_recalls(number: int, printed: list[str]) -> None:
    assert len(blocks("python")) == 2
    example = blocks("python")[number]
    done = subprocess.run(
        [sys.executable, "-c", example], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == printed


@pytest.mark.parametrize("path", ["LICENSE", "CHANGELOG.md", ".github/workflows/ci.yml"])
def test_the_usual_files_are_there(path: str) -> None:
    assert (ROOT / path).stat().st_size > 0


def test_the_readmes_measurements_are_the_recorded_ones(tmp_path: Path) -> None:
    record = read_result(ROOT / "golden" / "perf" / "nvidia-h200.json")
    page = tmp_path / "page.md"
    page.write_text(README, encoding="utf-8")
    put_between(str(page), "bench", page_part(record, "golden/figures"))
    assert page.read_text(encoding="utf-8") == README
    for figure in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / figure).stat().st_size > 0


def test_the_readmes_results_are_the_files_of_evaluations() -> None:
    files = sorted((ROOT / "golden" / "results").glob("*.json"))
    evaluations = [read_evaluation(str(path)) for path in files]
    bench = read_bench(str(ROOT / "golden" / "perf" / "nvidia-h200.json"))
    for part in result_tables(evaluations, bench):
        assert part in README


def test_no_module_hides_one_of_the_standard_library() -> None:
    """A notebook runs in its own folder, whose modules come first: cProfile imports `profile`."""
    names = {path.stem for path in (ROOT / "granite_paged").rglob("*.py")}
    assert names & sys.stdlib_module_names == set()
