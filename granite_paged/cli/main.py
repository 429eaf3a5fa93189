"""The command line: `granite-paged verify | generate | bench | eval` and more.

Exit status: 0 for success, 1 when a check failed, 2 for wrong usage or environment (explained in
one line), 130 when interrupted, 143 when terminated, 141 when the reader of standard output is gone
(as after `| head`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import click

from granite_paged import __version__
from granite_paged.cli.batch import batch
from granite_paged.cli.bench import bench, coldstart
from granite_paged.cli.evaluate import evaluate
from granite_paged.cli.gate import gate
from granite_paged.cli.generate import generate
from granite_paged.cli.options import (
    CLOSED_PIPE,
    INTERRUPTED,
    NOTHING_KEPT,
    OK,
    SETTINGS,
    TERMINATED,
    USAGE,
    CommandGroup,
)
from granite_paged.cli.profiling import profile
from granite_paged.cli.report import plot, report
from granite_paged.cli.termination import Termination, terminations_interrupt
from granite_paged.cli.tune import tune
from granite_paged.cli.verify import verify
from granite_paged.errors import GeometryError, GranitePagedError, PagingError

PROGRAM = "granite-paged"


def main() -> None:
    """Entry point of the `granite-paged` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; an error is one line on standard error."""
    with terminations_interrupt() as termination:
        return _run(arguments, termination)


def _run(arguments: Sequence[str], termination: Termination) -> int:
    try:
        status = cli.main(list(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        return _complain(error.format_message())
    except GranitePagedError as error:
        return _complain(_in_options(error))
    except (KeyboardInterrupt, click.Abort) as interrupt:  # click turns the one into the other
        kept = getattr(interrupt.__cause__ or interrupt, "__notes__", [NOTHING_KEPT])
        ended = "terminated" if termination.came else "interrupted"
        click.echo(f"{PROGRAM}: {ended}; {kept[0]}", err=True)
        return TERMINATED if termination.came else INTERRUPTED
    except SystemExit:  # here, click and rich exit only when the reader of our output is gone
        _discard_output()
        return CLOSED_PIPE
    except OSError as error:  # standard output is full
        _discard_output()
        return _complain(f"cannot write {error.filename or 'standard output'}: {error.strerror}")
    return status if isinstance(status, int) else OK


def _complain(message: str) -> int:
    click.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)
    return USAGE


def _in_options(error: GranitePagedError) -> str:
    """Return the message with the options that a user typed in place of fields of PagedConfig."""
    message = str(error)
    if not isinstance(error, (GeometryError, PagingError)):
        return message
    message = re.sub(r"\b(PagedConfig\.)?max_sequences\b", "the number of sequences", message)
    fields = r"\b(?:PagedConfig\.)?(page_size|memory_fraction|max_tokens)\b"
    return re.sub(fields, lambda field: f"--{field[1].replace('_', '-')}", message)


def _discard_output() -> None:
    """Drop what is left in the buffer, so that the interpreter can exit without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=CommandGroup, context_settings=SETTINGS)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Paged attention for IBM Granite-4 hybrid models.

    Start with `granite-paged verify`. It needs no download and checks that paging gives the same
    answers on this machine as transformers' own attention.
    """


for command in (
    verify,
    generate,
    batch,
    bench,
    coldstart,
    gate,
    tune,
    profile,
    plot,
    evaluate,
    report,
):
    cli.add_command(command)
