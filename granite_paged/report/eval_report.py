"""The report: results as a page that a person can read without the code, with figures beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import CannotWrite, writing
from granite_paged.report.eval_figures import curves, draw_all
from granite_paged.report.eval_results import BenchRow, Entry, Json, entries, original_study
from granite_paged.report.markdown import put_between
from granite_paged.report.plotting import check_matplotlib

_MOST_SHOWN = 20  # differing questions a table lists; the JSON has them all


def write_report(
    folder: str,
    evaluations: Sequence[Json],
    bench: Sequence[BenchRow] = (),
) -> list[Path]:
    """Write `results.json`, `report.md` and the figures. Returns the figures' paths.

    Args:
        folder: made if need be.
        evaluations: as `granite-paged eval --json` writes them.
        bench: rows of benchmarks, for the curves.

    Raises:
        CannotWrite: if the folder cannot be written.
        MissingExtra: without matplotlib.
    """
    found = entries(evaluations)
    path = Path(folder)
    with writing(f"the report to {folder}"):
        path.mkdir(parents=True, exist_ok=True)
        figures = draw_all(path, found, bench)
        text = json.dumps({"evaluations": list(evaluations)}, indent=1)
        (path / "results.json").write_text(text + "\n", encoding="utf-8")
        page = _page(evaluations, bench, figures)
        (path / "report.md").write_text(page, encoding="utf-8")
    return [path / f"{name}.png" for name in figures]


def prepare_folder(folder: str) -> None:
    """Make it, and see that figures can be drawn. Raises CannotWrite and MissingExtra."""
    check_matplotlib()
    path = Path(folder)
    with writing(f"the report to {folder}"):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise CannotWrite(f"the report to {folder}", "it is write-protected")


def update_page(
    page: str,
    evaluations: Sequence[Json],
    bench: Sequence[BenchRow] = (),
    figures: Sequence[Path] = (),
) -> None:
    """Put the tables, and links to the figures, between the two `results` comments of a Markdown
    page, in place of what is there. Raises DataError where the page has no such comments.
    """
    at = Path(page).resolve().parent
    links = [f"![{path.stem}]({os.path.relpath(path.resolve(), at)})" for path in figures]
    put_between(page, "results", "\n\n".join([*result_tables(evaluations, bench), *links]))


def result_tables(evaluations: Sequence[Json], bench: Sequence[BenchRow]) -> list[str]:
    """Where and by which commands they were made; ours, the agreement with `default`, and the
    original study's beside ours.
    """
    found = entries(evaluations)
    commands = dict.fromkeys(run["command"] for run in evaluations if "command" in run)
    parts = [_places(found), *_shell(commands), _metrics(found), _agreement(found)]
    return [part for part in [*parts, *_study_tables(found, bench)] if part]


# -- the page -----------------------------------------------------------------------------------


def _page(evaluations: Sequence[Json], bench: Sequence[BenchRow], figures: dict[str, str]) -> str:
    parts = [
        "# Evaluation",
        "Does paging keep the answers, and what does it cost or save? Every question was put to "
        "each mode in the same run: `default` is transformers' SDPA on whole sequences, `static` "
        "transformers' StaticCache with its compiled step, `paged` this package.",
        "## Results",
        *result_tables(evaluations, bench),
        *_differences(entries(evaluations)),
        "## Figures",
        *(f"![{caption}]({name}.png)\n\n{caption}" for name, caption in figures.items()),
        "## How to read it",
        _LEGEND,
    ]
    return "\n\n".join(parts) + "\n"


_LEGEND = """\
- **accuracy**: the part of questions whose likeliest choice is right, ± one standard error; for
  `truthfulqa_mc2`, the probability mass on right choices.
- **mean, p50, p99**: milliseconds a question, tokenising left out; in batches, a batch's time
  divided by its questions.
- **tokens/s**: input tokens, each context and continuation counted once, whatever a mode computed.
- **peak**: GPU memory at the worst moment, weights included, other modes' caches left out.
- **hits**: the part of context tokens found in the cache. **saved**: tokens not computed that
  scoring without a cache computes.
