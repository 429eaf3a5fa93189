"""The command `batch`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click
import rich.progress as bars
from rich.console import Console

from granite_paged.cli.options import (
    FAILED,
    OK,
    POSITIVE,
    SETTINGS,
    ModelChoice,
    exact_option,
    keeping,
    log_timer,
    model_options,
    option,
)
from granite_paged.cli.ray import RayChoice, ray_options
from granite_paged.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from granite_paged.batch.answering import Answering
    from granite_paged.batch.output import BatchOutput, Tally
    from granite_paged.batch.run import Report
    from granite_paged.models import LoadedModel


@click.command(context_settings=SETTINGS)
@click.argument("input_file", metavar="INPUT.jsonl")
@click.argument("output_file", metavar="OUTPUT.jsonl")
@model_options
@exact_option
@option("--tokenizer", "Use this tokenizer, for a model that has none.", metavar="ID_OR_PATH")
@option(
    "--max-new-tokens",
    "End answers of lines without max_tokens after this many tokens.  [default: the model's "
    "generation config, else 64]",
    POSITIVE,
    metavar="N",
)
@option("--alias", "Answer lines that call the model this, too. May be repeated.", multiple=True)
@option(
    "--rows",
    "Let at most this many sequences run at once.  [default: 256; 32 on a CPU]",
    POSITIVE,
    metavar="N",
)
@ray_options
def batch(
    input_file: str,
    output_file: str,
    choice: ModelChoice,
    tokenizer: str | None,
    max_new_tokens: int | None,
    alias: tuple[str, ...],
    rows: int | None,
    cluster: RayChoice | None,
) -> int:
    """Answer every line of a file of requests.

    INPUT has one JSON object per line: a request of OpenAI's batch format ("custom_id", and "body"
    with "prompt" or "messages"), or just {"prompt": "text"}. Fields such as "max_tokens",
    "temperature", "top_p", "top_k", "n", "stop", "seed" and "logprobs" win over the model's
    generation config, for their line.
    OUTPUT gets one line per request, in the same order and in OpenAI's format. A request that
    cannot be answered gets a line with "error". - is standard input or output.

    The same command resumes after an interrupt or a kill: lines that OUTPUT has are kept. An
    OUTPUT of another input, model or setting is refused.

    Exits with 0 if every line has an answer, 1 if some have an error, 2 for wrong usage or a full
    disk, 130 if interrupted, and 143 if terminated. Finished lines are kept in each case.

    With --ray, workers of a Ray cluster answer the lines, each with an engine of its own. The
    output is the same.

    \b
    granite-paged batch requests.jsonl answers.jsonl --model ibm-granite/granite-4.0-h-1b
    granite-paged batch prompts.jsonl - --max-new-tokens 8 | head
    granite-paged batch requests.jsonl answers.jsonl --model DIR --ray --workers 2
    """  # noqa: D301
    from granite_paged.batch.lines import read_lines
    from granite_paged.batch.output import BatchOutput

    if cluster is not None and input_file == "-":
        raise InvalidArgument("--ray reads the input more than once: name a file, got -")
    with ExitStack() as stack:
        source = stack.enter_context(_opened(input_file))
        _check_different(input_file, output_file)
        output = stack.enter_context(closing(BatchOutput(output_file)))
        lines = read_lines(source)
        stack.enter_context(keeping(lambda: output.kept))
        output.match(lines)
        report = stack.enter_context(progress(_size(input_file), output.tally))
        if cluster is None:
            from granite_paged.batch.run import answer_lines

            loaded = _load(choice, tokenizer)
            with _answering(loaded, choice, rows, max_new_tokens, alias) as answering:
                output.check_run(answering.run)
                answer_lines(lines, answering, output, report)
        else:
            with cluster.connected(choice, tokenizer) as (ray, spec, workers):
                from granite_paged.ray.batch import answer_file
                from granite_paged.ray.workers import WorkerOptions

                options = WorkerOptions(rows, max_new_tokens, alias)
                answer_file(ray, input_file, spec, options, workers, output, report)
    return _summary(output)


def _opened(path: str) -> BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None


def _check_different(source: str, output: str) -> None:
    if "-" not in (source, output) and Path(output).exists() and Path(source).samefile(output):
        raise DataError(output, "is the input as well; name another output")


def _size(path: str) -> int | None:
    """Return the bytes of a file; None for standard input, a pipe or a device."""
    return Path(path).stat().st_size if path != "-" and Path(path).is_file() else None


def _load(choice: ModelChoice, tokenizer: str | None) -> LoadedModel:
    from granite_paged.models import load_tokenizer

    loaded = choice.load()
    if tokenizer is None:
        return loaded
    return dataclasses.replace(loaded, tokenizer=load_tokenizer(tokenizer))


@contextmanager
def _answering(
    loaded: LoadedModel,
    choice: ModelChoice,
    rows: int | None,
    max_new_tokens: int | None,
    aliases: tuple[str, ...],
) -> Iterator[Answering]:
    from granite_paged.batch.answering import Answering, batch_engine
    from granite_paged.batch.request import Defaults

    defaults = Defaults(loaded.model.generation_config, max_new_tokens, choice.seed)
    with batch_engine(loaded, choice.config, rows) as engine:
        yield Answering(engine, loaded, defaults, aliases)


def _summary(output: BatchOutput) -> int:
    tally = output.tally
    failed = f", {tally.failed:,} with an error; the first: {tally.first_error}"
    click.echo(f"{tally.lines:,} lines{failed if tally.failed else ''}", err=True)
    return FAILED if tally.failed else OK


# -- progress -----------------------------------------------------------------------------------


@contextmanager
def progress(size: int | None, held: Tally) -> Iterator[Report]:
    """Yield a callback that shows lines, tokens per second and the time left.

    It draws a bar on a terminal; elsewhere it prints a line every half minute. The time left
    follows from the bytes of the input that are answered.
    """
    speed = _Speed(size, held)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield speed.log
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[left]}"),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("start", total=size, completed=held.end, left="")

        def report(tally: Tally) -> None:
            left = speed.left(tally)
            bar.update(task, description=speed.text(tally), completed=tally.end, left=left)

        yield report


class _Speed:
    """Tokens per second and time left of this run, without what an earlier one did."""

    def __init__(self, size: int | None, held: Tally) -> None:
        self._size = size
        self._tokens, self._end = held.tokens, held.end
        self._started = time.monotonic()
        self._is_due = log_timer()

    def text(self, tally: Tally) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (tally.tokens - self._tokens) / seconds
        failed = f", {tally.failed:,} with an error" if tally.failed else ""
        return f"{tally.lines:,} lines{failed}, {rate:,.0f} tokens/s"

    def left(self, tally: Tally) -> str:
        done = tally.end - self._end
        if self._size is None or done <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._size - tally.end)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"

    def log(self, tally: Tally) -> None:
        if self._is_due():
            parts = (self.text(tally), self.left(tally))
            click.echo(", ".join(part for part in parts if part), err=True)
