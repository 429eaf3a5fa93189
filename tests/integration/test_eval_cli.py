"""The commands `eval` and `report`: answers, files, resumed runs, and one-line errors."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite_paged import models
from granite_paged.cli import evaluate as command
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, INTERRUPTED, OK, USAGE
from granite_paged.environment import mamba_note
from granite_paged.evaluate import run as evaluation_run
from granite_paged.evaluate.journal import Journal, held_run
from granite_paged.evaluate.scorer import Answer
from granite_paged.evaluate.scorer_engine import EngineScorer
from granite_paged.report.eval_results import Agreement, Difference
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.evaluation import MMLU, tiny_evaluation, write
from tests.helpers.killed import kill_soon
from tests.helpers.tiny_models import tiny_model

FEW = ["--device", "cpu", "--limit", "3", "--seed", "7"]


@pytest.fixture
def short_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit contexts to 32 tokens, since attention on the CPU is dense and slow."""
    monkeypatch.setattr("granite_paged.evaluate.tasks.RECALL_LONGEST", 32)


def evaluate(*options: str) -> int:
    return run(["eval", *FEW, *options])


# -- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "report"])
def test_help_of_eval_and_report_shows_examples(command: str, capsys: Capture) -> None:
    assert run([command, "--help"]) == OK
    shown = capsys.readouterr().out
    examples = [line for line in shown.splitlines() if line.startswith("  granite-paged ")]
    assert len(examples) >= 2
    assert all(line.startswith(f"  granite-paged {command}") for line in examples)
    assert "\\b" not in shown


def test_help_of_eval_names_tasks_modes_and_defaults(capsys: Capture) -> None:
    run(["eval", "-h"])
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("recall", "mmlu", "truthfulqa_mc1", "[default|static|paged|both|all]", "auto"):
        assert word in shown
    for option in (
        "num-fewshot",
        "limit",
        "subjects",
        "data",
        "out",
        "bench",
        "wandb",
        "tensorboard",
    ):
        assert f"--{option}" in shown


# -- answering ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_recall")
def test_eval_on_the_cpu_warns_about_times(capsys: Capture) -> None:
    assert evaluate("--device", "cpu") == OK
    assert "its times say nothing about a GPU" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("short_recall")
def test_eval_prints_one_json_object(capsys: Capture) -> None:
    assert evaluate("--json", "-") == OK
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    recall = result["tasks"]["recall"]
    assert set(recall["modes"]) == {"default", "paged"}
    assert recall["agreement"]["paged"]["questions"] == 3
    assert recall["agreement"]["paged"]["differing"] == []


@pytest.mark.usefixtures("short_recall")
def test_tables_name_both_modes_and_their_agreement(capsys: Capture) -> None:
    assert evaluate() == OK
    shown = capsys.readouterr().out
    assert "default" in shown
    assert "3 of 3 choices equal default's" in shown
    assert "…" not in shown, "the table truncates numbers"


