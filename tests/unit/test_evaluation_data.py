"""Evaluation data is read unchanged, or refused with file, line and field."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.errors import DataError, MissingExtra
from granite_paged.evaluate import data
from tests.helpers.evaluation import MMLU, TARGETS, TRUTHFULQA, data_folder, write


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


def targets(**change: Any) -> dict[str, Any]:
    return {**TRUTHFULQA, "mc1_targets": {**TARGETS, **change}}


BAD_MMLU = {
    "no subject": (without(MMLU, "subject"), "field 'subject' is missing: a text expected"),
    "question": ({**MMLU, "question": 3}, "field 'question' is 3: a text expected"),
    "choices": ({**MMLU, "choices": ["a"]}, "field 'choices' is [\"a\"]: a list of 4 texts"),
    "choice": ({**MMLU, "choices": [1, 2, 3, 4]}, "a list of 4 texts expected"),
    "answer": ({**MMLU, "answer": 4}, "field 'answer' is 4: a number from 0 to 3 expected"),
    "letter": ({**MMLU, "answer": "B"}, "field 'answer' is \"B\": a number from 0 to 3"),
    "truth": ({**MMLU, "answer": True}, "field 'answer' is true"),
    "no JSON": ('{"subject": ', "not JSON"),
    "list": ("[1, 2]", "not a JSON object"),
}

BAD_TRUTHFULQA = {
    "question": (without(TRUTHFULQA, "question"), "field 'question' is missing"),
    "targets": ({**TRUTHFULQA, "mc2_targets": []}, "field 'mc2_targets' is []"),
    "choices": (targets(choices=[]), "field 'mc1_targets.choices' is []: a list of texts"),
    "labels": (targets(labels=[1]), "field 'mc1_targets.labels' is [1]: a 0 or 1 for each"),
    "no right one": (targets(labels=[0, 0]), "a right choice (one in mc1) expected"),
    "two right ones": (targets(labels=[1, 1]), "a right choice (one in mc1) expected"),
}


def refusal(read: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("bad", BAD_MMLU)
def test_an_error_names_the_bad_row_of_mmlu(bad: str, tmp_path: Path) -> None:
    row, reason = BAD_MMLU[bad]
    folder = write(tmp_path, "mmlu_test", MMLU, row)
    error = refusal(lambda: data.mmlu("test", folder))
    assert str(error).startswith(f"{tmp_path / 'mmlu_test.jsonl'}, line 2: ")
    assert reason in str(error)
    assert error.line == 2


@pytest.mark.parametrize("bad", BAD_TRUTHFULQA)
def test_an_error_names_the_bad_row_of_truthfulqa(bad: str, tmp_path: Path) -> None:
    row, reason = BAD_TRUTHFULQA[bad]
    folder = write(tmp_path, "truthfulqa_mc", TRUTHFULQA, "", row)
    error = refusal(lambda: data.truthfulqa(folder))
    assert str(error).startswith(f"{tmp_path / 'truthfulqa_mc.jsonl'}, line 3: ")
    assert reason in str(error)


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    assert data.mmlu("dev", write(tmp_path, "mmlu_dev", MMLU, "", MMLU)) == [MMLU, MMLU]
    assert data.truthfulqa(write(tmp_path, "truthfulqa_mc", TRUTHFULQA)) == [TRUTHFULQA]


def test_an_error_names_the_missing_data(tmp_path: Path) -> None:
    assert "no such folder" in str(refusal(lambda: data.mmlu("test", str(tmp_path / "no"))))
    assert "mmlu_test.jsonl: cannot be read: No such file" in str(
        refusal(lambda: data.mmlu("test", str(tmp_path)))
    )
    write(tmp_path, "mmlu_test")
    assert "no rows" in str(refusal(lambda: data.mmlu("test", str(tmp_path))))


def test_invalid_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    good = json.dumps(MMLU).encode()
    (tmp_path / "mmlu_test.jsonl").write_bytes(good + b"\n\xff\xfe\n")
    assert "line 2: not UTF-8 text" in str(refusal(lambda: data.mmlu("test", str(tmp_path))))


def test_without_datasets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="with its extra eval"):
        data.mmlu("test", None)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "why_silent", lambda *args: "")


def test_a_silent_hub_is_one_line_of_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    monkeypatch.setattr(data, "why_silent", lambda *args: "the hub does not answer")
    assert str(refusal(lambda: data.mmlu("test", None))) == (
        "cais/mmlu: the hub does not answer; --data DIR reads JSONL files instead, and "
        "HF_HUB_OFFLINE=1 reads what was downloaded before"
    )


@pytest.mark.usefixtures("answering")
def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    message = str(refusal(lambda: data.truthfulqa(None)))
    assert message.startswith("truthfulqa/truthful_qa: cannot be loaded from the hub: ")
    assert "Couldn't reach" in message
    assert message.endswith("--data DIR reads JSONL files instead")


@pytest.mark.usefixtures("answering")
def test_rows_from_the_hub_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"test": [MMLU], "dev": [MMLU, {**MMLU, "answer": 9}]}

    def load(repository: str, subset: str, split: str) -> Any:
        assert (repository, subset) == ("cais/mmlu", "all")
        return rows[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert data.mmlu("test", None) == [MMLU]
    assert "cais/mmlu dev, line 2: field 'answer'" in str(refusal(lambda: data.mmlu("dev", None)))


def test_the_real_data_is_complete() -> None:
    folder = data_folder()
    assert len(data.mmlu("test", folder)) == 14042
    assert len(data.mmlu("dev", folder)) == 285
    assert len(data.truthfulqa(folder)) == 817
