"""Metrics and agreement follow from the records of answers."""

from __future__ import annotations

import dataclasses
import math

import pytest

from granite_paged.errors import RequestError
from granite_paged.evaluate.journal import NOT_FINITE, JournalEntry
from granite_paged.evaluate.metrics import (
    agreement,
    credit,
    gap_error,
    mode_metrics,
    standard_error,
)
from granite_paged.evaluate.scorer import ScoreRequest
from granite_paged.evaluate.tasks import Question, Task
from granite_paged.report.eval_results import Difference


def question(key: str, labels: tuple[int, ...] = (1, 0)) -> Question:
    return Question(key, "g", ScoreRequest([1, 2], [[3]] * len(labels)), labels)


def entry(key: str, *logprobs: float, seconds: float = 1.0, refused: str = "") -> JournalEntry:
    return JournalEntry("paged", "t", key, logprobs, (), seconds, refused=refused)


FOUR = Task("t", tuple(question(str(i)) for i in range(4)))


def test_metrics_follow_from_the_records() -> None:
    records = {
        str(i): JournalEntry(
            "paged", "t", str(i), (-1.0, -2.0) if i else (-2.0, -1.0), (True, False),
            seconds=0.2 * (i + 1) + 1e-9, tokens=10, full=20, computed=5, reused=1, peak=100 + i,
        )
        for i in range(4)
    }  # fmt: skip
    metrics = mode_metrics(FOUR, records)
    assert (metrics.questions, metrics.refused) == (4, 0)
    assert metrics.accuracy == 0.75
    assert metrics.stderr == pytest.approx(0.25)
    assert metrics.latency_mean_ms == pytest.approx(500)
    assert metrics.latency_p50_ms == pytest.approx(500)
    assert metrics.latency_p99_ms == pytest.approx(794)
    assert metrics.questions_per_second == pytest.approx(2)
    assert metrics.tokens_per_second == pytest.approx(20)
    assert metrics.peak_bytes == 103
    assert (metrics.input_tokens, metrics.computed_tokens, metrics.saved_tokens) == (40, 20, 60)
    assert metrics.hit_rate == pytest.approx(4 / 8)
    assert metrics.latency_ms == (200.0, 400.0, 600.0, 800.0)


def test_latencies_keep_four_digits_of_a_millisecond() -> None:
    task = Task("t", FOUR.questions[:1])
    metrics = mode_metrics(task, {"0": entry("0", -1.0, -2.0, seconds=0.00012345678)})
    assert metrics.latency_ms == (0.1235,)


def test_refused_questions_count_in_no_mean() -> None:
    records = {str(i): entry(str(i), -1.0, -2.0, seconds=2.0) for i in range(3)}
    metrics = mode_metrics(FOUR, {**records, "3": entry("3", seconds=50.0, refused="too long")})
    assert (metrics.questions, metrics.refused) == (3, 1)
    assert (metrics.accuracy, metrics.latency_mean_ms) == (1.0, 2000.0)
    assert metrics.peak_bytes is None  # nothing was measured


def test_a_mode_that_refused_everything_names_the_first_reason() -> None:
    records = {str(i): entry(str(i), refused=f"reason {i}") for i in range(4)}
    with pytest.raises(RequestError, match="reason 0"):
        mode_metrics(FOUR, records)


def test_one_value_has_no_standard_error() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)


def test_mc2_is_the_probability_mass_on_right_choices() -> None:
    asked = question("0", (1, 0, 1))
    logprobs = [-2000 + math.log(part) for part in (0.2, 0.5, 0.3)]
    assert credit(asked, logprobs, mass=True) == pytest.approx(0.5)
    assert credit(asked, logprobs, mass=False) == 0.0
    assert credit(asked, [-1.0, -2.0, -3.0], mass=False) == 1.0
    assert credit(question("0"), [-3.0, math.log(3) - 3], mass=True) == pytest.approx(0.25)
    # a far likelier choice gets all of it, without an overflow
    assert credit(question("0"), [-2000.0, -1.0], mass=True) == 0.0


def test_a_task_of_mc2_counts_mass() -> None:
    task = Task("t", FOUR.questions[:1], mass=True)
    metrics = mode_metrics(task, {"0": entry("0", math.log(0.5), math.log(0.25))})
    assert metrics.accuracy == pytest.approx(2 / 3)


def test_the_gap_error_is_that_of_the_worst_pair() -> None:
    assert gap_error([-1.0, -2.0, -3.0], [-1.1, -2.0, -2.8]) == pytest.approx(0.3)


# -- agreement ----------------------------------------------------------------------------------


def test_agreement_compares_what_both_answered() -> None:
    default = {str(i): entry(str(i), -1.0, -2.0, seconds=1.0 + i) for i in range(4)}
    other = {
        "0": entry("0", refused="too long", seconds=99.0),
        "1": entry("1", -1.25, -2.0, seconds=6.0),
        "2": entry("2", -3.5, -2.5, seconds=6.0),
        "3": entry("3", -1.0, -2.0, seconds=6.0),
    }
    found = agreement(FOUR, default, other)
    assert (found.questions, found.largest_difference) == (3, 2.5)
    assert found.latency_ratio == pytest.approx(6.0 / 3.0), "of the questions 1, 2 and 3"
    assert found.differing == (
        Difference(
            key="2",
            default_choice=0,
            other_choice=1,
            default_logprobs=(-1.0, -2.0),
            other_logprobs=(-3.5, -2.5),
            gap=1.0,
            sdpa_error=None,
            near_tie=None,
        ),
    )
    swapped = agreement(FOUR, other, default)
    assert (swapped.questions, swapped.differing[0].gap) == (3, 1.0)


def test_equal_answers_do_not_differ() -> None:
    default = {str(i): entry(str(i), -1.0, -2.0) for i in range(4)}
    found = agreement(FOUR, default, {k: dataclasses.replace(e) for k, e in default.items()})
    assert (found.differing, found.largest_difference, found.latency_ratio) == ((), 0.0, 1.0)


def test_modes_that_answered_nothing_in_common_do_not_differ() -> None:
    task = Task("t", FOUR.questions[:2])
    default = {"0": entry("0", -1.0, -2.0), "1": entry("1", refused="too long")}
    other = {"0": entry("0", refused="too long"), "1": entry("1", -1.0, -2.0)}
    found = agreement(task, default, other)
    assert (found.questions, found.differing, found.largest_difference) == (0, (), 0.0)
    assert found.latency_ratio is None


def test_answers_that_are_not_finite_count_where_default_answered() -> None:
    default = {str(i): entry(str(i), -1.0, -2.0) for i in range(4)}
    default["3"] = entry("3", refused="too long")
    other = {str(i): entry(str(i), refused=NOT_FINITE) for i in (1, 2, 3)}
    other["0"] = entry("0", -1.0, -2.0)
    found = agreement(FOUR, default, other)
    assert (found.questions, found.differing, found.not_finite) == (1, (), 2)
    assert not found.passed
    assert agreement(FOUR, default, {**other, "1": default["1"], "2": default["3"]}).passed