- **near-tie**: a question that two modes answer differently, where `default` prefers its choice by
  less than the error that its own arithmetic makes in such a gap. That error is measured against
  the same weights in higher precision, on the differing questions and some others."""


def _shell(commands: Iterable[str]) -> list[str]:
    lines = "\n".join(commands)
    return ["Made by:", f"```sh\n{lines}\n```"] if lines else []


def _places(found: Sequence[Entry]) -> str:
    return "\n".join(f"- {place}" for place in dict.fromkeys(entry.where for entry in found))


def _metrics(found: Sequence[Entry]) -> str:
    head = (
        "task",
        "mode",
        "questions",
        "accuracy",
        "mean ms",
        "p50",
        "p99",
        "questions/s",
        "tokens/s",
        "peak GB",
        "hits",
        "saved",
    )
    return _table(head, (_metrics_row(e, mode) for e in found for mode in e.modes))


def _metrics_row(entry: Entry, mode: str) -> tuple[str, ...]:
    m = entry.modes[mode]
    refused = f" ({m['refused']:,} refused)" if m["refused"] else ""
    times = (m["latency_mean_ms"], m["latency_p50_ms"], m["latency_p99_ms"])
    return (
        entry.label,
        mode,
        f"{m['questions']:,}{refused}",
        f"{m['accuracy']:.4f} ± {m['stderr'] or 0:.4f}",
        *(f"{value:,.1f}" for value in times),
        f"{m['questions_per_second']:,.1f}",
        f"{m['tokens_per_second']:,.0f}",
        _gigabytes(m["peak_bytes"]),
        f"{m['hit_rate']:.1%}",
        f"{m['saved_tokens']:,}",
    )


def _agreement(found: Sequence[Entry]) -> str:
    head = (
        "task",
        "mode",
        "same choice as default",
        "other choice",
        "of them near-ties",
        "largest log-likelihood difference",
        "SDPA's own error of a gap",
        "latency / default's",
    )
    return _table(
        head, (_agreement_row(e, mode, a) for e in found for mode, a in e.agreement.items())
    )


def _agreement_row(entry: Entry, mode: str, a: Json) -> tuple[str, ...]:
    near = sum(bool(difference["near_tie"]) for difference in a["differing"])
    error = "-" if a["sdpa_error"] is None else f"{a['sdpa_error']:.3g} (against {a['reference']})"
    return (
        entry.label,
        mode,
        f"{a['questions'] - len(a['differing']):,} of {a['questions']:,}",
        str(len(a["differing"])),
        str(near),
        f"{a['largest_difference']:.2g}",
        error,
        f"{a['latency_ratio']:.3f}",
    )


def _differences(found: Sequence[Entry]) -> list[str]:
    rows = [
        (entry.label, mode, difference)
        for entry in found
        for mode, agreement in entry.agreement.items()
        for difference in agreement["differing"]
    ]
    if not rows:
        return ["Every choice of every mode is `default`'s."]
    head = (
        "task",
        "question",
        "default's choice",
        "log-probability of both",
        "the other mode's",
        "log-probability of both",
        "gap",
        "SDPA's error here",
        "near-tie",
    )
    shown = _table(head, (_difference_row(*row) for row in rows[:_MOST_SHOWN]))
    more = f"The first {_MOST_SHOWN} of {len(rows):,}; `results.json` has all."
    return [
        "### Questions answered differently",
        shown,
        *([more] if len(rows) > _MOST_SHOWN else []),
    ]


def _difference_row(label: str, mode: str, d: Json) -> tuple[str, ...]:
    return (
        label,
        d["key"],
        str(d["default_choice"]),
        _pair(d["default_logprobs"]),
        f"{d['other_choice']} ({mode})",
        _pair(d["other_logprobs"]),
        f"{d['gap']:.4f}",
        "-" if d["sdpa_error"] is None else f"{d['sdpa_error']:.4f}",
        "yes" if d["near_tie"] else "**no**",
    )


# -- the original study -------------------------------------------------------------------------


def _study_tables(found: Sequence[Entry], bench: Sequence[BenchRow]) -> list[str]:
    study = original_study()
    accuracy = _study_accuracy(study, found)
    sizes = [_study_curve(study, axis, bench) for axis in ("batch", "context")]
    title = f"The original study ({study['source']}; {study['gpu']}) beside ours:"
    return [title, *(part for part in [accuracy, *sizes] if part)]


def _study_accuracy(study: Json, found: Sequence[Entry]) -> str:
    head = ("task", "mode", "measured on", "accuracy", "ms per question", "peak GB")
    theirs = [
        (
            row["task"],
            row["mode"],
            f"{study['gpu']}, original study",
            f"{row['accuracy']:.4f}",
            f"{row['latency_ms']:,}",
            f"{row['peak_gb']:.2f}",
        )
        for row in study["accuracy"]
    ]
    ours = [
        (
            entry.label,
            mode,
            f"{entry.device}, {entry.model}",
            f"{metrics['accuracy']:.4f}",
            f"{metrics['latency_mean_ms']:,.1f}",
            _gigabytes(metrics["peak_bytes"]),
        )
        for entry in found
        if entry.task.startswith(("mmlu", "truthfulqa"))
        for mode, metrics in entry.modes.items()
    ]
    return _table(head, [*theirs, *ours])


def _study_curve(study: Json, axis: str, bench: Sequence[BenchRow]) -> str:
    """Milliseconds a query and GB at each size; a line for each series."""
    sizes = study[axis]["size"]
    theirs = [
        (
            f"{study['gpu']}, original study",
            mode,
            study[axis][f"{mode}_ms"],
            study[axis][f"{mode}_gb"],
        )
        for mode in ("default", "paged")
    ]
    rows = [
        (where, mode, *(f"{ms:,.0f} ms, {gb:.2f} GB" for ms, gb in zip(times, peaks, strict=True)))
        for where, mode, times, peaks in theirs
    ]
    for (case, mode), points in curves(bench, axis).items():
        at = {getattr(row, axis): row for row in points}
        rows.append((f"ours: {case}", mode, *(_point(at.get(size)) for size in sizes)))
    return _table((f"by {axis}", "mode", *map(str, sizes)), rows)


def _point(row: BenchRow | None) -> str:
    if row is None:
        return "-"
    return f"{row.median_ms / row.batch:,.2f} ms, {_gigabytes(row.peak_bytes)} GB"


# -- Markdown -----------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Empty where there are no rows."""
    body = [_line(row) for row in rows]
    return "\n".join([_line(head), _line(["---"] * len(head)), *body]) if body else ""


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _pair(logprobs: Sequence[float]) -> str:
    return " / ".join(f"{logprob:.4f}" for logprob in logprobs)


def _gigabytes(count: int | None) -> str:
    return f"{count / 1e9:.2f}" if count else "-"
