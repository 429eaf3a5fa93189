"""The command `bench serve`."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from granite_paged.bench.workload import Workload, arrivals
from granite_paged.cli.options import (
    FAILED,
    NATURAL,
    OK,
    POSITIVE,
    SETTINGS,
    ModelChoice,
    exact_option,
    json_option,
    model_options,
    option,
    options,
    progress,
    reporting,
    table_of,
    write_json,
)
from granite_paged.names import BASELINES, MODES

if TYPE_CHECKING:
    import torch

    from granite_paged.bench.serve_results import ServeResult
    from granite_paged.bench.vllm_serving import EngineRun, Rounds
    from granite_paged.engine.engine import Engine
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
@exact_option
@_workload_options
@option(
    "--rows", "Let at most this many requests run at once in the engine.", POSITIVE, default=256
)
@option(
    "--mode modes",
    "Serve with this mode; may be repeated. `paged` is always served; `static` "
    "compiles before it serves; `vllm` starts vLLM twice.",
    click.Choice((*MODES, "vllm")),
    multiple=True,
    default=("default", "paged"),
)
@option(
    "--python",
    "Run vLLM with this interpreter.  [default: the one that runs this command]",
    metavar="PATH",
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
    python: str | None,
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

    `vllm` adds a comparison with vLLM, once with its Mamba states in float32 and once at its
    defaults, in its own process and with as many rows as the engine. Each engine serves two rounds
    of requests, sent at once, whose tokens are not streamed; the second is this workload.

    \b
    granite-paged bench serve
    granite-paged bench serve --shared-tokens 96 --rate 50 --requests 200
    granite-paged bench serve --random-weights granite-4.0-h-1b --requests 512 --json serve.json
    granite-paged bench serve --model ./granite --mode vllm --python /opt/vllm/bin/python
    """  # noqa: D301
    if python is not None and "vllm" not in modes:
        raise click.UsageError("--python is the interpreter of vLLM: pass --mode vllm too")
    workload = Workload(**params)
    python = python or sys.executable
    if "vllm" in modes:
        _check_vllm(python, workload)
    with tempfile.TemporaryDirectory(prefix="granite-paged-") as folder:
        ours = _serve_ours(
            choice,
            workload,
            rows=rows,
            modes=[mode for mode in BASELINES if mode in modes],
            batch=batch,
            limit=batched_requests,
            checkpoint=folder if "vllm" in modes else None,
        )
        result = ours.result
        if ours.vllm is not None:
            result = _serve_vllm(ours, python, json_file)
    with reporting(json_file, result.to_json()) as console:
        _print(result, console)
    return FAILED if any(row.error for row in result.rows) else OK


@dataclass(frozen=True)
class _Ours:
    """What our engine and transformers' modes did, and what vLLM needs to do the same."""

    result: ServeResult
    run: EngineRun | None
    rounds: Rounds
    device: torch.device
    vllm: dict[str, Any] | None  # arguments of vllm.LLM; None without vLLM


def _serve_ours(
    choice: ModelChoice,
    workload: Workload,
    *,
    rows: int,
    modes: Sequence[str],
    batch: int,
    limit: int | None,
    checkpoint: str | None,
) -> _Ours:
    """Serve with the engine and transformers' modes; when this returns, their memory is free.

    With `checkpoint`, an empty folder, random weights are saved there, and the engine serves two
    rounds first, as vLLM will.
    """
    import torch

    from granite_paged.bench import serving
    from granite_paged.engine.engine import Engine

    loaded = choice.load()
    model = loaded.model
    other, coming = (
        arrivals(workload, model.config.vocab_size, seed) for seed in (choice.seed + 1, choice.seed)
    )
    config = sized(choice.config, model, rows=min(rows, len(coming)), tokens=workload.longest)
    arguments = _vllm_arguments(choice, model, config, checkpoint) if checkpoint else None
    run = None
    begin = time.perf_counter()
    with (
        progress("capture") as report_progress,
        Engine(model, config, queue=len(coming), progress=report_progress) as engine,
    ):
        serving.warm_up(engine)
        if checkpoint:
            run = _two_rounds(engine, (other, coming), config, time.perf_counter() - begin)
        traces = serving.serve(engine, coming, report_progress)
        result = serving.compare(
            engine,
            loaded,
            traces,
            workload,
            seed=choice.seed,
            modes=modes,
            batch=batch,
            limit=limit,
            progress=report_progress,
        )
    return _Ours(result, run, (other, coming), torch.device(model.device), arguments)


