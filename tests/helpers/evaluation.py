"""Small evaluations: questions of token ids on tiny models, and real data where it is available."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from granite_paged import PagedConfig
from granite_paged.evaluate.journal import Journal
from granite_paged.evaluate.run import evaluate
from granite_paged.evaluate.scorer import Answer, ScoreRequest
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.models import LoadedModel
from granite_paged.report.eval_results import Evaluation
from tests.helpers.tiny_models import EOS, VOCABULARY, tiny_model

SMALL_PAGES = PagedConfig(page_size=8)

DATA = Path(os.environ.get("GRANITE_PAGED_DATA", Path(__file__).parents[3] / "shared" / "data"))
"""Folder of the MMLU and TruthfulQA files. They are never part of the repository."""


MMLU: dict[str, Any] = {
    "subject": "anatomy",
    "question": "Which?",
    "choices": ["a", "b", "c", "d"],
    "answer": 2,
}
TARGETS = {"choices": ["yes", "no"], "labels": [1, 0]}
TRUTHFULQA: dict[str, Any] = {"question": "Is it?", "mc1_targets": TARGETS, "mc2_targets": TARGETS}


def write(folder: Path, name: str, *rows: dict[str, Any] | str) -> str:
    """Write `rows` to `folder/name.jsonl`. Return the folder."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def data_folder() -> str:
    """Return the folder of real data. Skip the test, with the reason, if it is not available."""
    if not (DATA / "mmlu_test.jsonl").exists():
        pytest.skip(f"no evaluation data in {DATA}: set GRANITE_PAGED_DATA to a folder that has it")
    return str(DATA)


def tiny_loaded(flavour: str = "hybrid", **sizes: Any) -> LoadedModel:
    """Load a tiny model with weights large enough that choices differ in likelihood."""
    return LoadedModel("tiny", tiny_model(flavour, **{"initializer_range": 0.3, **sizes}), None)


def requests(count: int = 6, *, prefix: int = 40, seed: int = 0) -> list[ScoreRequest]:
    """Make requests of many lengths with a common prefix, each with 4 short continuations."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randint(EOS + 1, VOCABULARY - 1) for _ in range(draw.randint(least, most))]

    beginning = tokens(prefix, prefix)
    return [
        ScoreRequest(beginning + tokens(1, 30), [tokens(1, 5) for _ in range(4)])
        for _ in range(count)
    ]


def tiny_task(count: int = 6, name: str = "tiny", **options: Any) -> Task:
    draw = random.Random(1)
    questions = []
    for i, request in enumerate(requests(count, **options)):
        right = draw.randrange(4)
        labels = tuple(int(place == right) for place in range(4))
        questions.append(Question(str(i), "all", request, labels, options.get("prefix", 40)))
    return Task(name, tuple(questions))


def tiny_evaluation(
    loaded: LoadedModel | None = None,
    task: Task | None = None,
    modes: tuple[str, ...] = ("default", "paged"),
    journal: Journal | None = None,
    **options: Any,
) -> Evaluation:
    return evaluate(
        loaded or tiny_loaded(),
        [task or tiny_task()],
        modes,
        **{"config": SMALL_PAGES, "journal": journal or Journal(None, {}), **options},
    )


def largest_difference(ours: list[Answer], theirs: list[Answer]) -> float:
    return max(
        abs(one - other)
        for answer, expected in zip(ours, theirs, strict=True)
        for one, other in zip(answer.logprobs, expected.logprobs, strict=True)
    )
