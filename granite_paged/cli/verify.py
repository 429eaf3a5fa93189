"""The command `verify`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    OK,
    SETTINGS,
    ModelChoice,
    check_writable,
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
@option(
    "--bits-out",
    "Only run fixed requests in exact mode, and add the digests of each layer's bits to this file.",
    click.Path(dir_okay=False, writable=True),
    callback=check_writable,
    metavar="FILE",
)
@option(
    "--bits",
    "Only compare two files of --bits-out, and name the first layer whose bits differ.",
    click.Path(dir_okay=False),
    nargs=2,
    metavar="FILE FILE",
)
@json_option
def verify(
    choice: ModelChoice,
    context: int,
    reference: bool,
    bits_out: str | None,
    bits: tuple[str, str] | None,
    json_file: str | None,
) -> int:
    """Check that paging gives the same answers as SDPA.

    Runs the same inputs through transformers' SDPA and through pages: a prefill, a chunked
    prefill, 64 decode steps, a ragged left-padded batch, and a sequence that is forked and
    continued. For each, prints the largest logit difference, both errors against float64 and
    their ratio, and whether every token agrees; also recall accuracy (embedded model) and KV
    memory. Exits with 1 when a tolerance is exceeded, or when bits differ (--bits).

    \b
    granite-paged verify
    granite-paged verify --random-weights granite-4.0-h-1b --dtype bfloat16
    granite-paged verify --model ./my-checkpoint --json report.json
    granite-paged verify --bits-out before.json
    granite-paged verify --bits before.json after.json
    """  # noqa: D301
    if bits and bits_out:
        raise click.UsageError("--bits and --bits-out are two runs; pass one of them")
    if json_file and (bits or bits_out):
        raise click.UsageError(f"{'--bits' if bits else '--bits-out'} writes no --json report")
    if bits:
        return _compare_bits(*bits)
    if bits_out:
        return _write_bits(choice, bits_out)
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


def _write_bits(choice: ModelChoice, path: str) -> int:
    from granite_paged.bits import bits_report, write_report

    exact = replace(choice, config=replace(choice.config, exact=True))
    report = bits_report(exact.load(), exact.config)
    write_report(path, report)
    click.echo(f"the bits of {report.model} in {report.dtype} are in {path}")
    return OK


def _compare_bits(first: str, second: str) -> int:
    """Print what differs between two files: in the places, and in which layer first."""
    from granite_paged.bits import newest_pairs, read_reports

    pairs = newest_pairs(read_reports(first), read_reports(second))
    for one, other in pairs:
        click.echo(f"{one.model}, {one.dtype}")
        for line in one.described(other):
            click.echo(f"  {line}")
    return FAILED if any(one.differences(other) for one, other in pairs) else OK


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
