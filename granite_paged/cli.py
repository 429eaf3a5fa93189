"""The command line: `granite-paged verify | generate`.

Exit status: 0 all is well, 1 a check failed, 2 wrong usage or environment (said in one line),
130 interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from granite_paged import __version__
from granite_paged.errors import GranitePagedError, InvalidRequest, PromptError

PROGRAM = "granite-paged"

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_SMALL_PAGE = 16  # for the embedded model, whose contexts are short: so that they fill many pages

_TABLE_WIDTH = 100  # where the output goes to a file, so that numbers are not cut

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


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


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Paged attention for IBM Granite-4 hybrid models, proven equal to SDPA.

    Start with `granite-paged verify`: it needs no download and says whether paging gives the
    same answers here as transformers' own attention does.
    """


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command with a model, which gets a `LoadedModel` and a `PagedConfig`."""

    @click.option(
        "--model",
        metavar="ID_OR_PATH",
        help="Checkpoint folder or hub id.  [default: the embedded tiny-recall]",
        show_default=False,
    )
    @click.option(
        "--random-weights",
        metavar="NAME",
        help="A published geometry with random weights, e.g. granite-4.0-h-1b.",
    )
    @click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
    @click.option(
        "--dtype",
        default="auto",
        metavar="DTYPE",
        help="auto, float32, bfloat16, float16 or float64.",
    )
    @click.option(
        "--seed",
        default=0,
        type=click.IntRange(min=0),
        help="Of random weights, prompts and sampling.",
    )
    @click.option(
        "--page-size",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Tokens a page, a power of two.  [default: 16 for the embedded model, else 128]",
        show_default=False,
    )
    @click.option(
        "--memory-fraction",
        default=0.5,
        type=click.FloatRange(0, 1, min_open=True),
        help="Most of the free memory that K and V may take.",
    )
    @click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Fixed size of the pool, instead of growing with need.",
    )
    @click.option(
        "--backend",
        default="auto",
        type=click.Choice(["auto", "eager", "compiled"]),
        help="How FlexAttention runs.",
    )
    @functools.wraps(command)
    def with_model(
        model: str | None,
        random_weights: str | None,
        device: str,
        dtype: str,
        seed: int,
        page_size: int | None,
        **rest: Any,
    ) -> Any:
        from granite_paged import models
        from granite_paged.geometry import PagedConfig

        options = {name: rest.pop(name) for name in ("memory_fraction", "max_tokens", "backend")}
        if page_size is None and model is None and random_weights is None:
            page_size = _SMALL_PAGE
        if page_size is not None:
            options["page_size"] = page_size
        config = PagedConfig(**options)  # before the model: wrong sizes should not cost a load
        _quiet()
        loaded = models.load(
            model, random_weights=random_weights, device=device, dtype=dtype, seed=seed
        )
        return command(loaded=loaded, config=config, seed=seed, **rest)

    return with_model


def _in_a_folder(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Refuse now what could not be written when the work is done."""
    folder = Path(path or ".").parent
    if path != "-" and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise click.BadParameter(f"cannot write {path}: its folder is missing or write-protected")
    return path


# -- verify -------------------------------------------------------------------------------------


@cli.command(context_settings=_SETTINGS)
@_model_options
@click.option(
    "--context", default=384, type=click.IntRange(min=16), help="Tokens of the longest prompt."
)
@click.option(
    "--reference/--no-reference",
    default=True,
    help="Judge errors against a float64 copy (8 bytes a parameter).",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    callback=_in_a_folder,
    help="Write the report as one JSON object; - for standard output.",
)
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

    with _progress() as bar:
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
    console = Console(stderr=json_file == "-")
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(*_report_tables(report), sep="")
    if json_file:
        _write_json(json_file, report.to_json())
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


# -- generate -----------------------------------------------------------------------------------


@cli.command(context_settings=_SETTINGS)
@click.argument("text")
@_model_options
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
    import torch
    from transformers import TextStreamer, set_seed

    from granite_paged.integrate import paged
    from granite_paged.models import load_tokenizer

    tokens = load_tokenizer(tokenizer) if tokenizer else loaded.tokenizer
    if tokens is None:
        raise InvalidRequest(f"{loaded.name} has no tokenizer: pass --tokenizer ID_OR_PATH")
    inputs = tokens(text, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise PromptError("empty prompt: TEXT has no tokens")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    set_seed(seed)
    with paged(loaded.model, config), torch.inference_mode():
        loaded.model.generate(
            **inputs.to(loaded.model.device),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokens, skip_prompt=True, skip_special_tokens=True),
            **(sampling if temperature else {"do_sample": False}),
        )
    return OK


# -- shared -------------------------------------------------------------------------------------


def _quiet() -> None:
    """Leave standard error to our own progress and errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _progress() -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _write_json(path: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if path == "-":
        click.echo(text, nl=False)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
