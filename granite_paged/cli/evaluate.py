"""The command `eval`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from granite_paged.cli.options import (
    FAILED,
    OK,
    SETTINGS,
    ModelChoice,
    check_writable,
    exact_option,
    json_option,
    keeping,
    model_options,
    options,
    out_option,
    progress,
    reporting,
)
from granite_paged.cli.ray import RayChoice, ray_options
from granite_paged.names import BASELINES
from granite_paged.report.formatting import gigabytes, significant

if TYPE_CHECKING:
    from granite_paged.evaluate.journal import Journal
    from granite_paged.evaluate.tasks import Task, TaskOptions
    from granite_paged.models import LoadedModel
    from granite_paged.report.bench_results import Result
    from granite_paged.report.eval_results import Agreement, Evaluation, ModeMetrics

_MODES = {
    "default": ("default",),
    "static": ("static",),
    "paged": ("paged",),
    "both": ("default", "paged"),
    "all": ("default", "static", "paged"),
}


def _names(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    """Split at commas."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _batch_size(context: click.Context, option: click.Parameter, value: str) -> int | None:
    """Return the number, or None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"must be auto or a number of at least 1, got {value!r}")
    return int(value)


_task_options = options(
    click.option(
        "--tasks",
        default="recall",
        callback=_names,
        metavar="A,B",
        help="Ask these: recall, mmlu, truthfulqa (truthfulqa_mc1 and truthfulqa_mc2).",
    ),
    click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        help="Put this many examples before each question of MMLU.  [default: 5]",
        show_default=False,
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        help="Ask at most this many questions per task; --seed draws them.",
    ),
    click.option(
        "--subjects",
        default="",
        callback=_names,
        metavar="A,B",
        help="Ask these subjects of MMLU.  [default: all]",
        show_default=False,
    ),
    click.option(
        "--data",
        metavar="DIR",
        type=click.Path(),
        help="Read mmlu_test.jsonl, mmlu_dev.jsonl and truthfulqa_mc.jsonl from this folder.  "
        "[default: the hub]",
        show_default=False,
    ),
    click.option(
        "--tokenizer", metavar="ID_OR_PATH", help="Use this tokenizer, for a model that has none."
    ),
)

_result_options = options(
    click.option(
        "--output",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        callback=check_writable,
        help="Keep finished answers in this file; the same command resumes from them.  "
        "[default: answers.jsonl in the --out folder]",
        show_default=False,
    ),
    out_option("results.json, report.md and figures"),
    click.option(
        "--bench",
        multiple=True,
        metavar="FILE",
        type=click.Path(),
        help="Draw the curves of this JSON of granite-paged bench too. May be repeated.",
    ),
    click.option("--wandb", "project", metavar="PROJECT", help="Log to Weights & Biases."),
    click.option(
        "--tensorboard",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="Log to TensorBoard, in this folder.",
    ),
)


@click.command("eval", context_settings=SETTINGS)
@click.option(
    "--mode",
    default="both",
    type=click.Choice(list(_MODES)),
    help="Answer with these modes; both means default and paged.",
)
@_task_options
@click.option(
    "--batch-size",
    "batch",
    default="1",
    callback=_batch_size,
    metavar="N|auto",
    help="Rows per forward pass; auto measures what is fastest for default.",
)
@_result_options
@model_options
@exact_option
@json_option
@ray_options
def evaluate(
    choice: ModelChoice,
    cluster: RayChoice | None,
    mode: str,
    tasks: tuple[str, ...],
    batch: int | None,
    json_file: str | None,
    output: str | None,
    folder: Path | None,
    bench: tuple[str, ...],
    project: str | None,
    tensorboard: str | None,
    **about_tasks: Any,
) -> int:
    """Compare answers, speed and memory on evaluation tasks.

    Asks each mode every question in the same run and compares accuracy, choices, latency,
    throughput and memory. Paged computes a context once, and what neighbouring questions share
    once. Exits with 1 when two modes differ by more than a near-tie, or when a mode gives NaN or
    infinity where `default` gives numbers. With --ray, the workers of a Ray cluster answer, and
    this process judges.

    \b
    granite-paged eval
    granite-paged eval --tasks mmlu,truthfulqa --model ibm-granite/granite-4.0-h-1b --out report
    granite-paged eval --tasks mmlu --num-fewshot 0 --limit 1000 --data DIR --batch-size auto
    """  # noqa: D301
    from granite_paged.evaluate.tasks import TaskOptions, check_data, make_task
    from granite_paged.report.bench_results import read_result

    outputs = _Outputs(output, folder, project, tensorboard)
    names = outputs.check(tasks)
    curves = [read_result(path) for path in bench]
    check_data(names, about_tasks["data"])
    loaded = choice.load()
    tokenizer = about_tasks.pop("tokenizer")
    loaded = _with_tokenizer(loaded, tokenizer)
    options = TaskOptions(**about_tasks, smallest=choice.config.page_size, seed=choice.seed)
    made = [make_task(name, options, loaded, loaded.tokenizer) for name in names]
    on_ray = _OnRay(cluster, choice, tokenizer, options) if cluster else None
    with _journal(outputs.journal, loaded, made, choice, _MODES[mode], batch) as journal:
        found = _run(loaded, made, choice, journal, on_ray)
        evaluation = replace(found, command=_command_line())
        try:
            with reporting(json_file, evaluation.to_json()) as console:
                _print(evaluation, console)
        finally:  # the reader of a pipe may be gone
            outputs.write(evaluation, curves)
    return OK if evaluation.passed else FAILED


# -- steps of eval ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Where results go besides the terminal: a journal, a report folder and trackers."""

    output: str | None
    folder: Path | None
    project: str | None
    tensorboard: str | None

    @property
    def journal(self) -> str | None:
        """Path of the journal; without `--output`, it is in the report folder."""
        return self.output or (str(self.folder / "answers.jsonl") if self.folder else None)

    def check(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse now what would fail after hours of work. Return the tasks' names."""
        from granite_paged.evaluate.tasks import task_names
        from granite_paged.report.eval_report import prepare_folder
        from granite_paged.report.tensorboard_run import writer_class
        from granite_paged.report.wandb_run import wandb_module

        names = task_names(tasks)
        if self.project:
            wandb_module()
        if self.tensorboard:
            writer_class()
        if self.folder:
            prepare_folder(self.folder)
        return names

    def write(self, evaluation: Evaluation, curves: list[Result]) -> None:
        """Write the report and log to the trackers."""
        figures: list[Path] = []
        if self.folder:
            from granite_paged.report.eval_report import write_report

            figures = write_report(self.folder, [evaluation], curves)
        if self.project:
            from granite_paged.report.wandb_run import log_to_wandb

            click.echo(f"wandb: {log_to_wandb(self.project, evaluation, figures)}", err=True)
        if self.tensorboard:
            from granite_paged.report.tensorboard_run import log_to_tensorboard

            log_to_tensorboard(self.tensorboard, evaluation, figures)


def _with_tokenizer(loaded: LoadedModel, tokenizer: str | None) -> LoadedModel:
    from granite_paged.models import load_tokenizer

    return replace(loaded, tokenizer=load_tokenizer(tokenizer)) if tokenizer else loaded


@dataclass(frozen=True, slots=True)
class _OnRay:
    """What workers need to answer the same questions."""

    cluster: RayChoice
    choice: ModelChoice
    tokenizer: str | None
    options: TaskOptions

    def answer(
        self, tasks: list[Task], modes: tuple[str, ...], batch: int, journal: Journal, report: Any
    ) -> None:
        """Let workers answer what the journal lacks."""
        with self.cluster.connected(self.choice, self.tokenizer) as (ray, spec, workers):
            from granite_paged.ray.evaluate import Questions, answer_questions

            names = tuple(task.name for task in tasks)
            asked = Questions(names, self.options, modes, batch, journal.run["weights"])
            answer_questions(ray, tasks, asked, spec, workers, journal, report)


@contextmanager
def _journal(
    path: str | None,
    loaded: LoadedModel,
    tasks: list[Task],
    choice: ModelChoice,
    modes: tuple[str, ...],
    batch: int | None,
) -> Iterator[Journal]:
    """Open the journal of this run. An interrupt says what it holds."""
    from granite_paged.evaluate.journal import Journal, held_run
    from granite_paged.evaluate.run import identity

    if batch is None:
        batch = held_run(path).get("batch size")
        if type(batch) is not int or batch < 1:
            batch = _find_batch(loaded, tasks, choice.seed)
    run = identity(loaded, tasks, modes, choice.config, batch)
    with closing(Journal(path, run)) as journal, keeping(lambda: journal.kept):
        yield journal


def _run(
    loaded: LoadedModel,
    tasks: list[Task],
    choice: ModelChoice,
    journal: Journal,
    on_ray: _OnRay | None,
) -> Evaluation:
    from granite_paged.evaluate.run import evaluate

    batch = journal.run["batch size"]
    modes = tuple(journal.run["modes"])
    with progress(time_left=True) as report_progress:
        if on_ray is not None:
            on_ray.answer(tasks, modes, batch, journal, report_progress)
        return evaluate(
            loaded,
            tasks,
            modes,
            config=choice.config,
            journal=journal,
            batch=batch,
            seed=choice.seed,
            progress=report_progress,
        )


def _find_batch(loaded: LoadedModel, tasks: list[Task], seed: int) -> int:
    from granite_paged.evaluate.batch_size import best_batch

    batch = best_batch(loaded.model, [q.request for task in tasks for q in task.questions], seed)
    click.echo(f"default is fastest with {batch} rows per forward pass", err=True)
    return batch


def _command_line() -> str:
    return shlex.join(["granite-paged", *sys.argv[1:]])


# -- tables -------------------------------------------------------------------------------------

_COLUMNS = ("accuracy", "mean ms", "p50 ms", "p99 ms", "question/s", "token/s", "GB", "hits")


def _print(evaluation: Evaluation, console: Console) -> None:
    """Print the tables, then what a reader must know to judge the numbers."""
    from granite_paged.environment import mamba_note
    from granite_paged.report.eval_report import chance_note
    from granite_paged.report.eval_results import entries

    console.print(*_tables(evaluation), sep="")
    baselines = any(mode in BASELINES for task in evaluation.tasks.values() for mode in task.modes)
    notes = [chance_note(entries([evaluation])), mamba_note() if baselines else ""]
    if baselines and evaluation.batch == 1:
        notes.append("note: one question per forward pass; default's fastest is --batch-size auto")
    for note in filter(None, notes):
        console.print(note.replace("`", ""), soft_wrap=True, markup=False)


def _tables(evaluation: Evaluation) -> list[Table]:
    where = f"{evaluation.model}, {evaluation.dtype}, {evaluation.device}"
    metrics = Table(title=where, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    if evaluation.device == "cpu":
        metrics.caption = "on a CPU, paged attention is dense, so its times say nothing about a GPU"
    metrics.add_column("task", no_wrap=True)
    metrics.add_column("mode", no_wrap=True)
    for column in _COLUMNS:
        metrics.add_column(column, justify="right", no_wrap=True)
    verdicts = Table(show_header=False, box=SIMPLE)
    for task, result in evaluation.tasks.items():
        for mode, found in result.modes.items():
            metrics.add_row(task, mode, *_numbers(found))
            if found.refused:
                verdicts.add_row(task, f"{mode}: {found.refused} questions refused", "")
        for mode, agreement in result.agreement.items():
            verdicts.add_row(task, *_verdict(mode, agreement))
    if not evaluation.passed:
        verdicts.add_row("verdict", "FAILED", "[red]FAILED[/]")
    return [metrics, verdicts] if verdicts.row_count else [metrics]


def _numbers(found: ModeMetrics) -> list[str]:
    times = (found.latency_mean_ms, found.latency_p50_ms, found.latency_p99_ms)
    return [
        f"{found.accuracy:.4f} ± {found.stderr or 0:.4f}",
        *map(significant, (*times, found.questions_per_second, found.tokens_per_second)),
        gigabytes(found.peak_bytes),
        f"{found.hit_rate:.1%}",
    ]


def _verdict(mode: str, found: Agreement) -> tuple[str, str]:
    same = f"{found.same} of {found.questions} choices equal default's"
    ties = f", {found.near_ties} of the others are near-ties" if found.differing else ""
    failed = f", {found.not_finite} answers are not finite" if found.not_finite else ""
    latency = found.latency_ratio
    ratio = "" if latency is None else f"; latency {latency:.3f} x default's"
    verdict = "[green]ok[/]" if found.passed else "[red]FAILED[/]"
    return f"{mode}: {same}{ties}{failed}{ratio}", verdict
