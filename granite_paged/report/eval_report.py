"""The report of evaluations: a page to read without the code, its figures, and all results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import CannotWrite
from granite_paged.files import write_file, write_json
from granite_paged.names import MAMBA_REFERENCE, mamba_kernels_of
from granite_paged.report import bench_figures, eval_figures
from granite_paged.report.bench_results import Result, writable_folder
from granite_paged.report.bench_tables import study_tables
from granite_paged.report.eval_results import (
    CHANCE,
    Agreement,
    Difference,
    Entry,
    Evaluation,
    ModeMetrics,
    entries,
)
from granite_paged.report.formatting import gigabytes
from granite_paged.report.markdown import image_links, put_between, table
from granite_paged.report.plotting import check_matplotlib
from granite_paged.report.published import PublishedTask, original_study

_MOST_SHOWN = 20  # differing questions in a table; results.json has all of them


def write_report(
    folder: str | Path, evaluations: Sequence[Evaluation], bench: Sequence[Result] = ()
) -> list[Path]:
    """Write `results.json`, `report.md` and the figures, and return the figures' paths.

    Args:
        folder: made if it is missing.
        evaluations: results of `granite-paged eval`.
        bench: results of `granite-paged bench`, for curves against batch and context.

    Raises:
        CannotWrite: if the folder cannot be written.
        MissingExtra: if matplotlib is not installed.
    """
    path = writable_folder(Path(folder))
    figures = eval_figures.draw_all(path, entries(evaluations))
    if bench:
        figures += bench_figures.draw_all(bench, [original_study()], path)
    results = {"evaluations": [evaluation.to_json() for evaluation in evaluations]}
    write_json(path / "results.json", results)
    write_file(path / "report.md", _page(evaluations, bench, figures))
    return figures


def prepare_folder(folder: Path) -> None:
    """Make the folder of a report before the work starts. Raises CannotWrite and MissingExtra."""
    check_matplotlib()
    if not os.access(writable_folder(folder), os.W_OK):
        raise CannotWrite(str(folder), "the folder is write-protected")


def update_page(
    page: str,
    evaluations: Sequence[Evaluation],
    bench: Sequence[Result] = (),
    figures: Sequence[Path] = (),
) -> None:
    """Write tables and links to figures between the two `results` comments of a Markdown page.

    Raises FileError if the page has no such comments.
    """
    parts = [*result_tables(evaluations, bench), *image_links(page, figures)]
    put_between(page, "results", "\n\n".join(parts))


def result_tables(evaluations: Sequence[Evaluation], bench: Sequence[Result] = ()) -> list[str]:
    """Return the parts of a page: where it was measured, tables, how to read them, and commands."""
    found = entries(evaluations)
    commands = dict.fromkeys(run.command for run in evaluations if run.command)
    parts = [_places(evaluations), _metrics(found), chance_note(found), _agreement(found)]
    parts += [_not_finite(found), _LEGEND]
    parts += [*_study(found), *study_tables(bench), *_shell(commands)]
    return [part.rstrip("\n") for part in parts if part]


# -- the page -----------------------------------------------------------------------------------

_INTRODUCTION = """\
# Evaluation

Does paging keep the answers, and what does it cost or save? Every question was put to each mode in
the same run. `default` is transformers' SDPA on whole sequences, `static` is transformers'
StaticCache with its compiled step, and `paged` is this package."""

_LEGEND = """\
- **accuracy**: share of questions whose most likely choice is right, ± one standard error; for
  `truthfulqa_mc2`, the probability mass on right choices.
- **mean, p50, p99**: milliseconds per question without tokenisation. In batches, a question's time
  is its batch's time divided by the batch's questions.
- **input tokens per second**: each context and continuation counts once, whatever a mode computed.
- **peak GB**: peak GPU memory, weights included, caches of the other modes left out.
- **prefix hits**: share of context tokens found in the prefix cache.
- **tokens saved**: tokens that were not computed and that scoring without a cache computes.
- **largest log-likelihood difference**: over all choices of all questions. Near-ties are not
  judged by it.
