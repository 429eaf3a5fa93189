"""The command `tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    OK,
    SETTINGS,
    ModelChoice,
    check_writable,
    json_option,
    model_options,
    option,
    progress,
    reporting,
    write_json,
)
from granite_paged.names import SUBJECT_NAMES

if TYPE_CHECKING:
    from granite_paged.bench.tune import Outcome, Trial

_OWN_FILE = ""  # value of --write without a file


@click.command(context_settings=SETTINGS)
@model_options
@option(
    "--only subjects",
    "Tune only this subject; may be repeated.  [default: all]",
    click.Choice(SUBJECT_NAMES),
    multiple=True,
)
@option("--quick", "Try fewer candidates in fewer shapes.", is_flag=True)
@option(
    "--allow",
    "Accept constants that are at most this much slower than the best candidate.",
    click.FloatRange(min=0),
    default=10.0,
    metavar="PERCENT",
)
@option(
    "--write path",
    "Save the best constants in this file; without FILE, in the one that granite_paged reads.",
    click.Path(dir_okay=False, writable=True),
    is_flag=False,
    flag_value=_OWN_FILE,
    metavar="[FILE]",
)
@json_option
def tune(
    choice: ModelChoice,
    subjects: Sequence[str],
    quick: bool,
    allow: float,
    path: str | None,
    json_file: str | None,
) -> int:
    """Compare kernel constants with the best found on this GPU.

    \b
    decode     attention of a step: splits, blocks, warps
    prefill    attention of a prompt chunk: blocks, warps
    products   matrix products of 1, 16, 32, 64 sequences

    Times the constants in use and other candidates in shapes of the model, and prints how much
    slower the constants in use are than the best. --write saves, for each group of shapes, the
    candidate with the smallest worst-case loss; constants that were not timed stay unchanged.

    Exits with 1 when the constants in use, or the saved ones, lose more than --allow.

    \b
    granite-paged tune --random-weights granite-4.0-h-1b --dtype bfloat16 --quick
    granite-paged tune --random-weights granite-4.0-h-1b --only decode --json decode.json
    granite-paged tune --random-weights granite-4.0-h-1b --write
    """  # noqa: D301
    choice.require_gpu("tune")
    from granite_paged.bench.search_space import TuningTarget, environment, groups_of
    from granite_paged.bench.tune import retuned, sweep_all
    from granite_paged.layers.tuning import PATH, TUNED

    path = str(PATH) if path == _OWN_FILE else path
    check_writable(None, None, path)
    loaded = choice.load()
    target = TuningTarget(loaded.model, choice.config, seed=choice.seed)
    with progress() as report_progress:
        outcomes = sweep_all(groups_of(target, subjects, quick=quick), report_progress)
    where = environment(target)
    found = {**where, "groups": [outcome.to_json() for outcome in outcomes]}
    with reporting(json_file, found) as console:
        try:
            console.print(_table(f"{loaded.name}, {where['device']}", outcomes))
        finally:
            if path:
                write_json(path, retuned(TUNED, outcomes, where).to_json())
        if path:
            console.print(f"written: {path}", soft_wrap=True)
    lost = max((o.worst(o.chosen if path else 0) for o in outcomes), default=0.0)
    return OK if 100 * lost <= allow else FAILED


def _table(title: str, outcomes: Sequence[Outcome]) -> Table:
    skipped = sum(outcome.skipped for outcome in outcomes)
    table = Table("shape", title=title, box=SIMPLE, caption=f"{skipped} candidates did not run")
    for name in ("in use", "best found"):
        table.add_column(name)
    for name in ("µs", "best µs", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        for shape, (in_use, *_) in outcome.trials.items():
            best = outcome.best(shape)
            layouts = map(_layout, (in_use, best))
            times = (f"{trial.microseconds:,.2f}" for trial in (in_use, best))
            table.add_row(shape, *layouts, *times, f"{outcome.loss(shape):.1%}")
    return table


def _layout(trial: Trial) -> str:
    names = ((name.removeprefix("num_").lower(), n) for name, n in trial.layout.items())
    return ", ".join(f"{name} {n}" for name, n in names)
