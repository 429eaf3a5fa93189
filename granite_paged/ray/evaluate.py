"""`granite-paged eval` on Ray: workers answer shares of the questions, and this process judges.

Each worker loads the model and makes the tasks for itself; a share names questions by their keys.
Answers go to the journal as they come, in the order of the questions.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from granite_paged.digests import weights_digest
from granite_paged.errors import ClusterError
from granite_paged.evaluate.journal import Journal, JournalEntry
from granite_paged.evaluate.run import Answering, ordered
from granite_paged.evaluate.tasks import Task, TaskOptions, make_task
from granite_paged.geometry import PagedConfig
from granite_paged.progress import Progress, silent
from granite_paged.ray import exact
from granite_paged.ray.cluster import check_resources, failures_named
from granite_paged.ray.groups import Columns
from granite_paged.ray.pipeline import Workers, answered_rows
from granite_paged.ray.rows import objects
from granite_paged.ray.workers import ModelSpec, share_of_gpu

_SHARES = 4  # per worker and task: enough to even out their speeds


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked, so that each worker can make the same questions.

    Attributes:
        tasks: names of the tasks.
        options: choices about them.
        modes: modes that answer.
        batch: rows per forward pass.
        weights: digest of the weights that every worker must have.
    """

    tasks: tuple[str, ...]
    options: TaskOptions
    modes: tuple[str, ...]
    batch: int
    weights: str


class QuestionWorker:
    """Answers shares of questions with a model of its own."""

    def __init__(self, spec: ModelSpec, asked: Questions) -> None:
        loaded = spec.load()
        if weights_digest(loaded.model) != asked.weights:
            raise ClusterError(
                f"{loaded.name} has other weights on a worker than here: pass --dtype, "
                "and make sure that every machine has the same checkpoint"
            )
        if spec.config is not None and spec.config.exact:
            exact.join(loaded.model.device)
        made = (make_task(name, asked.options, loaded, loaded.tokenizer) for name in asked.tasks)
        self._tasks = {task.name: task for task in made}
        self._journal = Journal(None, {})
        self._answering = Answering(
            loaded.model,
            asked.modes,
            share_of_gpu(spec.config or PagedConfig()),
            asked.batch,
            list(self._tasks.values()),
            self._journal,
            silent,
        )

    def __call__(self, batch: Columns) -> Columns:
        """Answer each share, a row. Return its journal entries."""
        pairs = zip(batch["task"], batch["keys"], strict=True)
        return {"entries": objects([self._answered(str(task), keys) for task, keys in pairs])}

    def _answered(self, name: str, keys: Any) -> bytes:
        task, wanted = self._tasks[name], set(keys)
        share = tuple(question for question in task.questions if question.key in wanted)
        self._answering.answer(replace(task, questions=share))
        entries = list(self._journal.entries.values())
        self._journal.entries.clear()
        return pickle.dumps(entries)


def answer_questions(
    ray: Any,
    tasks: Sequence[Task],
    asked: Questions,
    spec: ModelSpec,
    workers: Workers,
    journal: Journal,
    progress: Progress,
) -> None:
    """Answer the questions that the journal lacks, and append the answers to it.

    Raises:
        ClusterError: if the cluster is too small, or a worker fails; earlier answers are kept.
        CannotWrite: if answers cannot be written; earlier answers are kept.
    """
    shares = [share for task in tasks for share in _shares(task, asked, workers.count, journal)]
    if not shares:
        return
    check_resources(ray, workers.count, workers.gpus, workers.cpus)
    rows = answered_rows(ray, shares, QuestionWorker, (spec, asked), workers)
    total = len(asked.modes) * sum(len(task.questions) for task in tasks)
    with failures_named(journal), closing(rows):
        for row in rows:
            entries: list[JournalEntry] = pickle.loads(row["entries"])
            journal.append([one for one in entries if one.place not in journal.entries])
            progress(entries[0].task if entries else "", len(journal.entries), total)


def _shares(
    task: Task, asked: Questions, workers: int, journal: Journal
) -> Iterator[dict[str, Any]]:
    """Yield shares of the questions without an answer, neighbours together."""
    missing = [
        question.key
        for question in ordered(task.questions, asked.batch)
        if any((mode, task.name, question.key) not in journal.entries for mode in asked.modes)
    ]
    size = max(asked.batch, -(-len(missing) // (_SHARES * workers)), 1)
    for start in range(0, len(missing), size):
        yield {"task": task.name, "keys": missing[start : start + size]}
