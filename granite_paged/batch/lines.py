"""Lines of an input file, read one by one.

A file of any length is read in bounded memory: lines are limited to `LONGEST` bytes, and the
`custom_id`s that were seen are kept in a temporary database on disk.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from granite_paged.errors import CannotWrite

LONGEST = 16 << 20
"""Most bytes of a line."""

WINDOW = 4096
"""Most lines in memory. A line that takes longer than this many others makes them wait."""

_SHOWN = 256  # bytes that are kept of a line that is too long
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: its number in the file, from 1; blank lines count.
        text: its bytes, without white space at both ends.
        data: its JSON object; empty if it has a problem.
        problem: why it is no request, or "".
        end: number of bytes of the file up to its end.
    """

    number: int
    text: bytes
    data: dict[str, Any]
    problem: str = ""
    end: int = 0

    @property
    def custom_id(self) -> str | None:
        """Return the caller's name for the request, if it is text."""
        found = self.data.get("custom_id")
        return found if isinstance(found, str) else None

    @property
    def digest(self) -> str:
        """Return a digest of number and text, which finds the line of an answer."""
        content = b"%d %b" % (self.number, self.text)
        return hashlib.blake2b(content, digest_size=8).hexdigest()


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """Yield every line of a file that is not blank. One that repeats a `custom_id` has a problem.

    Raises:
        CannotWrite: if the temporary database cannot grow.
    """
    return _without_repeats(_lines(stream))


def parsed(number: int, text: bytes, end: int = 0) -> Line:
    """Return a line with its JSON object, or with what is wrong with it."""
    try:
        data = json.loads(text)
    except RecursionError:
        return Line(number, text, {}, "it is nested too deeply", end)
    except json.JSONDecodeError as error:
        return Line(number, text, {}, f"it is not JSON: {error.msg} at column {error.colno}", end)
    except ValueError as error:  # bytes that are not UTF-8, or a number with too many digits
        return Line(number, text, {}, f"it is not JSON: {error}", end)
    if not isinstance(data, dict):
        return Line(number, text, {}, f"it must be a JSON object, got {text[:40]!r}", end)
    return Line(number, text, data, "", end)


def _lines(stream: BinaryIO) -> Iterator[Line]:
    number = end = 0
    while content := stream.readline(LONGEST):
        number += 1
        end += len(content)
        is_cut = len(content) == LONGEST and not content.endswith(b"\n")
        if number == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        if is_cut:
            end += _skip_line(stream)
            problem = f"it is longer than {LONGEST >> 20} MiB"
            yield Line(number, content[:_SHOWN], {}, problem, end)
        elif text := content.strip():
            yield parsed(number, text, end)


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of the line. Return the number of bytes."""
    skipped = 0
    while content := stream.readline(LONGEST):
        skipped += len(content)
        if content.endswith(b"\n"):
            break
    return skipped


def _without_repeats(lines: Iterable[Line]) -> Iterator[Line]:
    seen = sqlite3.connect("")  # a temporary file, of which a part is in memory
    seen.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")
    try:
        for line in lines:
            name = line.custom_id
            first = None if name is None else _first_with(seen, name, line.number)
            if first is None:
                yield line
            else:
                yield replace(line, problem=f"its custom_id {name!r} is that of line {first}")
    except sqlite3.Error as error:
        raise CannotWrite("the temporary database of custom_ids", str(error)) from None
    finally:
        seen.close()


def _first_with(seen: sqlite3.Connection, name: str, number: int) -> int | None:
    """Note an id. Return the number of an earlier line that has it, or None."""
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()
    if seen.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, number)).rowcount:
        return None
    (found,) = seen.execute("SELECT line FROM ids WHERE digest = ?", (digest,)).fetchone()
    return int(found)


def prefix_key(line: Line) -> str:
    """Return what lines are ordered by, so that prompts with a common beginning are neighbours."""
    body = line.data.get("body", line.data)
    if not isinstance(body, dict):
        return ""
    prompt = body.get("prompt") or body.get("messages")
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
