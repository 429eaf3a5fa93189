"""The report of evaluations: a page to read without the code, its figures, and all results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from granite_paged.errors import CannotWrite
from granite_paged.report import bench_figures, eval_figures
from granite_paged.report.bench_results import Result, writable_folder
from granite_paged.report.bench_tables import study_tables
from granite_paged.report.eval_results import (
    CHANCE,
    Agreement,
    Difference,
    Entry,
    Evaluation,
    entries,
)
from granite_paged.report.formatting import gigabytes
from granite_paged.report.markdown import image_links, put_between, table, write_text
from granite_paged.report.plotting import check_matplotlib
from granite_paged.report.published import Published, original_study

_MOST_SHOWN = 20  # differing questions in a table; results.json has all of them


def write_report(
    folder: str, evaluations: Sequence[Evaluation], bench: Sequence[Result] = ()
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
    write_text(path / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_text(path / "report.md", _page(evaluations, bench, figures))
    return figures


def prepare_folder(folder: str) -> None:
    """Make the folder of a report before the work starts. Raises CannotWrite and MissingExtra."""
    check_matplotlib()
    if not os.access(writable_folder(Path(folder)), os.W_OK):
        raise CannotWrite(folder, "the folder is write-protected")


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
    """Return what was measured where, the results, and the original study's where comparable."""
    found = entries(evaluations)
    commands = dict.fromkeys(run.command for run in evaluations if run.command)
    parts = [_places(evaluations), *_shell(commands), _metrics(found), _chance(found)]
    parts += [_agreement(found), *_study(found), *study_tables(bench)]
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
        "## How to read it",
        _LEGEND,
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _places(evaluations: Sequence[Evaluation]) -> str:
    """Return one line for each machine, model and set of versions."""
    lines = (
        f"- {run.device}; {run.model}, {run.dtype}; "
        + ", ".join(f"{name} {version}" for name, version in run.versions.items())
        for run in evaluations
    )
    return "\n".join(dict.fromkeys(lines))


def _shell(commands: Iterable[str]) -> list[str]:
    lines = "\n".join(commands)
    return ["Commands:", f"```sh\n{lines}\n```"] if lines else []


# -- tables -------------------------------------------------------------------------------------

_METRICS = (
    *("task", "mode", "questions", "accuracy", "mean, ms per question", "p50, ms", "p99, ms"),
    *("questions per second", "input tokens per second", "peak GB", "prefix hits", "tokens saved"),
)
_AGREEMENT = (
    *("task", "mode", "same choice as default", "other choice", "near-ties among them"),
    *("largest log-likelihood difference", "SDPA's own error of a gap", "latency / default"),
)
_DIFFERENCES = (
    *("task", "question", "default's choice", "log-probability of both"),
    *("the other mode's", "log-probability of both", "gap", "SDPA's error here", "near-tie"),
)


def _metrics(found: Sequence[Entry]) -> str:
    return table(
        _METRICS, (_metrics_row(e, mode) for e in found for mode in e.result.modes), left=2
    )


def _metrics_row(entry: Entry, mode: str) -> tuple[str, ...]:
    metrics = entry.result.modes[mode]
    refused = f" ({metrics.refused:,} refused)" if metrics.refused else ""
    return (
        entry.label,
        mode,
        f"{metrics.questions:,}{refused}",
        f"{metrics.accuracy:.4f} ± {metrics.stderr or 0:.4f}",
        f"{metrics.latency_mean_ms:,.1f}",
        f"{metrics.latency_p50_ms:,.1f}",
        f"{metrics.latency_p99_ms:,.1f}",
        f"{metrics.questions_per_second:,.1f}",
        f"{metrics.tokens_per_second:,.0f}",
        gigabytes(metrics.peak_bytes),
        f"{metrics.hit_rate:.1%}",
        f"{metrics.saved_tokens:,}",
    )


