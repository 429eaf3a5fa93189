"""The commands `plot` and `report`, which present results that are already measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from granite_paged.cli.options import (
    OK,
    SETTINGS,
    keeping,
    markdown_option,
    out_option,
    records_option,
)
from granite_paged.names import FIGURE_FORMATS

_KEPT = "finished files are kept; run the same command to write all"


@click.command(context_settings=SETTINGS)
@click.argument(
    "results",
    nargs=-1,
    required=True,
    metavar="RESULT.json...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@out_option("the figures")
@click.option(
    "--format",
    "form",
    default="png",
    type=click.Choice(FIGURE_FORMATS),
    help="Draw in this format.",
)
@markdown_option
@click.option(
    "--page",
    metavar="FILE",
    help="Also write the first result's tables, and all figures, between the bench comments of "
    "this Markdown page.",
)
@records_option
def plot(
    results: Sequence[Path],
    folder: Path | None,
    form: str,
    markdown_file: str | None,
    page: str | None,
    records: Path,
) -> int:
    """Draw benchmark results and write their tables.

    The figures show time and memory against batch and context, decode steps, and attention alone,
    with the floor. The original study's published curves are drawn in grey and labelled with their
    GPU. Several results share the figures. Reports of `bench serve` add tables, and no figures.

    \b
    granite-paged plot result.json --out golden/figures
    granite-paged plot before.json after.json --out figures --format svg
    granite-paged plot decode.json --markdown decode.md
    granite-paged plot result.json --out golden/figures --page docs/benchmarks.md
    """  # noqa: D301
    from granite_paged.bench.serve_results import is_serve, read_serve, serve_table
    from granite_paged.files import write_file
    from granite_paged.report.bench_figures import draw_all
    from granite_paged.report.bench_results import read_result, writable_folder
    from granite_paged.report.bench_tables import page_part, tables
    from granite_paged.report.markdown import image_links, put_between, split_at
    from granite_paged.report.published import read_published

    if folder is None and markdown_file is None:
        raise click.UsageError("nothing to write: pass --out DIR, --markdown FILE or both")
    if page is not None and (folder is None or form != "png"):
        raise click.UsageError("--page shows figures: pass --out DIR and leave --format at png")
    if page is not None:
        split_at(page, "bench")  # refuses a page without a place before anything is drawn
    served = [read_serve(path) for path in results if is_serve(path)]
    read = [read_result(path) for path in results if not is_serve(path)]
    if folder is not None and not read:
        raise click.UsageError("reports of `bench serve` have no figures: pass --markdown alone")
    with keeping(lambda: _KEPT):
        if markdown_file is not None:
            parts = filter(None, [tables(read), *map(serve_table, served)])
            write_file(markdown_file, "\n".join(parts))
            click.echo(markdown_file)
        drawn = []
        if folder is not None:
            drawn = draw_all(read, read_published(records), writable_folder(folder), form)
        for path in drawn:
            click.echo(path)
        if page is not None:
            put_between(page, "bench", page_part(read[0], image_links(page, drawn)))
    return OK


@click.command("report", context_settings=SETTINGS)
@click.argument("results", nargs=-1, required=True, type=click.Path())
@click.option(
    "--bench",
    multiple=True,
    metavar="FILE",
    type=click.Path(),
    help="Also draw this JSON file of granite-paged bench; may be repeated.",
)
@out_option("results.json, report.md and figures", default="report")
@click.option(
    "--page",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Also write tables and figures between the results comments of this Markdown page.",
)
def report(results: tuple[str, ...], bench: tuple[str, ...], folder: Path, page: str | None) -> int:
    """Write one report of several evaluations.

    RESULTS are files that `granite-paged eval --json` wrote.

    \b
    granite-paged report mmlu.json truthfulqa.json --out report
    granite-paged report golden/results/*.json --out out --page docs/evaluation.md
    """  # noqa: D301
    from granite_paged.report.bench_results import read_result
    from granite_paged.report.eval_report import update_page, write_report
    from granite_paged.report.eval_results import read_evaluation
    from granite_paged.report.markdown import split_at

    if page:
        split_at(page, "results")
    evaluations = [read_evaluation(path) for path in results]
    measured = [read_result(path) for path in bench]
    with keeping(lambda: _KEPT):
        figures = write_report(folder, evaluations, measured)
        if page:
            update_page(page, evaluations, measured, figures)
    click.echo(f"{folder}/report.md and {len(figures)} figures")
    return OK
