"""Run an evaluation: every mode answers every question, in one run.

Each batch of questions goes to one mode and then to the next, so that clocks and temperature are
the same for all modes. Answers are in the journal before the next batch begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from granite_paged.device import device_name, dtype_name, one_memory_error
from granite_paged.digests import config_digest, sha256, tokenizer_digest, weights_digest
from granite_paged.environment import versions
from granite_paged.errors import BrokenInvariant, GranitePagedError, NonFiniteRequest
from granite_paged.evaluate.journal import NOT_FINITE, Journal, JournalEntry
from granite_paged.evaluate.metrics import agreement, mode_metrics
from granite_paged.evaluate.modes import make_scorer
from granite_paged.evaluate.near_ties import judge_near_ties
from granite_paged.evaluate.peak_memory import PeakMemory
from granite_paged.evaluate.scorer import (
    Answer,
    Needs,
    Scorer,
    ScoreRequest,
    chunked,
    uncached_tokens,
)
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.geometry import PagedConfig
from granite_paged.models import LoadedModel
from granite_paged.progress import Progress, silent
from granite_paged.report.eval_results import Evaluation, TaskResult


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    modes: Sequence[str],
    *,
    config: PagedConfig,
    journal: Journal,
    batch: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Answer the questions that the journal lacks, then compute metrics and agreement.

    Args:
        loaded: the model; it must not be patched.
        tasks: the tasks with their questions.
        modes: names in `granite_paged.names.MODES`.
        config: settings of the `paged` mode.
        journal: the answers so far; new ones are appended.
        batch: rows per forward pass; the original study used 1.
        seed: draws the questions on which SDPA's error is measured.
        progress: called with (task, answers so far, answers), over all tasks and modes.

    Raises:
        CannotWrite: if answers cannot be written; earlier answers are kept.
        RequestError: if a mode refused every question of a task.
    """
    answering = Answering(loaded.model, modes, config, batch, tasks, journal, progress)
    for task in tasks:
        answering.answer(task)
    answering.close()
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
    """Return what must be equal for a run to resume from a journal, in plain types.

    Weights, config, tokenizer and questions enter as SHA-256 digests, so that a checkpoint that
    changed under its name is noticed. A journal that was written without digests is refused.
    """
    return {
        "model": loaded.name,
        "weights": weights_digest(loaded.model),
        "config": config_digest(loaded.model.config),
        "tokenizer": tokenizer_digest(loaded.tokenizer),
        "device": device_name(loaded.model.device),
        "dtype": dtype_name(loaded.model.dtype),
        "modes": list(modes),
        "batch size": batch,
        "page size": config.page_size,
        "max tokens": config.max_tokens,
        "backend": config.backend,
        **({"exact": True} if config.exact else {}),
        "questions": {task.name: _digest(task) for task in tasks},
        "versions": versions(),
    }


# -- answering ----------------------------------------------------------------------------------


