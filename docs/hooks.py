"""MkDocs hook: pages link figures as `../golden/figures/...`, which works in the repository too.

In the site the figures live in `figures/`, copied from golden/figures at every build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FIGURES = Path("golden/figures")


def on_files(files: Files, config: Any) -> Files:
    """Add every recorded figure to the site."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / FIGURES).rglob("*.png")):
        uri = f"figures/{path.relative_to(root / FIGURES).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Point links to figures at the copies in the site."""
    return markdown.replace(f"](../{FIGURES}/", "](figures/")
