"""A difference is a near-tie if SDPA's own error is as large. Without a model; see integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged.evaluate import near_ties
from granite_paged.evaluate.journal import JournalEntry
from granite_paged.evaluate.near_ties import MEASURED, judge_near_ties
from granite_paged.evaluate.scorer import ScoreRequest
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.report.eval_results import Agreement, Difference

QUESTIONS = 50


def key_of(number: int) -> str:
    return f"{number:02}"


TASK = Task(
    "t",
    tuple(
        Question(key_of(i), "g", ScoreRequest([1], [[2], [3]]), (1, 0)) for i in range(QUESTIONS)
    ),
)


def difference(number: int, gap: float) -> Difference:
    scores = (-1.0, -1.0 - gap)
    return Difference(key_of(number), 0, 1, scores, scores[::-1], gap, None, None)


def judged(
    monkeypatch: pytest.MonkeyPatch,
    *differing: Difference,
    errors: dict[int, float],
    refused: frozenset[int] = frozenset(),
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    questions: int = QUESTIONS,
) -> tuple[Agreement, list[str]]:
    """Judge differences where `default` errs by so much. Returns the keys measured as well."""
    entries = {
        key_of(i): JournalEntry(
            "default",
            "t",
            key_of(i),
            (-1.0 + errors.get(i, 0.0), -2.0),
            refused="long" if i in refused else "",
        )
        for i in range(questions)
    }
    asked: list[str] = []

    def exact(model: Any, questions: list[Question]) -> dict[str, list[float]]:
        asked.extend(question.key for question in questions)
        return {question.key: [-1.0, -2.0] for question in questions}

    monkeypatch.setattr(near_ties, "_exact", exact)
    found = Agreement(questions, differing, 1.0, 1.0)
    model = SimpleNamespace(dtype=dtype)
    return judge_near_ties(found, TASK, entries, model, seed), asked


def test_without_differences_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = judged(monkeypatch, errors={})
    assert (found.sdpa_error, found.measured, asked) == (None, 0, [])


def test_a_gap_is_judged_by_the_largest_error(monkeypatch: pytest.MonkeyPatch) -> None:
    differing = (difference(0, 0.5), difference(1, 0.75), difference(2, -0.5), difference(3, -2.0))
    found, asked = judged(monkeypatch, *differing, errors={0: 0.25, 3: -0.5})
    assert [d.near_tie for d in found.differing] == [True, False, True, False]
    assert [d.sdpa_error for d in found.differing] == [0.25, 0.0, 0.0, 0.5]
    assert (found.sdpa_error, found.reference) == (0.5, "float32")
    assert found.measured == len(asked)


def test_questions_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [judged(monkeypatch, difference(7, 1.0), errors={}, seed=s)[1] for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert all("07" in asked and MEASURED <= len(asked) <= MEASURED + 1 for asked in runs)
    assert MEASURED == 32


def test_a_refused_question_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = frozenset(range(10, QUESTIONS))
    _, asked = judged(monkeypatch, difference(0, 1.0), errors={}, refused=refused)
    assert asked == [key_of(i) for i in range(10)]


@pytest.mark.parametrize(
    ("dtype", "reference"),
    [
        (torch.float16, "float32"),
        (torch.bfloat16, "float32"),
        (torch.float32, "float64"),
        (torch.float64, "float64"),
    ],
    ids=str,
)
def test_the_reference_is_more_precise_than_the_model(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reference: str
) -> None:
    found, _ = judged(monkeypatch, difference(0, 1.0), errors={}, dtype=dtype)
    assert found.reference == reference
