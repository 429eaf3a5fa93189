"""What a run's answers amount to: per mode, and one mode against another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from granite_paged.errors import RequestError
from granite_paged.evaluate.journal import Record
from granite_paged.evaluate.scorer import choice
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.quantiles import quantile


@dataclass(frozen=True)
class ModeMetrics:
    """One mode on one task. Times are of a question, in milliseconds.

    Attributes:
        questions: answered.
        refused: not answered, most often longer than the pool.
        accuracy, stderr: over the questions answered; None where there are none.
        latency_ms: of each question, in the order of the task.
        peak_bytes: of GPU memory; None on the CPU.
        computed_tokens, saved_tokens: run, and not run that scoring without a cache would have.
        hit_rate: the part of all context tokens that was found in the cache.
    """

    questions: int
    refused: int
    accuracy: float | None
    stderr: float | None
    latency_mean_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    questions_per_second: float
    tokens_per_second: float
    peak_bytes: int | None
    input_tokens: int
    computed_tokens: int
    saved_tokens: int
    hit_rate: float
    latency_ms: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """A question that two modes answer differently. Log-probabilities are of the two choices.

    Attributes:
        gap: by how much `default` prefers its choice.
        sdpa_error: the error of SDPA's own gaps on this question, against the reference.
        near_tie: whether the gap is within the error that SDPA makes (`Agreement.sdpa_error`).
    """

    key: str
    default_choice: int
    other_choice: int
    default_logprobs: tuple[float, float]
    other_logprobs: tuple[float, float]
    gap: float
    sdpa_error: float | None
    near_tie: bool | None


@dataclass(frozen=True)
class Agreement:
    """One mode against `default`.

    Attributes:
        questions: answered by both.
        differing: those with another choice.
        largest_difference: of any log-likelihood.
        sdpa_error: the largest error of a gap between two choices that `default` was seen to make,
            against the same model in `reference` precision; None where nothing had to be measured.
        measured: questions that it was measured on.
        latency_ratio: mean latency, divided by `default`'s.
    """

    questions: int
    differing: tuple[Difference, ...]
    largest_difference: float
    latency_ratio: float
    sdpa_error: float | None = None
    reference: str | None = None
    measured: int = 0

    @property
    def passed(self) -> bool:
        """Whether every difference is a near-tie."""
        return all(difference.near_tie for difference in self.differing)


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
