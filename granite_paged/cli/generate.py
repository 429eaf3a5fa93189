"""Commands that run on the engine: `granite-paged generate | bench serve`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.bench.workload import Workload, arrivals
from granite_paged.cli.options import (
    OK,
    SETTINGS,
    json_option,
    model_options,
    progress_bar,
    report_console,
    write_json,
)
from granite_paged.errors import TokenizerError
from granite_paged.geometry import pages_for

# -- generate -----------------------------------------------------------------------------------


@click.command(context_settings=SETTINGS)
@click.argument("text")
@model_options
@click.option("--tokenizer", metavar="ID_OR_PATH", help="Tokenizer, where the model brings none.")
@click.option(
    "--max-new-tokens", default=64, type=click.IntRange(min=1), help="Most tokens of the answer."
)
@click.option(
    "--temperature",
    default=0.0,
    type=click.FloatRange(min=0),
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-p",
    default=1.0,
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the likeliest tokens that hold this much probability.",
)
def generate(
    text: str,
    loaded: Any,
    config: Any,
    seed: int,
    tokenizer: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> int:
    """Continue TEXT, printing the answer as it comes; the KV cache is paged.

    \b
    granite-paged generate --model ibm-granite/granite-4.0-h-1b "Paged attention is"
    granite-paged generate "<bos> <plain> red-fox copper-bell and red-fox <ask>" --max-new-tokens 1
    """  # noqa: D301
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.request import SamplingParams, check_tokens
    from granite_paged.models import load_tokenizer

    tokens = load_tokenizer(tokenizer) if tokenizer else loaded.tokenizer
    if tokens is None:
        raise TokenizerError(f"{loaded.name} has no tokenizer: pass --tokenizer ID_OR_PATH")
    prompt = check_tokens(tokens(text)["input_ids"], loaded.model.config.vocab_size, "prompt")
    sizes = _sized(config, rows=1, tokens=len(prompt) + max_new_tokens)
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with Engine(loaded.model, sizes, tokenizer=tokens) as engine:
        for piece in engine.stream(prompt, params):
            click.echo(piece.text, nl=False)
    click.echo()
    return OK


# -- bench serve --------------------------------------------------------------------------------


@click.command("bench serve", context_settings=SETTINGS)
@model_options
@click.option("--requests", default=64, type=click.IntRange(min=1), help="Requests that arrive.")
@click.option(
    "--rate",
    default=0.0,
    type=click.FloatRange(min=0),
    help="Arrivals a second, at random as by Poisson; 0 for all at once.",
)
@click.option(
    "--prompt-tokens", default=(8, 64), type=(int, int), help="Fewest and most tokens of a prompt."
)
@click.option(
    "--new-tokens", default=(8, 32), type=(int, int), help="Fewest and most tokens of an answer."
)
@click.option(
    "--shared-tokens",
    default=0,
    type=click.IntRange(min=0),
    help="Tokens of a beginning that a quarter of the prompts share.",
)
@click.option(
    "--long-every", default=0, type=click.IntRange(min=0), help="Each so many requests, a long one."
)
@click.option(
    "--long-tokens", default=0, type=click.IntRange(min=0), help="Tokens of a long prompt."
)
@click.option("--rows", default=256, type=click.IntRange(min=1), help="Most requests that run.")
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(["default", "static", "paged"]),
    default=("default", "paged"),
    help="`paged` is always served; `static` compiles for minutes first.",
)
@click.option(
    "--batch", default=32, type=click.IntRange(min=1), help="Requests of a batch, but for paged."
)
@click.option(
    "--batched-requests",
    type=click.IntRange(min=1),
    metavar="INTEGER",
    help="So many requests, the first ones, are enough for the batches.  [default: all]",
    show_default=False,
)
@json_option
def bench_serve(
    loaded: Any,
    config: Any,
    seed: int,
    rows: int,
    batch: int,
    modes: tuple[str, ...],
    batched_requests: int | None,
    json_file: str | None,
    **params: Any,
) -> int:
    """Serve requests as they arrive, and say how fast: by the engine, and in batches.

    Reports output tokens a second, the time to the first token and between tokens, the scheduler's
    own time and how much of the prompts was shared. `default` and `static` are transformers'
    generate() over left-padded batches of the same requests, with SDPA and a DynamicCache, or a
    StaticCache and compiled steps.

    \b
    granite-paged bench serve
    granite-paged bench serve --shared-tokens 96 --rate 50 --requests 200
    granite-paged bench serve --random-weights granite-4.0-h-1b --requests 512 --json serve.json
    """  # noqa: D301
    from granite_paged.bench.serving import MODES, compare
    from granite_paged.engine.engine import Engine

    workload = Workload(**params)
    coming = arrivals(workload, loaded.model.config.vocab_size, seed)
    sizes = _sized(config, rows=min(rows, len(coming)), tokens=workload.longest)
    with progress_bar() as bar, Engine(loaded.model, sizes, queue=len(coming)) as engine:
        task = bar.add_task("capture")

        def tell(what: str, done: int, total: int = len(coming)) -> None:
            bar.update(task, description=what, completed=done, total=total)

        engine.runner.warm_up(tell)
        report = compare(
            engine,
            loaded.model,
            coming,
            modes=[mode for mode in MODES if mode in modes],
            batch=batch,
            at_most=batched_requests,
            progress=tell,
        )
    report_console(json_file).print(_serving_table(report, loaded.name))
    if json_file:
        write_json(json_file, {"workload": dataclasses.asdict(workload), **report.to_json()})
    return OK


def _sized(config: Any, *, rows: int, tokens: int) -> Any:
    """The user's config, with rows and pools no larger than the work where they are left open."""
    needed = rows * pages_for(tokens, config.page_size) * config.page_size
    return dataclasses.replace(
        config,
        max_sequences=config.max_sequences or rows,
        max_tokens=config.max_tokens or needed,
    )


def _serving_table(report: Any, model: str) -> Table:
    table = Table(title=f"serving, {model}", box=SIMPLE, caption=_caption(report))
    table.add_column("")
    for column in ("tokens/s", "first token p50", "p99", "between tokens p50", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    batched = {name: baseline.served for name, baseline in report.baselines.items()}
    for name, served in {"paged": report.engine, **batched}.items():
        times = (*served.first_token_ms, *served.between_tokens_ms)
        table.add_row(name, f"{served.tokens_per_second:,.0f}", *(f"{ms:,.1f} ms" for ms in times))
    return table


def _caption(report: Any) -> str:
    parts = [
        f"scheduler {report.schedule_ms:.3f} ms a step",
        f"{report.prefix_hit_rate:.0%} of prompt tokens shared",
        f"{report.preempted} preempted",
    ]
    for name, baseline in report.baselines.items():
        same = f"same tokens {baseline.tokens_equal:.0%} of {baseline.served.requests}"
        parts.append(f"{baseline.speedup:.1f} x {name}, {same}")
    return "; ".join(parts)