class Answering:
    """The answering part of a run, with its scorers, which are made for the first question.

    Args: see `evaluate`; `tasks` are all that will be asked.
    """

    def __init__(
        self,
        model: Any,
        modes: Sequence[str],
        config: PagedConfig,
        batch: int,
        tasks: Sequence[Task],
        journal: Journal,
        progress: Progress,
    ) -> None:
        self._model = model
        self._modes = modes
        self._config = config
        self._batch = batch
        self._journal = journal
        self._progress = progress
        questions = [question for task in tasks for question in task.questions]
        shared = max((question.shared for question in questions), default=0)
        self._needs = Needs.of((question.request for question in questions), shared)
        self._done, self._total = 0, len(modes) * len(questions)
        self._scorers: dict[str, Scorer] = {}
        self._peaks = PeakMemory(model.device)

    def answer(self, task: Task) -> None:
        """Answer every question of a task that the journal has no answer to."""
        missing = [
            question
            for question in ordered(task.questions, self._batch)
            if any(self._lacks(mode, task, question) for mode in self._modes)
        ]
        self._report(task, len(self._modes) * (len(task.questions) - len(missing)))
        if not missing:
            return
        self._make_scorers()
        rows = max(scorer.batch for scorer in self._scorers.values())
        batches = chunked(missing, rows, request=lambda question: question.request)
        self._warm_up(batches)
        for questions in batches:
            for mode in self._modes:
                wanted = [q for q in questions if self._lacks(mode, task, q)]
                self._journal.append(self._entries(mode, task, wanted))
                self._report(task, len(questions))

    def _lacks(self, mode: str, task: Task, question: Question) -> bool:
        return (mode, task.name, question.key) not in self._journal.entries

    def _report(self, task: Task, more: int) -> None:
        self._done += more
        self._progress(task.name, self._done, self._total)

    def close(self) -> None:
        """Free the memory that the scorers hold."""
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

    def _warm_up(self, batches: Sequence[Sequence[Question]]) -> None:
        """Run the first batch (on CUDA: one per size class) untimed.

        This warms up compilers and allocators.
        """
        gpu = self._model.device.type == "cuda"
        sample = _one_of_each_size(batches) if gpu else batches[:1]
        for mode, scorer in self._scorers.items():
            with self._peaks.of(mode):
                for questions in sample:
                    _answers(scorer, [question.request for question in questions])
                scorer.forget()

    def _entries(self, mode: str, task: Task, questions: Sequence[Question]) -> list[JournalEntry]:
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
            replace(_entry(mode, task.name, question, answer), seconds=seconds, peak=peak)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _one_of_each_size(batches: Sequence[Sequence[Question]]) -> list[Sequence[Question]]:
    """Group batches by the power-of-two buckets of their longest lengths; return one of each."""
    found: dict[tuple[int, ...], Sequence[Question]] = {}
    for questions in batches:
        requests = [question.request for question in questions]
        own = max(len(question.request.context) - question.shared for question in questions)
        answer = max(len(tokens) for request in requests for tokens in request.continuations)
        lengths = (max(request.tokens for request in requests), own, answer)
        found.setdefault(tuple(length.bit_length() for length in lengths), questions)
    return list(found.values())


def _answers(scorer: Scorer, requests: Sequence[ScoreRequest]) -> list[Answer | str]:
    """Return an answer per request, or the reason for its refusal.

    If a batch fails, each of its requests runs alone.
    """
    try:
        with one_memory_error():
            return list(scorer.score(requests))
    except BrokenInvariant:
        raise
    except (GranitePagedError, torch.OutOfMemoryError) as error:
        scorer.forget()
        if len(requests) == 1:
            return [_refusal(requests[0], error)]
    return [answer for request in requests for answer in _answers(scorer, [request])]


def _refusal(request: ScoreRequest, error: Exception) -> str:
    if isinstance(error, NonFiniteRequest):
        return NOT_FINITE
    return f"{request.tokens} tokens: {str(error).splitlines()[0]}"


def _entry(mode: str, task: str, question: Question, answer: Answer | str) -> JournalEntry:
    if isinstance(answer, Answer) and not answer.finite:
        answer = NOT_FINITE
    if isinstance(answer, str):
        return JournalEntry(mode, task, question.key, refused=answer)
    return JournalEntry(
        mode,
        task,
        question.key,
        logprobs=answer.logprobs,
        greedy=answer.greedy,
        tokens=question.request.tokens,
        full=uncached_tokens(question.request),
        computed=answer.computed,
        reused=answer.reused,
    )


def ordered(questions: Iterable[Question], batch: int) -> list[Question]:
    """Order questions by group; in batches the longest first, so that rows of a batch need little
    padding.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    if batch > 1:
        for group in groups.values():
            group.sort(key=lambda question: -len(question.request.context))
    return [question for group in groups.values() for question in group]


def _digest(task: Task) -> str:
    """Hash the key, tokens and labels of every question."""
    asked = [[q.key, q.request.context, q.request.continuations, q.labels] for q in task.questions]
    return sha256(asked)


# -- judging ------------------------------------------------------------------------------------


def _result(
    task: Task, modes: Sequence[str], journal: Journal, model: Any, seed: int
) -> TaskResult:
    entries = {
        mode: {q.key: journal.entries[mode, task.name, q.key] for q in task.questions}
        for mode in modes
    }
    metrics = {mode: mode_metrics(task, entries[mode]) for mode in modes}
    against = {}
    if "default" in modes:
        default = entries["default"]
        for mode in modes:
            if mode != "default":
                found = agreement(task, default, entries[mode])
                against[mode] = judge_near_ties(found, task, default, model, seed)
    return TaskResult(len(task.questions), task.fewshot, metrics, against)
