"""What the commands share: options, progress bars, JSON output and exit statuses.

Imports neither torch nor transformers, so that `--help` is quick.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich.progress as bars
from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from granite_paged import files
from granite_paged.progress import Progress

if TYPE_CHECKING:
    from granite_paged.geometry import PagedConfig
    from granite_paged.models import LoadedModel

OK, FAILED, USAGE, INTERRUPTED, CLOSED_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143

NOTHING_KEPT = "nothing new was kept; run the same command again"

SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}

_SMALL_PAGE = 16  # for the embedded model: its contexts are short, and should fill several pages

LOG_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""

_TABLE_WIDTH = 100  # minimum width of tables in files, so that numbers are not cut
_BOUNDLESS = 10**4  # columns, more than any table has

POSITIVE, NATURAL = click.IntRange(min=1), click.IntRange(min=0)

Command = Callable[..., Any]
Option = Callable[[Command], Command]


def option(names: str, text: str, kind: Any = None, **settings: Any) -> Option:
    """Return a click option. `names` is the flag, then the parameter's name if that differs."""
    return click.option(*names.split(), help=text, type=kind, **settings)


def options(*decorators: Option) -> Option:
    """Return one decorator that adds these options; `--help` lists them in this order."""

    def add_all(command: Command) -> Command:
        return functools.reduce(lambda made, add: add(made), reversed(decorators), command)

    return add_all


class CommandGroup(click.Group):
    """A group whose help shows the whole first sentence of each command, on several lines."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        shown = {name: command for name, command in self.commands.items() if not command.hidden}
        rows = [(name, shown[name].get_short_help_str(_BOUNDLESS)) for name in sorted(shown)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


# -- options that several commands have ---------------------------------------------------------


def check_writable(
    context: click.Context | None, option: click.Parameter | None, path: str | None
) -> str | None:
    """Refuse, before the work, a file that could not be written after it, and -."""
    if path == "-":
        raise click.BadParameter("cannot write -: only --json writes to standard output")
    if path is not None:
        folder = Path(path).parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            wrong = "its folder is missing or write-protected"
            raise click.BadParameter(f"cannot write {path}: {wrong}")
    return path


def _check_json(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Refuse what `check_writable` refuses, but for standard output."""
    return path if path == "-" else check_writable(context, option, path)


json_option = option(
    "--json json_file",
    "Write the report to this file as one JSON object; - writes to standard output.",
    click.Path(dir_okay=False, writable=True, allow_dash=True),
    callback=_check_json,
    metavar="FILE",
)

markdown_option = option(
    "--markdown markdown_file",
    "Write the tables to this file as Markdown.",
    click.Path(dir_okay=False, writable=True),
    callback=check_writable,
    metavar="FILE",
)


def out_option(what: str, **settings: Any) -> Option:
    """Return the option that names the folder a command writes to, made if it is missing."""
    kind = click.Path(file_okay=False, path_type=Path)
    return option("--out folder", f"Write {what} to this folder.", kind, metavar="DIR", **settings)


RECORDS = Path(__file__).parents[1] / "records"
"""Records that the package brings along."""

records_option = option(
    "--records",
    "Folder with the recorded and published results.  [default: those of the package]",
    click.Path(path_type=Path, file_okay=False),
    default=RECORDS,
    show_default=False,
    metavar="DIR",
)


