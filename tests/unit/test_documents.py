"""The documents are true: their commands, snippets, paths, names and recorded numbers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import granite_paged
from granite_paged import errors
from granite_paged.cli.main import cli
from granite_paged.report.bench_figures import _FIGURES
from granite_paged.report.bench_results import read_result
from granite_paged.report.bench_tables import page_part
from granite_paged.report.eval_report import result_tables
from granite_paged.report.eval_results import read_evaluation
from granite_paged.report.markdown import put_between

ROOT = Path(__file__).parents[2]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "golden/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
README_LINES = 180


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(page), flags=re.DOTALL)


def records() -> list[Path]:
    """Return the recorded measurements, one file per GPU."""
    return sorted((ROOT / "granite_paged" / "records").glob("*.json"))


def sessions() -> set[str]:
    """Return the names of the sessions in the noxfile."""
    text = read("noxfile.py")
    found = re.findall(
        r"^@nox\.session[^\n]*\n(?:[@ )][^\n]*\n)*def (\w+?)_?\(", text, re.MULTILINE
    )
    assert len(found) == text.count("@nox.session")
    return set(found)


# -- commands -----------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= README_LINES


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = [block.strip() for block in blocks("README.md", "sh") if "nox -s tests" in block]
    assert command in read(".ci/run").splitlines(), f".ci/run must call {command!r}"


@pytest.mark.parametrize("page", PAGES)
def test_every_nox_session_on_a_page_exists(page: str) -> None:
    named = re.findall(r"nox -R? ?-?s? ?\"?([a-z_]+(?: [a-z_]+)*)", read(page))
    unknown = {name for names in named for name in names.split()} - sessions()
    assert not unknown, f"{page} names sessions that noxfile.py does not have"


def test_contributing_mentions_every_session() -> None:
    text = read("CONTRIBUTING.md")
    missing = {name for name in sessions() if not re.search(rf"`(?:nox -s )?{name}`", text)}
    assert not missing, "describe these sessions in CONTRIBUTING.md"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_exists(page: str) -> None:
    named = re.findall(r"(?:^|`|bin/)granite-paged (\w+)", read(page), flags=re.MULTILINE)
    unknown = set(named) - set(cli.commands)
    assert not unknown, f"{page} names commands that do not exist"


def test_the_readme_lists_every_command() -> None:
    shown = {name for name, command in cli.commands.items() if not command.hidden}
    listed = re.findall(r"^\| `granite-paged (\w+)", read("README.md"), flags=re.MULTILINE)
    expected = {name.split()[0] for name in shown}
    assert set(listed) == expected, "list exactly the commands that --help shows in README.md"


# -- names and paths ----------------------------------------------------------------------------

PATH = re.compile(r"`([\w.-]+(?:/[\w.-]*)+)`")
OUTSIDE = (
    *(".nox/", "site/"),
    *("perf/", "figures/", "logits/", "tables/", "results/", "runs/", "vllm/"),
)
"""Paths that pages may name although they are built, or relative to golden/."""


@pytest.mark.parametrize("page", PAGES)
def test_every_path_on_a_page_exists(page: str) -> None:
    """Paths start at the root of the repository or in the package's folder."""
    places = (ROOT, ROOT / "granite_paged")
    named = [path for path in PATH.findall(read(page)) if not path.startswith(OUTSIDE)]
    missing = [path for path in named if not any((place / path).exists() for place in places)]
    assert not missing, f"{page} names paths that do not exist"


def test_every_module_of_the_folder_table_exists() -> None:
    rows = re.findall(r"^\| `(\w+)/`.*$", read("docs/architecture.md"), flags=re.MULTILINE)
    assert {"paging", "layers", "hf", "runner", "engine", "report", "cli"} <= set(rows)
    for line in read("docs/architecture.md").splitlines():
        folder = re.match(r"\| `(\w+)/`", line)
        for module in re.findall(r"`(\w+\.py)`", line) if folder else ():
            assert (ROOT / "granite_paged" / folder.group(1) / module).exists(), module


@pytest.mark.parametrize("page", PAGES)
def test_every_module_run_on_a_page_exists(page: str) -> None:
    modules = re.findall(r"python3? -m ((?:granite_paged|tools)[\w.]*)", read(page))
    places = [ROOT / module.replace(".", "/") for module in modules]
    missing = [
        p for p in places if not (p.with_suffix(".py").exists() or (p / "__main__.py").exists())
    ]
    assert not missing, f"{page} runs modules that do not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_on_a_page_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(page))
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert not missing, f"{page} links to files that do not exist"


def test_the_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^::: .*\.(\w+)$", read("docs/reference/python.md"), re.MULTILINE))
    named = {name for name in granite_paged.__all__ if not hasattr(errors, name)}
    assert documented == named - {"__version__"}


@pytest.mark.parametrize("path", ["LICENSE", "CHANGELOG.md", ".github/workflows/ci.yml"])
def test_license_changelog_and_workflow_exist(path: str) -> None:
    assert (ROOT / path).stat().st_size > 0


def test_no_module_shadows_the_standard_library() -> None:
    """A script's own folder comes first on sys.path, and cProfile, for one, imports `profile`."""
    names = {path.stem for path in (ROOT / "granite_paged").rglob("*.py")}
    assert names & sys.stdlib_module_names == set()


def test_every_documented_gate_message_is_printed() -> None:
    rows = re.findall(r'^\| [^|]*"([^"|]+)"', read("docs/golden.md"), flags=re.MULTILINE)
    assert len(rows) == 7
    folder = ROOT / "granite_paged" / "bench"
    printed = "".join((folder / f"{name}.py").read_text() for name in ("gate", "judge", "records"))
    assert not [message for message in rows if message not in printed]


# -- snippets and numbers -----------------------------------------------------------------------


def test_readme_snippets_are_the_example_files() -> None:
    """tests/integration/test_examples.py runs the files."""
    files = ("paged_generate.py", "generate.py")
    assert blocks("README.md", "python") == [read(f"examples/{name}") for name in files]


def test_the_benchmark_page_shows_a_recorded_gpu(tmp_path: Path) -> None:
    """The page shows the GPU that was recorded last, which may be any of them."""
    text = read("docs/benchmarks.md")
    page = tmp_path / "page.md"
    links = [f"![{name}](../golden/figures/{name}.png)" for name in _FIGURES]
    shown = []
    for path in records():
        page.write_text(text, encoding="utf-8")
        put_between(str(page), "bench", page_part(read_result(path), links))
        shown.append(page.read_text(encoding="utf-8"))
    assert text in shown


def test_the_evaluation_page_shows_the_recorded_results() -> None:
    files = sorted((ROOT / "golden" / "results").glob("*.json"))
    evaluations = [read_evaluation(str(path)) for path in files]
    text = read("docs/evaluation.md")
    for part in result_tables(evaluations):
        assert part in text


def test_the_session_of_ci_has_ray_and_lm_eval() -> None:
    """Without them, tests/integration/test_ray.py and test_lm_eval*.py are skipped."""
    (session,) = re.findall(r"\ndef tests\(.*?\n\n\n", read("noxfile.py"), flags=re.DOTALL)
    assert 'package=".[ray,eval]"' in session