def _vllm_arguments(
    choice: ModelChoice, model: Any, config: PagedConfig, folder: str
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`; random weights are saved in the folder for it."""
    from granite_paged.bench.vllm_serving import vllm_arguments
    from granite_paged.checkpoints import TINY_RECALL

    weights = choice.model or str(TINY_RECALL)
    if choice.random_weights:
        weights = folder
        model.save_pretrained(folder)
    assert config.max_sequences is not None  # `sized` sets it
    return vllm_arguments(model, weights, rows=config.max_sequences, seed=choice.seed)


def _two_rounds(
    engine: Engine, rounds: Rounds, config: PagedConfig, start_seconds: float
) -> EngineRun:
    """Serve the rounds that vLLM will serve, and forget their prefixes."""
    from granite_paged.bench.vllm_serving import EngineRun, serve_offline
    from granite_paged.device import used_bytes
    from granite_paged.environment import versions

    first, second = rounds
    served = serve_offline(engine, first), serve_offline(engine, second)
    used = used_bytes(engine.runner.device)
    engine.forget_prefixes()
    settings = {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return EngineRun(served, start_seconds, versions(), settings, used)


def _check_vllm(python: str, workload: Workload) -> None:
    """Refuse, before the work, what cannot be served with vLLM."""
    from granite_paged.bench.vllm_serving import check_vllm

    if workload.rate:
        raise click.UsageError("vLLM gets all requests at once: leave --rate at 0 for --mode vllm")
    check_vllm(python)


def _serve_vllm(ours: _Ours, python: str, json_file: str | None) -> ServeResult:
    """Serve with vLLM in each of its settings; the file is written after each engine."""
    from granite_paged.bench.serve_results import EngineRow
    from granite_paged.bench.vllm_serving import OURS, SETTINGS, row_of, run_vllm
    from granite_paged.device import release_memory
    from granite_paged.errors import Unsupported

    assert ours.run is not None
    assert ours.vllm is not None
    release_memory(ours.device)
    result = dataclasses.replace(ours.result, rows=[row_of(OURS, ours.run, ours.run)])
    for engine, settings in SETTINGS.items():
        if json_file != "-":
            write_json(json_file, result.to_json())  # a crash or an interruption keeps the rows
        try:
            run = run_vllm(python, {**ours.vllm, **settings}, ours.rounds, ours.device)
            row = row_of(engine, run, ours.run)
        except Unsupported as error:
            row = EngineRow(engine, len(ours.rounds[-1]), error=str(error))
        result = dataclasses.replace(result, rows=[*result.rows, row])
    return result


def sized(config: PagedConfig, model: Any, *, rows: int, tokens: int) -> PagedConfig:
    """Return the config with rows and pages for the work, where the user left them open.

    `rows` sequences run at once, the longest with `tokens` tokens, or as many as the model takes.
    """
    page, tokens = config.page_size, min(tokens, model.config.max_position_embeddings)
    tokens = config.max_tokens or rows * -(-tokens // page) * page
    rows = config.max_sequences or rows
    return dataclasses.replace(config, max_sequences=rows, max_tokens=tokens)


def _print(result: ServeResult, console: Console) -> None:
    from granite_paged.bench.serve_results import COLUMNS, cells, conditions
    from granite_paged.environment import mamba_note

    console.print(_table(result))
    if (note := mamba_note()) and result.baselines:
        console.print(note, soft_wrap=True)
    if not result.rows:
        return
    caption = "the second of two rounds; start is the time until the engine was ready"
    title = f"serving beside vLLM, {result.model}"
    table = table_of([""], COLUMNS, title=title, caption=caption)
    for row in (row for row in result.rows if not row.error):
        table.add_row(row.engine, *cells(row))
    console.print(table)
    for row in result.rows:
        if row.error:
            click.echo(conditions(row), err=True)
        else:
            console.print(conditions(row), soft_wrap=True, markup=False, highlight=False)


def _table(report: ServeResult) -> Table:
    numbers = ("tokens/s", "first token p50", "p99", "between tokens p50", "p99")
    table = table_of([""], numbers, title=f"serving, {report.model}", caption=_caption(report))
    batched = {name: baseline.served for name, baseline in report.baselines.items()}
    for name, served in {"paged": report.engine, **batched}.items():
        times = (*served.first_token_ms, *served.between_tokens_ms)
        table.add_row(name, f"{served.tokens_per_second:,.0f}", *(f"{ms:,.1f} ms" for ms in times))
    return table


def _caption(report: ServeResult) -> str:
    parts = [
        f"scheduler {report.schedule_ms:.3f} ms per step",
        f"{report.prefix_hit_rate:.0%} of prompt tokens from the prefix cache",
        f"{report.preempted} preempted",
    ]
    for name, baseline in report.baselines.items():
        same = f"same tokens in {baseline.tokens_equal:.0%} of {baseline.served.requests} requests"
        parts.append(f"{baseline.speedup:.1f} x the tokens/s of {name}, {same}")
    return "; ".join(parts)
