"""The command line: `granite-paged verify | generate | bench | eval` and more.

Exit status: 0 for success, 1 when a check failed, 2 for wrong usage or environment (explained in
one line), 130 when interrupted.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged import __version__
from granite_paged.cli.bench import bench, coldstart
from granite_paged.cli.evaluate import evaluate
from granite_paged.cli.gate import gate
from granite_paged.cli.generate import generate
from granite_paged.cli.options import (
    FAILED,
    INTERRUPTED,
    OK,
    SETTINGS,
    USAGE,
    ModelChoice,
    json_option,
    model_options,
    progress,
    report_console,
    write_json,
)
from granite_paged.cli.profiling import profile
from granite_paged.cli.report import plot, report
from granite_paged.cli.tune import tune
from granite_paged.errors import GeometryError, GranitePagedError, PagingError

PROGRAM = "granite-paged"


def main() -> None:
    """Entry point of the `granite-paged` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; an error is one line on standard error."""
    try:
        status = cli.main(list(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        return _complain(error.format_message())
    except GranitePagedError as error:
        return _complain(_in_options(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"\n{PROGRAM}: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone, as after `| head`
        _discard_output()
        return FAILED
    except OSError as error:  # standard output is full
        _discard_output()
        return _complain(f"cannot write {error.filename or 'standard output'}: {error.strerror}")
    return status if isinstance(status, int) else OK


def _complain(message: str) -> int:
    click.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)
    return USAGE


def _in_options(error: GranitePagedError) -> str:
    """Return the message with the options that a user typed in place of fields of PagedConfig."""
    message = str(error)
    if not isinstance(error, (GeometryError, PagingError)):
        return message
    message = re.sub(r"\b(PagedConfig\.)?max_sequences\b", "the number of sequences", message)
    fields = r"\b(?:PagedConfig\.)?(page_size|memory_fraction|max_tokens)\b"
    return re.sub(fields, lambda field: f"--{field[1].replace('_', '-')}", message)


def _discard_output() -> None:
    """Drop what is left in the buffer, so that the interpreter can exit without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Paged attention for IBM Granite-4 hybrid models.

    Start with `granite-paged verify`. It needs no download and checks that paging gives the same
    answers on this machine as transformers' own attention.
    """


# -- verify -------------------------------------------------------------------------------------


@cli.command(context_settings=SETTINGS)
@model_options
@click.option(
    "--context",
    default=384,
    type=click.IntRange(min=16),
    help="Give the longest prompt this many tokens.",
)
@click.option(
    "--reference/--no-reference",
    default=True,
    help="Also compare both with a float64 copy of the model (8 bytes per parameter).",
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
    from granite_paged.verify import stages
    from granite_paged.verify import verify as run_verification

    loaded = choice.load()
    counted = itertools.count(1)
    with progress() as report_progress:
        found = run_verification(
            loaded,
            config=choice.config,
            context=context,
            seed=choice.seed,
            reference=reference,
            progress=lambda stage: report_progress(stage, next(counted), stages(loaded)),
        )
    report_console(json_file).print(*_report_tables(found), sep="")
    if json_file:
        write_json(json_file, found.to_json())
    return OK if found.passed else FAILED


def _report_tables(report: Any) -> list[Any]:
    title = f"{report.model}, {report.dtype}, {report.device}, pages of {report.page_size}"
    cases = Table(title=title, box=SIMPLE, caption=f"law: {report.cases[0].law}")
    cases.add_column("case", no_wrap=True)
    for column in ("max |diff|", "of scale", "SDPA error", "paged error", "ratio", "tokens", ""):
        cases.add_column(column, justify="right", no_wrap=True)
    for case in report.cases:
        cases.add_row(
            case.name,
            *map(_short, (case.max_abs_diff, case.relative_diff)),
            *map(_short, (case.error_default, case.error_paged)),
            "-" if case.error_ratio is None else f"{case.error_ratio:.3f}",
            "equal" if case.tokens_equal else f"{case.flipped} flipped",
            _verdict(case.passed),
        )
        if case.invariant != "holds":
            cases.add_row(f"  [red]{case.invariant}[/]")
    summary = Table(show_header=False, box=SIMPLE)
    if report.recall:
        recall = report.recall
        same = "every answer equal" if recall.answers_equal else "answers differ"
        summary.add_row(
            "recall",
            f"default {recall.default:.4f}, paged {recall.paged:.4f}; {same}",
            _verdict(recall.passed),
        )
    kv = report.kv
    summary.add_row(
        "KV memory",
        f"{kv.sequences} ragged sequences: padded {_megabytes(kv.bytes_contiguous)}, "
        f"paged {_megabytes(kv.bytes_paged)}, waste {kv.waste_fraction:.2%}",
        _verdict(kv.passed),
    )
    summary.add_row("versions", ", ".join(f"{name} {v}" for name, v in report.versions.items()))
    summary.add_row("verdict", "passed" if report.passed else "FAILED", _verdict(report.passed))
    return [cases, summary]


def _verdict(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[red]BROKEN[/]"


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.2e}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


# -- commands that have a module of their own ---------------------------------------------------

for command in (generate, bench, coldstart, gate, tune, profile, plot, evaluate, report):
    cli.add_command(command)
