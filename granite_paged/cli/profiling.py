"""The command `profile`, and the profiles that `bench --out` writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    OK,
    POSITIVE,
    SETTINGS,
    ModelChoice,
    json_option,
    model_options,
    option,
    out_option,
    reporting,
    table_of,
)
from granite_paged.names import MODES

if TYPE_CHECKING:
    from granite_paged.bench.profiler import Profile
    from granite_paged.bench.session import BenchPlan, Session

_MOST_KERNELS = 25  # rows in a table of kernels


@click.command(context_settings=SETTINGS)
@click.argument("kind", type=click.Choice(("prefill", "decode")), metavar="prefill|decode")
@model_options
@option("--mode", "Profile this mode.", click.Choice(MODES), default="paged")
@option("--batch", "Run this many sequences.", POSITIVE, default=1)
@option("--context", "Give each sequence this many tokens.", POSITIVE, default=512)
@out_option("the trace", default="profiles")
@option("--memory", "Also write a snapshot of CUDA memory.", is_flag=True)
@json_option
def profile(
    kind: Any,
    choice: ModelChoice,
    mode: str,
    batch: int,
    context: int,
    folder: Path,
    memory: bool,
    json_file: str | None,
) -> int:
    """Show where the time of one step goes.

    Writes a trace and prints the kernels by kind of layer. The trace opens in
    https://ui.perfetto.dev, the memory snapshot in https://pytorch.org/memory_viz. A kernel is
    counted for the layer whose module launched it. Kernels of compiled code and CUDA graphs have
    no module; their names decide.

    \b
    granite-paged profile decode --batch 32 --random-weights granite-4.0-h-1b
    granite-paged profile prefill --mode default --context 4096 --out traces --memory
    """  # noqa: D301
    from granite_paged.bench.cases import Shape
    from granite_paged.bench.session import Session
    from granite_paged.report.bench_results import writable_folder

    writable_folder(folder)  # refuses a folder before the work
    session = Session(choice.load(), choice.config, seed=choice.seed)
    found = session.profile(kind, Shape(batch, context), mode, folder, memory=memory)
    with reporting(json_file, found.to_json()) as console:
        console.print(_kind_table(found), _kernel_table(found))
        console.print(f"trace: {found.trace}", soft_wrap=True)
        if found.snapshot:
            console.print(f"memory snapshot: {found.snapshot}", soft_wrap=True)
    return OK


def _kind_table(found: Profile) -> Table:
    table = table_of(["kind of layer"], ["µs", "share"], title="one step")
    total = sum(time for _, time in found.by_kind()) or 1.0
    for kind, time in found.by_kind():
        table.add_row(kind, f"{time:,.1f}", f"{time / total:.1%}")
    return table


def _kernel_table(found: Profile) -> Table:
    table = Table("kind", box=SIMPLE)
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=60)
    for name in ("calls", "µs"):
        table.add_column(name, justify="right")
    for kernel in found.kernels[:_MOST_KERNELS]:
        calls, time = f"{kernel.calls:,}", f"{kernel.microseconds:,.1f}"
        table.add_row(kernel.kind, kernel.name, calls, time)
    return table


def profile_first_shapes(session: Session, plan: BenchPlan, folder: Path) -> None:
    """Write a trace for each case's first shape in each mode, and one table of their kernels."""
    from granite_paged.bench.session import first_steps
    from granite_paged.files import write_file
    from granite_paged.report.bench_results import writable_folder
    from granite_paged.report.markdown import table

    lines = []
    for case, shape, mode in first_steps(plan):
        found = session.profile(case.kind, shape, mode, folder, name=f"{case.name}-{mode}")
        for kernel in found.kernels[:_MOST_KERNELS]:
            cost = (kernel.kind, kernel.name, str(kernel.calls), f"{kernel.microseconds:.1f}")
            lines.append((f"{case.name}, {mode}", *cost))
    header = ("case", "kind", "kernel", "calls", "µs per step")
    write_file(writable_folder(folder) / "kernels.md", table(header, lines, left=3))
