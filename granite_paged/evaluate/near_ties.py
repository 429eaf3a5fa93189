"""Near-ties told from mistakes, by the error that `default` itself was measured to make."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from granite_paged.device import dtype_name
from granite_paged.evaluate.journal import Record
from granite_paged.evaluate.metrics import gap_error
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.report.eval_results import Agreement

MEASURED = 32  # questions on which SDPA's error is measured, beside those that differ


def judged(
    found: Agreement, task: Task, default: dict[str, Record], model: Any, seed: int
) -> Agreement:
    """With SDPA's own error measured where it is needed to tell near-ties from mistakes.

    The differing questions and some others are scored by a copy of the model in higher precision;
    the largest error that `default` makes in the gap between two choices is what a near-tie is
    held against.
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


def _sample(found: Agreement, default: dict[str, Record], seed: int) -> set[str]:
    answered = sorted(key for key, record in default.items() if not record.refused)
    drawn = random.Random(seed).sample(answered, min(MEASURED, len(answered)))
    return {*drawn, *(difference.key for difference in found.differing)}


def _exact(model: Any, questions: Sequence[Question]) -> dict[str, list[float]]:
    reference = copy.deepcopy(model).to(_reference_dtype(model))
    answers = DefaultScorer(reference).score([question.request for question in questions])
    return {
        question.key: [score.logprob for score in answer.scores]
        for question, answer in zip(questions, answers, strict=True)
    }


def _reference_dtype(model: Any) -> torch.dtype:
    """float32 for halves; they differ from it in their fourth digit, it in its eighth."""
    return torch.float32 if model.dtype.itemsize < 4 else torch.float64
