"""Read MMLU and TruthfulQA from JSONL files in a folder or from the hub, and check every row.

mmlu_test.jsonl, mmlu_dev.jsonl   subject, question, choices (4), answer (0 to 3)
truthfulqa_mc.jsonl               question, mc1_targets, mc2_targets (choices and labels each)
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from granite_paged.errors import DataError, MissingExtra
from granite_paged.hub import why_silent

DataRow = dict[str, Any]

MMLU_CHOICES = 4

_HUB = {
    "mmlu_test": ("cais/mmlu", "all", "test"),
    "mmlu_dev": ("cais/mmlu", "all", "dev"),
    "truthfulqa_mc": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
}


def mmlu(split: str, folder: str | None) -> list[DataRow]:
    """Return MMLU's `test` or `dev` split. Raises DataError, which names file, line and field."""
    return _rows(f"mmlu_{split}", folder, _check_mmlu)


def truthfulqa(folder: str | None) -> list[DataRow]:
    """Return TruthfulQA's multiple-choice questions. Raises DataError like `mmlu`."""
    return _rows("truthfulqa_mc", folder, _check_truthfulqa)


def _rows(name: str, folder: str | None, check: Callable[[DataRow], str]) -> list[DataRow]:
    """Read and check rows; `check` returns the problem of a row, or ""."""
    source, numbered = _from_hub(name) if folder is None else _from_file(name, folder)
    rows = []
    for line, row in numbered:
        problem = check(row)
        if problem:
            raise DataError(source, problem, line=line)
        rows.append(row)
    if not rows:
        raise DataError(source, "no rows: the file is empty")
    return rows


def _from_file(name: str, folder: str) -> tuple[str, Iterator[tuple[int, DataRow]]]:
    path = Path(folder) / f"{name}.jsonl"
    if not Path(folder).is_dir():
        raise DataError(folder, "no such folder; pass the folder of the JSONL files as --data")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(str(path), "not UTF-8 text", line=line) from None
    return str(path), _parsed(str(path), text)


def _parsed(source: str, text: str) -> Iterator[tuple[int, DataRow]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg} at column {error.colno}"
            raise DataError(source, problem, line=number) from None
        if not isinstance(row, dict):
            raise DataError(source, "not a JSON object; write one object per line", line=number)
        yield number, row


def _from_hub(name: str) -> tuple[str, Iterator[tuple[int, DataRow]]]:
    repository, subset, split = _HUB[name]
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MissingExtra("datasets", extra="eval") from None
    advice = "--data DIR reads JSONL files instead"
    if not constants.HF_HUB_OFFLINE and (silent := why_silent(repository, "dataset")):
        known = "HF_HUB_OFFLINE=1 reads what was downloaded before"
        raise DataError(repository, f"{silent}; {advice}, and {known}")
    try:
        rows = datasets.load_dataset(repository, subset, split=split)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(repository, f"cannot be loaded from the hub: {reason}; {advice}") from None
    return f"{repository} {split}", enumerate(map(dict, rows), start=1)


# -- checks ------------------------------------------------------------------------------------


def _check_mmlu(row: DataRow) -> str:
    for name in ("subject", "question"):
        if not isinstance(row.get(name), str):
            return _expected(row, name, "a text")
    choices = row.get("choices")
    if not _texts(choices) or len(choices) != MMLU_CHOICES:  # type: ignore[arg-type]
        return _expected(row, "choices", f"a list of {MMLU_CHOICES} texts")
    answer = row.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < MMLU_CHOICES:
        return _expected(row, "answer", f"a number from 0 to {MMLU_CHOICES - 1}")
    return ""


def _check_truthfulqa(row: DataRow) -> str:
    if not isinstance(row.get("question"), str):
        return _expected(row, "question", "a text")
    for name in ("mc1_targets", "mc2_targets"):
        targets = row.get(name)
        if not isinstance(targets, dict):
            return _expected(row, name, "an object of choices and labels")
        choices, labels = targets.get("choices"), targets.get("labels")
        if not _texts(choices) or not choices or not all(choices):
            return _expected(targets, "choices", "a list of texts", inside=name)
        if not _labels(labels, len(choices)):
            return _expected(targets, "labels", "a 0 or 1 for each choice", inside=name)
        right = sum(labels)  # type: ignore[arg-type]
        if right != 1 if name == "mc1_targets" else not right:
            return _expected(targets, "labels", "a right choice (one in mc1)", inside=name)
    return ""


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _labels(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(x in (0, 1) for x in value)


def _expected(row: DataRow, name: str, what: str, *, inside: str = "") -> str:
    field = f"field {f'{inside}.{name}' if inside else name!r}"
    if name not in row:
        return f"{field} is missing: {what} expected"
    shown = json.dumps(row[name], default=str)
    return f"{field} is {shown if len(shown) <= 40 else shown[:40] + '...'}: {what} expected"