def test_eval_says_what_its_numbers_cannot_show(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Random weights score at chance, Mamba layers may be slow, and batches are faster."""
    untrained = replace(tiny_evaluation(), model="tiny (random weights, seed 0)")
    trained = replace(untrained, model="tiny", batch=8)
    shown = []
    for evaluation in (untrained, trained):
        found = evaluation
        monkeypatch.setattr(evaluation_run, "evaluate", lambda *args, found=found, **more: found)
        assert evaluate() == OK
        shown.append(capsys.readouterr().out)
    for said in (
        "accuracy is at chance by construction. What these runs test is agreement",
        "one question per forward pass; default's fastest is --batch-size auto",
    ):
        assert said in shown[0]
        assert said not in shown[1]
    slow = "transformers' modes run Mamba layers on its reference code"
    assert (slow in shown[0]) is bool(mamba_note())


@pytest.mark.usefixtures("short_recall")
def test_a_single_mode_is_not_compared(capsys: Capture) -> None:
    assert evaluate("--mode", "paged", "--json", "-") == OK
    result = json.loads(capsys.readouterr().out)
    assert list(result["tasks"]["recall"]["modes"]) == ["paged"]
    assert result["tasks"]["recall"]["agreement"] == {}


@pytest.mark.usefixtures("short_recall")
def test_batch_size_auto_is_kept_by_a_second_run(tmp_path: Path, capsys: Capture) -> None:
    output = ["--output", str(tmp_path / "answers.jsonl"), "--batch-size", "auto", "--json", "-"]
    assert evaluate(*output) == OK
    shown = capsys.readouterr()
    assert "default is fastest with" in shown.err
    assert evaluate(*output) == OK
    again = capsys.readouterr()
    assert "fastest" not in again.err
    assert json.loads(again.out) == json.loads(shown.out)


def test_a_difference_beyond_a_near_tie_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    result = tiny_evaluation()
    task = result.tasks["tiny"]
    difference = Difference("0", 1, 2, (-1.0, -2.0), (-2.0, -1.0), 1.0, 0.1, near_tie=False)
    agreement = replace(task.agreement["paged"], differing=(difference,))
    task = replace(task, agreement={"paged": agreement})
    broken = replace(result, passed=False, tasks={"tiny": task})
    monkeypatch.setattr(evaluation_run, "evaluate", lambda *args, **options: broken)
    assert evaluate() == FAILED
    assert "FAILED" in capsys.readouterr().out


def test_modes_without_a_common_answer_have_no_latency_ratio() -> None:
    said, _ = command._verdict("paged", Agreement(0, (), 0.0, None))
    assert said == "paged: 0 of 0 choices equal default's"


@pytest.mark.usefixtures("short_recall")
def test_answers_that_are_not_finite_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Paged scores NaN for every question but the first."""
    score, asked = EngineScorer.score, list[Any]()

    def spoilt(self: EngineScorer, requests: Any) -> list[Answer]:
        asked.extend(requests)
        found = score(self, requests)
        return found if requests == asked[:1] else [a._replace(logprobs=(math.nan,)) for a in found]

    monkeypatch.setattr(EngineScorer, "score", spoilt)
    assert evaluate() == FAILED
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 choices equal default's, 2 answers are not finite" in shown
    assert "FAILED" in shown


def test_missing_data_is_reported_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("a model was loaded"))
    for task in ("mmlu", "truthfulqa_mc2"):
        assert run(["eval", "--tasks", task, "--data", str(tmp_path)]) == USAGE
        assert_one_line(capsys, "cannot be read: No such file")


# -- interrupted runs ---------------------------------------------------------------------------


@pytest.mark.usefixtures("short_recall")
@pytest.mark.parametrize("keeps", [True, False])
def test_an_interrupted_eval_says_what_was_kept(
    keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    append = Journal.append

    def interrupted(self: Journal, entries: Any) -> None:
        if len(self.entries) >= 3:
            raise KeyboardInterrupt
        append(self, entries)

    monkeypatch.setattr(Journal, "append", interrupted)
    path = str(tmp_path / "answers.jsonl")
    assert evaluate(*(["--output", path] if keeps else [])) == INTERRUPTED
    kept = f"3 answers kept in {path}; run the same command to resume"
    lost = "answers were not kept: name a file with --output to keep them"
    said = f"granite-paged: interrupted; {kept if keeps else lost}"
    assert capsys.readouterr().err.strip() == said


@pytest.mark.usefixtures("short_recall")
def test_a_second_eval_on_one_output_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "answers.jsonl")
    assert evaluate("--output", path) == OK
    capsys.readouterr()
    with closing(Journal(path, held_run(path))):
        assert evaluate("--output", path) == USAGE
    assert_one_line(capsys, f"cannot write {path}: another run keeps its answers there")


KILLS = int(os.environ.get("GRANITE_PAGED_KILLS", "1"))  # runs, each of which is killed twice


def without_times(value: Any) -> Any:
    """Return a result without its command and without all that is measured."""
    measured = ("latency", "seconds", "per_second", "command", "peak")
    if not isinstance(value, dict):
        return value
    names = [name for name in value if not any(word in name for word in measured)]
    return {name: without_times(value[name]) for name in names}


