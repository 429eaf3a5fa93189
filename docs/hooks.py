"""MkDocs hooks: figures of golden/figures, and the help of every command.

Pages link a figure as `../golden/figures/...`, which works in the repository too. In the site the
figures are in `figures/`, copied at every build.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FIGURES = Path("golden/figures")
COMMANDS = "reference/commands.md"
WIDTH = 88


def on_files(files: Files, config: Any) -> Files:
    """Add every recorded figure to the site."""
    for path in sorted((ROOT / FIGURES).rglob("*.png")):
        uri = f"figures/{path.relative_to(ROOT / FIGURES).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Point links to figures at the copies in the site; add the commands to their page."""
    if page.file.src_uri == COMMANDS:
        return markdown + "".join(_sections())
    return markdown.replace(f"](../{FIGURES}/", "](figures/")


def _sections() -> Iterator[str]:
    sys.path.insert(0, str(ROOT))
    from granite_paged.cli.main import cli  # noqa: PLC0415  # imports no torch

    sizes = {"terminal_width": WIDTH, "max_content_width": WIDTH, **cli.context_settings}
    for name, command in _named("", cli):
        context = click.Context(command, info_name=f"granite-paged {name}", **sizes)
        yield f"\n## {name}\n\n```text\n{command.get_help(context)}\n```\n"


def _named(prefix: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """Every visible command with its full name, subcommands after their group."""
    for name, command in sorted(group.commands.items()):
        if not command.hidden:
            yield prefix + name, command
        if isinstance(command, click.Group):
            yield from _named(f"{prefix}{name} ", command)
