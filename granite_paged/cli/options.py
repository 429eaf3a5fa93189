"""What the commands share: options, progress, tables and JSON, and the exit statuses.

Imports neither torch nor transformers: `--help` is quick.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from granite_paged.errors import writing

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}

_SMALL_PAGE = 16  # for the embedded model, whose contexts are short: so that they fill many pages

_TABLE_WIDTH = 100  # where the output goes to a file, so that numbers are not cut


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json FILE`, given to the command as `json_file`."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, writable=True, allow_dash=True),
        callback=in_a_folder,
        help="Write the report as one JSON object; - for standard output.",
    )(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
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
        help="Tokens a page, a power of two; at least 16 on a GPU.  "
        "[default: 16 for the embedded model, else 128]",
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
        quiet()
        loaded = models.load(
            model, random_weights=random_weights, device=device, dtype=dtype, seed=seed
        )
        return command(loaded=loaded, config=config, seed=seed, **rest)

    return with_model


def in_a_folder(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Refuse now what could not be written when the work is done."""
    if path is not None and path != "-":
        refuse_unwritable(path)
    return path


def refuse_unwritable(path: str) -> None:
    """Raise click.BadParameter where no file can be written."""
    folder = Path(path).parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise click.BadParameter(f"cannot write {path}: its folder is missing or write-protected")


def quiet() -> None:
    """Leave standard error to our own progress and errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress_bar(*, time_left: bool = False) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    left = (TextColumn("left"), TimeRemainingColumn()) if time_left else ()
    return Progress(
        *columns,
        TimeElapsedColumn(),
        *left,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def write_json(path: str, report: dict[str, Any]) -> None:
    """Write one JSON object to a file, or to standard output for `-`. Raises CannotWrite."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if path == "-":
        click.echo(text, nl=False)
        return
    with writing(path):
        Path(path).write_text(text)


def report_console(json_file: str | None) -> Console:
    """Where tables go: standard error when standard output carries the JSON."""
    console = Console(stderr=json_file == "-")
    console.width = max(console.width, _TABLE_WIDTH)
    return console
