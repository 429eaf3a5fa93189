"""Parts of a Markdown page that a command writes, between two comments: never typed by hand."""

from __future__ import annotations

from pathlib import Path

from granite_paged.errors import DataError


def put_between(page: str, part: str, text: str) -> None:
    """Replace what stands between `<!-- PART: start -->` and `<!-- PART: end -->`.

    Raises:
        DataError: where the page cannot be read, or has no such comments.
    """
    try:
        whole = Path(page).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(page, f"cannot be read: {error.strerror}") from None
    opens, closes = f"<!-- {part}: start -->", f"<!-- {part}: end -->"
    before, start, rest = whole.partition(opens)
    _, end, after = rest.partition(closes)
    if not start or not end:
        raise DataError(page, f"no place for {part}: put {opens} and {closes} where they belong")
    Path(page).write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