def _chance(found: Sequence[Entry]) -> str:
    """Return a warning about accuracy where weights are random."""
    names = dict.fromkeys(entry.name for entry in found if entry.run.random_weights)
    known = ", ".join(f"{CHANCE[name]:g} for `{name}`" for name in names if name in CHANCE)
    if not names:
        return ""
    return (
        "The weights are random, so accuracy is at chance by construction"
        f"{f' (a uniform guess scores {known})' if known else ''}. "
        "What these runs test is agreement: whether `paged` chooses what `default` chooses."
    )


def _agreement(found: Sequence[Entry]) -> str:
    rows = [
        _agreement_row(entry, mode, agreement)
        for entry in found
        for mode, agreement in entry.result.agreement.items()
    ]
    return table(_AGREEMENT, rows, left=2) if rows else ""


def _agreement_row(entry: Entry, mode: str, found: Agreement) -> tuple[str, ...]:
    error = "-"
    if found.sdpa_error is not None:
        error = f"{found.sdpa_error:.3g} (against {found.reference})"
    return (
        entry.label,
        mode,
        f"{found.same:,} of {found.questions:,}",
        str(len(found.differing)),
        str(found.near_ties),
        f"{found.largest_difference:.2g}",
        error,
        f"{found.latency_ratio:.3f}",
    )


def _differences(found: Sequence[Entry]) -> list[str]:
    rows = [
        (entry.label, mode, difference)
        for entry in found
        for mode, agreement in entry.result.agreement.items()
        for difference in agreement.differing
    ]
    if not rows:
        return ["Every mode makes the same choices as `default`."]
    shown = table(_DIFFERENCES, (_difference_row(*row) for row in rows[:_MOST_SHOWN]), left=2)
    more = f"The first {_MOST_SHOWN} of {len(rows):,}; `results.json` has all of them."
    title = "### Questions answered differently"
    return [title, shown, *([more] if len(rows) > _MOST_SHOWN else [])]


def _difference_row(label: str, mode: str, found: Difference) -> tuple[str, ...]:
    return (
        label,
        found.key,
        str(found.default_choice),
        " / ".join(f"{logprob:.4f}" for logprob in found.default_logprobs),
        f"{found.other_choice} ({mode})",
        " / ".join(f"{logprob:.4f}" for logprob in found.other_logprobs),
        f"{found.gap:.4f}",
        "-" if found.sdpa_error is None else f"{found.sdpa_error:.4f}",
        "yes" if found.near_tie else "**no**",
    )


def _study(found: Sequence[Entry]) -> list[str]:
    """Return the original study's results and ours, for tasks that both asked one by one."""
    study = original_study()
    ours = [
        e for e in found if e.run.batch == 1 and any(_same_task(e, t.task) for t in study.tasks)
    ]
    asked = [row for row in study.tasks if any(_same_task(entry, row.task) for entry in ours)]
    if not ours:
        return []
    theirs = [
        (
            row.task,
            row.mode,
            f"original study, {study.model}, {study.device}",
            f"{row.accuracy:.4f}",
            f"{row.ms_per_query:,.0f}",
            f"{row.peak_gb:.2f}",
        )
        for row in asked
    ]
    head = ("task", "mode", "measured on", "accuracy", "ms per question", "peak GB")
    rows = [*theirs, *(_beside_study(entry, mode) for entry in ours for mode in entry.result.modes)]
    return [_study_note(study), table(head, rows, left=3)]


def _same_task(entry: Entry, name: str) -> bool:
    return entry.name.startswith(name)


def _beside_study(entry: Entry, mode: str) -> tuple[str, ...]:
    metrics, run = entry.result.modes[mode], entry.run
    by_chance = " (chance)" if run.random_weights else ""
    return (
        entry.label,
        mode,
        f"{run.model}, {run.device}",
        f"{metrics.accuracy:.4f}{by_chance}",
        f"{metrics.latency_mean_ms:,.1f}",
        gigabytes(metrics.peak_bytes),
    )


def _study_note(study: Published) -> str:
    return (
        f"The original study ({study.source}) asked its questions one by one, so only such runs "
        "are listed with it. It had another model, with trained weights, and another GPU: random "
        "weights cannot match its accuracy, and times compare two systems, not two modes."
    )
