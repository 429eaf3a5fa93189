"""The command `bench serve`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.bench.workload import Workload, arrivals
from granite_paged.cli.options import (
    OK,
    SETTINGS,
    ModelChoice,
    json_option,
    model_options,
    options,
    progress,
    report_console,
    write_json,
)
from granite_paged.names import BASELINES, MODES

if TYPE_CHECKING:
    from granite_paged.bench.serving import ServingReport
    from granite_paged.geometry import PagedConfig

_workload_options = options(
    click.option(
        "--requests", default=64, type=click.IntRange(min=1), help="Send this many requests."
    ),
    click.option(
        "--rate",
        default=0.0,
        type=click.FloatRange(min=0),
        help="Mean arrivals per second, as a Poisson process; 0 sends all at once.",
    ),
    click.option(
        "--prompt-tokens",
        default=(8, 64),
        type=(int, int),
        metavar="MIN MAX",
        help="Draw the length of each prompt from this range.",
    ),
    click.option(
        "--new-tokens",
        default=(8, 32),
        type=(int, int),
        metavar="MIN MAX",
        help="Draw the length of each answer from this range.",
    ),
    click.option(
        "--shared-tokens",
        default=0,
        type=click.IntRange(min=0),
        help="Start each prompt with one of four shared prefixes of this many tokens.",
    ),
    click.option(
        "--long-every",
        default=0,
        type=click.IntRange(min=0),
        metavar="N",
        help="Make every Nth request a long prompt; 0 makes none.",
    ),
    click.option(
        "--long-tokens",
        default=0,
        type=click.IntRange(min=0),
        help="Give each long prompt this many tokens.",
    ),
)


@click.command(context_settings=SETTINGS)
@model_options
@_workload_options
@click.option(
    "--rows",
    default=256,
    type=click.IntRange(min=1),
    help="Let at most this many requests run at once in the engine.",
)
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(MODES),
    default=("default", "paged"),
    help="Serve with this mode; may be repeated. `paged` is always served; `static` first "
    "compiles for minutes.",
)
@click.option(
    "--batch",
    default=32,
    type=click.IntRange(min=1),
    help="Batch size of transformers' modes.",
)
@click.option(
    "--batched-requests",
    type=click.IntRange(min=1),
    metavar="N",
    help="Serve only the first N requests in transformers' modes.  [default: all]",
    show_default=False,
)
@json_option
def serve(
    choice: ModelChoice,
    rows: int,
    batch: int,
    modes: tuple[str, ...],
    batched_requests: int | None,
    json_file: str | None,
    **params: Any,
) -> int:
    """Measure how fast arriving requests are served.

    The engine serves each request as it arrives. `default` and `static` serve the same requests
    in left-padded batches with transformers' generate(): `default` with SDPA and a DynamicCache,
    `static` with a StaticCache and compiled decode steps. Reports output tokens per second, time
    to the first token, time between tokens, time spent in the scheduler, and the share of prompt
    tokens found in the prefix cache.

    \b
    granite-paged bench serve
    granite-paged bench serve --shared-tokens 96 --rate 50 --requests 200
    granite-paged bench serve --random-weights granite-4.0-h-1b --requests 512 --json serve.json
    """  # noqa: D301
    from granite_paged.bench.serving import compare
    from granite_paged.engine.engine import Engine
    from granite_paged.environment import mamba_note

    workload = Workload(**params)
    loaded = choice.load()
    coming = arrivals(workload, loaded.model.config.vocab_size, choice.seed)
    config = sized(
        choice.config, loaded.model, rows=min(rows, len(coming)), tokens=workload.longest
    )
    with (
        progress("capture") as report_progress,
        Engine(loaded.model, config, queue=len(coming)) as engine,
    ):
        engine.runner.warm_up(report_progress)
        report = compare(
            engine,
            loaded.model,
            coming,
            modes=[mode for mode in BASELINES if mode in modes],
            batch=batch,
            limit=batched_requests,
            progress=report_progress,
        )
    console = report_console(json_file)
    console.print(_table(report, loaded.name))
    if (note := mamba_note()) and report.baselines:
        console.print(note, soft_wrap=True)
    if json_file:
        write_json(json_file, {"workload": dataclasses.asdict(workload), **report.to_json()})
    return OK


def sized(config: PagedConfig, model: Any, *, rows: int, tokens: int) -> PagedConfig:
    """Return the config with rows and pages for the work, where the user left them open.

    Args:
        config: from the model options.
        model: limits the length of a sequence.
        rows: sequences that run at once.
        tokens: length of the longest sequence.
    """
    page, tokens = config.page_size, min(tokens, model.config.max_position_embeddings)
    needed = rows * -(-tokens // page) * page
    return dataclasses.replace(
        config,
        max_sequences=config.max_sequences or rows,
        max_tokens=config.max_tokens or needed,
    )


def _table(report: ServingReport, model: str) -> Table:
    table = Table(title=f"serving, {model}", box=SIMPLE, caption=_caption(report))
    table.add_column("")
    for column in ("tokens/s", "first token p50", "p99", "between tokens p50", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    batched = {name: baseline.served for name, baseline in report.baselines.items()}
    for name, served in {"paged": report.engine, **batched}.items():
        times = (*served.first_token_ms, *served.between_tokens_ms)
        table.add_row(name, f"{served.tokens_per_second:,.0f}", *(f"{ms:,.1f} ms" for ms in times))
    return table


def _caption(report: ServingReport) -> str:
    parts = [
        f"scheduler {report.schedule_ms:.3f} ms per step",
        f"{report.prefix_hit_rate:.0%} of prompt tokens from the prefix cache",
        f"{report.preempted} preempted",
    ]
    for name, baseline in report.baselines.items():
        same = f"same tokens in {baseline.tokens_equal:.0%} of {baseline.served.requests} requests"
        parts.append(f"{baseline.speedup:.1f} x the tokens/s of {name}, {same}")
    return "; ".join(parts)
