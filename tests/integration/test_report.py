"""Reports: pages, figures and run logs that say what was measured, and on which GPU."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite_paged.cli.main import OK, USAGE, run
from granite_paged.errors import CannotWrite, FileError, ResultFileError
from granite_paged.report.bench_results import Result, read_result
from granite_paged.report.eval_report import result_tables, update_page, write_report
from granite_paged.report.eval_results import (
    CHANCE,
    Agreement,
    Difference,
    Evaluation,
    entries,
    read_evaluation,
)
from granite_paged.report.published import original_study
from tests.helpers.evaluation import data_folder, tiny_evaluation

Capture = pytest.CaptureFixture[str]

DIFFERENCE = Difference(
    key="anatomy/7",
    default_choice=1,
    other_choice=2,
    default_logprobs=(-2.1, -2.11),
    other_logprobs=(-2.12, -2.1),
    gap=0.01,
    sdpa_error=0.03,
    near_tie=True,
)

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
def evaluation() -> Evaluation:
    """A real evaluation, edited: one choice differs, and peak memory was measured."""
    result = tiny_evaluation()
    task = result.tasks["tiny"]
    other = replace(
        task.agreement["paged"],
        differing=(DIFFERENCE,),
        sdpa_error=0.04,
        reference="float32",
        measured=6,
    )
    modes = {name: replace(found, peak_bytes=3_210_000_000) for name, found in task.modes.items()}
    task = replace(task, modes=modes, agreement={"paged": other})
    return replace(result, command="granite-paged eval --seed 3", tasks={"mmlu": task})


def bench_result(folder: Path) -> Result:
    path = folder / "bench.json"
    content = {
        "device": "NVIDIA H200",
        "model": "granite-4.0-h-1b",
        "versions": {},
        "seed": 0,
        "rows": BENCH,
    }
    path.write_text(json.dumps(content))
    return read_result(path)


# -- tables -------------------------------------------------------------------------------------


def test_tables_name_the_run_and_its_figures(evaluation: Evaluation) -> None:
    text = "\n".join(result_tables([evaluation], []))
    metrics = evaluation.tasks["mmlu"].modes["paged"]
    for said in (
        "cpu; tiny, float32; granite_paged",
        "```sh\ngranite-paged eval --seed 3\n```",
        f"{metrics.accuracy:.4f}",
        "3.21",
        "5 of 6 | 1 | 1 |",
        "0.04 (against float32)",
    ):
        assert said in text
    assert "chance" not in text


def test_accuracy_of_random_weights_is_labelled_as_chance(evaluation: Evaluation) -> None:
    untrained = replace(evaluation, model="granite-4.0-h-1b (random weights, seed 0)")
    text = "\n".join(result_tables([untrained]))
    assert "accuracy is at chance by construction (a uniform guess scores 0.25 for `mmlu`)" in text
    assert text.count(" (chance) |") == 2, "in the rows with the study's"


@pytest.mark.parametrize(
    ("installed", "said"),
    [({}, "its reference code, which is slow"), ({"mamba_ssm": "2.3.0"}, "mamba_ssm 2.3.0")],
)
def test_a_report_names_the_kernels_of_mamba_layers(
    installed: dict[str, str], said: str, evaluation: Evaluation
) -> None:
    run = replace(evaluation, versions={"torch": "2.14", **installed})
    text = "\n".join(result_tables([run]))
    assert f"; transformers' modes ran Mamba layers with {said}\n" in text


def test_results_of_several_gpus_name_their_gpu(evaluation: Evaluation) -> None:
    assert [entry.label for entry in entries([evaluation])] == ["mmlu 0-shot, one by one"]
    runs = [replace(evaluation, device=device) for device in ("NVIDIA H200", "NVIDIA L4")]
    assert [entry.label for entry in entries(runs)] == [
        "mmlu 0-shot, one by one, H200",
        "mmlu 0-shot, one by one, L4",
    ]
    text = "\n".join(result_tables(runs, []))
    assert text.count(evaluation.command) == 1
    assert "- NVIDIA H200; tiny" in text
    assert "- NVIDIA L4; tiny" in text


ALONE = "mmlu 0-shot, one by one"
OTHER: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "dtype": (
        [{"dtype": "float32"}, {"dtype": "bfloat16"}],
        [f"{ALONE}, float32", f"{ALONE}, bfloat16"],
    ),
    "model": ([{"model": "a"}, {"model": "org/b"}], [f"{ALONE}, a", f"{ALONE}, org/b"]),
    "model and dtype": (
        [{"model": "a"}, {"model": "b"}, {"model": "b", "dtype": "bfloat16"}],
        [f"{ALONE}, a", f"{ALONE}, b, float32", f"{ALONE}, b, bfloat16"],
    ),
    "versions": (
        [{"versions": {"torch": "2.14"}}, {"versions": {"torch": "2.14", "mamba_ssm": "2.3"}}],
        [f"{ALONE}, no mamba_ssm", f"{ALONE}, mamba_ssm 2.3"],
    ),
    "page size": (
        [{"page_size": 16}, {"page_size": 128}],
        [f"{ALONE}, page size 16", f"{ALONE}, page size 128"],
    ),
    "nothing": ([{}, {}], [f"{ALONE}, run 1", f"{ALONE}, run 2"]),
    "one of three": (
        [{}, {}, {"batch": 8}],
        [f"{ALONE}, run 1", f"{ALONE}, run 2", "mmlu 0-shot, batch 8"],
    ),
}


@pytest.mark.parametrize("other", OTHER)
def test_labels_name_what_is_different(other: str, evaluation: Evaluation) -> None:
    changes, labels = OTHER[other]
    runs = [replace(evaluation, **change) for change in changes]
    assert [entry.label for entry in entries(runs)] == labels


def test_a_report_counts_answers_that_are_not_finite(evaluation: Evaluation) -> None:
    said = "paged: 3 questions that `default` answered have log-likelihoods that are not finite"
    assert said not in "\n".join(result_tables([evaluation]))
    task = evaluation.tasks["mmlu"]
    other = replace(task.agreement["paged"], not_finite=3)
    broken = replace(evaluation, tasks={"mmlu": replace(task, agreement={"paged": other})})
    assert f"mmlu 0-shot, one by one, {said}" in "\n".join(result_tables([broken]))


# -- the original study -------------------------------------------------------------------------


def test_the_tables_of_the_study_appear_with_their_gpu(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    asked = replace(evaluation, model="ibm-granite/granite-4.0-h-1b")
    text = "\n".join(result_tables([asked], [bench_result(tmp_path)]))
    assert "HPML Team 13, Columbia University" in text
    assert (
        "| mmlu | paged | original study, 24-layer model, NVIDIA A100 80GB | 0.6786 | 1,780" in text
    )
    ours = next(line for line in text.splitlines() if ", NVIDIA H200 | paged |" in line)
    assert ours.count("ms,") == 3
    assert ours.count(" - |") == 3, "sizes that were not measured must show a dash"


def test_the_study_is_omitted_if_nothing_compares(evaluation: Evaluation, tmp_path: Path) -> None:
    """Another batch, task or size of the model is not what the study measured."""
    asked = replace(evaluation, model="granite-4.0-h-1b")
    batched = replace(asked, batch=8)
    other_task = replace(asked, tasks={"recall": asked.tasks["mmlu"]})
    bench = replace(bench_result(tmp_path), model="granite-4.0-h-small")
    text = "\n".join(result_tables([evaluation, batched, other_task], [bench]))
    assert "original study" not in text
    text = "\n".join(result_tables([asked]))
    assert "| truthfulqa |" not in text, "only tasks that were run"
    assert "by batch size" not in text, "no benchmark was given"


def test_the_tables_of_the_study_are_complete() -> None:
    study = original_study()
    assert len(study.rows) == 24
    assert len(study.tasks) == 4


def test_a_uniform_guess_has_the_stated_score() -> None:
    path = Path(data_folder()) / "truthfulqa_mc.jsonl"
    asked = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for name in ("mc1", "mc2"):
        labels = [question[f"{name}_targets"]["labels"] for question in asked]
        share = statistics.fmean(sum(right) / len(right) for right in labels)
        assert CHANCE[f"truthfulqa_{name}"] == round(share, 4)


# -- pages --------------------------------------------------------------------------------------


def test_tables_are_written_between_the_comments_of_a_page(
    evaluation: Evaluation, tmp_path: Path
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


def test_a_page_without_the_comments_is_refused(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing here\n")
    with pytest.raises(FileError, match="no place for results"):
        update_page(str(tmp_path / "page.md"), [evaluation])


# -- files of results ---------------------------------------------------------------------------


def test_an_evaluation_is_read_back_unchanged(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(evaluation.to_json()))
    assert read_evaluation(path) == evaluation


def changed(data: Any, place: str, value: Any) -> Any:
    """Set the field `a.b.c` to a value; `...` deletes it."""
    *path, last = place.split(".")
    holder = data
    for name in path:
        holder = holder[name]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return data


METRICS = "tasks.mmlu.modes.paged"
WRONG: dict[str, tuple[str, Any, str]] = {
    "no model": ("model", ..., "is missing"),
    "no task": ("tasks", {}, "has no task"),
    "no mode": ("tasks.mmlu.modes", {}, "has no mode"),
    "accuracy null": (f"{METRICS}.accuracy", None, "must be a finite number"),
    "accuracy NaN": (f"{METRICS}.accuracy", math.nan, "must be a finite number"),
    "accuracy of more than all": (f"{METRICS}.accuracy", 1.1, "at most 1, got 1.1"),
    "latency missing": (f"{METRICS}.latency_mean_ms", ..., "is missing"),
    "latency huge": (f"{METRICS}.latency_mean_ms", 10**400, "must be a finite number"),
    "near tie a number": ("tasks.mmlu.agreement.paged.differing", [3], "must be an object"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_names_the_file_and_field(
    wrong: str, evaluation: Evaluation, tmp_path: Path
) -> None:
    place, value, problem = WRONG[wrong]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(changed(evaluation.to_json(), place, value)))
    with pytest.raises(ResultFileError) as caught:
        read_evaluation(path)
    assert str(caught.value).startswith(f"{path}: {place}")
    assert problem in str(caught.value)


def test_a_result_without_a_count_of_answers_that_are_not_finite_is_read(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    place = "tasks.mmlu.agreement.paged.not_finite"
    path.write_text(json.dumps(changed(evaluation.to_json(), place, ...)))
    assert read_evaluation(path) == evaluation


def test_a_malformed_result_file_is_refused(tmp_path: Path) -> None:
    for content, reason in (
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ("{}", "passed is missing"),
    ):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ResultFileError, match=reason):
            read_evaluation(tmp_path / "result.json")


# -- figures ------------------------------------------------------------------------------------


def test_a_report_has_a_page_results_and_figures(evaluation: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    bench = bench_result(tmp_path)
    folder = tmp_path / "out" / "deeper"
    figures = write_report(str(folder), [evaluation], [bench])
    names = {figure.stem for figure in figures}
    assert names == {
        *("accuracy", "latency", "throughput", "memory"),
        *("latency-context", "memory-context"),
    }
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    page = (folder / "report.md").read_text()
    assert all(f"]({name}.png)" in page for name in names)
    assert "granite-paged eval --seed 3" in page
    assert "paged | anatomy/7 | 1 | 2 | -2.1000 / -2.1100 | -2.1200 / -2.1000" in page
    results = json.loads((folder / "results.json").read_text())
    assert results == {"evaluations": [evaluation.to_json()]}


def test_equal_results_write_identical_reports(evaluation: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    for name in ("one", "two"):
        write_report(str(tmp_path / name), [evaluation])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_folder_that_cannot_be_written_is_refused(evaluation: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write"):
        write_report(str(tmp_path / "file"), [evaluation])


def test_report_combines_several_results(
    evaluation: Evaluation, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    files = []
    for batch in (1, 32):
        path = tmp_path / f"{batch}.json"
        path.write_text(json.dumps(replace(evaluation, batch=batch).to_json()))
        files.append(str(path))
    assert run(["report", *files, "--out", str(tmp_path / "out")]) == OK
    assert "report.md and 4 figures" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.md").read_text()
    assert "mmlu 0-shot, one by one" in page
    assert "mmlu 0-shot, batch 32" in page


def test_report_refuses_a_missing_result(tmp_path: Path, capsys: Capture) -> None:
    assert run(["report", str(tmp_path / "none.json")]) == USAGE
    assert "none.json cannot be read: No such file" in capsys.readouterr().err


def test_unusual_results_can_be_drawn(evaluation: Evaluation, tmp_path: Path) -> None:
    """Times of zero, a dollar sign in a name, no common answers, and a single mode."""
    pytest.importorskip("matplotlib", reason="figures need the extra granite-paged[plot]")
    task = evaluation.tasks["mmlu"]
    still = {
        name: replace(found, latency_ms=(0.0, 0.0), latency_mean_ms=0.0, questions_per_second=0.0)
        for name, found in task.modes.items()
    }
    nothing = Agreement(0, (), 0.0, None)
    odd = [
        replace(evaluation, tasks={"a$_b$": replace(task, modes=still, agreement={"$": nothing})}),
        replace(evaluation, tasks={"c": replace(task, modes={"other": still["paged"]})}),
    ]
    assert len(write_report(str(tmp_path), odd)) == 4
    page = (tmp_path / "report.md").read_text()
    assert "| $ | 0 of 0 | 0 | 0 | 0 | - | - |" in page


# -- Weights & Biases ---------------------------------------------------------------------------


def test_wandb_offline_records_metrics_tables_and_figures(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    log = next((where.parent).glob("*.wandb"))
    for _ in range(300):  # wandb's own process may still be writing
        if b"mmlu/paged/latency_ratio" in log.read_bytes():
            break
        time.sleep(0.1)
    assert b"mmlu/paged/accuracy" in log.read_bytes()
    assert b"mmlu/paged/latency_ratio" in log.read_bytes()


# -- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_records_metrics_tables_and_figures(
    evaluation: Evaluation, tmp_path: Path
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
    metrics = evaluation.tasks["mmlu"].modes["paged"]
    assert accuracy.value == pytest.approx(metrics.accuracy)
    assert set(kept.Tags()["images"]) == {figure.stem for figure in figures}
    (table,) = kept.Tensors("metrics/text_summary")
    assert b"| task | mode | questions |" in table.tensor_proto.string_val[0]


def test_tensorboard_refuses_a_file_as_its_folder(evaluation: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra granite-paged[tensorboard]")
    from granite_paged.report.tensorboard_run import log_to_tensorboard  # noqa: PLC0415

    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"):
        log_to_tensorboard(str(tmp_path / "file" / "board"), evaluation)
