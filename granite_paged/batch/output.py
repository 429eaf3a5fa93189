"""The output file of a batch: whole lines, in the order of the input.

An answer's id holds a digest of the model and the settings, and one of the input line. So the file
itself shows where a run stopped, and whether it belongs to this input and this model. A kill can
leave a tail that is no JSON: it is removed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from granite_paged.append_file import AppendFile
from granite_paged.batch.answer import PREFIX, Answer
from granite_paged.batch.lines import Line
from granite_paged.errors import CannotWrite, DataError, writing

_SYNC_SECONDS = 5.0  # at most this much work is lost if the machine crashes


@dataclass(slots=True)
class Tally:
    """What an output file holds.

    Attributes:
        lines: number of lines.
        failed: number of those that hold an error.
        first_error: message of the first of those, or "".
        tokens: number of tokens of all answers.
        end: number of bytes of the input up to the last line's.
    """

    lines: int = 0
    failed: int = 0
    first_error: str = ""
    tokens: int = 0
    end: int = 0

    def add(self, line: Line, answer: Answer) -> None:
        """Count the answer of a line."""
        self.lines += 1
        self.end = line.end
        self.failed += bool(answer.error)
        self.first_error = self.first_error or answer.error
        self.tokens += answer.tokens


class BatchOutput:
    """The output of one batch.

    Args:
        path: the file, which may hold answers of the same batch; "-" is standard output. A device
            or a pipe is written, and not resumed.

    Attributes:
        tally: what it holds.

    Raises:
        CannotWrite: if the file cannot be written, or another run has it open.
    """

    def __init__(self, path: str) -> None:
        self.tally = Tally()
        self._path = path
        self._run: str | None = None
        self._synced = time.monotonic()
        self._file: AppendFile | None = None
        self._stream: BinaryIO | None = None
        self._standard = sys.stdout  # which may be redirected while answers are written
        if path != "-" and _is_stream(path):
            with writing(path):
                self._stream = open(path, "wb", buffering=0)  # noqa: SIM115
        elif path != "-":
            self._file = AppendFile(path, "output")

    def match(self, lines: Iterator[Line]) -> None:
        """Take from `lines` those that the file answers already, and remove a broken tail.

        Raises:
            DataError: if the file holds something else than answers of these lines.
        """
        if self._file is None:
            return
        end = 0
        with writing(self._path), open(self._path, "rb") as file:
            for number, content in enumerate(file, start=1):
                row = _row(content)
                if row is None:
                    self._check_tail(file, content, number)
                    break
                self._match(row, next(lines, None), number)
                end += len(content)
        self._file.cut(end)

    def check_run(self, run: str) -> None:
        """Check the model and the settings. Raises DataError if the file has those of others."""
        if self._run not in (None, run):
            raise DataError(
                self._path,
                "was written with another model, tokenizer or other settings; "
                "name another output, or remove it",
            )
        self._run = run

    def write(self, answers: Sequence[tuple[Line, Answer]]) -> None:
        """Append the answers of the next lines. Raises CannotWrite; earlier answers are kept."""
        if not answers:
            return
        content = b"".join(answer.content for _, answer in answers)
        if self._file is None:
            self._write_stream(content)
        else:
            now = time.monotonic()
            to_disk = now - self._synced > _SYNC_SECONDS
            self._synced = now if to_disk else self._synced
            self._file.append(content, kept=self.kept, to_disk=to_disk)
        for line, answer in answers:
            self.tally.add(line, answer)

    @property
    def kept(self) -> str:
        """What is kept of an interrupted run, and how to resume."""
        if self._file is None:
            return f"{self.tally.lines:,} lines written"
        return f"{self.tally.lines:,} lines kept in {self._path}; run the same command to resume"

    def close(self) -> None:
        """Close the file, which releases its lock."""
        if self._file is not None:
            self._file.close()
        if self._stream is not None:
            self._stream.close()

    # -- details --------------------------------------------------------------------------------

    def _write_stream(self, content: bytes) -> None:
        if self._stream is None:  # an OSError of standard output concerns the whole program
            self._standard.buffer.write(content)
            self._standard.buffer.flush()
            return
        try:
            self._stream.write(content)
        except OSError as error:
            raise CannotWrite(self._path, f"{error.strerror}; {self.kept}") from None

    def _match(self, row: dict[str, Any], line: Line | None, number: int) -> None:
        run, _, digest = row["id"].removeprefix(PREFIX).partition("_")
        if line is None:
            self._refuse("answers a line that the input does not have", number)
        elif digest != line.digest or row["custom_id"] != line.custom_id:
            self._refuse(f"does not answer line {line.number} of this input", number)
        elif self._run not in (None, run):
            self._refuse("was written with another model or other settings", number)
        else:
            self._run = run
            self.tally.add(line, _answer(row))

    def _refuse(self, problem: str, number: int) -> None:
        advice = "name another output, or remove the file"
        raise DataError(self._path, f"{problem}; {advice}", line=number)

    def _check_tail(self, file: BinaryIO, content: bytes, number: int) -> None:
        """Refuse to remove what a kill cannot have left, such as someone's own file."""
        begun = b'{"id": "' + PREFIX.encode()
        is_ours = begun.startswith(content[: len(begun)]) or content.startswith(begun)
        is_ours = is_ours or not content.strip(b"\0\n")
        if not is_ours or any(_row(later) is not None for later in file):
            self._refuse("is no answer of this program", number)


def _is_stream(path: str) -> bool:
    found = Path(path)
    return found.exists() and not found.is_file() and not found.is_dir()


def _row(content: bytes) -> dict[str, Any] | None:
    """Return a whole line's object if it is an answer, or None."""
    if not content.endswith(b"\n"):
        return None
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError, AttributeError):
        row = json.loads(content)
        if row["id"].startswith(PREFIX) and "custom_id" in row and _answer(row):
            return dict(row)
    return None


def _answer(row: dict[str, Any]) -> Answer:
    if row["error"]:
        return Answer(b"", error=str(row["error"]["message"]))
    return Answer(b"", int(row["response"]["body"]["usage"]["completion_tokens"]))
