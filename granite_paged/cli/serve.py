"""The command `bench serve`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from granite_paged.bench.workload import Workload, arrivals
from granite_paged.cli.options import (
    NATURAL,
    OK,
    POSITIVE,
    SETTINGS,
    ModelChoice,
    json_option,
    model_options,
    option,
    options,
    progress,
    report_console,
    table_of,
    write_json,
)
from granite_paged.names import BASELINES, MODES

if TYPE_CHECKING:
    from granite_paged.bench.serving import ServingReport
    from granite_paged.geometry import PagedConfig

_workload_options = options(
    option("--requests", "Send this many requests.", POSITIVE, default=64),
    option(
        "--rate",
        "Mean arrivals per second, as a Poisson process; 0 sends all at once.",
        click.FloatRange(min=0),
        default=0.0,
    ),
    option(
        "--prompt-tokens",
        "Draw the length of each prompt from this range.",
        (int, int),
        default=(8, 64),
        metavar="MIN MAX",
    ),
    option(
        "--new-tokens",
        "Draw the length of each answer from this range.",
        (int, int),
        default=(8, 32),
        metavar="MIN MAX",
    ),
    option(
        "--shared-tokens",
        "Start each prompt with one of four shared prefixes of this many tokens.",
        NATURAL,
        default=0,
    ),
    option(
        "--long-every",
        "Make every Nth request a long prompt; 0 makes none.",
        NATURAL,
        default=0,
        metavar="N",
    ),
    option("--long-tokens", "Give each long prompt this many tokens.", NATURAL, default=0),
)


@click.command(context_settings=SETTINGS)
@model_options
@_workload_options
@option(
    "--rows", "Let at most this many requests run at once in the engine.", POSITIVE, default=256
)
@option(
    "--mode modes",
    "Serve with this mode; may be repeated. `paged` is always served; `static` first "
    "compiles for minutes.",
    click.Choice(MODES),
    multiple=True,
    default=("default", "paged"),
)
@option("--batch", "Batch size of transformers' modes.", POSITIVE, default=32)
@option(
    "--batched-requests",
    "Serve only the first N requests in transformers' modes.  [default: all]",
    POSITIVE,
    metavar="N",
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
        Engine(loaded.model, config, queue=len(coming), progress=report_progress) as engine,
    ):
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
    write_json(json_file, {"workload": dataclasses.asdict(workload), **report.to_json()})
    return OK


def sized(config: PagedConfig, model: Any, *, rows: int, tokens: int) -> PagedConfig:
    """Return the config with rows and pages for the work, where the user left them open.

    `rows` sequences run at once, the longest with `tokens` tokens, or as many as the model takes.
    """
    page, tokens = config.page_size, min(tokens, model.config.max_position_embeddings)
    tokens = config.max_tokens or rows * -(-tokens // page) * page
    rows = config.max_sequences or rows
    return dataclasses.replace(config, max_sequences=rows, max_tokens=tokens)


def _table(report: ServingReport, model: str) -> Table:
    numbers = ("tokens/s", "first token p50", "p99", "between tokens p50", "p99")
    table = table_of([""], numbers, title=f"serving, {model}", caption=_caption(report))
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
