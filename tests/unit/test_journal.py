"""The journal keeps finished answers through crashes and full disks, and refuses other files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from granite_paged.errors import CannotWrite, DataError
from granite_paged.evaluate.journal import Journal, JournalEntry, held_run

RUN = {"model": "tiny", "modes": ["default"], "batch size": 4}

HEAD = json.dumps({"format": 1, "run": RUN}) + "\n"


def record(key: str, mode: str = "default") -> JournalEntry:
    return JournalEntry(
        mode, "mmlu", key, logprobs=(-1.0, -2.5), greedy=(True, False), seconds=0.25
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "answers.jsonl")


def written(path: str, *keys: str) -> None:
    journal = Journal(path, RUN)
    journal.append([record(key) for key in keys])
    journal.close()


def test_appended_records_are_read_back(path: str) -> None:
    written(path, "a", "b")
    assert list(Journal(path, RUN).entries.values()) == [record("a"), record("b")]


def test_a_truncated_last_line_is_dropped(path: str) -> None:
    written(path, "a", "b")
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-20])
    journal = Journal(path, RUN)
    assert [key for _, _, key in journal.entries] == ["a"]
    journal.append([record("b")])
    assert Path(path).read_bytes() == whole


def test_every_append_reaches_the_disk(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    written(path, "a")
    assert len(synced) == 2  # the head, and the answer


def test_a_full_disk_keeps_finished_answers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, RUN)
    journal.append([record("a")])
    before = Path(path).read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(CannotWrite, match=r"No space left on device; its 1 finished answers"):
            journal.append([record("b")])
    assert Path(path).read_bytes() == before
    assert len(journal.entries) == 1
    journal.append([record("b")])
    assert len(Journal(path, RUN).entries) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "other"}, "model was tiny, now other"),
        ({"seed": 3}, "seed was None, now 3"),
        ({"batch size": 8}, "batch size was 4, now 8"),
    ],
)
def test_a_journal_of_another_run_is_refused(
    path: str, change: dict[str, Any], reason: str
) -> None:
    written(path, "a")
    before = Path(path).read_bytes()
    with pytest.raises(DataError, match=reason):
        Journal(path, {**RUN, **change})
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("dear diary\n", "line 1: not a JSON object"),
        ("[1]\n", "line 1: not a JSON object"),
        ("{}\n", "holds no answers of this program"),
        (f"{HEAD}nonsense\n", "line 2: not a JSON object"),
        (f'{HEAD}{{"mode": "x"}}\n', "line 2: no answer"),
    ],
)
def test_a_file_that_is_not_a_journal_is_refused(path: str, content: str, reason: str) -> None:
    Path(path).write_text(content)
    with pytest.raises(DataError, match=reason):
        Journal(path, RUN)
    assert Path(path).read_text() == content


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="cannot write"):
        Journal(str(tmp_path / "no" / "such" / "folder"), RUN)


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, RUN)
    journal.append([record("a")])
    journal.close()
    assert list(tmp_path.iterdir()) == []
    assert len(journal.entries) == 1


def test_held_run_reads_the_run_of_a_journal(path: str) -> None:
    assert held_run(path) == held_run(None) == {}
    written(path)
    assert held_run(path) == RUN
