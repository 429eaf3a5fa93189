"""Keep finished answers on disk, so that a run that was killed can resume.

The file has one JSON object per line, and every append is forced to disk. The first line identifies
the run, and each other line is a `JournalEntry`. A crash can leave a tail that is no JSON: the next
start removes it and asks its questions again. A broken line before a whole one is refused. While a
journal is open, it holds a lock on its file, where the platform and the file system have locks.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from granite_paged.append_file import AppendFile
from granite_paged.errors import DataError, FileError
from granite_paged.typed_json import Signed, checked

FORMAT = 1

NOT_FINITE = "a log-likelihood is not a finite number; check the weights and the dtype"
"""What `refused` says of a question with a log-likelihood that is NaN or infinite."""

EntryKey = tuple[str, str, str]
"""Mode, task and question."""


@dataclass(frozen=True)
class JournalEntry:
    """One mode's answer to one question.

    Attributes:
        mode, task, key: the mode, the task, and the question within the task.
        logprobs: log-likelihood of each choice; empty if the question was refused.
        greedy: for each choice, whether greedy decoding would write it.
        seconds: time of the question's batch, divided by the number of its questions.
        tokens: number of tokens of the context and of all continuations.
        full: number of tokens that scoring without a cache runs.
        computed, reused: see `Answer`.
        peak: peak GPU memory in bytes, without that of other modes; 0 on the CPU.
        refused: reason why the question was not answered, or "".
    """

    mode: str
    task: str
    key: str
    logprobs: tuple[Signed, ...] = ()
    greedy: tuple[bool, ...] = ()
    seconds: float = 0.0
    tokens: int = 0
    full: int = 0
    computed: int = 0
    reused: int = 0
    peak: int = 0
    refused: str = ""

    @property
    def not_finite(self) -> bool:
        """Whether the question has no answer because a log-likelihood is not finite."""
        return self.refused == NOT_FINITE

    @property
    def place(self) -> EntryKey:
        """Key of this entry in `Journal.entries`."""
        return self.mode, self.task, self.key


class Journal:
    """Answers of one run, in memory and, with a path, in a file.

    Args:
        path: the file, which may already hold answers of the same run; None: memory only.
        run: what identifies the run, in plain types (see `evaluate.run.identity`).

    Raises:
        DataError: if the file is broken or belongs to another run.
        CannotWrite: if the file cannot be written, or another run has it open.
    """

    def __init__(self, path: str | None, run: dict[str, Any]) -> None:
        self.path = path
        self.run = run
        self.entries: dict[EntryKey, JournalEntry] = {}
        self._file: AppendFile | None = None
        if path is not None:
            try:
                self._open(path, json.loads(json.dumps(run)))
            except BaseException:
                self.close()
                raise

    def append(self, entries: Iterable[JournalEntry]) -> None:
        """Store entries. Raises CannotWrite if the disk fails; earlier entries are kept."""
        entries = list(entries)
        lines = "".join(json.dumps(asdict(entry), allow_nan=False) + "\n" for entry in entries)
        self._write(lines.encode())
        self.entries.update({entry.place: entry for entry in entries})

    @property
    def kept(self) -> str:
        """What is kept of an interrupted run, and how to resume."""
        if self.path is None:
            return "answers were not kept: name a file with --output to keep them"
        return f"{len(self.entries)} answers kept in {self.path}; run the same command to resume"

    def close(self) -> None:
        """Close the file, which releases its lock."""
        if self._file is not None:
            self._file.close()

    # -- details --------------------------------------------------------------------------------

    def _open(self, path: str, run: dict[str, Any]) -> None:
        self._file = AppendFile(path, "--output")
        content = self._file.content()
        lines = content.split(b"\n")
        rows = [_parsed(line) for line in lines]
        while rows and rows[-1] is None:  # the tail
            rows.pop()
        if not rows and not _cut_head(content):
            raise DataError(path, "not a JSON object; name another --output", line=1)
        for number, row in enumerate(rows, start=1):
            if row is None:
                problem = "not a JSON object; name another --output, or remove this line"
                raise DataError(path, problem, line=number)
            if number == 1:
                _check_same_run(path, row, run)
            else:
                entry = _entry(path, number, row)
                self.entries[entry.place] = entry
        whole = b"".join(line + b"\n" for line in lines[: len(rows)])
        self._file.cut(min(len(whole), len(content)))
        self._write(whole[len(content) :] if rows else _head(run))

    def _write(self, content: bytes) -> None:
        if self._file is not None:
            self._file.append(content, kept=self.kept)


def held_run(path: str | None) -> dict[str, Any]:
    """Return the `run` that a journal's first line holds; empty if there is none."""
    try:
        with open(path or os.devnull, encoding="utf-8") as file:
            head = json.loads(file.readline() or "{}")
    except (OSError, ValueError):
        return {}
    run = head.get("run") if isinstance(head, dict) else None
    return run if isinstance(run, dict) else {}


def _head(run: dict[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, "run": run}) + "\n").encode()


def _cut_head(content: bytes) -> bool:
    """Whether a crash may have left this of the first line; other content is someone's file."""
    head = b'{"format": '
    left = content.rstrip(b"\0")
    return b"\n" not in left and head.startswith(left[: len(head)])


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line's JSON object, or None."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        return row if isinstance(row, dict) else None
    return None


def _check_same_run(path: str, row: dict[str, Any], run: dict[str, Any]) -> None:
    if row.get("format") != FORMAT or not isinstance(row.get("run"), dict):
        raise DataError(path, "holds no answers of this program; name another --output")
    held: dict[str, Any] = row["run"]
    for name in {**held, **run}:
        if held.get(name) != run.get(name):
            raise DataError(
                path,
                f"holds answers of another run: {name} was {held.get(name, 'not recorded')}, now "
                f"{run.get(name, 'not recorded')}; name another --output, or remove the file",
            )


def _entry(path: str, number: int, row: dict[str, Any]) -> JournalEntry:
    def fail(field: str, problem: str) -> FileError:
        advice = "name another --output, or remove this line"
        return DataError(path, f"no answer: {field} {problem}; {advice}", line=number)

    entry: JournalEntry = checked(JournalEntry, row, fail, "")
    return entry
