"""The journal keeps finished answers through crashes and full disks, and refuses other files."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from granite_paged import append_file
from granite_paged.errors import CannotWrite, DataError
from granite_paged.evaluate.journal import Journal, JournalEntry, held_run

RUN = {"model": "tiny", "modes": ["default"], "batch size": 4}

HEAD = json.dumps({"format": 1, "run": RUN}) + "\n"


def record(key: str, mode: str = "default") -> JournalEntry:
    return JournalEntry(
        mode, "mmlu", key, logprobs=(-1.0, -2.5), greedy=(True, False), seconds=0.25
    )


LINE = json.dumps(asdict(record("a"))) + "\n"


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


@pytest.mark.parametrize(
    "tail",
    [b'{"mode": "pa', b"\0" * 40, b"\0" * 40 + b"\n", b"\xff\xfe\n", '{"key": "é'.encode()[:-1]],
)
def test_a_broken_tail_is_removed(path: str, tail: bytes) -> None:
    written(path, "a")
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole + tail)
    journal = Journal(path, RUN)
    assert [key for _, _, key in journal.entries] == ["a"]
    assert Path(path).read_bytes() == whole


def test_a_missing_last_newline_is_added(path: str) -> None:
    written(path, "a", "b")
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-1])
    assert len(Journal(path, RUN).entries) == 2
    assert Path(path).read_bytes() == whole


@pytest.mark.parametrize("length", range(0, len(HEAD), 7))
def test_a_first_line_cut_short_is_written_again(path: str, length: int) -> None:
    Path(path).write_text(HEAD[:length])
    written(path)
    assert Path(path).read_text() == HEAD


def test_a_second_run_on_an_open_journal_is_refused(path: str) -> None:
    pytest.importorskip("fcntl")
    first = Journal(path, RUN)
    with pytest.raises(CannotWrite, match="another run keeps its answers there"):
        Journal(path, RUN)
    first.append([record("a")])
    first.close()
    assert len(Journal(path, RUN).entries) == 1


@pytest.mark.parametrize("locks", ["not on Windows", "not on this file system"])
def test_a_journal_works_without_locks(
    locks: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    if locks == "not on Windows":
        monkeypatch.setattr(append_file, "fcntl", None)
    else:
        refusal = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=refusal))
    written(path, "a")
    written(path, "b")
    first = Journal(path, RUN)
    assert [key for _, _, key in first.entries] == ["a", "b"]
    Journal(path, RUN)  # nothing keeps a second run out


def test_a_refused_journal_is_unlocked(path: str) -> None:
    written(path)
    with pytest.raises(DataError):
        Journal(path, {})
    Journal(path, RUN).close()


def test_an_answer_that_is_not_a_number_is_not_written(path: str) -> None:
    """Its line could not be read back."""
    journal = Journal(path, RUN)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append([record("a"), replace(record("b"), logprobs=(float("nan"),))])
    assert journal.entries == {}
    assert Path(path).read_text() == HEAD


def test_a_refused_question_counts_no_time_and_no_tokens() -> None:
    refused = JournalEntry("paged", "mmlu", "a", refused="too long")
    assert (refused.logprobs, refused.greedy, refused.seconds) == ((), (), 0)
    counts = (refused.tokens, refused.full, refused.computed, refused.reused, refused.peak)
    assert counts == (0, 0, 0, 0, 0)


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
        with pytest.raises(CannotWrite, match=r"No space left on device; 1 answers kept in"):
            journal.append([record("b")])
    assert Path(path).read_bytes() == before
    assert len(journal.entries) == 1
    journal.append([record("b")])
    journal.close()
    assert len(Journal(path, RUN).entries) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "other"}, "model was tiny, now other"),
        ({"seed": 3}, "seed was not recorded, now 3"),
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
        (json.dumps({"format": 2, "run": RUN}) + "\n", "holds no answers of this program"),
        (json.dumps({"format": 1, "run": [RUN]}) + "\n", "holds no answers of this program"),
        ("a diary without a newline", "line 1: not a JSON object"),
        (f"{HEAD}nonsense\n{LINE}", "line 2: not a JSON object"),
        (f"{HEAD}{LINE}\0\0\n{LINE}", "line 3: not a JSON object"),
        (f'{HEAD}{{"mode": "x"}}\n', "line 2: no answer: task is missing"),
        (f"{HEAD}{LINE.replace('-2.5', 'NaN')}", r"line 2: no answer: logprobs\[1\] must be"),
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
