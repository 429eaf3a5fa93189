"""The commands `bench`, `gate`, `tune`, `plot` and `profile`; the other modules do the work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    OK,
    SETTINGS,
    in_a_folder,
    json_option,
    model_options,
    progress_bar,
    refuse_unwritable,
    report_console,
    write_json,
)

if TYPE_CHECKING:
    from granite_paged.bench.gate import GateReport
    from granite_paged.bench.profiler import Profile
    from granite_paged.bench.session import Plan, Session
    from granite_paged.bench.tune import Group, Outcome, Trial
    from granite_paged.report.bench_results import Result, Row

RECORDS = "golden/perf"

# said again here, as the modules that know them import torch
CASE_NAMES = ("batch", "context", "decode", "kernel", "memory", "coldstart")
MODE_NAMES = ("default", "static", "paged")
SUBJECT_NAMES = ("decode", "prefill", "products")
FORMATS = ("png", "svg")

_MOST_KERNELS = 25  # lines of a table of kernels

_records_option = click.option(
    "--records",
    default=RECORDS,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of recorded and published results.",
)
_markdown_option = click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, writable=True),
    callback=in_a_folder,
    help="Write the tables as Markdown.",
)


# -- bench --------------------------------------------------------------------------------------


@click.command(context_settings=SETTINGS)
@model_options
@click.option(
    "--case", "cases", multiple=True, type=click.Choice(CASE_NAMES), help="[default: all of them]"
)
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(MODE_NAMES), help="[default: all of them]"
)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(min=1), help="Instead of the case's."
)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(min=1),
    help="Tokens a sequence, instead of the case's.",
)
@click.option("--quick", is_flag=True, help="Fewer shapes, fewer repeats: minutes to a first look.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Begin no shape after so long; what is left out is listed.",
)
@json_option
@click.option("--update", is_flag=True, help="Keep the rows of the --json file not measured again.")
@_markdown_option
@click.option(
    "--profile",
    "profile_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for a trace of each case's first shape, and a table of its kernels.",
)
@click.pass_context
def bench(
    context: click.Context,
    loaded: Any,
    config: Any,
    seed: int,
    cases: Sequence[str],
    modes: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    quick: bool,
    budget: float | None,
    json_file: str | None,
    update: bool,
    markdown_file: str | None,
    profile_dir: Path | None,
) -> int:
    """Measure speed and memory: transformers' own modes and pages, side by side in one run.

    \b
    batch      prefill, 1 to 32 prompts of 512 tokens
    context    prefill of one prompt of 128 to 131072 tokens
    decode     one step for 1 to 128 sequences of 512 to 32768 tokens
    kernel     paged FlexAttention, contiguous SDPA and the floor that memory sets
    memory     ragged sequences that fit a budget, in pages and padded
    coldstart  first token, and every shape compiled, in fresh processes

    Modes take turns, so that what the machine does meanwhile, it does to all. A shape that a mode
    cannot run is listed with its reason. On the CPU, shapes are small. An interrupted run keeps
    the rows it has.

    \b
    granite-paged bench --quick
    granite-paged bench --random-weights granite-4.0-h-1b --case decode --json decode.json
    granite-paged bench --case kernel --json all.json --update
    granite-paged bench --case batch --batch 8 --context 1024 --mode default --mode paged
    """  # noqa: D301
    from granite_paged.bench.measure import QUICK, Repeats
    from granite_paged.bench.session import Session, plan_of
    from granite_paged.report.bench_results import updated

    earlier = _earlier(json_file) if update else None
    session = Session(
        loaded,
        config,
        seed=seed,
        repeats=QUICK if quick else Repeats(),
        fresh_arguments=_same_model(context.params),
    )
    plan = plan_of(
        session,
        cases,
        modes,
        quick=quick,
        batches=batches,
        contexts=contexts,
        budget=budget,
    )
    if earlier is not None:
        updated(earlier, session.result([]))  # now, not when the work is done
    rows: list[Row] = []
    try:
        _collect(session, plan, rows)
    finally:  # an interrupt keeps the rows so far
        _write_rows(session, rows, earlier, json_file, markdown_file)
    console = report_console(json_file)
    console.print(*_row_tables(session, rows), sep="")
    for failure in _failures(rows):
        console.print(failure, soft_wrap=True, markup=False)
    if profile_dir is not None:
        _profile_first_shapes(session, plan, profile_dir)
    return OK


def _same_model(chosen: dict[str, Any]) -> list[str]:
    """The options that load the same model in another process."""
    names = ("model", "random_weights", "device", "dtype", "seed", "page_size", "backend")
    given = [(f"--{name.replace('_', '-')}", chosen.get(name)) for name in names]
    return [text for name, value in given if value is not None for text in (name, str(value))]


def _collect(session: Session, plan: Plan, rows: list[Row]) -> None:
    """Run a plan behind a progress bar; `rows` has every row as soon as it is measured."""
    from granite_paged.bench.session import run

    with progress_bar() as bar:
        task = bar.add_task("start", total=len(plan.shapes))

        def on_shape(what: str) -> None:
            bar.update(task, description=what, advance=1)

        rows.extend(run(session, plan, progress=on_shape))


def _earlier(json_file: str | None) -> Result | None:
    """What `--update` adds to: the file as it is; None where there is none yet."""
    from granite_paged.report.bench_results import read_result

    if json_file is None or json_file == "-":
        raise click.UsageError("--update needs a file: pass --json FILE")
    return read_result(json_file) if Path(json_file).exists() else None


def _write_rows(
    session: Session,
    rows: list[Row],
    earlier: Result | None,
    json_file: str | None,
    markdown_file: str | None,
) -> None:
    from granite_paged.report.bench_results import updated
    from granite_paged.report.bench_tables import markdown, write_text

    if not rows:
        return
    result = session.result(rows)
    if earlier is not None:
        result = updated(earlier, result)
    if json_file:
        write_json(json_file, result.to_json())
    if markdown_file:
        write_text(Path(markdown_file), markdown([result]))


_STEP_COLUMNS = ("batch", "context", "ms", "p90", "n", "tokens/s", "floor", "peak GB")
_OTHER_COLUMNS = ("what", "sequences", "seconds", "GB")


def _row_tables(session: Session, rows: Sequence[Row]) -> list[Table]:
    """Steps in one table; what fits, and how long a start takes, in another."""
    steps = [row for row in rows if row.case not in ("memory", "coldstart")]
    others = [row for row in rows if row.case in ("memory", "coldstart")]
    title = f"{session.name}, {session.device_name}"
    tables = []
    if steps:
        lines = [(*_shape(row), *_cells(row)) for row in steps]
        tables.append(_table(title, _STEP_COLUMNS, lines))
    if others:
        tables.append(_table(title, _OTHER_COLUMNS, [_other_cells(row) for row in others]))
    return tables


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=SIMPLE)
    for name in ("case", "mode"):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _shape(row: Row) -> tuple[str, ...]:
    lengths = row.variant.removeprefix("ragged ") or f"{row.context:,}"
    return (row.case, row.mode, str(row.batch), lengths)


def _other_cells(row: Row) -> list[str]:
    seconds = row.latency_ms.median / 1e3 if row.latency_ms else None
    what = "failed" if row.error else row.variant
    return [row.case, row.mode, what, f"{row.batch:,}", _ms(seconds), _gb(row)]


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{r.case}, {r.mode}, {r.batch} x {r.context}: {r.error}" for r in rows if r.error]


def _cells(row: Row) -> list[str]:
    if row.error:
        return ["failed"]
    latency = row.latency_ms
    times = (latency.median, latency.p90) if latency else (None, None)
    return [
        *map(_ms, times),
        str(latency.n) if latency else "-",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-",
        _ms(row.floor_us / 1e3 if row.floor_us else row.floor_ms),
        _gb(row),
    ]


def _gb(row: Row) -> str:
    return "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.3f}"


def _ms(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}" if number < 100 else f"{number:,.0f}"


@click.command(hidden=True, context_settings=SETTINGS)
@model_options
@click.option("--context", default=512, type=click.IntRange(min=1))
def coldstart(loaded: Any, config: Any, seed: int, context: int) -> int:
    """Time the first token and every bucket in this process; `bench --case coldstart` calls it."""
    from granite_paged.bench.cases import Shape
    from granite_paged.bench.coldstart import in_this_process

    write_json("-", in_this_process(loaded.model, config, Shape(1, context), seed))
    return OK


# -- gate ---------------------------------------------------------------------------------------


def _needs_gpu(command: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse before a model is loaded."""

    @functools.wraps(command)
    def with_gpu(**options: Any) -> Any:
        import torch

        from granite_paged.bench.gate import no_gpu

        if not torch.cuda.is_available():
            raise no_gpu(command.__name__)
        return command(**options)

    return with_gpu


