"""Compute metrics of each mode, and the agreement of a mode with `default`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from granite_paged.errors import RequestError
from granite_paged.evaluate.journal import JournalEntry
from granite_paged.evaluate.scorer import choice
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.quantiles import quantile
from granite_paged.report.eval_results import Agreement, Difference, ModeMetrics

Entries = Mapping[str, JournalEntry]
"""One mode's answers to one task, by question."""


def mode_metrics(task: Task, entries: Entries) -> ModeMetrics:
    """Return one mode's metrics on a task. Raises RequestError if it refused every question."""
    pairs = [(question, entries[question.key]) for question in task.questions]
    answered = [(question, entry) for question, entry in pairs if not entry.refused]
    if not answered:
        reason = pairs[0][1].refused
        raise RequestError(f"{task.name}: every question was refused; the first: {reason}")
    right = [credit(question, entry.logprobs, mass=task.mass) for question, entry in answered]
    kept = [entry for _, entry in answered]
    milliseconds = [1e3 * entry.seconds for entry in kept]
    seconds = sum(entry.seconds for entry in kept)
    tokens = sum(entry.tokens for entry in kept)
    computed = sum(entry.computed for entry in kept)
    contexts = sum(len(question.request.context) for question, _ in answered)
    return ModeMetrics(
        questions=len(kept),
        refused=len(pairs) - len(kept),
        accuracy=statistics.fmean(right),
        stderr=standard_error(right),
        latency_mean_ms=statistics.fmean(milliseconds),
        latency_p50_ms=quantile(milliseconds, 0.5),
        latency_p99_ms=quantile(milliseconds, 0.99),
        questions_per_second=len(kept) / seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=max(entry.peak for entry in kept) or None,
        input_tokens=tokens,
        computed_tokens=computed,
        saved_tokens=sum(entry.full for entry in kept) - computed,
        hit_rate=sum(entry.reused for entry in kept) / contexts,
        latency_ms=tuple(round(value, 4) for value in milliseconds),
    )


def agreement(task: Task, default: Entries, other: Entries) -> Agreement:
    """Compare a mode with `default`; `judge_near_ties` judges the differences afterwards.

    Choices, log-likelihoods and latency are compared over the questions that both answered.
    """
    differing, largest, both, not_finite = [], 0.0, [], 0
    for question in task.questions:
        ours, theirs = other[question.key], default[question.key]
        not_finite += ours.not_finite and not theirs.refused
        if ours.refused or theirs.refused:
            continue
        both.append((ours, theirs))
        differences = map(_distance, ours.logprobs, theirs.logprobs)
        largest = max(largest, *differences)
        difference = _difference(question.key, theirs.logprobs, ours.logprobs)
        if difference:
            differing.append(difference)
    ratio = _latency_ratio(both)
    return Agreement(len(both), tuple(differing), largest, ratio, not_finite=not_finite)


def credit(question: Question, logprobs: Sequence[float], *, mass: bool) -> float:
    """Return the credit for an answer, 0 to 1.

    Without `mass` it is 1 if the most likely choice is right. With `mass` (TruthfulQA's mc2), it is
    the share of probability that the right choices have.
    """
    if not mass:
        return float(question.labels[choice(logprobs)])
    highest = max(logprobs)  # unlike lm-eval, which exponentiates directly and may divide 0 by 0
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    right = [w for w, label in zip(weights, question.labels, strict=True) if label]
    return sum(right) / sum(weights)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def gap_error(logprobs: Sequence[float], exact: Sequence[float]) -> float:
    """Return the largest error of any difference between two log-likelihoods."""
    errors = list(map(_signed, logprobs, exact))
    return max(errors) - min(errors)


def _difference(key: str, default: Sequence[float], other: Sequence[float]) -> Difference | None:
    first, second = choice(default), choice(other)
    if first == second:
        return None
    return Difference(
        key=key,
        default_choice=first,
        other_choice=second,
        default_logprobs=(default[first], default[second]),
        other_logprobs=(other[first], other[second]),
        gap=default[first] - default[second],
        sdpa_error=None,
        near_tie=None,
    )


def _latency_ratio(both: Sequence[tuple[JournalEntry, JournalEntry]]) -> float | None:
    """Return the time of the first entries divided by that of the second; None without any."""
    if not both:
        return None
    return sum(ours.seconds for ours, _ in both) / sum(theirs.seconds for _, theirs in both)


def _signed(a: float, b: float) -> float:
    return a - b


def _distance(a: float, b: float) -> float:
    return abs(a - b)
