"""The command `gate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    NOTHING_KEPT,
    OK,
    POSITIVE,
    SETTINGS,
    ModelChoice,
    check_writable,
    json_option,
    keeping,
    model_options,
    option,
    progress,
    records_option,
    reporting,
    table_of,
    write_json,
)

if TYPE_CHECKING:
    from granite_paged.bench.gate import GateReport
    from granite_paged.bench.judge import Gated
    from granite_paged.bench.session import Session
    from granite_paged.bench.suites import TeethReport
    from granite_paged.report.bench_results import Calibration


@click.command(context_settings=SETTINGS)
@model_options
@records_option
@option(
    "--calibrate",
    "Run N suites of this code, record how far they stray in the --records folder, and stop.",
    click.IntRange(min=5),
    metavar="N",
)
@option(
    "--update",
    "With --calibrate, add the suites to those recorded, for example on another machine.",
    is_flag=True,
)
@option(
    "--teeth",
    "Judge N suites of this code, and N that are slower and larger, and stop.",
    POSITIVE,
    metavar="N",
)
@json_option
def gate(
    choice: ModelChoice,
    records: Path,
    calibrate: int | None,
    update: bool,
    teeth: int | None,
    json_file: str | None,
) -> int:
    """Check speed and memory on this GPU against its record.

    Compares the time of `paged`, divided by the shortest time that this GPU's bandwidth and
    arithmetic allow, with the time recorded for this GPU, model and dtype, and peak memory with
    the recorded bytes; and both with `default` (transformers' SDPA) in the same run. Without a
    record, checks only that `paged` is not slower than `default` and takes no more memory. A
    record that lacks a shape fails by name.

    A record needs a calibration: suites of identical code, from which each shape's bound follows.
    `--calibrate 20` makes one, on an idle machine; `--calibrate 5 --update` adds another machine's.
    If it is interrupted, the same command runs the suites that are missing, and as many more as a
    bound needs.
    `--teeth 20` shows that the gate sees a loss: suites of this code must be green, and suites
    with a step that is 5 % slower (10 % for the engine) and 1.5 % larger red, every time.

    Exits with 1 when a check fails, or when noise leaves one undecided after three tries. Exits
    with 2 when there is nothing to judge: no GPU, a fallback to a slower path, or a record that
    cannot be read or was made with another GPU, model, dtype, torch or triton. A --records folder
    that does not exist is refused, except with --calibrate.

    \b
    granite-paged gate --random-weights granite-4.0-h-1b --dtype bfloat16
    granite-paged gate --random-weights granite-4.0-h-1b --calibrate 20 --records perf
    granite-paged gate --random-weights granite-4.0-h-1b --teeth 20 --records perf
    """  # noqa: D301
    if calibrate and teeth:
        raise click.UsageError("--calibrate and --teeth are two runs; pass one of them")
    if update and not calibrate:
        raise click.UsageError("--update needs --calibrate N")
    if not (calibrate or records.is_dir()):
        raise click.UsageError(f"--records: {records} does not exist; --calibrate N makes it")
    choice.require_gpu("gate")
    from granite_paged.bench.session import Session

    session = Session(choice.load(), choice.config, seed=choice.seed)
    if calibrate:
        return _calibrate(session, records, calibrate, json_file, update=update)
    if teeth:
        return _teeth(session, records, teeth, json_file)
    return _judge(session, records, json_file)


def _judge(session: Session, records: Path, json_file: str | None) -> int:
    from granite_paged.bench import gate as gates
    from granite_paged.bench import judge
    from granite_paged.bench.records import against_records, how_to_record
    from granite_paged.bench.visits import shapes_for
    from granite_paged.environment import mamba_note
    from granite_paged.report.published import read_published

    against = against_records(records, session, read_published(records))
    with progress() as report_progress:
        report = gates.gate(session, against, shapes_for(session, judge.GATED), report_progress)
    with reporting(json_file, report.to_json()) as console:
        console.print(_table(report))
        if note := mamba_note():
            console.print(note, soft_wrap=True)
        if against.calibration is None:
            console.print(how_to_record(against.unused, records), soft_wrap=True)
    return OK if report.passed else FAILED


def _table(report: GateReport) -> Table:
    table = Table("shape", "check", title=f"{report.model}, {report.device}", box=SIMPLE)
    for name in ("found", "allowed", ""):
        table.add_column(name, justify="right")
    for check in report.checks:
        verdict = f"[{'green' if check.verdict == 'passed' else 'red'}]{check.verdict}[/]"
        table.add_row(check.what, check.law, check.found, check.bound, verdict)
    return table


# -- calibration and teeth ----------------------------------------------------------------------


def _calibrate(
    session: Session, records: Path, suites: int, json_file: str | None, *, update: bool
) -> int:
    from dataclasses import replace

    from granite_paged.bench import gate as gates
    from granite_paged.bench import judge
    from granite_paged.bench.records import record_path, record_to_extend, unfinished_path
    from granite_paged.bench.suites import alarms_of, joined
    from granite_paged.bench.visits import shapes_for
    from granite_paged.report.bench_results import writable_folder

    path = record_path(writable_folder(records), session)
    check_writable(None, None, str(path))
    record = record_to_extend(path, session)
    gates.refuse_where_blind(session)
    left = unfinished_path(path)
    calibration = _calibrated(session, suites, shapes_for(session, judge.GATED), left)
    calibration = joined(calibration, record.calibration if update else None)
    result = replace(record, calibration=calibration)
    write_json(str(path), result.to_json())
    left.unlink(missing_ok=True)
    alarms = alarms_of(calibration)
    with reporting(json_file, result.to_json()) as console:
        console.print(_calibration_table(session, calibration))
        console.print(
            f"{alarms.red} of {alarms.suites} suites would have been red by the bounds of the "
            f"others: at most {alarms.at_most:.0%} false alarms (95 % confidence)\n"
            f"written: {path}",
            soft_wrap=True,
        )
    return OK


def _calibrated(session: Session, suites: int, shapes: Sequence[Gated], left: Path) -> Calibration:
    """Run the suites that the file of an interrupted calibration lacks, and keep each there.

    Runs more than those if a bound needs them.
    """
    from dataclasses import replace

    from granite_paged.bench.records import unfinished
    from granite_paged.bench.suites import calibrate, missing_suites, suites_in

    earlier = unfinished(left, session, shapes)
    kept, missing = suites_in(earlier), missing_suites(earlier, suites)
    if kept:
        click.echo(f"resumed: {kept} suites are in {left}; {missing} more will run", err=True)

    def keep(calibration: Calibration) -> None:
        nonlocal kept
        write_json(str(left), replace(session.result([]), calibration=calibration).to_json())
        kept = suites_in(calibration)

    with keeping(lambda: _kept(kept, left)), progress() as report_progress:
        return calibrate(session, missing, shapes, earlier, report_progress, keep)


def _kept(suites: int, left: Path) -> str:
    if not suites:
        return NOTHING_KEPT
    return f"{suites} suites kept in {left}; run the same command to resume"


def _calibration_table(session: Session, calibration: Calibration) -> Table:
    from granite_paged.bench.suites import bounds_of

    numbers = ("suites", "time / floor", "spread", "bound", "sees", "GPU busy")
    table = table_of(["shape"], numbers, title=f"{session.name}, {session.device_name}")
    for shape, bound in bounds_of(calibration):
        cells = ["-"] * 4
        if bound is not None:
            shares = (bound.spread, bound.allowed, bound.sees)
            cells = [f"{bound.base:.4f}", *(f"{share:.2%}" for share in shares)]
        busy = "-" if shape.busy is None else f"{shape.busy:.0%}"
        name = f"{shape.case} {shape.batch} x {shape.context}"
        table.add_row(name, str(sum(map(len, shape.sessions))), *cells, busy)
    return table


def _teeth(session: Session, records: Path, tries: int, json_file: str | None) -> int:
    from granite_paged.bench import gate as gates
    from granite_paged.bench import judge
    from granite_paged.bench.records import against_records
    from granite_paged.bench.suites import teeth
    from granite_paged.bench.visits import shapes_for
    from granite_paged.errors import CannotJudge

    against = against_records(records, session, ())
    if against.calibration is None:
        raise CannotJudge(f"teeth need a record, and {against.unused}; make one with --calibrate")
    gates.refuse_where_blind(session)
    shapes = shapes_for(session, judge.GATED)
    with progress() as report_progress:
        report = teeth(session, against, tries, shapes, report_progress)
    with reporting(json_file, report.to_json()) as console:
        console.print(_teeth_table(report))
    return OK if report.passed else FAILED


def _teeth_table(report: TeethReport) -> Table:
    numbers = ("loss", "green without it", "red with it")
    table = table_of(["shape", "check"], numbers, title=f"{report.model}, {report.device}")
    for bite in report.bites:
        counts = (f"{count} of {bite.tries}" for count in (bite.green, bite.red))
        table.add_row(bite.what, bite.law, f"{bite.loss:.1%}", *counts)
    return table
