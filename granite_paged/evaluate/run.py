"""The evaluation: every question by every mode, in one run, side by side.

A batch of questions goes to one mode, then to the next, so that clocks and temperature are the same
for all. An answer is in the journal before the next batch begins.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from granite_paged.device import device_name, dtype_name
from granite_paged.environment import versions
from granite_paged.errors import BrokenInvariant, GranitePagedError
from granite_paged.evaluate.journal import Journal, Record
from granite_paged.evaluate.metrics import agreement, mode_metrics
from granite_paged.evaluate.modes import make_scorer
from granite_paged.evaluate.near_ties import judged
from granite_paged.evaluate.peak_memory import Peaks
from granite_paged.evaluate.scorer import (
    Answer,
    Needs,
    Request,
    Scorer,
    chunked,
    full_length,
    is_finite,
)
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.geometry import PagedConfig
from granite_paged.models import LoadedModel
from granite_paged.report.eval_results import Evaluation, TaskResult

Progress = Callable[[str, int], None]
"""Told the task and how many more answers there are."""


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    modes: Sequence[str],
    *,
    config: PagedConfig,
    journal: Journal,
    batch: int = 1,
    seed: int = 0,
    progress: Progress = lambda task, answers: None,
) -> Evaluation:
    """Answer what the journal has no answers to, then say what all answers amount to.

    Args:
        loaded: the model.
        tasks: with their questions.
        modes: some of `MODES`.
        config: of the paged mode.
        journal: answers so far; each new one is appended.
        batch: rows a forward pass; 1 is how the original study ran.
        seed: of the questions on which SDPA's error is measured.
        progress: told about new answers.

    Raises:
        CannotWrite: if answers cannot be written; those before are kept.
        RequestError: if a task has no answer at all.
    """
    bench = _Bench(loaded.model, modes, config, batch, tasks)
    for task in tasks:
        bench.answer(task, journal, progress)
    bench.close()
    results = {task.name: _result(task, modes, journal, loaded.model, seed) for task in tasks}
    return Evaluation(
        passed=all(a.passed for result in results.values() for a in result.agreement.values()),
        model=loaded.name,
        device=device_name(loaded.model.device),
        dtype=dtype_name(loaded.model.dtype),
        batch=batch,
        page_size=config.page_size,
        seed=seed,
        tasks=results,
        versions=versions(),
    )


def identity(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    modes: Sequence[str],
    config: PagedConfig,
    batch: int,
) -> dict[str, Any]:
    """What has to be the same for a run to go on from another's journal."""
    return {
        "model": loaded.name,
        "device": device_name(loaded.model.device),
        "dtype": dtype_name(loaded.model.dtype),
        "modes": list(modes),
        "batch size": batch,
        "page size": config.page_size,
        "max tokens": config.max_tokens,
        "backend": config.backend,
        "questions": {task.name: _digest(task) for task in tasks},
        "versions": versions(),
    }


# -- answering ----------------------------------------------------------------------------------


