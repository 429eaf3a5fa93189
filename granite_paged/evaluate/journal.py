"""Keep finished answers on disk, so that a run that was killed can resume.

The file has one JSON object per line, and every append is forced to disk. The first line identifies
the run, and each other line is a `JournalEntry`. If a crash cut the last line short, the next start
drops it and asks its question again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from granite_paged.errors import CannotWrite, DataError, writing

FORMAT = 1

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
    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    seconds: float = 0.0
    tokens: int = 0
    full: int = 0
    computed: int = 0
    reused: int = 0
    peak: int = 0
    refused: str = ""

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
        CannotWrite: if the file cannot be written.
    """

    def __init__(self, path: str | None, run: dict[str, Any]) -> None:
        self.path = path
        self.entries: dict[EntryKey, JournalEntry] = {}
        self._file: BinaryIO | None = None
        if path is not None:
            self._open(Path(path), json.loads(json.dumps(run)))

    def append(self, entries: Iterable[JournalEntry]) -> None:
        """Store entries. Raises CannotWrite if the disk fails; earlier entries are kept."""
        entries = list(entries)
        lines = "".join(json.dumps(asdict(entry), allow_nan=False) + "\n" for entry in entries)
        self._write(lines.encode())
        self.entries.update({entry.place: entry for entry in entries})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    # -- details --------------------------------------------------------------------------------

    def _open(self, path: Path, run: dict[str, Any]) -> None:
        with writing(path):
            path.touch()
            self._file = path.open("r+b", buffering=0)
            content = self._file.readall()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            row = _parsed(path, number, line)
            if number == 1:
                _check_same_run(path, row, run)
            else:
                entry = _entry(path, number, row)
                self.entries[entry.place] = entry
        self._file.seek(len(whole))
        self._file.truncate()
        if not lines:
            self._write((json.dumps({"format": FORMAT, "run": run}) + "\n").encode())

    def _write(self, content: bytes) -> None:
        if self._file is None:
            return
        end = self._file.tell()
        try:
            written = self._file.write(content)
            if written != len(content):  # a full disk may take only a part
                written += self._file.write(content[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.seek(end)
            self._file.truncate()
            raise CannotWrite(
                str(self.path),
                f"{error.strerror}; its {len(self.entries)} finished answers are kept: "
                "run the same command again to resume",
            ) from None


def held_run(path: str | None) -> dict[str, Any]:
    """Return the `run` that a journal's first line holds; empty if there is none."""
    try:
        with open(path or os.devnull, encoding="utf-8") as file:
            head = json.loads(file.readline() or "{}")
    except (OSError, ValueError):
        return {}
    run = head.get("run") if isinstance(head, dict) else None
    return run if isinstance(run, dict) else {}


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise DataError(str(path), "not a JSON object; name another --output", line=number)
    return row


def _check_same_run(path: Path, row: dict[str, Any], run: dict[str, Any]) -> None:
    if row.get("format") != FORMAT or not isinstance(row.get("run"), dict):
        raise DataError(str(path), "holds no answers of this program; name another --output")
    held: dict[str, Any] = row["run"]
    for name in {**held, **run}:
        if held.get(name) != run.get(name):
            raise DataError(
                str(path),
                f"holds answers of another run: {name} was {held.get(name)}, now "
                f"{run.get(name)}; name another --output, or remove the file",
            )


def _entry(path: Path, number: int, row: dict[str, Any]) -> JournalEntry:
    try:
        logprobs, greedy = tuple(row.pop("logprobs")), tuple(row.pop("greedy"))
        return JournalEntry(logprobs=logprobs, greedy=greedy, **row)
    except (KeyError, TypeError) as error:
        problem = f"no answer ({error}); name another --output, or remove the file"
        raise DataError(str(path), problem, line=number) from None
