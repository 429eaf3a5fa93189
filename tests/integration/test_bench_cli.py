"""The commands `bench`, `gate`, `tune`, `plot` and `profile`, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged import models
from granite_paged.bench import coldstart, search_space, session
from granite_paged.bench.cases import Shape
from granite_paged.bench.session import Session
from granite_paged.bench.tune import Group, TunedShape
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, INTERRUPTED, OK, USAGE, ModelChoice
from granite_paged.geometry import PagedConfig
from granite_paged.layers.tuning import PATH, TUNED, read_tuned
from granite_paged.report.bench_results import Result, Row, read_result
from granite_paged.report.formatting import ratio, significant
from tests.helpers import recording_runner
from tests.helpers.command_line import Capture, assert_one_line

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def runner() -> Iterator[Any]:
    with recording_runner.installed() as fake:
        yield fake


def bench(*options: str) -> int:
    return run(["bench", "--device", "cpu", "--quick", *options])


ONE_SHAPE = ("--case", "batch", "--batch", "2", "--context", "16")


# -- bench --------------------------------------------------------------------------------------


def test_bench_writes_and_shows_rows_of_both_modes(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "result.json"
    assert bench(*ONE_SHAPE, "--json", str(file)) == OK
    result = read_result(file)
    assert [row.mode for row in result.rows] == ["default", "paged"]
    assert all(row.latency_ms and row.latency_ms.n for row in result.rows)
    assert (result.device, result.model, result.dtype) == ("cpu", "tiny-recall", "float32")
    assert {"torch", "transformers", "granite_paged"} <= set(result.versions)
    shown = capsys.readouterr()
    assert "tiny-recall, cpu" in shown.out
    assert shown.out.count("batch ") >= 2
    assert shown.err == ""


def test_the_table_shows_sdpa_next_to_the_paged_kernel(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "result.json"
    assert bench("--case", "kernel", "--batch", "1", "--context", "32", "--json", str(file)) == OK
    (row,) = read_result(file).rows
    shown = capsys.readouterr().out
    assert "paged / SDPA" in shown
    assert significant(row.sdpa_us) in shown
    assert ratio(row.paged_us, row.sdpa_us) in shown


def test_json_is_all_of_standard_output(capsys: Capture) -> None:
    assert bench("--case", "memory", "--json", "-") == OK
    shown = capsys.readouterr()
    assert [row["mode"] for row in json.loads(shown.out)["rows"]] == ["default", "paged"]
    assert "memory" in shown.err


def test_bench_writes_markdown(tmp_path: Path) -> None:
    file = tmp_path / "tables.md"
    assert bench(*ONE_SHAPE, "--markdown", str(file)) == OK
    assert "| 2 | 16 |" in file.read_text()


def test_bench_runs_only_the_chosen_modes(tmp_path: Path, runner: Any) -> None:
    file = tmp_path / "result.json"
    assert bench(*ONE_SHAPE, "--mode", "default", "--json", str(file)) == OK
    assert [row.mode for row in read_result(file).rows] == ["default"]
    assert runner.made == []


def test_a_failing_mode_is_listed_with_its_reason(
    runner: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(self: Any, chunks: Any) -> Any:
        raise torch.OutOfMemoryError("3 GB asked for")

    monkeypatch.setattr(runner, "prefill", full)
    assert bench(*ONE_SHAPE) == OK
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "batch, paged, 2 x 16: OutOfMemoryError: 3 GB asked for" in shown


def test_an_interrupt_keeps_the_measured_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def rows(self: Any, case: Any, shape: Any, modes: Any) -> list[Row]:
        if shape.batch == 2:
            raise KeyboardInterrupt
        return [Row(case.name, "paged", *shape[:2], error="none taken")]

    monkeypatch.setattr(session.Session, "rows", rows)
    file, page = tmp_path / "result.json", tmp_path / "page.md"
    files = ("--json", str(file), "--markdown", str(page))
    assert bench("--case", "batch", *files) == INTERRUPTED
    assert [(row.batch, row.error) for row in read_result(file).rows] == [(1, "none taken")]
    assert "none taken" in page.read_text()
    shown = capsys.readouterr()
    kept = f"1 rows kept in {file}; run the same command with --missing to resume"
    assert shown.err.strip() == f"granite-paged: interrupted; {kept}"
    assert "none taken" in shown.out


def test_an_update_replaces_only_what_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    update = ("--json", str(file), "--update")
    assert bench("--case", "memory", *update) == OK
    assert bench(*ONE_SHAPE, *update) == OK
    before = read_result(file).rows
    assert bench(*ONE_SHAPE, "--mode", "default", *update) == OK
    after = {row.key: row for row in read_result(file).rows}
    assert set(after) == {row.key for row in before}
    changed = [row.mode for row in before if after[row.key] != row]
    assert changed == ["default"]


def test_a_resumed_bench_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    command = ("--case", "batch", "--context", "16", "--json", str(file))
    bench(*command, "--batch", "2", "--budget", "0")
    skipped = read_result(file).rows
    assert {row.error for row in skipped} <= {"", "not measured: the budget of 0 s was spent"}
    bench(*command, "--batch", "2")
    first = read_result(file).rows
    bench(*command, "--batch", "2", "--batch", "3", "--missing")
    rows = read_result(file).rows
    assert rows[: len(first)] == first
    assert [(row.mode, row.batch) for row in rows[len(first) :]] == [("default", 3), ("paged", 3)]
    monkeypatch.setattr(session.Session, "rows", lambda *args: pytest.fail("measured again"))
    assert bench(*command, "--batch", "2", "--batch", "3", "--missing") == OK
    assert read_result(file).rows == rows


def test_a_bench_that_lacks_nothing_says_so_and_writes_its_tables(
    tmp_path: Path, capsys: Capture
) -> None:
    file, page = tmp_path / "result.json", tmp_path / "page.md"
    bench(*ONE_SHAPE, "--mode", "paged", "--json", str(file), "--markdown", str(page))
    before, tables = file.read_bytes(), page.read_text()
    page.unlink()
    capsys.readouterr()
    again = (*ONE_SHAPE, "--mode", "paged", "--json", str(file), "--missing")
    assert bench(*again, "--markdown", str(page)) == OK
    assert capsys.readouterr().out == f"nothing is missing in {file}\n"
    assert (file.read_bytes(), page.read_text()) == (before, tables)
    page.unlink()
    assert bench(*again) == OK
    assert not page.exists()


def test_an_update_of_another_model_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(Result("cpu", {}, 0, [], model="another").to_json()))
    monkeypatch.setattr(Session, "rows", lambda *args: pytest.fail("a row was measured"))
    assert bench(*ONE_SHAPE, "--json", str(file), "--update") == USAGE
    assert_one_line(capsys, "cannot merge results of different model: another and tiny-recall")


def test_rows_beyond_the_budget_say_so(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert bench("--case", "batch", "--budget", "0", "--json", str(file)) == OK
    errors = {row.error for row in read_result(file).rows}
    assert errors == {"not measured: the budget of 0 s was spent"}


def test_bench_profiles_the_first_shape_of_each_case(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    assert bench("--case", "batch", "--out", str(folder)) == OK
    written = {path.name for path in folder.iterdir()}
    assert written == {"batch-default.trace.json", "batch-paged.trace.json", "kernels.md"}
    assert "| batch, default | mamba |" in (folder / "kernels.md").read_text()


def test_bench_profiles_attention_alone(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    assert bench("--case", "kernel", "--out", str(folder)) == OK
    assert {path.name for path in folder.iterdir()} == {"kernel-paged.trace.json", "kernels.md"}


def test_bench_without_steps_to_profile_writes_an_empty_table(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "profiles"
    assert bench("--case", "memory", "--budget", "0", "--out", str(folder)) == OK
    assert len((folder / "kernels.md").read_text().splitlines()) == 2


# -- cold start ---------------------------------------------------------------------------------


def test_a_cold_start_times_the_first_token_and_every_bucket(
    runner: Any,
) -> None:
    model = models.load(device="cpu").model
    found = coldstart.in_this_process(model, PagedConfig(page_size=16), Shape(1, 100), seed=0)
    assert 0 < found["first_token"] < found["every_bucket"]
    (made,) = runner.made
    assert [name for name, _ in made.calls] == ["prefill", "prefill", "warm_up"]


def test_a_cold_start_uses_empty_then_warm_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], dict[str, str], bool]] = []

    def started(command: list[str], env: dict[str, str], **options: Any) -> Any:
        caches = {name: env[name] for name in coldstart.CACHES}
        seen.append((command, caches, any(Path(path).exists() for path in caches.values())))
        for path in caches.values():
            Path(path).mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, '{"first_token": 2, "every_bucket": 3}', "")

    monkeypatch.setattr(subprocess, "run", started)
    file = tmp_path / "result.json"
    options = ["--random-weights", "granite-4.0-h-350m", "--seed", "3"]
    monkeypatch.setattr(models, "load", lambda *args, **given: REAL_LOAD(device="cpu"))
    assert bench("--case", "coldstart", *options, "--json", str(file)) == OK
    (first, caches, warm), (second, same_caches, warm_now) = seen
    assert (warm, warm_now) == (False, True)
    assert caches == same_caches
    assert set(caches.values()).isdisjoint(os.environ.values())
    assert first == second
    assert " ".join(options) in " ".join(first).replace("--device cpu --dtype auto ", "")
    rows = [(r.variant, r.latency_ms.median) for r in read_result(file).rows if r.latency_ms]
    assert rows == [
        ("first token, empty cache", 2000.0),
        ("every bucket, empty cache", 3000.0),
        ("first token, warm cache", 2000.0),
        ("every bucket, warm cache", 3000.0),
    ]


REAL_LOAD = models.load


def test_a_failed_cold_start_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no compiler\n")

    monkeypatch.setattr(subprocess, "run", failed)
    file = tmp_path / "result.json"
    assert bench("--case", "coldstart", "--json", str(file)) == OK
    (row,) = read_result(file).rows
    assert "the fresh process failed: RuntimeError: no compiler" in row.error


def test_the_cold_start_process_prints_its_times(capsys: Capture) -> None:
    assert run(["coldstart", "--device", "cpu", "--context", "32"]) == OK
    assert set(json.loads(capsys.readouterr().out)) == set(coldstart.STAGES)


# -- gate ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="only for machines without a GPU")
def test_the_gate_without_a_gpu_refuses_before_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("a model was loaded"))
    assert run(["gate", "--random-weights", "granite-4.0-h-1b"]) == USAGE
    assert_one_line(capsys, "a CUDA device, and this run has none")


@pytest.mark.parametrize("command", ["gate", "tune"])
def test_a_gpu_command_refuses_a_cpu_before_loading(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("a model was loaded"))
    assert run([command, "--device", "cpu"]) == USAGE
    assert_one_line(capsys, f"{command} needs a CUDA device, and this run has none")


# -- tune ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="only for machines without a GPU")
def test_tune_needs_a_gpu(capsys: Capture) -> None:
    assert run(["tune", "--random-weights", "granite-4.0-h-1b"]) == USAGE
    assert_one_line(capsys, "a CUDA device, and this run has none")


def tuned_with(monkeypatch: pytest.MonkeyPatch, loss: float, *options: str) -> int:
    """Run `tune` on a pretended GPU, where half as many columns avoid the loss."""
    rule, better = (replace(TUNED.one_row[0], COLUMNS=columns) for columns in (4, 2))

    def layout(constants: Any) -> dict[str, int]:
        return {"COLUMNS": constants.COLUMNS}

    def seconds(layout: dict[str, int]) -> float:
        return 1e-5 * (1 + loss if layout["COLUMNS"] == rule.COLUMNS else 1)

    shape = TunedShape("product 1 x 2 x 3", layout, lambda: seconds)
    groups = [Group((rule, better), (shape,))]
    monkeypatch.setattr(ModelChoice, "require_gpu", lambda *args: None)
    monkeypatch.setattr(search_space, "groups_of", lambda *args, **options: groups)
    return run(["tune", "--device", "cpu", *options])


@pytest.mark.parametrize(
    ("loss", "allow", "status"), [(0.05, "10", OK), (0.2, "10", FAILED), (0.2, "30", OK)]
)
def test_tune_exits_1_when_the_loss_exceeds_the_limit(
    loss: float, allow: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = PATH.read_bytes()
    assert tuned_with(monkeypatch, loss, "--allow", allow) == status
    shown = capsys.readouterr().out
    assert f"{loss:.1%}" in shown
    assert "columns 4" in shown
    assert "columns 2" in shown
    assert "0 candidates did not run" in shown
    assert PATH.read_bytes() == before


def test_tune_writes_the_best_constants_and_all_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, report = tmp_path / "tuned.json", tmp_path / "report.json"
    files = ("--write", str(out), "--json", str(report))
    assert tuned_with(monkeypatch, 0.2, *files) == OK
    tuned = read_tuned(out)
    assert (tuned.one_row[0].COLUMNS, tuned.device) == (2, "cpu")
    assert tuned.microseconds == {"product 1 x 2 x 3": 10.0}
    data = json.loads(report.read_text())
    (trials,) = data["groups"][0]["shapes"].values()
    assert [trial["microseconds"] for trial in trials] == pytest.approx([12, 10])
    assert f"written: {out}" in capsys.readouterr().out


def test_tune_refuses_an_unwritable_file_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "nowhere" / "tuned.json"
    assert tuned_with(monkeypatch, 0.2, "--write", str(out)) == USAGE
    assert_one_line(capsys, "its folder is missing")


# -- plot ---------------------------------------------------------------------------------------


def test_plot_draws_what_bench_wrote(tmp_path: Path, capsys: Capture) -> None:
    file, page, folder = tmp_path / "result.json", tmp_path / "page.md", tmp_path / "new" / "out"
    bench(*ONE_SHAPE, "--json", str(file))
    capsys.readouterr()
    options = ["--out", str(folder), "--markdown", str(page), "--format", "svg"]
    assert run(["plot", str(file), *options]) == OK
    assert capsys.readouterr().out.split() == [str(page), str(folder / "latency-batch.svg")]
    assert (folder / "latency-batch.svg").read_text().startswith("<?xml")
    assert "| 2 | 16 |" in page.read_text()


# -- profile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_profile_writes_a_trace_and_lists_kinds(kind: str, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "profile.json"
    options = ["--device", "cpu", "--mode", "default", "--context", "24"]
    files = ["--out", str(tmp_path), "--json", str(report)]
    assert run(["profile", kind, *options, *files]) == OK
    trace = tmp_path / f"{kind}-default-1x24.trace.json"
    assert json.loads(trace.read_text())["traceEvents"]
    shown = capsys.readouterr().out
    assert str(trace) in shown.replace("\n", "")
    data = json.loads(report.read_text())
    assert {"mamba", "attention", "mlp", "norm", "head"} <= set(data["kinds"])
    assert all(kind in shown for kind in data["kinds"])


# -- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["bench", "gate", "plot", "profile"])
def test_help_shows_examples(command: str, capsys: Capture) -> None:
    assert run([command, "--help"]) == OK
    shown = capsys.readouterr().out
    examples = [line for line in shown.splitlines() if line.startswith("  granite-paged ")]
    assert len(examples) >= 2, shown
    assert all(line.startswith(f"  granite-paged {command} ") for line in examples)
    assert "\\b" not in shown


def test_the_internal_command_is_hidden(capsys: Capture) -> None:
    assert run(["--help"]) == OK
    shown = capsys.readouterr().out
    assert "bench" in shown
    assert "coldstart" not in shown


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown case": (["bench", "--case", "speed"], "'--case'"),
    "unknown mode": (["bench", "--mode", "fast"], "'--mode'"),
    "batch of none": (["bench", "--batch", "0"], "'--batch'"),
    "negative budget": (["bench", "--budget", "-1"], "'--budget'"),
    "case without its mode": (
        ["bench", "--device", "cpu", "--case", "kernel", "--mode", "static"],
        "case kernel runs in mode paged only",
    ),
    "markdown without folder": (["bench", "--markdown", "no/such/page.md"], "cannot write"),
    "bench's markdown to standard output": (["bench", "--markdown", "-"], "'--markdown'"),
    "plot's markdown to standard output": (["plot", "README.md", "--markdown", "-"], "only --json"),
    "answers to standard output": (["eval", "--output", "-"], "'--output'"),
    "digests to standard output": (["verify", "--bits-out", "-"], "'--bits-out'"),
    "report of digests": (["verify", "--bits-out", "x", "--json", "y"], "--bits-out writes no"),
    "report of compared digests": (["verify", "--bits", "x", "y", "--json", "-"], "--bits writes"),
    "digests made and compared": (["verify", "--bits", "x", "y", "--bits-out", "z"], "two runs"),
    "update of nothing": (["bench", "--device", "cpu", "--update"], "pass --json FILE"),
    "options before serve": (["bench", "--quick", "serve"], "after `serve`"),
    "profile of nothing": (["profile"], "Missing argument"),
    "profile of training": (["profile", "training"], "'training'"),
    "snapshot of a CPU": (
        ["profile", "decode", "--device", "cpu", "--mode", "default", "--memory"],
        "leave --memory out",
    ),
    "plot of nothing": (["plot"], "Missing argument"),
    "plot to nowhere": (["plot", "README.md"], "pass --out DIR, --markdown FILE or both"),
    "plot of a missing file": (["plot", "nowhere.json", "--out", "x"], "does not exist"),
    "plot of a page": (["plot", "README.md", "--out", "x"], "README.md is not JSON"),
    "format": (["plot", "README.md", "--out", "x", "--format", "gif"], "'--format'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_usage_is_reported_in_one_line(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "README.md").write_text("# no result\n")
    monkeypatch.chdir(tmp_path)
    arguments, reason = WRONG[wrong]
    assert run(arguments) == USAGE
    assert_one_line(capsys, reason)


def test_a_wrong_field_of_a_result_is_named(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(Result("cpu", {}, 0, []).to_json() | {"seed": "zero"}))
    assert run(["plot", str(file), "--out", str(tmp_path)]) == USAGE
    assert_one_line(capsys, f"{file}: seed must be a whole number")
