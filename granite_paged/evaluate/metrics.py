"""What a run's answers amount to: per mode, and one mode against another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from granite_paged.errors import RequestError
from granite_paged.evaluate.journal import Record
from granite_paged.evaluate.scorer import choice
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.quantiles import quantile
from granite_paged.report.eval_results import Agreement, Difference, ModeMetrics

Records = Mapping[str, Record]
"""By question."""


def mode_metrics(task: Task, records: Records) -> ModeMetrics:
    """Of one mode. Raises RequestError where every question was refused."""
    pairs = [(question, records[question.key]) for question in task.questions]
    answered = [(question, record) for question, record in pairs if not record.refused]
    if not answered:
        reason = pairs[0][1].refused
        raise RequestError(f"{task.name}: every question was refused; the first: {reason}")
    right = [credit(question, record.logprobs, mass=task.mass) for question, record in answered]
    kept = [record for _, record in answered]
    milliseconds = [1e3 * record.seconds for record in kept]
    seconds = sum(record.seconds for record in kept)
    tokens = sum(record.tokens for record in kept)
    computed = sum(record.computed for record in kept)
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
        peak_bytes=max(record.peak for record in kept) or None,
        input_tokens=tokens,
        computed_tokens=computed,
        saved_tokens=sum(record.full for record in kept) - computed,
        hit_rate=sum(record.reused for record in kept) / contexts,
        latency_ms=tuple(round(value, 4) for value in milliseconds),
    )


def agreement(task: Task, default: Records, other: Records) -> Agreement:
    """Of two modes; near-ties are left to be judged (`judged`)."""
    differing, largest, questions = [], 0.0, 0
    for question in task.questions:
        ours, theirs = other[question.key], default[question.key]
        if ours.refused or theirs.refused:
            continue
        questions += 1
        differences = map(_distance, ours.logprobs, theirs.logprobs)
        largest = max(largest, *differences)
        difference = _difference(question.key, theirs.logprobs, ours.logprobs)
        if difference:
            differing.append(difference)
    ratio = _mean_seconds(other) / _mean_seconds(default)
    return Agreement(questions, tuple(differing), largest, ratio)


def credit(question: Question, logprobs: Sequence[float], *, mass: bool) -> float:
    """Between 0 and 1: whether the likeliest choice is right, or how much of the mass is."""
    if not mass:
        return float(question.labels[choice(logprobs)])
    highest = max(logprobs)  # lm-eval exponentiates as they are, and meets 0 / 0
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    right = [w for w, label in zip(weights, question.labels, strict=True) if label]
    return sum(right) / sum(weights)


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def gap_error(logprobs: Sequence[float], exact: Sequence[float]) -> float:
    """The largest error of any difference between two choices."""
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


def _mean_seconds(records: Records) -> float:
    return statistics.fmean(record.seconds for record in records.values() if not record.refused)


def _signed(a: float, b: float) -> float:
    return a - b


def _distance(a: float, b: float) -> float:
    return abs(a - b)
