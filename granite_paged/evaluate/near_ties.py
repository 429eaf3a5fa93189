"""Tell near-ties from mistakes, by the measured error of `default` itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from granite_paged.device import dtype_name
from granite_paged.evaluate.journal import JournalEntry
from granite_paged.evaluate.metrics import gap_error
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.report.eval_results import Agreement

MEASURED = 32  # questions on which SDPA's error is measured, in addition to those that differ


def judge_near_ties(
    found: Agreement, task: Task, default: dict[str, JournalEntry], model: Any, seed: int
) -> Agreement:
    """Return the agreement with every differing question judged as a near-tie or a mistake.

    A copy of the model in higher precision scores the differing questions and `MEASURED` others,
    drawn by `seed`. A difference is a near-tie if its gap is at most the largest error that
    `default` makes in any gap between two choices of these questions.
    """
    if not found.differing:
        return found
    keys = _sample(found, default, seed)
    exact = _exact(model, [q for q in task.questions if q.key in keys])
    errors = {key: gap_error(default[key].logprobs, exact[key]) for key in exact}
    largest = max(errors.values())
    differing = tuple(
        replace(d, sdpa_error=errors[d.key], near_tie=abs(d.gap) <= largest)
        for d in found.differing
    )
    return replace(
        found,
        differing=differing,
        sdpa_error=largest,
        reference=dtype_name(_reference_dtype(model)),
        measured=len(errors),
    )


def _sample(found: Agreement, default: dict[str, JournalEntry], seed: int) -> set[str]:
    answered = sorted(key for key, entry in default.items() if not entry.refused)
    drawn = random.Random(seed).sample(answered, min(MEASURED, len(answered)))
    return {*drawn, *(difference.key for difference in found.differing)}


def _exact(model: Any, questions: Sequence[Question]) -> dict[str, list[float]]:
    reference = copy.deepcopy(model).to(_reference_dtype(model))
    answers = DefaultScorer(reference).score([question.request for question in questions])
    return {
        question.key: list(answer.logprobs)
        for question, answer in zip(questions, answers, strict=True)
    }


def _reference_dtype(model: Any) -> torch.dtype:
    """Return float32 for half precision, float64 for the others."""
    return torch.float32 if model.dtype.itemsize < 4 else torch.float64