class _Bench:
    """The scorers of a run, made when the first question needs them, and what they hold."""

    def __init__(
        self,
        model: Any,
        modes: Sequence[str],
        config: PagedConfig,
        batch: int,
        tasks: Sequence[Task],
    ) -> None:
        self._model = model
        self._modes = modes
        self._config = config
        self._batch = batch
        self._needs = Needs.of(q.request for task in tasks for q in task.questions)
        self._scorers: dict[str, Scorer] = {}
        self._peaks = Peaks(model.device)

    def answer(self, task: Task, journal: Journal, progress: Progress) -> None:
        """Every question of a task that the journal has no answer to."""
        missing = [
            question
            for question in _ordered(task.questions, self._batch)
            if any((mode, task.name, question.key) not in journal.records for mode in self._modes)
        ]
        done = len(self._modes) * (len(task.questions) - len(missing))
        progress(task.name, done)
        if not missing:
            return
        self._make_scorers()
        rows = max(scorer.batch for scorer in self._scorers.values())
        parts = chunked(missing, rows, request=lambda question: question.request)
        self._warm_up(parts)
        for questions in parts:
            for mode in self._modes:
                wanted = [q for q in questions if (mode, task.name, q.key) not in journal.records]
                journal.append(self._records(mode, task, wanted))
                progress(task.name, len(questions))

    def close(self) -> None:
        """Free what the scorers hold."""
        for scorer in self._scorers.values():
            scorer.close()
        self._scorers.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_scorers(self) -> None:
        for mode in self._modes:
            if mode not in self._scorers:
                with self._peaks.of(mode):
                    self._scorers[mode] = make_scorer(
                        mode, self._model, self._config, self._needs, self._batch
                    )

    def _warm_up(self, parts: Sequence[Sequence[Question]]) -> None:
        """Compilers and allocators meet the first, and on a GPU some of each size, untimed."""
        sample = _one_of_each_size(parts) if self._model.device.type == "cuda" else parts[:1]
        for mode, scorer in self._scorers.items():
            with self._peaks.of(mode):
                for part in sample:
                    _answers(scorer, [question.request for question in part])
                scorer.forget()

    def _records(self, mode: str, task: Task, questions: Sequence[Question]) -> list[Record]:
        requests = [question.request for question in questions]
        if not requests:
            return []
        with self._peaks.of(mode):
            self._synchronize()
            start = time.perf_counter()
            answers = _answers(self._scorers[mode], requests)
            self._synchronize()
            seconds = (time.perf_counter() - start) / len(requests)
        peak = self._peaks.peak(mode)
        return [
            replace(_record(mode, task.name, question, answer), seconds=seconds, peak=peak)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _one_of_each_size(parts: Sequence[Sequence[Question]]) -> list[Sequence[Question]]:
    """Alike are parts whose longest lengths lie between the same powers of two."""
    found: dict[tuple[int, ...], Sequence[Question]] = {}
    for part in parts:
        requests = [question.request for question in part]
        own = max(len(request.context) - request.shared for request in requests)
        answer = max(len(tokens) for request in requests for tokens in request.continuations)
        lengths = (max(request.tokens for request in requests), own, answer)
        found.setdefault(tuple(length.bit_length() for length in lengths), part)
    return list(found.values())


def _answers(scorer: Scorer, requests: Sequence[Request]) -> list[Answer | str]:
    """One a request, or why there is none: what fails in company is tried alone."""
    try:
        return list(scorer.score(requests))
    except BrokenInvariant:
        raise
    except (GranitePagedError, torch.OutOfMemoryError) as error:
        scorer.forget()
        if len(requests) == 1:
            return [f"{requests[0].tokens} tokens: {str(error).splitlines()[0]}"]
    return [answer for request in requests for answer in _answers(scorer, [request])]


def _record(mode: str, task: str, question: Question, answer: Answer | str) -> Record:
    request = question.request
    if isinstance(answer, Answer) and not is_finite(answer):
        answer = "a log-likelihood is not a finite number: check the weights and the dtype"
    if isinstance(answer, str):
        return Record(mode, task, question.key, refused=answer)
    return Record(
        mode,
        task,
        question.key,
        logprobs=tuple(score.logprob for score in answer.scores),
        greedy=tuple(score.greedy for score in answer.scores),
        tokens=request.tokens,
        full=full_length(request),
        computed=answer.computed,
        reused=answer.reused,
    )


def _ordered(questions: Iterable[Question], batch: int) -> list[Question]:
    """Group by group; in batches, the longest first, so that rows beside each other are alike."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    if batch > 1:
        for group in groups.values():
            group.sort(key=lambda question: -len(question.request.context))
    return [question for group in groups.values() for question in group]


def _digest(task: Task) -> str:
    """Of every token that is asked about."""
    asked = [[q.key, q.request.context, q.request.continuations, q.labels] for q in task.questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


# -- judging ------------------------------------------------------------------------------------


def _result(
    task: Task, modes: Sequence[str], journal: Journal, model: Any, seed: int
) -> TaskResult:
    records = {
        mode: {q.key: journal.records[mode, task.name, q.key] for q in task.questions}
        for mode in modes
    }
    metrics = {mode: mode_metrics(task, records[mode]) for mode in modes}
    against = {}
    if "default" in modes:
        default = records["default"]
        for mode in modes:
            if mode != "default":
                found = agreement(task, default, records[mode])
                against[mode] = judged(found, task, default, model, seed)
    return TaskResult(len(task.questions), task.fewshot, metrics, against)
