"""The command `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    OK,
    SETTINGS,
    ModelChoice,
    exact_option,
    json_option,
    model_options,
    option,
    progress,
    reporting,
    table_of,
)

if TYPE_CHECKING:
    from granite_paged.verify import CaseResult, KVMemory, RecallResult, VerifyReport


@click.command(context_settings=SETTINGS)
@model_options
@exact_option
@option(
    "--context",
    "Give the longest prompt this many tokens.",
    click.IntRange(min=16),
    default=384,
    metavar="TOKENS",
)
@option(
    "--reference/--no-reference",
    "Also compare both with a float64 copy of the model (8 bytes per parameter).",
    default=True,
)
@json_option
def verify(choice: ModelChoice, context: int, reference: bool, json_file: str | None) -> int:
    """Check that paging gives the same answers as SDPA.

    Runs the same inputs through transformers' SDPA and through pages: a prefill, a chunked
    prefill, 64 decode steps, a ragged left-padded batch, and a sequence that is forked and
    continued. For each, prints the largest logit difference, both errors against float64 and
    their ratio, and whether every token agrees; also recall accuracy (embedded model) and KV
    memory. Exits with 1 when a tolerance is exceeded.

    \b
    granite-paged verify
    granite-paged verify --random-weights granite-4.0-h-1b --dtype bfloat16
    granite-paged verify --model ./my-checkpoint --json report.json
    """  # noqa: D301
    from granite_paged.verify import verify as run_verification

    loaded = choice.load()
    with progress() as report_progress:
        report = run_verification(
            loaded,
            config=choice.config,
            context=context,
            seed=choice.seed,
            reference=reference,
            progress=report_progress,
        )
    with reporting(json_file, report.to_json()) as console:
        console.print(_cases(report), _summary(report), sep="")
    return OK if report.passed else FAILED


def _cases(report: VerifyReport) -> Table:
    title = f"{report.model}, {report.dtype}, {report.device}, {report.page_size} tokens per page"
    numbers = ("max |diff|", "relative", "SDPA error", "paged error", "ratio", "tokens", "")
    caption = f"tolerance: {report.cases[0].law}"
    table = table_of(["case"], numbers, title=title, caption=caption)
    for case in report.cases:
        table.add_row(case.name, *_numbers(case), _verdict(case.passed))
        if case.invariant != "holds":
            table.add_row(f"  [red]{case.invariant}[/]")
    return table


def _numbers(case: CaseResult) -> list[str]:
    return [
        *map(_short, (case.max_abs_diff, case.relative_diff)),
        *map(_short, (case.error_default, case.error_paged)),
        "-" if case.error_ratio is None else f"{case.error_ratio:.3f}",
        "equal" if case.tokens_equal else f"{case.flipped} differ",
    ]


def _summary(report: VerifyReport) -> Table:
    table = Table(show_header=False, box=SIMPLE)
    if report.recall:
        table.add_row("recall", _recall(report.recall), _verdict(report.recall.passed))
    table.add_row("KV memory", _memory(report.kv), _verdict(report.kv.passed))
    table.add_row("versions", ", ".join(f"{name} {v}" for name, v in report.versions.items()))
    table.add_row("verdict", "passed" if report.passed else "FAILED", _verdict(report.passed))
    return table


def _recall(recall: RecallResult) -> str:
    same = "all answers equal" if recall.answers_equal else "answers differ"
    return f"accuracy default {recall.default:.4f}, paged {recall.paged:.4f}; {same}"


def _memory(kv: KVMemory) -> str:
    padded, in_pages = _megabytes(kv.bytes_contiguous), _megabytes(kv.bytes_paged)
    return (
        f"{kv.sequences} ragged sequences: padded {padded}, in pages {in_pages}, "
        f"{kv.waste_fraction:.2%} of it wasted"
    )


def _verdict(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[red]FAILED[/]"


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.2e}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
