"""Finished answers, one JSON line each, appended and forced to disk: what a killed run leaves.

The first line says which run it is; every other is a `Record`. A line that a crash cut short is
dropped at the next start, and its question asked again.
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

Key = tuple[str, str, str]
"""Mode, task and question."""


@dataclass(frozen=True)
class Record:
    """One mode's answer to one question.

    Attributes:
        mode, task, key: which.
        logprobs: of each choice; empty where the question was refused.
        seconds: the time of its batch, divided by the questions in it.
        tokens: of its context and continuations, each once.
        full: tokens that scoring without a cache runs.
        computed, reused: see `Answer`.
        peak: bytes of GPU memory at the worst, other modes' left out; 0 on the CPU.
        refused: why there is no answer, or nothing.
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
    def place(self) -> Key:
        """What it answers."""
        return self.mode, self.task, self.key


class Journal:
    """Answers of one run, in memory and, with a path, in a file.

    Args:
        path: the file; it may hold answers of the same run. None: memory only.
        run: what identifies the run, in plain types.

    Raises:
        DataError: a file of another run, or a broken one.
        CannotWrite: a file that cannot be written.
    """

    def __init__(self, path: str | None, run: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[Key, Record] = {}
        self._file: BinaryIO | None = None
        if path is not None:
            self._open(Path(path), json.loads(json.dumps(run)))

    def append(self, records: Iterable[Record]) -> None:
        """Keep them. Raises CannotWrite where the disk does not; what was kept before stays."""
        records = list(records)
        lines = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records)
        self._write(lines.encode())
        self.records.update({record.place: record for record in records})

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
                record = _record(path, number, row)
                self.records[record.place] = record
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
            if written != len(content):  # a disk that fills up takes a part
                written += self._file.write(content[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.seek(end)
            self._file.truncate()
            raise CannotWrite(
                str(self.path),
                f"{error.strerror}; its {len(self.records)} finished answers are kept: "
                "run the same command again to resume",
            ) from None


def held_run(path: str | None) -> dict[str, Any]:
    """The run that a file is of; empty where there is none yet."""
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


def _record(path: Path, number: int, row: dict[str, Any]) -> Record:
    try:
        logprobs, greedy = tuple(row.pop("logprobs")), tuple(row.pop("greedy"))
        return Record(logprobs=logprobs, greedy=greedy, **row)
    except (KeyError, TypeError) as error:
        problem = f"no answer ({error}); name another --output, or remove the file"
        raise DataError(str(path), problem, line=number) from None
