"""Help and tables fit terminals of 60, 80 and 120 columns, whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from granite_paged.bench.profiler import KernelCost
from granite_paged.cli import bench, evaluate, gate, profiling, serve, tune, verify
from granite_paged.cli.main import cli, run
from granite_paged.cli.options import RECORDS, report_console
from granite_paged.report.bench_results import read_result
from granite_paged.report.eval_results import read_evaluation
from tests.helpers.command_line import Capture, commands

WIDTHS = [60, 80, 120]
HELP = ["", *(words for words, _ in commands(cli))]
RESULTS = Path(__file__).parents[2] / "golden" / "results"
WHERE = {"model": "granite-4.0-h-1b (random weights, seed 0)", "device": "NVIDIA H100 80GB HBM3"}


# -- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", HELP)
def test_help_fits_and_cuts_nothing(
    words: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """An example is one line of any length, to be copied."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert run([*words.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if not line.startswith("  granite-paged ")]
    assert [line for line in lines if len(line) > width] == []
    cut = [line for line in lines if line.endswith("...") and not line.startswith("Usage:")]
    assert cut == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_help_of_a_group_has_the_whole_first_sentence_of_each_command(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, command in cli.commands.items():
        sentence = " ".join(str(command.help).partition(".")[0].split())
        assert (f"{name} {sentence}." in shown) is not command.hidden


# -- tables -------------------------------------------------------------------------------------


def bench_tables() -> Iterator[Table]:
    path = next(path for path in sorted(RECORDS.glob("*.json")) if ".published." not in path.name)
    session: Any = SimpleNamespace(name=WHERE["model"], device_name=WHERE["device"])
    yield from bench._row_tables(session, read_result(path).rows)


def eval_tables() -> Iterator[Table]:
    for path in sorted(RESULTS.glob("*.json")):
        yield from evaluate._tables(read_evaluation(path))


def profile_tables() -> Iterator[Table]:
    kernels = [KernelCost("attention", "triton_tem_fused_0", 40, 12_345.6)]
    found: Any = SimpleNamespace(kernels=kernels, by_kind=lambda: [("attention", 12_345.6)])
    yield profiling._kind_table(found)
    yield profiling._kernel_table(found)


def verify_tables() -> Iterator[Table]:
    case: Any = SimpleNamespace(
        name="decode, right padding",
        law="largest |paged - SDPA| at most 2e-05 of the largest logit",
        invariant="holds",
        passed=True,
        max_abs_diff=1.2e-6,
        relative_diff=3.4e-7,
        error_default=5.6e-7,
        error_paged=7.8e-7,
        error_ratio=1.023,
        tokens_equal=True,
    )
    kv = SimpleNamespace(
        sequences=1021, bytes_contiguous=10**9, bytes_paged=5 * 10**8, waste_fraction=0.03,
        passed=True,
    )  # fmt: skip
    more = {"dtype": "bfloat16", "page_size": 128, "recall": None, "passed": True, "kv": kv}
    versions = {"granite_paged": "0.1.0", "torch": "2.14.1", "transformers": "5.24.0"}
    report: Any = SimpleNamespace(**WHERE, cases=[case], versions=versions, **more)
    yield verify._cases(report)
    yield verify._summary(report)


def gate_tables() -> Iterator[Table]:
    check = SimpleNamespace(
        what="decode 32 x 8192", law="paged is not slower than recorded", verdict="passed",
        found="1.0234", bound="1.0500 x the record",
    )  # fmt: skip
    report: Any = SimpleNamespace(**WHERE, checks=[check])
    yield gate._table(report)
    bite = SimpleNamespace(
        what="decode 32 x 8192", law="time", loss=0.05, tries=20, green=20, red=19
    )
    teeth: Any = SimpleNamespace(**WHERE, bites=[bite])
    yield gate._teeth_table(teeth)


def serve_tables() -> Iterator[Table]:
    served = SimpleNamespace(
        first_token_ms=(12.3, 45.6), between_tokens_ms=(7.8, 9.1), tokens_per_second=12_345.0,
        requests=256,
    )  # fmt: skip
    baseline = SimpleNamespace(served=served, tokens_equal=0.99, speedup=7.5)
    report: Any = SimpleNamespace(
        model=WHERE["model"], engine=served, baselines={"default": baseline, "static": baseline},
        schedule_ms=0.123, prefix_hit_rate=0.5, preempted=3,
    )  # fmt: skip
    yield serve._table(report)


def tune_tables() -> Iterator[Table]:
    layout = {"SPLITS": 16, "BLOCK": 64, "num_warps": 4, "num_stages": 3}
    trial = SimpleNamespace(layout=layout, microseconds=1_234.5)
    outcome: Any = SimpleNamespace(
        skipped=2,
        trials={"decode 32 x 8192": [trial]},
        best=lambda shape: trial,
        loss=lambda shape: 0.034,
    )
    yield tune._table(f"{WHERE['model']}, {WHERE['device']}", [outcome])


TABLES: list[Callable[[], Iterator[Table]]] = [
    bench_tables,
    eval_tables,
    gate_tables,
    profile_tables,
    serve_tables,
    tune_tables,
    verify_tables,
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tables", TABLES)
def test_tables_fit_and_cut_nothing(
    tables: Callable[[], Iterator[Table]],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Where a table is wider than the terminal, it is printed as a list."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes the captured output for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    for table in tables():
        words = [word for column in table.columns for cell in column.cells for word in plain(cell)]
        assert words
        report_console(None).print(table)
        shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
        assert [word for word in words if word not in shown] == []
        assert "…" not in shown


def plain(cell: Any) -> list[str]:
    return Text.from_markup(str(cell)).plain.split()
