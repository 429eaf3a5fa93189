"""Tables and figures of benchmarks show exactly what the results hold."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite_paged.errors import CannotWrite, InvalidArgument, MissingExtra
from granite_paged.files import write_file
from granite_paged.names import FIGURE_FORMATS
from granite_paged.report import bench_figures, bench_tables, markdown
from granite_paged.report.bench_figures import draw_all
from granite_paged.report.bench_results import Latency, Result, Row
from granite_paged.report.bench_tables import table, tables
from granite_paged.report.plotting import default_style
from granite_paged.report.published import original_study

PUBLISHED = [original_study()]


def row(case: str, mode: str, batch: int, context: int, ms: float, **more: Any) -> Row:
    latency = Latency(ms, ms, ms, 10)
    fields = {"peak_bytes": 3 * 10**9, "floor_ms": 1.0, "tokens_per_second": 5e4, **more}
    return Row(case, mode, batch, context, latency, **fields)


ROWS = [
    row("batch", "default", 1, 512, 78.0),
    row("batch", "paged", 1, 512, 6.0, peak_bytes=2 * 10**9),
    row("batch", "default", 8, 512, 170.0),
    row("batch", "paged", 8, 512, 30.0),
    row("context", "paged", 1, 4096, 30.0),
    Row("context", "default", 1, 4096, error="OutOfMemoryError: 3 GB asked for"),
    row("decode", "default", 1, 512, 75.0),
    row("decode", "static", 1, 512, 3.4),
    row("decode", "paged", 1, 512, 1.7),
    row("decode", "paged", 1, 4096, 1.8),
    row("kernel", "paged", 32, 4096, 0.08, floor_us=62.0, sdpa_us=75.0, paged_us=80.0),
    row(
        "kernel",
        "paged",
        32,
        4096,
        0.07,
        variant="ragged 64-4096",
        floor_us=32.0,
        sdpa_us=85.0,
        paged_us=70.0,
    ),
    Row("memory", "default", 300, 4096, peak_bytes=10**9, variant="ragged 1-4096", note="1 GB"),
    Row("memory", "paged", 500, 4096, peak_bytes=10**9, variant="ragged 1-4096", note="1 GB"),
    Row("coldstart", "paged", 1, 512, Latency(11e3, n=1), variant="first token, empty cache"),
    row("serve", "paged", 64, 96, 100.0),
]


def result(*rows: Row, device: str = "NVIDIA H200") -> Result:
    versions = {"torch": "2.11"}
    return Result(device, versions, 0, list(rows or ROWS), model="granite-4.0-h-1b", dtype="bf16")


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_batch_table_compares_modes_side_by_side() -> None:
    header, _, first, second = cells(table(result(), "batch"))
    assert header[2:6] == ["default, ms", "paged, ms", "default / paged", "floor, ms"]
    assert first == ["1", "512", "78", "6", "13.00", "1", "3.00", "2.00", "50,000"]
    assert second[:5] == ["8", "512", "170", "30", "5.67"]


def test_a_failure_has_a_cell_and_a_note() -> None:
    text = table(result(), "context")
    assert "| out of memory | 30 | - |" in text
    assert "- default, 1 x 4096: OutOfMemoryError: 3 GB asked for" in text


def test_a_shape_that_was_not_run_shows_a_dash_and_says_so() -> None:
    text = table(result(), "decode")
    assert cells(text)[3][:7] == ["1", "4,096", "-", "-", "1.8", "-", "-"]
    assert "- default: not measured at 1 x 4096\n" in text
    assert "- static: not measured at 1 x 4096\n" in text
    assert "paged: not measured" not in text


def test_a_skipped_shape_is_not_called_failed() -> None:
    skipped = Row("decode", "default", 1, 4096, error="not measured: the budget of 9 s was spent")
    text = table(result(*ROWS, skipped), "decode")
    assert cells(text)[3][2] == "-"
    assert "- default, 1 x 4096: not measured: the budget of 9 s was spent" in text


def test_the_compiled_mode_has_a_ratio_of_its_own() -> None:
    header, _, first, _ = cells(table(result(), "decode"))
    ratios = dict(zip(header, first, strict=True))
    assert (ratios["default / paged"], ratios["static / paged"]) == ("44.12", "2.00")


def test_rows_with_mamba_kernels_have_columns_of_their_own() -> None:
    fast = row("batch", "default", 8, 512, 60.0, variant="mamba_ssm", mamba="mamba_ssm 2.3.0")
    header, _, first, second = cells(table(result(*ROWS, fast), "batch"))
    assert header[2:5] == ["default, ms", "default, mamba_ssm, ms", "paged, ms"]
    assert header[5:7] == ["default / paged", "default, mamba_ssm / paged"]
    assert second[2:7] == ["170", "60", "30", "5.67", "2.00"]
    assert first[3] == "-"


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.11"}, "with transformers' reference code, which is slow"),
        ({"torch": "2.11", "mamba_ssm": "2.3.0"}, "Columns say what transformers' modes run"),
    ],
)
def test_the_heading_says_what_ran_the_mamba_layers(versions: dict[str, str], said: str) -> None:
    found = replace(result(), versions=versions)
    assert said in tables([found])
    assert said in bench_tables.page_part(found, [])


def test_a_workload_is_named_by_its_requests() -> None:
    header, _, line = cells(table(result(), "serve"))
    assert header[:2] == ["requests", "tokens each, at most"]
    assert header[-1] == "new tokens per second"
    assert line[:3] == ["64", "96", "100"]


def test_the_kernel_table_has_the_ratio_to_sdpa() -> None:
    lines = cells(table(result(), "kernel"))
    assert [line[1] for line in lines[2:]] == ["4,096", "ragged 64-4096"]
    assert [line[-1] for line in lines[2:]] == ["1.07", "0.82"]


def test_memory_and_cold_start_have_tables() -> None:
    assert cells(table(result(), "memory"))[3][:4] == ["in pages", "1-4096", "500", "1.00"]
    assert cells(table(result(), "coldstart"))[2] == ["first token, empty cache", "11"]


def test_the_page_names_device_model_versions_and_cases() -> None:
    text = tables([result(), result(device="cpu")])
    assert "**NVIDIA H200** · granite-4.0-h-1b, bf16 · torch 2.11" in text
    assert "**cpu**" in text
    assert [title for title in bench_tables._TITLES.values() if text.count(title) != 2] == []


def test_all_rows_of_a_table_have_equal_length() -> None:
    for case in bench_tables._TITLES:
        lines = cells(table(result(), case))
        assert len({len(line) for line in lines}) == 1, case


def test_a_case_without_rows_has_no_table() -> None:
    assert table(result(ROWS[0]), "kernel") == ""


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="cannot write"):
        write_file(tmp_path, "x")


# -- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FIGURE_FORMATS)
def test_every_figure_with_rows_is_written(form: str, tmp_path: Path) -> None:
    files = draw_all([result()], PUBLISHED, tmp_path, form)
    assert {file.stem for file in files} == set(bench_figures._FIGURES)
    assert all(file.stat().st_size > 5000 for file in files)


def test_only_figures_with_rows_are_written(tmp_path: Path) -> None:
    files = draw_all([result(*ROWS[:4])], PUBLISHED, tmp_path)
    assert [file.name for file in files] == ["latency-batch.png", "memory-batch.png"]


def test_equal_results_draw_identical_files(tmp_path: Path) -> None:
    first, second = (
        draw_all([result(*ROWS[:4])], PUBLISHED, folder)[0].read_bytes()
        for folder in (tmp_path, tmp_path)
    )
    assert first == second


def test_figures_do_not_depend_on_the_users_matplotlibrc(tmp_path: Path) -> None:
    import matplotlib  # noqa: PLC0415

    plain, styled = tmp_path / "plain", tmp_path / "styled"
    for folder in (plain, styled):
        folder.mkdir()
    draw_all([result()], PUBLISHED, plain)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        draw_all([result()], PUBLISHED, styled)
        assert matplotlib.rcParams["text.usetex"], "the user's own settings are back"
    for figure in plain.iterdir():
        assert figure.read_bytes() == (styled / figure.name).read_bytes()


def test_a_backend_that_matplotlib_does_not_know_is_no_obstacle(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from granite_paged.report.plotting import default_style, new_figure\n"
            "with default_style():\n"
            f"    new_figure(figsize=(1, 1))[0].savefig({str(tmp_path / 'figure.png')!r})",
        ],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "module://not_installed"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("name", ["a $x^ b", r"a \frac{ b", "a_b^c"])
def test_names_are_drawn_as_text(name: str, tmp_path: Path) -> None:
    assert draw_all([result(*ROWS[:4], device=name)], PUBLISHED, tmp_path)


def test_a_cell_stays_in_its_row_and_column() -> None:
    assert markdown.table(["a", "b"], [["x | y", "two\nlines"]]).splitlines()[2:] == [
        r"| x \| y | two lines |"
    ]


def lines_of(name: str, *results: Result, published: Any = PUBLISHED) -> dict[str, Any]:
    with default_style():
        figure = bench_figures._FIGURES[name](list(results), published)
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_lines_show_medians_floor_and_published_figures() -> None:
    lines = lines_of("latency-batch", result())
    assert list(lines["paged"].get_ydata()) == [6.0, 30 / 8]
    assert list(lines["floor"].get_ydata()) == [1.0, 1 / 8]
    study = lines["original study: paged,\n24-layer model, NVIDIA A100 80GB"]
    assert list(study.get_xdata()) == [1, 2, 4, 8, 16, 32]
    assert study.get_ydata()[0] == 289.84


def test_rows_with_mamba_kernels_have_a_line_of_their_own() -> None:
    fast = row("batch", "default", 8, 512, 60.0, variant="mamba_ssm")
    lines = bench_figures._lines([result(*ROWS, fast)], "batch", "batch", bench_figures._ms)
    points = {line.label: line.points for line in lines}
    assert points["default, mamba_ssm"] == [(8.0, 60.0)]
    assert points["default"] == [(1.0, 78.0), (8.0, 170.0)]


def test_each_prompt_length_has_its_own_line() -> None:
    rows = [row("batch", "paged", b, c, 1.0 * b * c) for b in (1, 2) for c in (16, 64)]
    lines = lines_of("latency-batch", result(*rows), published=[])
    assert list(lines["paged 64 tokens"].get_ydata()) == [64.0, 64.0]
    assert list(lines["paged 16 tokens"].get_ydata()) == [16.0, 16.0]


def test_memory_is_drawn_in_gigabytes() -> None:
    assert list(lines_of("memory-batch", result())["paged"].get_ydata()) == [2.0, 3.0]


def test_two_devices_have_their_own_labels_and_styles() -> None:
    lines = lines_of("latency-batch", result(), result(device="NVIDIA L4"), published=[])
    one, other = lines["paged, NVIDIA H200"], lines["paged, NVIDIA L4"]
    assert one.get_linestyle() != other.get_linestyle()


def test_decode_has_a_panel_for_each_context() -> None:
    with default_style():
        figure = bench_figures._FIGURES["decode"]([result()], [])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["context 512 tokens", "context 4,096 tokens"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"static", "floor"} <= labels


def test_results_without_a_row_are_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nothing to draw"):
        draw_all([result(ROWS[5])], PUBLISHED, tmp_path)


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="with its extra plot"):
        draw_all([result()], PUBLISHED, tmp_path)
