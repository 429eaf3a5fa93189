"""The command `gate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    OK,
    SETTINGS,
    ModelChoice,
    json_option,
    model_options,
    progress,
    records_option,
    report_console,
    write_json,
)

if TYPE_CHECKING:
    from granite_paged.bench.gate import GateReport


@click.command(context_settings=SETTINGS)
@model_options
@records_option
@json_option
def gate(choice: ModelChoice, records: Path, json_file: str | None) -> int:
    """Check speed and memory on this GPU against its record.

    Runs `paged` and `default` (transformers' SDPA) in interleaved pairs. Compares the time of
    `paged`, divided by the shortest time that this GPU's bandwidth and arithmetic allow, with the
    time recorded for this GPU and model, and peak memory with the recorded bytes. Without a
    record, checks only that `paged` is not slower than `default` and takes no more memory. A
    record that lacks a shape, or that another device, torch or triton made, fails by name.

    Exits with 1 when a check fails, or when noise leaves one undecided after three tries. Exits
    with 2 when there is nothing to judge: no GPU, or a fallback to a slower path.

    \b
    granite-paged gate --random-weights granite-4.0-h-1b --dtype bfloat16
    granite-paged gate --random-weights granite-4.0-h-1b --json gate.json
    """  # noqa: D301
    choice.require_gpu("gate")
    from granite_paged.bench import gate as gates
    from granite_paged.bench.session import Session
    from granite_paged.environment import mamba_note
    from granite_paged.report.published import read_published

    published = read_published(records)
    session = Session(choice.load(), choice.config, seed=choice.seed)
    against = gates.against_records(records, session, published)
    with progress() as report_progress:
        report = gates.gate(session, against, progress=report_progress)
    console = report_console(json_file)
    console.print(_table(report))
    if note := mamba_note():
        console.print(note, soft_wrap=True)
    if against.record is None:
        console.print(gates.how_to_record(against.unused), soft_wrap=True)
    write_json(json_file, report.to_json())
    return OK if report.passed else FAILED


def _table(report: GateReport) -> Table:
    table = Table("shape", "check", title=f"{report.model}, {report.device}", box=SIMPLE)
    for name in ("found", "allowed", ""):
        table.add_column(name, justify="right")
    for check in report.checks:
        verdict = f"[{'green' if check.verdict == 'passed' else 'red'}]{check.verdict}[/]"
        table.add_row(check.what, check.law, check.found, check.bound, verdict)
    return table
