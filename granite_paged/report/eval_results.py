"""Results of an evaluation as one JSON object, written and read back.

What is read is checked field by field, so that tables, figures and trackers need no checks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from granite_paged.errors import ResultFileError
from granite_paged.typed_json import Share, Signed, SignedInt, read_json

CHANCE = {"mmlu": 0.25, "truthfulqa_mc1": 0.2261, "truthfulqa_mc2": 0.4484}
"""Accuracy of a uniform guess, by task. MMLU has four choices per question. For TruthfulQA it is
the mean, over its 817 questions, of the share of choices that are right."""


@dataclass(frozen=True, slots=True)
class ModeMetrics:
    """How one mode did on one task. Times are milliseconds per question.

    Attributes:
        questions: number of questions answered.
        refused: number of questions not answered, because they do not fit the pool or because a
            log-likelihood is not finite.
        accuracy: share of answers that are right; for `truthfulqa_mc2`, mean probability mass.
        stderr: standard error of `accuracy`; None for a single question.
        latency_ms: time of each question in task order; in batches, batch time / batch size.
        peak_bytes: peak GPU memory, weights included; None on the CPU.
        computed_tokens: tokens that were run through the model.
        saved_tokens: tokens that were not run and that scoring without a cache would have run.
        hit_rate: share of context tokens that were found in the prefix cache.
    """

    questions: int
    refused: int
    accuracy: Share
    stderr: float | None
    latency_mean_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    questions_per_second: float
    tokens_per_second: float
    peak_bytes: int | None
    input_tokens: int
    computed_tokens: int
    saved_tokens: SignedInt
    hit_rate: Share
    latency_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A question that two modes answer differently.

    Attributes:
        default_logprobs: of the two choices, `default`'s first, as `default` scores them.
        other_logprobs: of the same two choices, as the other mode scores them.
        gap: by how much `default` prefers its own choice.
        sdpa_error: error of SDPA's gaps between choices of this question; None if not measured.
        near_tie: whether `gap` is at most `Agreement.sdpa_error`; None if not judged.
    """

    key: str
    default_choice: int
    other_choice: int
    default_logprobs: tuple[Signed, Signed]
    other_logprobs: tuple[Signed, Signed]
    gap: Signed
    sdpa_error: float | None
    near_tie: bool | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """One mode compared with `default`.

    Attributes:
        questions: number of questions that both answered.
        differing: the questions with another choice.
        largest_difference: largest difference of any log-likelihood.
        latency_ratio: mean latency of the questions that both answered, divided by `default`'s
            mean latency of the same questions; None if there are none.
        sdpa_error: largest error of a gap between two choices that `default` makes, measured
            against the same weights in `reference` precision; None where nothing differs.
        measured: number of questions that `sdpa_error` was measured on.
        not_finite: number of questions that `default` answered, and for which a log-likelihood of
            this mode is NaN or infinite.
    """

    questions: int
    differing: tuple[Difference, ...]
    largest_difference: float
    latency_ratio: float | None
    sdpa_error: float | None = None
    reference: str | None = None
    measured: int = 0
    not_finite: int = 0

    @property
    def same(self) -> int:
        """Number of questions with the same choice."""
        return self.questions - len(self.differing)

    @property
    def near_ties(self) -> int:
        """Number of differing questions that are near-ties."""
        return sum(bool(difference.near_tie) for difference in self.differing)

    @property
    def passed(self) -> bool:
        """Whether every difference is a near-tie, and every log-likelihood finite."""
        return self.near_ties == len(self.differing) and not self.not_finite


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task: the metrics of every mode, and every other mode compared with `default`."""

    questions: int
    fewshot: int
    modes: dict[str, ModeMetrics]
    agreement: dict[str, Agreement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that `granite-paged eval` measured.

    Attributes:
        command: the command line that ran it; empty if it was run from Python.
        passed: whether all modes passed the comparison with `default`; see `Agreement.passed`.
        batch: questions per forward pass.
        page_size: tokens per page.
    """

    command: str = ""
    passed: bool
    model: str
    device: str
    dtype: str
    batch: int
    page_size: int
    seed: int
    tasks: dict[str, TaskResult]
    versions: dict[str, str]

    @property
    def random_weights(self) -> bool:
        """Whether the model was not trained, so that accuracy says nothing about it."""
        return "random weights" in self.model

    def to_json(self) -> dict[str, Any]:
        """Return plain types only."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


@dataclass(frozen=True, slots=True)
class Entry:
    """One task of one evaluation, with a label that is unique in a report."""

    label: str
    name: str
    run: Evaluation
    result: TaskResult


def read_evaluation(path: str | Path) -> Evaluation:
    """Read and check one file. Raises ResultFileError, which names the file and the field."""
    run: Evaluation = read_json(Evaluation, path, ResultFileError)
    if not run.tasks:
        raise ResultFileError(str(path), "tasks", "has no task")
    for name, task in run.tasks.items():
        if not task.modes:
            raise ResultFileError(str(path), f"tasks.{name}.modes", "has no mode")
    return run


def entries(evaluations: Sequence[Evaluation]) -> list[Entry]:
    """Return the tasks of all evaluations, labelled.

    Labels that would be equal name what differs between their runs (model, dtype, page size, seed
    or a version), and a number where nothing differs.
    """
    several_devices = len({run.device for run in evaluations}) > 1
    found = [
        Entry(_label(run, name, task, with_device=several_devices), name, run, task)
        for run in evaluations
        for name, task in run.tasks.items()
    ]
    labels = [entry.label for entry in found]
    packages = list(dict.fromkeys(name for run in evaluations for name in run.versions))
    for details in zip(*(_details(entry.run, packages) for entry in found), strict=True):
        labels = _distinguished(labels, details)
    numbers = [f"run {labels[: place + 1].count(label)}" for place, label in enumerate(labels)]
    labels = _distinguished(labels, numbers)
    return [replace(entry, label=label) for entry, label in zip(found, labels, strict=True)]


def _label(run: Evaluation, name: str, task: TaskResult, *, with_device: bool) -> str:
    shots = f" {task.fewshot}-shot" if name == "mmlu" else ""
    rows = "one by one" if run.batch == 1 else f"batch {run.batch}"
    device = f", {run.device.removeprefix('NVIDIA ')}" if with_device else ""
    return f"{name}{shots}, {rows}{device}"


def _details(run: Evaluation, packages: Sequence[str]) -> list[str]:
    """Return what tells a run from others, in the order in which labels name it."""
    versions = [f"{p} {run.versions[p]}" if p in run.versions else f"no {p}" for p in packages]
    return [run.model, run.dtype, f"page size {run.page_size}", f"seed {run.seed}", *versions]


def _distinguished(labels: Sequence[str], details: Sequence[str]) -> list[str]:
    """Append its detail to each label that has several details."""
    found: dict[str, set[str]] = {}
    for label, detail in zip(labels, details, strict=True):
        found.setdefault(label, set()).add(detail)
    return [
        f"{label}, {detail}" if len(found[label]) > 1 else label
        for label, detail in zip(labels, details, strict=True)
    ]