# -- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Values of the model options: which model, on which device, and how it is paged."""

    model: str | None
    random_weights: str | None
    device: str
    dtype: str
    seed: int
    config: PagedConfig
    revision: str | None = None

    def load(self) -> LoadedModel:
        """Load the model; see `granite_paged.models.load` for the errors.

        Exact mode then runs with one thread on a CPU: its calls are too small to share, and so its
        bits are those of any number of cores.
        """
        _quiet_libraries()
        from granite_paged.models import load

        loaded = load(
            self.model,
            random_weights=self.random_weights,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
            revision=self.revision,
        )
        if self.config.exact and loaded.model.device.type == "cpu":
            import torch

            torch.set_num_threads(1)
        return loaded

    def check_hub(self) -> None:
        """Raise CheckpointError now, before torch loads, if nothing can give the model."""
        if self.model is None or Path(self.model).exists():
            return
        from granite_paged.hub import looks_like_a_folder, reading_options

        if not looks_like_a_folder(self.model):
            reading_options(self.model, "config.json", self.revision)

    def require_gpu(self, command: str) -> None:
        """Raise CannotJudge, before the model is loaded, unless it would run on a GPU."""
        from granite_paged.bench.gate import no_gpu
        from granite_paged.device import resolve_device

        if resolve_device(self.device).type != "cuda":
            raise no_gpu(command)

    def arguments(self) -> list[str]:
        """Return the options that load the same model in another process."""
        given = {
            "--model": self.model,
            "--revision": self.revision,
            "--random-weights": self.random_weights,
            "--device": self.device,
            "--dtype": self.dtype,
            "--seed": self.seed,
            "--page-size": self.config.page_size,
            "--backend": self.config.backend,
        }
        pairs = [(name, str(value)) for name, value in given.items() if value is not None]
        return [text for pair in pairs for text in pair]


def _quiet_libraries() -> None:
    """Leave standard error to our own progress and errors."""
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FirstRetry())


class _FirstRetry(logging.Filter):
    """Says once, in one line, that the hub does not answer, in place of two lines per retry."""

    def __init__(self) -> None:
        super().__init__()
        self._said = False

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = "the hub does not answer: asking again for half a minute", ()
        said, self._said = self._said, True
        return not said


_MODEL_OPTIONS = options(
    option(
        "--model",
        "Load this checkpoint: a folder or a hub id.  [default: the embedded tiny-recall]",
        metavar="ID_OR_PATH",
    ),
    option("--revision", "Load this branch, tag or commit of a hub id.", metavar="NAME"),
    option(
        "--random-weights",
        "Use this published geometry with random weights, e.g. granite-4.0-h-1b.",
        metavar="NAME",
    ),
    option("--device", "Run on auto, cpu, cuda or cuda:N.", default="auto", metavar="DEVICE"),
    option(
        "--dtype",
        "Load weights as auto, float32, bfloat16, float16 or float64.",
        default="auto",
        metavar="DTYPE",
    ),
    option("--seed", "Seed random weights, prompts and sampling.", NATURAL, default=0),
    option(
        "--page-size",
        "Store this many tokens per page: a power of two, at least 16 on a GPU.  "
        "[default: 16 for the embedded model, else 128]",
        POSITIVE,
        metavar="TOKENS",
    ),
    option(
        "--memory-fraction",
        "Let K and V take at most this fraction of the free memory.",
        click.FloatRange(0, 1, min_open=True),
        default=0.5,
    ),
    option(
        "--max-tokens",
        "Fix the size of the page pool, instead of growing it on demand.",
        POSITIVE,
        metavar="TOKENS",
    ),
    option(
        "--backend",
        "Choose how attention runs: FlexAttention compiled, or SDPA over gathered pages.",
        click.Choice(["auto", "eager", "compiled"]),
        default="auto",
    ),
)


exact_option = option(
    "--exact",
    "Give each request the same bits whatever else runs: other requests, their number, chunks, "
    "cached prefixes, preemption. Slower, many times so on a CPU; what cannot be exact is refused.",
    is_flag=True,
)
"""For commands that make an engine: it becomes `ModelChoice.config.exact`."""


def model_options(command: Command) -> Command:
    """Add the options that choose a model; they reach the command as `choice: ModelChoice`."""

    @_MODEL_OPTIONS
    @functools.wraps(command)
    def with_choice(
        *, model: str | None, random_weights: str | None, page_size: int | None, **others: Any
    ) -> Any:
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's registrations
        from granite_paged.geometry import PagedConfig

        paging = {name: others.pop(name) for name in ("memory_fraction", "max_tokens", "backend")}
        paging["exact"] = others.pop("exact", False)
        if page_size is None and model is None and random_weights is None:
            page_size = _SMALL_PAGE
        if page_size is not None:
            paging["page_size"] = page_size
        where = {name: others.pop(name) for name in ("device", "dtype", "seed", "revision")}
        choice = ModelChoice(model, random_weights, **where, config=PagedConfig(**paging))
        if others.get("address") is None:  # without Ray, whose workers load the model
            choice.check_hub()
        return command(choice=choice, **others)

    return with_choice