@click.command(context_settings=SETTINGS)
@_needs_gpu
@model_options
@_records_option
@json_option
def gate(loaded: Any, config: Any, seed: int, records: Path, json_file: str | None) -> int:
    """Judge speed and memory on this GPU: has paged slipped, or is default better?

    Paged and default run in interleaved pairs. Paged's time, over the floor that this GPU shows
    now, is held against what was recorded for the GPU and model, peak memory against the recorded
    bytes; where nothing is recorded, only the laws that hold anywhere count: not slower than
    default, not more memory. Exit status 1 when a check fails or noise leaves it open after three
    tries; 2 where there is nothing to judge: no GPU, or the runner has fallen back to a slower
    path.

    \b
    granite-paged gate --random-weights granite-4.0-h-1b --dtype bfloat16
    granite-paged gate --random-weights granite-4.0-h-1b --json gate.json
    """  # noqa: D301
    from granite_paged.bench import gate as gates
    from granite_paged.bench.session import Session
    from granite_paged.report.published import read_published

    published = read_published(records)
    session = Session(loaded, config, seed=seed)
    against = gates.against_records(records, session, published)
    with progress_bar() as bar:
        task = bar.add_task("start", total=len(gates.GATED))

        def on_shape(what: str) -> None:
            bar.update(task, description=what, advance=1)

        report = gates.gate(session, against, progress=on_shape)
    console = report_console(json_file)
    console.print(_gate_table(report))
    if against.record is None:
        console.print(gates.how_to_record(records, session), soft_wrap=True)
    if json_file:
        write_json(json_file, report.to_json())
    return OK if report.passed else FAILED