- **SDPA's own error of a gap**: how far `default`'s gap between two choices is from higher
  precision.
- **latency / default**: mean time per question, divided by `default`'s, over the questions that
  both answered.
- **near-tie**: a question that two modes answer differently, where `default` prefers its choice by
  less than the error that its own arithmetic makes in such a gap. That error is measured against
  the same weights in higher precision, on the differing questions and some others."""


def _page(
    evaluations: Sequence[Evaluation], bench: Sequence[Result], figures: Sequence[Path]
) -> str:
    parts = [
        _INTRODUCTION,
        "## Results",
        *result_tables(evaluations, bench),
        *_differences(entries(evaluations)),
        "## Figures",
        *(f"![{path.stem}]({path.name})" for path in figures),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _places(evaluations: Sequence[Evaluation]) -> str:
    """Return one line for each machine, model and set of versions, with its Mamba kernels."""
    lines = (
        f"- {run.device}; {run.model}, {run.dtype}; "
        + ", ".join(f"{name} {version}" for name, version in run.versions.items())
        + f"; transformers' modes ran Mamba layers with {_kernels(run)}"
        for run in evaluations
    )
    return "\n".join(dict.fromkeys(lines))


def _kernels(run: Evaluation) -> str:
    found = mamba_kernels_of(run.versions)
    return f"its {found}, which is slow" if found == MAMBA_REFERENCE else found


def _shell(commands: Iterable[str]) -> list[str]:
    lines = "\n".join(commands)
    return ["The commands:", f"```sh\n{lines}\n```"] if lines else []


# -- tables -------------------------------------------------------------------------------------

_METRICS: dict[str, Callable[[ModeMetrics], str]] = {
    "questions": lambda m: f"{m.questions:,}" + (f" ({m.refused:,} refused)" if m.refused else ""),
    "accuracy": lambda m: f"{m.accuracy:.4f} ± {m.stderr or 0:.4f}",
    "mean, ms per question": lambda m: f"{m.latency_mean_ms:,.1f}",
    "p50, ms": lambda m: f"{m.latency_p50_ms:,.1f}",
    "p99, ms": lambda m: f"{m.latency_p99_ms:,.1f}",
    "questions per second": lambda m: f"{m.questions_per_second:,.1f}",
    "input tokens per second": lambda m: f"{m.tokens_per_second:,.0f}",
    "peak GB": lambda m: gigabytes(m.peak_bytes),
    "prefix hits": lambda m: f"{m.hit_rate:.1%}",
    "tokens saved": lambda m: f"{m.saved_tokens:,}",
}
_AGREEMENT: dict[str, Callable[[Agreement], str]] = {
    "same choice as default": lambda a: f"{a.same:,} of {a.questions:,}",
    "other choice": lambda a: str(len(a.differing)),
    "near-ties among them": lambda a: str(a.near_ties),
    "largest log-likelihood difference": lambda a: f"{a.largest_difference:.2g}",
    "SDPA's own error of a gap": lambda a: (
        "-" if a.sdpa_error is None else f"{a.sdpa_error:.3g} (against {a.reference})"
    ),
    "latency / default": lambda a: "-" if a.latency_ratio is None else f"{a.latency_ratio:.3f}",
}
_DIFFERENCE: dict[str, Callable[[Difference], str]] = {
    "question": lambda d: d.key,
    "default's choice": lambda d: str(d.default_choice),
    "other choice": lambda d: str(d.other_choice),
    "default's log-probability of both": lambda d: _pair(d.default_logprobs),
    "other log-probability of both": lambda d: _pair(d.other_logprobs),
    "gap": lambda d: f"{d.gap:.4f}",
    "SDPA's error here": lambda d: "-" if d.sdpa_error is None else f"{d.sdpa_error:.4f}",
    "near-tie": lambda d: "yes" if d.near_tie else "**no**",
}


def _table(columns: dict[str, Callable[[Any], str]], found: Iterable[tuple[str, str, Any]]) -> str:
    """Return a table with a row for each (task, mode, value); empty without rows."""
    rows = [(label, mode, *(show(x) for show in columns.values())) for label, mode, x in found]
    return table(("task", "mode", *columns), rows, left=2) if rows else ""


def _metrics(found: Sequence[Entry]) -> str:
    rows = ((entry.label, mode, m) for entry in found for mode, m in entry.result.modes.items())
    return _table(_METRICS, rows)


def _agreement(found: Sequence[Entry]) -> str:
    return _table(_AGREEMENT, _agreements(found))


def _not_finite(found: Sequence[Entry]) -> str:
    """Return a line for each mode that failed because of NaN or infinity; empty if none did."""
    lines = (
        f"- **{label}, {mode}: {other.not_finite:,} questions that `default` answered have "
        "log-likelihoods that are not finite.** Check the weights and the dtype."
        for label, mode, other in _agreements(found)
        if other.not_finite
    )
    return "\n".join(lines)


def _differences(found: Sequence[Entry]) -> list[str]:
    rows = [(label, mode, d) for label, mode, other in _agreements(found) for d in other.differing]
    if not rows:
        return ["Every mode makes the same choices as `default` where both answered."]
    parts = ["### Questions answered differently", _table(_DIFFERENCE, rows[:_MOST_SHOWN])]
    if len(rows) > _MOST_SHOWN:
        parts.append(f"The first {_MOST_SHOWN} of {len(rows):,}; `results.json` has all of them.")
    return parts


def _agreements(found: Sequence[Entry]) -> list[tuple[str, str, Agreement]]:
    return [(e.label, mode, other) for e in found for mode, other in e.result.agreement.items()]


def _pair(logprobs: Sequence[float]) -> str:
    return " / ".join(f"{logprob:.4f}" for logprob in logprobs)


def chance_note(found: Sequence[Entry]) -> str:
    """Return a warning about accuracy where weights are random, else an empty text."""
    names = dict.fromkeys(entry.name for entry in found if entry.run.random_weights)
    known = ", ".join(f"{CHANCE[name]:g} for `{name}`" for name in names if name in CHANCE)
    if not names:
        return ""
    return (
        "The weights are random, so accuracy is at chance by construction"
        f"{f' (a uniform guess scores {known})' if known else ''}. "
        "What these runs test is agreement: whether `paged` chooses what `default` chooses."
    )


# -- the original study -------------------------------------------------------------------------


def _study(found: Sequence[Entry]) -> list[str]:
    """Return the study's results, and ours: same task, one by one, and a model of its size."""
    study = original_study()
    comparable = (entry for entry in found if study.compares_with(entry.run.model))
    alone = [entry for entry in comparable if entry.run.batch == 1]
    asked = [row for row in study.tasks if any(e.name.startswith(row.task) for e in alone)]
    if not asked:
        return []
    where = f"original study, {study.model}, {study.device}"
    rows = [_studied(row, where) for row in asked]
    for entry in alone:
        if entry.name.startswith(tuple(row.task for row in asked)):
            rows += [_ours(entry, mode, metrics) for mode, metrics in entry.result.modes.items()]
    head = ("task", "mode", "measured on", "accuracy", "ms per question", "peak GB")
    note = (
        f"The original study ({study.source}) asked its questions one by one, so only such runs "
        "are listed with it. It had another model, with trained weights, and another GPU: random "
        "weights cannot match its accuracy, and times compare two systems, not two modes."
    )
    return [note, table(head, rows, left=3)]


def _studied(row: PublishedTask, where: str) -> tuple[str, ...]:
    times = (f"{row.accuracy:.4f}", f"{row.ms_per_query:,.0f}", f"{row.peak_gb:.2f}")
    return (row.task, row.mode, where, *times)


def _ours(entry: Entry, mode: str, metrics: ModeMetrics) -> tuple[str, ...]:
    return (
        entry.label,
        mode,
        f"{entry.run.model}, {entry.run.device}",
        f"{metrics.accuracy:.4f}{' (chance)' if entry.run.random_weights else ''}",
        f"{metrics.latency_mean_ms:,.1f}",
        gigabytes(metrics.peak_bytes),
    )