# -- output -------------------------------------------------------------------------------------


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Let an interrupt of the block say what is kept and how to resume."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(kept())
        raise


def log_timer() -> Callable[[], bool]:
    """Return a function that says whether a line of progress is due: every half minute."""
    logged = time.monotonic()

    def is_due() -> bool:
        nonlocal logged
        if time.monotonic() - logged < LOG_SECONDS:
            return False
        logged = time.monotonic()
        return True

    return is_due


@contextmanager
def progress(title: str = "start", *, time_left: bool = False) -> Iterator[Progress]:
    """Yield a callback that draws a bar on a terminal, and elsewhere prints a line at times."""
    console = Console(stderr=True)
    if not console.is_terminal:
        is_due = log_timer()

        def log(description: str, done: int, total: int) -> None:
            if is_due():
                click.echo(f"{description}: {done} of {total}", err=True)

        yield log
        return
    columns = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    ]
    if time_left:
        columns += [bars.TextColumn("left"), bars.TimeRemainingColumn()]
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield report


def write_json(path: str | None, report: dict[str, Any]) -> None:
    """Write one JSON object to a file, if one is named; `-` is standard output.

    Raises CannotWrite.
    """
    if path is None:
        return
    if path == "-":
        click.echo(files.json_text(report, "standard output"), nl=False)
    else:
        files.write_json(path, report)


@contextmanager
def reporting(json_file: str | None, report: dict[str, Any]) -> Iterator[Console]:
    """Yield the console for tables, and write the JSON at the end of the block.

    The JSON is written even if the tables cannot be: the reader of a pipe may be gone.
    """
    try:
        yield report_console(json_file)
    finally:
        write_json(json_file, report)


def table_of(text: Sequence[str], numbers: Sequence[str], **settings: Any) -> Table:
    """Return an empty table: columns of text, then columns of numbers, aligned to the right."""
    table = Table(*(Column(name, no_wrap=True) for name in text), box=SIMPLE, **settings)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def report_console(json_file: str | None) -> Console:
    """Return the console for tables: standard error when standard output carries the JSON."""
    console = _ReportConsole(stderr=json_file == "-")
    if not console.is_terminal:
        console.width = max(console.width, _TABLE_WIDTH)
    return console


class _ReportConsole(Console):
    """Prints a table as a list where the terminal is narrower than the table."""

    def print(self, *objects: Any, **settings: Any) -> None:
        tables = (self._fitting(part) if isinstance(part, Table) else part for part in objects)
        super().print(*tables, **settings)

    def _fitting(self, table: Table) -> Table:
        boundless = self.options.update(width=_BOUNDLESS)
        needed = Measurement.get(self, boundless, _unbroken(table)).minimum
        return _as_list(table) if table.show_header and needed > self.width else table


def _unbroken(table: Table) -> Table:
    """Return the table with each cell that must not wrap as one word, as rich measures words."""
    whole = Table(box=table.box, padding=table.padding, pad_edge=table.pad_edge)
    columns = []
    for column in table.columns:
        texts = [str(cell) for cell in (column.header, *column.cells)]
        columns.append([text.replace(" ", "_") for text in texts] if column.no_wrap else texts)
    for header, *_ in columns:
        whole.add_column(header)
    for cells in zip(*(cells for _, *cells in columns), strict=True):
        whole.add_row(*cells)
    return whole


def _as_list(table: Table) -> Table:
    """Return a table of two columns, name and value, with an empty line between rows."""
    listed = Table(title=table.title, caption=table.caption, box=None, show_header=False)
    names = [column.header for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for name, cell in zip(names, cells, strict=True):
            listed.add_row(name, cell)
        listed.add_row()
    return listed