def _gate_table(report: GateReport) -> Table:
    table = Table("shape", "law", title=f"{report.model}, {report.device}", box=SIMPLE)
    for name in ("found", "allowed", ""):
        table.add_column(name, justify="right")
    colours = {"passed": "green", "failed": "red", "unmeasurable": "red"}
    for check in report.checks:
        verdict = f"[{colours[check.verdict]}]{check.verdict}[/]"
        table.add_row(check.what, check.law, check.found, check.bound, verdict)
    return table


# -- tune ---------------------------------------------------------------------------------------


@click.command(context_settings=SETTINGS)
@_needs_gpu
@model_options
@click.option(
    "--only",
    "subjects",
    multiple=True,
    type=click.Choice(SUBJECT_NAMES),
    help="[default: all of them]",
)
@click.option("--quick", is_flag=True, help="Fewer candidates and shapes.")
@click.option(
    "--allow",
    default=10.0,
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    help="Most that the rules may lose to the best candidate.",
)
@click.option("--write", is_flag=True, help="Write the best constants into the rules' file.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True),
    help="The file that --write makes.  [default: the one that the rules read]",
    show_default=False,
)
@json_option
def tune(
    loaded: Any,
    config: Any,
    seed: int,
    subjects: Sequence[str],
    quick: bool,
    allow: float,
    write: bool,
    out: str | None,
    json_file: str | None,
) -> int:
    """Do the rules of kernel options choose well on this GPU? Find better constants.

    \b
    decode     attention of a decode step: parts, block, warps, stages
    prefill    attention of a chunk: blocks, warps, stages
    products   of whole decode steps of 1, 16, 32 and 64 rows: blocks, splits, warps, stages

    Times what the rules choose beside other candidates, in shapes of the model, and prints what
    they lose to the best. With --write, the constants whose worst loss is least go into the file
    that the rules read; what was not timed stays as it is. Exit status 1 where the rules, or what
    was written, lose more than is allowed.

    \b
    granite-paged tune --random-weights granite-4.0-h-1b --dtype bfloat16 --quick
    granite-paged tune --random-weights granite-4.0-h-1b --only decode --json decode.json
    granite-paged tune --random-weights granite-4.0-h-1b --write
    """  # noqa: D301
    from granite_paged.bench.search_space import Bench, environment, groups_of
    from granite_paged.bench.tune import retuned
    from granite_paged.layers.tuning import PATH, TUNED

    target = out or str(PATH)
    if write:
        refuse_unwritable(target)
    bench = Bench(loaded.model, config, seed=seed)
    outcomes = _sweep_all(groups_of(bench, subjects, quick=quick))
    where = environment(bench)
    console = report_console(json_file)
    console.print(_tune_table(f"{loaded.name}, {where['device']}", outcomes))
    if json_file:
        write_json(json_file, {**where, "groups": [outcome.to_json() for outcome in outcomes]})
    if write:
        write_json(target, retuned(TUNED, outcomes, where).to_json())
        console.print(f"written: {target}", soft_wrap=True)
    lost = max((o.worst(o.chosen if write else 0) for o in outcomes), default=0.0)
    return OK if 100 * lost <= allow else FAILED