@pytest.mark.usefixtures("short_recall")
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_run_killed_twice_resumes_to_the_same_result(seed: int, tmp_path: Path) -> None:
    draw, journal, result = random.Random(seed), tmp_path / "answers.jsonl", tmp_path / "result"
    options = ["--device", "cpu", "--limit", "12", "--json", str(result)]
    assert run(["eval", *options]) == OK
    expected = without_times(json.loads(result.read_text()))
    options += ["--output", str(journal)]
    for _ in range(2):
        kill_soon(["eval", *options], journal, draw)
    assert run(["eval", *options]) == OK
    assert without_times(json.loads(result.read_text())) == expected


# -- refusals -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "unknown task": (["--tasks", "mlmu"], "unknown task 'mlmu': use one of recall, mmlu, truth"),
    "no task": (["--tasks", ","], "no task named"),
    "unknown mode": (["--mode", "fast"], "'default', 'static', 'paged', 'both', 'all'"),
    "batch size": (["--batch-size", "many"], "must be auto or a number of at least 1, got 'many'"),
    "batch size zero": (["--batch-size", "0"], "must be auto or a number of at least 1, got '0'"),
    "limit": (["--limit", "0"], "'--limit'"),
    "examples": (["--num-fewshot", "-1"], "'--num-fewshot'"),
    "no data": (["--tasks", "mmlu", "--data", "./nowhere"], "./nowhere: no such folder"),
    "no tokenizer": (["--tokenizer", "./nowhere"], "no tokenizer in ./nowhere"),
    "no bench": (["--bench", "./no.json"], "./no.json cannot be read: No such file"),
    "answers without folder": (["--output", "no/such/answers.jsonl"], "cannot write"),
}


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if questions are asked: wrong usage must be reported before the work."""

    def work(*args: Any, **kwargs: Any) -> None:
        pytest.fail("questions were asked")

    monkeypatch.setattr(evaluation_run, "evaluate", work)


@pytest.mark.usefixtures("unanswered")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_usage_is_reported_in_one_line(wrong: str, capsys: Capture) -> None:
    options, reason = WRONG[wrong]
    assert evaluate(*options) == USAGE
    assert_one_line(capsys, reason)


@pytest.mark.usefixtures("unanswered")
def test_an_error_in_data_names_file_line_and_field(tmp_path: Path, capsys: Capture) -> None:
    folder = write(tmp_path, "mmlu_test", MMLU, {**MMLU, "answer": 7})
    assert evaluate("--tasks", "mmlu", "--num-fewshot", "0", "--data", folder) == USAGE
    assert_one_line(capsys, "mmlu_test.jsonl, line 2: field 'answer' is 7: a number from 0 to 3")


@pytest.mark.usefixtures("unanswered")
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    folder = write(tmp_path, "mmlu_test", MMLU)
    tiny_model().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    options = ["--model", str(tmp_path / "model"), "--tokenizer", str(models.TINY_RECALL)]
    asked = ["--tasks", "mmlu", "--num-fewshot", "0", "--data", folder]
    assert evaluate(*options, *asked) == USAGE
    assert_one_line(capsys, "the tokenizer has 296 tokens")


@pytest.mark.usefixtures("unanswered")
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    assert evaluate("--tokenizer", str(tmp_path / "tokenizer.json")) == USAGE
    assert_one_line(capsys, "no tokenizer in")


@pytest.mark.usefixtures("unanswered")
@pytest.mark.parametrize(
    ("option", "extra"),
    [("--out", "plot"), ("--wandb", "wandb"), ("--tensorboard", "tensorboard")],
)
def test_a_missing_extra_is_reported_before_the_work(
    option: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluate(option, str(tmp_path / "x")) == USAGE
    assert_one_line(capsys, f"with its extra {extra}")


@pytest.mark.usefixtures("unanswered")
def test_eval_refuses_answers_of_another_run(tmp_path: Path, capsys: Capture) -> None:
    head = {"format": 1, "run": {"model": "another"}}
    (tmp_path / "answers.jsonl").write_text(json.dumps(head) + "\n")
    assert evaluate("--output", str(tmp_path / "answers.jsonl")) == USAGE
    assert_one_line(capsys, "holds answers of another run: model was another, now tiny-recall")


def test_a_report_shows_the_command_line_as_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/granite-paged", "eval", "--subjects", "a b"])
    assert command._command_line() == "granite-paged eval --subjects 'a b'"
