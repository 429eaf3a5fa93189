"""The command line: `granite-paged verify | generate | bench | eval` and more.

Exit status: 0 all is well, 1 a check failed, 2 wrong usage or environment (said in one line),
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged import __version__
from granite_paged.cli import bench as bench_commands
from granite_paged.cli import evaluate as evaluate_commands
from granite_paged.cli import generate as engine_commands
from granite_paged.cli.options import (
    FAILED,
    INTERRUPTED,
    OK,
    SETTINGS,
    USAGE,
    json_option,
    model_options,
    progress_bar,
    report_console,
    write_json,
)
from granite_paged.errors import GranitePagedError

PROGRAM = "granite-paged"


def main() -> None:
    """Entry point of the `granite-paged` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command. Returns the exit status; errors go to standard error in one line."""
    try:
        status = cli.main(list(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        return _complain(error.format_message())
    except GranitePagedError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"\n{PROGRAM}: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone, as after `| head`
        sys.stderr.close()
        return FAILED
    return status if isinstance(status, int) else OK


def _complain(message: str) -> int:
    click.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)
    return USAGE


class _Commands(click.Group):
    """A group with commands of two words: `bench serve` beside `bench`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        both = " ".join(args[:2])
        if both in self.commands and len(args) > 1:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings=SETTINGS)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Paged attention for IBM Granite-4 hybrid models, proven equal to SDPA.

    Start with `granite-paged verify`: it needs no download and says whether paging gives the
    same answers here as transformers' own attention does.
    """


# -- verify -------------------------------------------------------------------------------------


@cli.command(context_settings=SETTINGS)
@model_options
@click.option(
    "--context", default=384, type=click.IntRange(min=16), help="Tokens of the longest prompt."
)
@click.option(
    "--reference/--no-reference",
    default=True,
    help="Judge errors against a float64 copy (8 bytes a parameter).",
)
@json_option
def verify(
    loaded: Any, config: Any, seed: int, context: int, reference: bool, json_file: str | None
) -> int:
    """Prove that paging gives SDPA's answers, on this machine and model.

    Runs the same inputs through transformers' SDPA and through pages: prefill, chunked prefill,
    64 decode steps, a ragged left-padded batch, a fork that goes on. Prints the largest logit
    difference of each, both errors against float64 and their ratio, whether every token agrees,
    recall accuracy (embedded model) and KV memory. Exits with 1 when a law is broken.

    \b
    granite-paged verify
    granite-paged verify --random-weights granite-4.0-h-1b --dtype bfloat16
    granite-paged verify --model ./my-checkpoint --json report.json
    """  # noqa: D301
    from granite_paged.verify import stages
    from granite_paged.verify import verify as run_verification

    with progress_bar() as bar:
        task = bar.add_task("start", total=stages(loaded))

        def on_stage(stage: str) -> None:
            bar.update(task, description=stage, advance=1)

        report = run_verification(
            loaded,
            config=config,
            context=context,
            seed=seed,
            reference=reference,
            progress=on_stage,
        )
    report_console(json_file).print(*_report_tables(report), sep="")
    if json_file:
        write_json(json_file, report.to_json())
    return OK if report.passed else FAILED


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

cli.add_command(engine_commands.generate)
cli.add_command(bench_commands.bench)
cli.add_command(engine_commands.bench_serve)
cli.add_command(bench_commands.coldstart)
cli.add_command(bench_commands.gate)
cli.add_command(bench_commands.plot)
cli.add_command(bench_commands.profile)
cli.add_command(bench_commands.tune)
cli.add_command(evaluate_commands.evaluate)
cli.add_command(evaluate_commands.report)