def _sweep_all(groups: Sequence[Group]) -> list[Outcome]:
    """Behind a progress bar."""
    from granite_paged.bench.tune import sweep

    with progress_bar() as bar:
        task = bar.add_task("start", total=sum(group.trials for group in groups))

        def on_trial(shape: str) -> None:
            bar.update(task, description=shape, advance=1)

        return [sweep(group, on_trial) for group in groups]


def _tune_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    skipped = sum(outcome.skipped for outcome in outcomes)
    table = Table("shape", title=title, box=SIMPLE, caption=f"{skipped} candidates did not run")
    for name in ("the rule's choice", "best found"):
        table.add_column(name)
    for name in ("µs", "best µs", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        for shape, (rule, *_) in outcome.trials.items():
            best = outcome.best(shape)
            layouts = map(_layout, (rule, best))
            times = (f"{trial.microseconds:,.2f}" for trial in (rule, best))
            table.add_row(shape, *layouts, *times, f"{outcome.loss(shape):.1%}")
    return table


def _layout(trial: Trial) -> str:
    names = ((name.removeprefix("num_").lower(), n) for name, n in trial.layout.items())
    return ", ".join(f"{name} {n}" for name, n in names)


# -- plot ---------------------------------------------------------------------------------------


@click.command(context_settings=SETTINGS)
@click.argument(
    "results",
    nargs=-1,
    required=True,
    metavar="RESULT.json...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the figures.",
)
@click.option("--format", "form", default="png", type=click.Choice(FORMATS), help="Of the figures.")
@_markdown_option
@click.option(
    "--page",
    metavar="FILE",
    help="Put the first result's tables and two figures between the bench comments of this page.",
)
@_records_option
def plot(
    results: Sequence[Path],
    out: Path | None,
    form: str,
    markdown_file: str | None,
    page: str | None,
    records: Path,
) -> int:
    """Draw results of `bench --json`, and write them as Markdown tables.

    Time and memory against batch and context, decode steps, and the kernel alone, with the floor
    drawn in and the original study's published curves beside ours, each labelled with its GPU.
    Several results share the figures.

    \b
    granite-paged plot golden/perf/nvidia-h200.json --out golden/figures
    granite-paged plot before.json after.json --out figures --format svg
    granite-paged plot decode.json --markdown decode.md
    granite-paged plot golden/perf/nvidia-h200.json --out golden/figures --page docs/benchmarks.md
    """  # noqa: D301
    from granite_paged.report.bench_figures import draw_all
    from granite_paged.report.bench_results import read_result, writable_folder
    from granite_paged.report.bench_tables import markdown, page_part, write_text
    from granite_paged.report.markdown import put_between
    from granite_paged.report.published import read_published

    if out is None and markdown_file is None:
        raise click.UsageError("nothing to write: pass --out DIR, --markdown FILE or both")
    if page is not None and (out is None or form != "png"):
        raise click.UsageError("--page shows figures: pass --out DIR and leave --format at png")
    read = [read_result(path) for path in results]
    if markdown_file is not None:
        write_text(Path(markdown_file), markdown(read))
        click.echo(markdown_file)
    if out is not None:
        for path in draw_all(read, read_published(records), writable_folder(out), form):
            click.echo(path)
    if page is not None and out is not None:
        figures = os.path.relpath(out, Path(page).parent)
        put_between(page, "bench", page_part(read[0], figures))
    return OK


# -- profile ------------------------------------------------------------------------------------


@click.command(context_settings=SETTINGS)
@click.argument("kind", type=click.Choice(("prefill", "decode")), metavar="prefill|decode")
@model_options
@click.option("--mode", default="paged", type=click.Choice(MODE_NAMES), help="What runs.")
@click.option("--batch", default=1, type=click.IntRange(min=1), help="Sequences.")
@click.option("--context", default=512, type=click.IntRange(min=1), help="Tokens a sequence.")
@click.option(
    "--out",
    default="profiles",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the trace.",
)
@click.option("--memory", is_flag=True, help="A snapshot of CUDA memory as well.")
@json_option
def profile(
    kind: Any,
    loaded: Any,
    config: Any,
    seed: int,
    mode: str,
    batch: int,
    context: int,
    out: Path,
    memory: bool,
    json_file: str | None,
) -> int:
    """Show where the time of one step goes: a trace, and kernels by kind of layer.

    The trace opens in https://ui.perfetto.dev, the memory snapshot in
    https://pytorch.org/memory_viz. Kernels that a module launched belong to its kind of layer;
    those of compiled code and CUDA graphs are told by their names.

    \b
    granite-paged profile decode --batch 32 --random-weights granite-4.0-h-1b
    granite-paged profile prefill --mode default --context 4096 --out traces --memory
    """  # noqa: D301
    from granite_paged.bench.cases import Shape
    from granite_paged.bench.session import Session

    session = Session(loaded, config, seed=seed)
    found = session.profile(kind, Shape(batch, context), mode, out, memory=memory)
    console = report_console(json_file)
    console.print(_kind_table(found), _kernel_table(found))
    console.print(f"trace: {found.trace}", soft_wrap=True)
    if found.snapshot:
        console.print(f"memory snapshot: {found.snapshot}", soft_wrap=True)
    if json_file:
        write_json(json_file, found.to_json())
    return OK


def _kind_table(found: Profile) -> Table:
    table = Table("kind of layer", title="one step", box=SIMPLE)
    for name in ("µs", "part"):
        table.add_column(name, justify="right")
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


def _profile_first_shapes(session: Session, plan: Plan, folder: Path) -> None:
    """A trace for the first shape of each case with steps, in each mode; one table of kernels."""
    from granite_paged.bench.session import first_steps
    from granite_paged.report.bench_results import writable_folder
    from granite_paged.report.bench_tables import format_table, write_text

    lines = []
    for case, shape, mode in first_steps(plan):
        found = session.profile(case.kind, shape, mode, folder, name=f"{case.name}-{mode}")
        for kernel in found.kernels[:_MOST_KERNELS]:
            cost = (kernel.kind, kernel.name, str(kernel.calls), f"{kernel.microseconds:.1f}")
            lines.append((f"{case.name}, {mode}", *cost))
    header = ("case", "kind", "kernel", "calls", "µs a step")
    write_text(writable_folder(folder) / "kernels.md", format_table(header, lines))
