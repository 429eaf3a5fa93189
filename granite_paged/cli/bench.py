"""The commands `bench` and, for `bench --case coldstart`, `coldstart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from granite_paged.cli.options import (
    OK,
    POSITIVE,
    SETTINGS,
    CommandGroup,
    ModelChoice,
    json_option,
    keeping,
    markdown_option,
    model_options,
    option,
    options,
    out_option,
    progress,
    report_console,
    table_of,
    write_json,
)
from granite_paged.cli.profiling import profile_first_shapes
from granite_paged.cli.serve import serve
from granite_paged.names import BASELINES, CASE_NAMES, MODES
from granite_paged.report.formatting import gigabytes, significant

if TYPE_CHECKING:
    from granite_paged.bench.session import Session
    from granite_paged.report.bench_results import Result, Row
    from granite_paged.report.bench_tables import Columns

_shape_options = options(
    option(
        "--case cases",
        "Measure only this case of those above; may be repeated.  [default: all]",
        click.Choice(CASE_NAMES),
        metavar="CASE",
        multiple=True,
    ),
    option(
        "--mode modes",
        "Measure only this mode; may be repeated.  [default: all, `static` for decode only]",
        click.Choice(MODES),
        multiple=True,
    ),
    option(
        "--batch batches",
        "Run this many sequences, instead of each case's own batches; may be repeated.",
        POSITIVE,
        multiple=True,
    ),
    option(
        "--context contexts",
        "Give each sequence this many tokens, instead of each case's own; may be repeated.",
        POSITIVE,
        multiple=True,
    ),
    option("--quick", "Measure fewer shapes with fewer repeats.", is_flag=True),
    option(
        "--budget",
        "Start no shape after this time; shapes left out are reported as not measured.",
        click.FloatRange(min=0),
        metavar="SECONDS",
    ),
)


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings=SETTINGS,
    subcommand_metavar="[serve]",
)
@model_options
@_shape_options
@json_option
@option("--update", "Keep the rows of the --json file that are not measured again.", is_flag=True)
@option(
    "--missing",
    "Measure only what the --json file has no row for, and keep its rows.",
    is_flag=True,
)
@markdown_option
@out_option("a profile of each case's first shape, a trace and a table of kernels,")
@click.pass_context
def bench(
    context: click.Context,
    choice: ModelChoice,
    cases: Sequence[str],
    modes: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    quick: bool,
    budget: float | None,
    json_file: str | None,
    update: bool,
    missing: bool,
    markdown_file: str | None,
    folder: Path | None,
) -> int:
    """Measure speed and memory of the modes, side by side.

    \b
    batch      prefill of 1 to 32 prompts of 512 tokens
    context    prefill of one prompt of 128 to 131072 tokens
    decode     steps of 1-128 sequences of 512-32768 tokens
    kernel     attention alone: paged, SDPA, and the floor
    memory     sequences that fit a budget, paged and padded
    coldstart  first token and every shape, in new processes
    serve      64 and 256 seeded requests, all sent at once

    The modes are `default` and `static`, which are transformers' own, and `paged`. They take
    turns in one run, so that drift of the machine affects all of them. The floor is the time that
    the device's bandwidth and arithmetic allow. `static` compiles each shape first, and runs
    prefill only with --mode static. A shape that a mode cannot run is listed with the reason.
    Shapes are small on the CPU. An interrupted run keeps its rows; the same command with --missing
    goes on.

    \b
    granite-paged bench --quick
    granite-paged bench --random-weights granite-4.0-h-1b --case decode --json decode.json
    granite-paged bench --case kernel --json all.json --update
    granite-paged bench --json all.json --missing --budget 300
    granite-paged bench --case batch --batch 8 --context 1024 --mode default --mode paged
    """  # noqa: D301
    if context.invoked_subcommand:
        _refuse_options_before(context)
        return OK
    from granite_paged.bench.measure import QUICK, Repeats
    from granite_paged.bench.session import Session, make_plan, missing_from
    from granite_paged.bench.session import run as run_plan
    from granite_paged.report.bench_results import updated, writable_folder

    earlier = _earlier(json_file) if update or missing else None
    if folder is not None:
        writable_folder(folder)  # refuses a folder before the work
    session = Session(
        choice.load(),
        choice.config,
        seed=choice.seed,
        repeats=QUICK if quick else Repeats(),
        fresh_arguments=choice.arguments(),
    )
    sizes = {"batches": batches, "contexts": contexts}
    plan = make_plan(session, cases, modes, quick=quick, budget=budget, **sizes)
    if earlier is not None:
        updated(earlier, session.result([]))  # refuses results of another model before the work
        plan = missing_from(earlier, session, plan) if missing else plan
        if missing and not plan.shapes:
            click.echo(f"nothing is missing in {json_file}")
            _write_tables(earlier, markdown_file)
            return OK
    rows: list[Row] = []
    with keeping(lambda: _kept(rows, json_file)):
        try:
            with progress() as report_progress:
                rows.extend(run_plan(session, plan, report_progress))
        finally:  # an interrupted run shows and keeps its rows
            try:
                _print_rows(session, rows, report_console(json_file))
            finally:
                _write_rows(session, rows, earlier, json_file, markdown_file)
        if folder is not None:
            profile_first_shapes(session, plan, folder)
    return OK


bench.add_command(serve)


def _refuse_options_before(context: click.Context) -> None:
    """Refuse options between `bench` and its subcommand, which would have no effect."""
    for name in context.params:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError("put the options of `bench serve` after `serve`")


def _earlier(json_file: str | None) -> Result | None:
    """Return the results that `--update` adds to; None if the file does not exist yet."""
    from granite_paged.report.bench_results import read_result

    if json_file is None or json_file == "-":
        raise click.UsageError("--update and --missing need a file: pass --json FILE")
    return read_result(json_file) if Path(json_file).is_file() else None


def _kept(rows: list[Row], json_file: str | None) -> str:
    if json_file in (None, "-"):
        return "rows were not kept: name a file with --json to keep them"
    return f"{len(rows)} rows kept in {json_file}; run the same command with --missing to resume"


def _write_rows(
    session: Session,
    rows: list[Row],
    earlier: Result | None,
    json_file: str | None,
    markdown_file: str | None,
) -> None:
    from granite_paged.report.bench_results import updated

    if not rows:
        return
    result = session.result(rows)
    if earlier is not None:
        result = updated(earlier, result)
    write_json(json_file, result.to_json())
    _write_tables(result, markdown_file)


def _write_tables(result: Result, markdown_file: str | None) -> None:
    from granite_paged.files import write_file
    from granite_paged.report.bench_tables import tables

    if markdown_file:
        write_file(markdown_file, tables([result]))


# -- tables -------------------------------------------------------------------------------------


def _print_rows(session: Session, rows: Sequence[Row], console: Console) -> None:
    from granite_paged.environment import mamba_note

    console.print(*_row_tables(session, rows), sep="")
    for row in (row for row in rows if row.error):
        failure = f"{row.case}, {row.mode}, {row.batch} x {row.context}: {row.error}"
        console.print(failure, soft_wrap=True, markup=False)
    if any(row.latency_ms for row in rows if row.mode in BASELINES) and (note := mamba_note()):
        console.print(note, soft_wrap=True)


def _row_tables(session: Session, rows: Sequence[Row]) -> list[Table]:
    """Put timed steps in one table, and each other case in its own."""
    from granite_paged.report.bench_tables import ROW_BY_ROW

    title = f"{session.name}, {session.device_name}"
    caption = "ms is the median of the repeats; the floor is what the device allows"
    steps = [row for row in rows if row.case not in ROW_BY_ROW]
    tables = [_table(title, _STEP_COLUMNS, steps, caption)] if steps else []
    for case, columns in ROW_BY_ROW.items():
        found = [row for row in rows if row.case == case]
        narrow = {name: show for name, show in columns.items() if name != "budget"}
        tables += [_table(title, narrow, found, found[0].note)] if found else []
    return tables


def _table(title: str, columns: Columns, rows: Sequence[Row], caption: str) -> Table:
    table = table_of(["case", "mode"], list(columns), title=title, caption=caption or None)
    from granite_paged.report.bench_tables import label_of

    for row in rows:
        mode = label_of(row) if columns is _STEP_COLUMNS else row.mode
        cells = [show(row) for show in columns.values()]
        table.add_row(row.case, mode, *cells[:-1], "failed" if row.error else cells[-1])
    return table


_STEP_COLUMNS: Columns = {
    "batch": lambda row: str(row.batch),
    "context": lambda row: f"{row.context:,}",
    "ms": lambda row: significant(row.latency_ms.median if row.latency_ms else None),
    "p90 ms": lambda row: significant(row.latency_ms.p90 if row.latency_ms else None),
    "repeats": lambda row: str(row.latency_ms.n) if row.latency_ms else "-",
    "tokens/s": lambda row: significant(row.tokens_per_second),
    "floor ms": lambda row: significant(row.floor_ms),
    "peak GB": lambda row: gigabytes(row.peak_bytes, digits=3),
}


# -- cold start ---------------------------------------------------------------------------------


@click.command(hidden=True, context_settings=SETTINGS)
@model_options
@click.option("--context", default=512, type=click.IntRange(min=1))
def coldstart(choice: ModelChoice, context: int) -> int:
    """Time the first token and every compiled shape; `bench --case coldstart` runs this."""
    from granite_paged.bench.cases import Shape
    from granite_paged.bench.coldstart import in_this_process

    shape = Shape(1, context)
    write_json("-", in_this_process(choice.load().model, choice.config, shape, choice.seed))
    return OK
