"""Markdown: tables, and the generated part of a page between two comments."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import FileError
from granite_paged.files import write_file


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> str:
    """Return a table.

    left: number of leading columns that hold text; the others hold numbers, aligned to the right.
    """
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "".join(_line(cells) for cells in (head, rule, *rows))


def image_links(page: str | Path, images: Iterable[Path]) -> list[str]:
    """Return a link to each image, relative to the page."""
    at = Path(page).resolve().parent
    return [f"![{image.stem}]({os.path.relpath(image.resolve(), at)})" for image in images]


def put_between(page: str | Path, part: str, text: str) -> None:
    """Replace the text between `<!-- PART: start -->` and `<!-- PART: end -->` of a page.

    Raises:
        FileError: if the page cannot be read or has no such comments.
        CannotWrite: if the page cannot be written.
    """
    before, after = split_at(page, part)
    write_file(page, f"{before}\n{text}\n{after}")


def split_at(page: str | Path, part: str) -> tuple[str, str]:
    """Return a page up to and with its start comment, and from its end comment on.

    Raises FileError if the page cannot be read or has no such comments.
    """
    if Path(page).exists() and not Path(page).is_file():  # reading a device may never end
        raise FileError(str(page), "", "cannot be read: not a regular file")
    try:
        whole = Path(page).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(str(page), "", f"cannot be read: {reason}") from None
    start, end = f"<!-- {part}: start -->", f"<!-- {part}: end -->"
    before, found_start, rest = whole.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise FileError(str(page), "", f"has no place for {part}: add {start} and {end} to it")
    return before + start, end + after


def _line(cells: Iterable[Any]) -> str:
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(texts) + " |\n"
