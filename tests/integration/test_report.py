"""Reports: pages, figures and run logs that say what was measured, and on which GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from granite_paged.cli.main import OK, USAGE, run
from granite_paged.errors import CannotWrite, DataError
from granite_paged.report.eval_figures import curves
from granite_paged.report.eval_report import result_tables, update_page, write_report
from granite_paged.report.eval_results import (
    BenchRow,
    entries,
    original_study,
    read_bench,
    read_evaluation,
)
from tests.helpers.evaluation import tiny_evaluation

Capture = pytest.CaptureFixture[str]

DIFFERENCE = {
    "key": "anatomy/7",
    "default_choice": 1,
    "other_choice": 2,
    "default_logprobs": [-2.1, -2.11],
    "other_logprobs": [-2.12, -2.1],
    "gap": 0.01,
    "sdpa_error": 0.03,
    "near_tie": True,
}

BENCH = [
    {
        "case": "context",
        "mode": mode,
        "batch": 1,
        "context": context,
        "latency_ms": {"median": 2.0 * context, "p10": 1.0, "p90": 3.0, "n": 9},
        "peak_bytes": 3_000_000_000,
    }
    for mode in ("default", "paged")
    for context in (128, 512, 4096)
]


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    """A real evaluation, edited: one choice differs, and peak memory was measured."""
    result = tiny_evaluation().to_json()
    task = result["tasks"]["tiny"]
    task["agreement"]["paged"].update(
        differing=[DIFFERENCE], sdpa_error=0.04, reference="float32", measured=6
    )
    for metrics in task["modes"].values():
        metrics["peak_bytes"] = 3_210_000_000
    return {**result, "command": "granite-paged eval --seed 3", "tasks": {"mmlu": task}}


def bench_file(folder: Path, rows: Any) -> str:
    content = {"device": "NVIDIA H200", "rows": rows}
    (folder / "bench.json").write_text(json.dumps(content))
    return str(folder / "bench.json")


# -- tables -------------------------------------------------------------------------------------


def test_tables_name_the_run_and_its_figures(evaluation: dict[str, Any]) -> None:
    text = "\n".join(result_tables([evaluation], []))
    metrics = evaluation["tasks"]["mmlu"]["modes"]["paged"]
    for said in (
        "cpu; tiny, float32; granite_paged",
        "```sh\ngranite-paged eval --seed 3\n```",
        f"{metrics['accuracy']:.4f}",
        "3.21",
        "5 of 6 | 1 | 1 |",
        "0.04 (against float32)",
    ):
        assert said in text


def test_results_of_several_gpus_name_their_gpu(
    evaluation: dict[str, Any],
) -> None:
    assert [entry.label for entry in entries([evaluation])] == ["mmlu 0-shot, one by one"]
    runs = [{**evaluation, "device": device} for device in ("NVIDIA H200", "NVIDIA L4")]
    assert [entry.label for entry in entries(runs)] == [
        "mmlu 0-shot, one by one, H200",
        "mmlu 0-shot, one by one, L4",
    ]
    text = "\n".join(result_tables(runs, []))
    assert text.count(evaluation["command"]) == 1
    assert "- NVIDIA H200; tiny" in text
    assert "- NVIDIA L4; tiny" in text


def test_the_tables_of_the_study_appear_with_their_gpu(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    rows = read_bench(bench_file(tmp_path, BENCH))
    text = "\n".join(result_tables([evaluation], rows))
    assert "HPML Team 13, Columbia University" in text
    assert "| truthfulqa | paged | NVIDIA A100 80 GB, original study | 0.3333 | 1,305 |" in text
    assert "| by batch | mode | 1 | 2 | 4 | 8 | 16 | 32 |" in text
    ours = next(
        line for line in text.splitlines() if "ours: prefill, batch 1, NVIDIA H200 | paged" in line
    )
    assert ours.count("ms,") == 3
    assert ours.count(" - |") == 3, "sizes that were not measured must show a dash"


def test_the_tables_of_the_study_are_complete() -> None:
    study = original_study()
    for axis in ("batch", "context"):
        assert {len(series) for series in study[axis].values()} == {6}
    assert len(study["accuracy"]) == 4


def test_tables_are_written_between_the_comments_of_a_page(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- results: start -->\nold\n<!-- results: end -->\nafter\n")
    update_page(str(page), [evaluation])
    once = page.read_text()
    assert once.startswith("before\n<!-- results: start -->\n- cpu; tiny")
    assert once.endswith("<!-- results: end -->\nafter\n")
    assert "old" not in once
    update_page(str(page), [evaluation], figures=[tmp_path / "figures" / "latency.png"])
    assert "![latency](figures/latency.png)\n<!-- results: end -->" in page.read_text()
    update_page(str(page), [evaluation])
    assert page.read_text() == once


def test_a_page_without_the_comments_is_refused(evaluation: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing here\n")
    with pytest.raises(DataError, match="no place for results"):
        update_page(str(tmp_path / "page.md"), [evaluation])


# -- result files -------------------------------------------------------------------------------


def test_curves_have_at_least_three_points() -> None:
    def row(case: str, batch: int, context: int) -> BenchRow:
        return BenchRow("GPU", case, "paged", batch, context, 1.0, 1.0, 1.0, None)

    rows = [row("batch", batch, 512) for batch in (4, 1, 2)] + [row("batch", 1, 1024)]
    rows += [row("decode", batch, 512) for batch in (1, 2, 4)] + [row("context", 1, 512)]
    found = curves(rows, "batch")
    assert list(found) == [("prefill, context 512, GPU", "paged")]
    assert [r.batch for r in found["prefill, context 512, GPU", "paged"]] == [1, 2, 4]
    assert curves(rows, "context") == {}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"cases": []}, "no device and rows"),
        ([{"case": "a"}], "row 1: field 'latency_ms' is missing"),
        ([{**BENCH[0], "batch": "many"}], "row 1: invalid literal"),
        ([BENCH[0], 3], "row 2: "),
    ],
)
def test_a_malformed_bench_file_is_refused(rows: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        read_bench(bench_file(tmp_path, rows))


def test_rows_without_a_time_are_skipped(tmp_path: Path) -> None:
    failed = {**BENCH[0], "latency_ms": None, "error": "out of memory"}
    bare = {**BENCH[1], "latency_ms": {"median": 7.0, "p10": None, "p90": None, "n": None}}
    (row,) = read_bench(bench_file(tmp_path, [failed, bare]))
    assert (row.p10_ms, row.median_ms, row.p90_ms) == (7.0, 7.0, 7.0)


def test_a_malformed_result_file_is_refused(tmp_path: Path) -> None:
    for content, reason in (
        ("{", "line 1: not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "field 'model' is missing"),
    ):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(DataError, match=reason):
            read_evaluation(str(tmp_path / "result.json"))


# -- figures ------------------------------------------------------------------------------------


def test_a_report_has_a_page_results_and_figures(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    rows = read_bench(bench_file(tmp_path, BENCH))
    folder = tmp_path / "out" / "deeper"
    figures = write_report(str(folder), [evaluation], rows)
    names = {figure.stem for figure in figures}
    assert names == {"accuracy", "latency", "throughput", "memory", "context"}
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    page = (folder / "report.md").read_text()
    assert all(f"]({name}.png)" in page for name in names)
    assert "granite-paged eval --seed 3" in page
    assert "anatomy/7 | 1 | -2.1000 / -2.1100 | 2 (paged) | -2.1200 / -2.1000" in page
    assert json.loads((folder / "results.json").read_text()) == {"evaluations": [evaluation]}


def test_equal_results_write_identical_reports(evaluation: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    for name in ("one", "two"):
        write_report(str(tmp_path / name), [evaluation])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_folder_that_cannot_be_written_is_refused(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write the report to"):
        write_report(str(tmp_path / "file"), [evaluation])


def test_report_combines_several_results(
    evaluation: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    files = []
    for batch in (1, 32):
        path = tmp_path / f"{batch}.json"
        path.write_text(json.dumps({**evaluation, "batch": batch}))
        files.append(str(path))
    assert run(["report", *files, "--out", str(tmp_path / "out")]) == OK
    assert "report.md and 4 figures" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    assert "mmlu 0-shot, one by one" in page
    assert "mmlu 0-shot, batch 32" in page


def test_report_refuses_a_missing_result(tmp_path: Path, capsys: Capture) -> None:
    assert run(["report", str(tmp_path / "none.json")]) == USAGE
    assert "none.json: cannot be read: No such file" in capsys.readouterr().err


# -- Weights & Biases ---------------------------------------------------------------------------


def test_wandb_offline_records_metrics_tables_and_figures(
    evaluation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs the extra granite-paged[wandb]")
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    from granite_paged.report.wandb_run import log_to_wandb  # noqa: PLC0415

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    figures = write_report(str(tmp_path / "report"), [evaluation])
    where = Path(log_to_wandb("granite-paged-tests", evaluation, figures))
    assert tmp_path in where.parents
    kept = {path.name for path in (where / "media").rglob("*") if path.is_file()}
    assert sum(name.endswith(".table.json") for name in kept) == 2
    assert {name.split("_")[0] for name in kept if name.endswith(".png")} == {
        figure.stem for figure in figures
    }
    summary = next((where.parent).glob("*.wandb")).read_bytes()
    assert b"mmlu/paged/accuracy" in summary
    assert b"mmlu/paged/latency_ratio" in summary


# -- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_records_metrics_tables_and_figures(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra granite-paged[tensorboard]")
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    from granite_paged.report.tensorboard_run import log_to_tensorboard  # noqa: PLC0415

    figures = write_report(str(tmp_path / "report"), [evaluation])
    log_to_tensorboard(str(tmp_path / "board"), evaluation, figures)
    kept = EventAccumulator(str(tmp_path / "board"))
    kept.Reload()
    (accuracy,) = kept.Scalars("mmlu/paged/accuracy")
    metrics = evaluation["tasks"]["mmlu"]["modes"]["paged"]
    assert accuracy.value == pytest.approx(metrics["accuracy"])
    assert set(kept.Tags()["images"]) == {figure.stem for figure in figures}
    (table,) = kept.Tensors("metrics/text_summary")
    assert b"| task | mode | questions |" in table.tensor_proto.string_val[0]


def test_tensorboard_refuses_a_file_as_its_folder(
    evaluation: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra granite-paged[tensorboard]")
    from granite_paged.report.tensorboard_run import log_to_tensorboard  # noqa: PLC0415

    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"):
        log_to_tensorboard(str(tmp_path / "file" / "board"), evaluation)
